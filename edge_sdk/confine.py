"""Put a child process under a memory limit, and tell afterwards whether the kernel killed it.

Two limits are laid on one another. A cgroup of its own, where this process may make one, bounds all
the kernel charges to the child, and counts its kills. RLIMIT_DATA bounds what it may map, so that
torch is refused an allocation, which costs a plan, before the kernel kills, which costs a process;
the limit on the address space would not do: torch reserves three times what it uses.
"""

from __future__ import annotations

import itertools
import os
import re
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edge_sdk.memory import CGROUP, PROC, read, read_number
from edge_sdk.process import process_data_bytes, process_rss_bytes

# A thread's stack counts whole although a page or two of it is used.
STACK_BYTES = 8 << 20
# Where the agent itself goes in a subtree that was delegated to it: version 2 allows processes
# only in groups without children.
LEAF = "edge-sdk-agent"

_NAME = re.compile(r"edge-sdk-(\d+)-\d+\Z")
_numbers = itertools.count(1)


class _NotPermitted(Exception):
    """No group can be made here, and why."""


class _Group:
    """One memory cgroup of ours; ``version`` is that of the hierarchy it lies in."""

    def __init__(self, version: int, directory: Path) -> None:
        self.version, self.directory = version, directory

    def add(self, pid: int) -> None:
        """Move a process in; what it holds already stays charged where it was."""
        (self.directory / "cgroup.procs").write_text(str(pid))

    def limit(self, limit_bytes: int) -> None:
        """What is charged to the group may not exceed this; never less than it holds now."""
        used = "memory.usage_in_bytes" if self.version == 1 else "memory.current"
        file = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        # Below its present use the kernel would kill at once, and an idle process at that.
        least_bytes = read_number(self.directory / used) or 0
        with suppress(OSError):  # version 1 refuses what it cannot reach: the old limit stays
            (self.directory / file).write_text(str(max(limit_bytes, least_bytes)))

    def kills(self) -> int:
        """How many of its processes the kernel killed for memory, anybody's memory."""
        file = "memory.oom_control" if self.version == 1 else "memory.events"
        found = re.search(r"^oom_kill (\d+)$", read(self.directory / file) or "", re.MULTILINE)
        return int(found[1]) if found else 0


class Confinement:
    """The memory limit of one process, in force from ``limit`` until it ends.

    ``how`` names the means, for people; ``why_no_group`` says what is in the way of a cgroup.
    """

    def __init__(
        self,
        pid: int,
        *,
        grouped: bool = True,
        proc_root: Path = PROC,
        cgroup_root: Path = CGROUP,
    ) -> None:
        """``grouped=False`` leaves the process in the cgroup it is in."""
        self._pid, self._proc_root = pid, proc_root
        self._group: _Group | None = None
        self._kills_before = _machine_kills(proc_root)
        self.why_no_group = "" if grouped else "not asked for"
        if grouped:
            try:
                self._group = _made(pid, proc_root, cgroup_root)
            except (_NotPermitted, OSError) as error:
                self.why_no_group = str(error)
        means = [f"cgroup v{self._group.version}"] if self._group is not None else []
        self.how = " and ".join(means + ["RLIMIT_DATA"] * _can_set_limits(pid)) or "nothing"

    def limit(self, budget_bytes: int) -> None:
        """From now on the process may have so much resident memory."""
        if self._group is not None:
            self._group.limit(budget_bytes)
        room_bytes = max(0, budget_bytes - process_rss_bytes(self._pid, proc_root=self._proc_root))
        data_bytes = process_data_bytes(self._pid, proc_root=self._proc_root)
        if data_bytes:
            _limit_data(self._pid, data_bytes + room_bytes + STACK_BYTES)

    def killed_for_memory(self, exit_code: int | None) -> bool:
        """After its end: whether the kernel killed it because memory ran out.

        Without a group of its own the machine's count of such kills stands in; ``exit_code`` is
        None for a process that is no child of ours.
        """
        if exit_code not in (None, -9):
            return False
        if self._group is not None:
            return self._group.kills() > 0
        return _machine_kills(self._proc_root) > self._kills_before

    def release(self) -> None:
        """After its end: remove the group."""
        if self._group is not None:
            with suppress(OSError):  # one that is still occupied is swept by the next start
                self._group.directory.rmdir()


def sweep_groups(*, proc_root: Path = PROC, cgroup_root: Path = CGROUP) -> int:
    """Remove the empty groups of processes that are gone, and of this one; returns how many."""
    removed = 0
    for _, home in homes(proc_root, cgroup_root):
        with suppress(OSError):
            for directory in list(home.iterdir()):
                owner = _NAME.match(directory.name)
                if owner and (int(owner[1]) == os.getpid() or not _lives(owner[1], proc_root)):
                    with suppress(OSError):
                        directory.rmdir()
                        removed += 1
    return removed


def _made(pid: int, proc_root: Path, cgroup_root: Path) -> _Group:
    """A new group with this process in it."""
    sweep_groups(proc_root=proc_root, cgroup_root=cgroup_root)
    reasons = []
    for version, home in homes(proc_root, cgroup_root):
        group = _Group(version, home / f"edge-sdk-{os.getpid()}-{next(_numbers)}")
        try:
            if version == 2:
                open_for_children(home)
            group.directory.mkdir()
            group.add(pid)
        except (_NotPermitted, OSError) as error:
            with suppress(OSError):
                group.directory.rmdir()
            reasons.append(str(error))
        else:
            return group
    raise _NotPermitted("; ".join(reasons) or "this process is in no memory cgroup it can see")


def homes(proc_root: Path, cgroup_root: Path) -> Iterator[tuple[int, Path]]:
    """Version and directory of the groups below which this process may hope to make its own."""
    for line in (read(proc_root / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        version, mounts = 0, [cgroup_root]
        if "memory" in controllers.split(","):
            version, mounts = 1, [cgroup_root / "memory"]
        elif number == "0" and not controllers:
            version, mounts = 2, [cgroup_root, cgroup_root / "unified"]
        # In a container the path is the host's, and the mount shows the container's own group.
        for directory in {m / group.lstrip("/"): 0 for m in mounts} | dict.fromkeys(mounts, 0):
            if version and os.getpid() in _members(directory):
                yield version, directory.parent if directory.name == LEAF else directory


def open_for_children(home: Path) -> None:
    """Let groups below ``home`` have limits on memory; this process moves out of its way."""
    if "memory" in (read(home / "cgroup.subtree_control") or "").split():
        return
    if "memory" not in (read(home / "cgroup.controllers") or "").split():
        raise _NotPermitted(f"{home} has no memory controller")
    others = _members(home) - {os.getpid()}
    if others:
        raise _NotPermitted(f"{home} is not ours alone: {len(others)} other processes are in it")
    leaf = home / LEAF
    leaf.mkdir(exist_ok=True)
    (leaf / "cgroup.procs").write_text(str(os.getpid()))
    try:
        (home / "cgroup.subtree_control").write_text("+memory")
    except OSError:
        (home / "cgroup.procs").write_text(str(os.getpid()))
        with suppress(OSError):
            leaf.rmdir()
        raise


def _members(directory: Path) -> set[int]:
    """Ids of the processes in a group; none where it cannot be read."""
    return {int(word) for word in (read(directory / "cgroup.procs") or "").split()}


def _lives(pid: str, proc_root: Path) -> bool:
    return (proc_root / pid).is_dir()


def _machine_kills(proc_root: Path) -> int:
    """Processes the kernel killed for memory since it started, on the whole machine."""
    found = re.search(r"^oom_kill (\d+)$", read(proc_root / "vmstat") or "", re.MULTILINE)
    return int(found[1]) if found else 0


def _can_set_limits(pid: int) -> bool:
    try:
        resource.prlimit(pid, resource.RLIMIT_DATA)
    except (AttributeError, OSError):  # not Linux, or not our process
        return False
    return True


def _limit_data(pid: int, limit_bytes: int) -> None:
    """The soft limit only, so that the next plan may have more."""
    with suppress(AttributeError, OSError, ValueError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_DATA)
        soft = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
        resource.prlimit(pid, resource.RLIMIT_DATA, (soft, hard))

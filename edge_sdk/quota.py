"""Give a child process a share of the processor, as a slower board would.

A cgroup's quota can be any share of a core. Where none can be had, the process is kept to whole
cores, which says less about a slow board and is said.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from edge_sdk.memory import CGROUP, PROC, read

# The kernel's own period: short against a training step on a board slow enough to be emulated.
PERIOD_US = 100_000
# Below that even a tiny step takes longer than anybody waits.
LEAST_CORES = 0.05

_NAME = re.compile(r"edge-sdk-(\d+)-\d+\Z")
_numbers = itertools.count(1)


class CpuQuota:
    """The processor time of one process, limited from ``limit`` until it ends.

    ``cores`` is how many it has, 0 without a limit; ``how`` names the means, for people;
    ``why_no_group`` says what is in the way of a cgroup.
    """

    def __init__(self, pid: int, *, proc_root: Path = PROC, cgroup_root: Path = CGROUP) -> None:
        self._pid, self._proc_root, self._cgroup_root = pid, proc_root, cgroup_root
        self._made: Path | None = None
        self.cores, self.how, self.why_no_group = 0.0, "nothing", ""

    def limit(self, cores: float) -> None:
        """Let the process use so many cores, or as near as can be."""
        quota_us = max(1000, round(cores * PERIOD_US))
        reasons = []
        for version, directory in self._groups():
            try:
                if version == 1:
                    self._limit_v1(directory, quota_us)
                else:
                    _limit_v2(directory, quota_us)
            except OSError as error:
                reasons.append(f"{error.filename or directory}: {error.strerror}")
                continue
            self.cores, self.how = quota_us / PERIOD_US, f"cgroup v{version} CPU quota"
            return
        self.why_no_group = "; ".join(reasons) or "this process is in no CPU cgroup it can see"
        self._keep_to_cores(math.ceil(cores))

    def release(self) -> None:
        """After the end of the process: remove the group."""
        if self._made is not None:
            with suppress(OSError):  # still occupied by what the process started
                self._made.rmdir()

    def _groups(self) -> Iterator[tuple[int, Path]]:
        """Version 1: where a group can be made. Version 2: the process's own group."""
        for line in (read(self._proc_root / str(self._pid) / "cgroup") or "").splitlines():
            number, _, rest = line.partition(":")
            controllers, _, group = rest.partition(":")
            version, mounts = 0, [self._cgroup_root]
            if "cpu" in controllers.split(","):
                version, mounts = 1, [self._cgroup_root / name for name in ("cpu", controllers)]
            elif number == "0" and not controllers:
                version, mounts = 2, [self._cgroup_root, self._cgroup_root / "unified"]
            # In a container the path is the host's, and the mount shows the container's own group.
            inside = group.lstrip("/")
            for directory in dict.fromkeys([m / inside for m in mounts] + mounts):
                if version and self._pid in _members(directory):
                    yield version, directory

    def _limit_v1(self, home: Path, quota_us: int) -> None:
        """In a group of its own, made below the one the process is in."""
        if self._made is None:
            _sweep(home, self._proc_root)
            directory = home / f"edge-sdk-{os.getpid()}-{next(_numbers)}"
            directory.mkdir()
            self._made = directory
        (self._made / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (self._made / "cpu.cfs_quota_us").write_text(str(quota_us))
        (self._made / "cgroup.procs").write_text(str(self._pid))

    def _keep_to_cores(self, cores: int) -> None:
        """Every thread on the same few of the cores it may use now."""
        try:
            allowed = sorted(os.sched_getaffinity(self._pid))[: max(1, cores)]
            for thread in (self._proc_root / str(self._pid) / "task").iterdir():
                os.sched_setaffinity(int(thread.name), allowed)
        except (AttributeError, OSError, ValueError):  # not Linux, or not our process
            return
        self.cores, self.how = float(len(allowed)), "affinity, whole cores only"


def _limit_v2(directory: Path, quota_us: int) -> None:
    """On the group the process is in, if it was made for it."""
    if not _NAME.match(directory.name):
        raise OSError(1, "the process has no cgroup of its own", str(directory))
    control = directory.parent / "cgroup.subtree_control"
    if "cpu" not in (read(control) or "").split():
        control.write_text("+cpu")
    (directory / "cpu.max").write_text(f"{quota_us} {PERIOD_US}")


def _sweep(home: Path, proc_root: Path) -> None:
    """Remove the empty groups that processes left which were killed."""
    for directory in list(home.iterdir()):
        owner = _NAME.match(directory.name)
        if owner and not (proc_root / owner[1]).is_dir():
            with suppress(OSError):
                directory.rmdir()


def _members(directory: Path) -> set[int]:
    """Ids of the processes in a group; none where it cannot be read."""
    return {int(word) for word in (read(directory / "cgroup.procs") or "").split()}

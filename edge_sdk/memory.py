"""Memory this machine has left: the kernel's own figures and the limits of cgroups.

Nothing is guessed: a figure that cannot be read is ``None``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

# glibc keeps freed memory in arenas unless told otherwise: up to a fifth of the peak that no cost
# model can predict. With thresholds of 256 KiB tensors go back to the system at once. What
# trains and what measures for it start alike.
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
    "MALLOC_ARENA_MAX": "2",
}

_MEMINFO_KEYS = {"total": "MemTotal", "available": "MemAvailable", "swap": "SwapTotal"}
_MAX_KERNEL_FILE_BYTES = 1024 * 1024
# The kernel's "no limit" of cgroup v1 is the largest page-aligned 63-bit number.
_V1_NO_LIMIT_BYTES = 2**62
# Usage, the part of memory.stat that is reclaimable, and the limits. Above memory.high a process
# crawls, so it counts as a limit.
_CGROUP_FILES = {
    1: ("memory.usage_in_bytes", "total_inactive_file", ("memory.limit_in_bytes",)),
    2: ("memory.current", "inactive_file", ("memory.max", "memory.high")),
}


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The memory limit of the cgroup, of this one and its parents, that leaves least.

    free_bytes: limit less what is used and cannot be reclaimed; ``None`` if usage is unreadable.
    source:     the file that holds the limit.
    """

    version: int
    limit_bytes: int
    used_bytes: int | None
    free_bytes: int | None
    source: str

    @property
    def usable_bytes(self) -> int:
        """What the group still gives, or its bare limit where usage is unreadable."""
        return self.limit_bytes if self.free_bytes is None else self.free_bytes


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of this machine in bytes; ``None`` where the system does not say.

    Swap, and zram counted as swap, is reported only: it is no memory to train in. ``unified``:
    a GPU takes its memory from here too, so that what is available shrinks when it works.
    """

    total_bytes: int | None
    available_bytes: int | None
    swap_bytes: int | None
    zram_bytes: int | None
    cgroup: CgroupMemory | None
    sources: dict[str, str]
    unified: bool = False

    @property
    def cgroup_free_bytes(self) -> int | None:
        """What the tightest cgroup still gives; ``None`` without a limit."""
        return self.cgroup.usable_bytes if self.cgroup else None

    @property
    def usable_bytes(self) -> int | None:
        """The least of what is available and what the cgroup leaves."""
        known = [self.available_bytes, self.cgroup_free_bytes]
        return min((value for value in known if value is not None), default=None)


def available_memory(*, proc_root: Path = PROC, cgroup_root: Path = CGROUP) -> Memory:
    """What one process can have now: the machine's free memory and the cgroup's."""
    values = _meminfo(proc_root)
    sources = {
        f"{name}_bytes": f"{proc_root / 'meminfo'} {key}"
        for name, key in _MEMINFO_KEYS.items()
        if key in values
    }
    if proc_root == PROC and not values:
        values, source = _without_meminfo()
        sources = {"total_bytes": source, "available_bytes": source} if values else {}
    cgroup, zram_bytes = _cgroup_memory(proc_root, cgroup_root), _zram_bytes(proc_root)
    if cgroup is not None:
        sources["cgroup"] = cgroup.source
    if zram_bytes is not None:
        sources["zram_bytes"] = str(proc_root / "swaps")
    total_bytes, available_bytes, swap_bytes = (values.get(k) for k in _MEMINFO_KEYS.values())
    return Memory(
        total_bytes, available_bytes, swap_bytes, zram_bytes, cgroup, sources, is_tegra(proc_root)
    )


def read(path: Path) -> str | None:
    """Text of a small kernel file; ``None`` if it is not there or not ours to read."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KERNEL_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def read_number(path: Path) -> int | None:
    """A file that holds one number; ``None`` for anything else, such as "max"."""
    text = (read(path) or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def is_tegra(proc_root: Path = PROC) -> bool:
    """Whether this is a Jetson: one memory for processor and GPU."""
    return "nvidia,tegra" in (read(proc_root / "device-tree" / "compatible") or "")


def _without_meminfo() -> tuple[dict[str, int], str]:
    """Where /proc is not Linux's, or is hidden: what the system's own calls say."""
    if sys.platform != "linux":
        import psutil

        physical = psutil.virtual_memory()
        return {"MemTotal": physical.total, "MemAvailable": physical.available}, "psutil"
    try:
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        # Free without the page cache: less than could be had, never more.
        pages = {"MemTotal": "SC_PHYS_PAGES", "MemAvailable": "SC_AVPHYS_PAGES"}
        return {key: os.sysconf(name) * page_bytes for key, name in pages.items()}, "sysconf"
    except (OSError, ValueError):
        return {}, ""


def _meminfo(proc_root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = re.findall(r"^(\w+): +(\d+) kB$", read(proc_root / "meminfo") or "", re.MULTILINE)
    return {key: int(value) * 1024 for key, value in found}


def _zram_bytes(proc_root: Path) -> int | None:
    """Swap that lies compressed in RAM; ``None`` if the kernel lists no swap at all."""
    text = read(proc_root / "swaps")
    if text is None:
        return None
    sizes = re.findall(r"^\S*zram\d+\s+\w+\s+(\d+)\s", text, re.MULTILINE)
    return sum(int(size) * 1024 for size in sizes)


def memory_groups(proc_root: Path = PROC, cgroup_root: Path = CGROUP) -> Iterator[tuple[int, Path]]:
    """Version and directory of this process's memory cgroups, each followed by its parents."""
    for line in (read(proc_root / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if "memory" in controllers.split(","):
            yield from ((1, path) for path in _groups(cgroup_root / "memory", group))
        elif number == "0" and not controllers:
            for mount in (cgroup_root, cgroup_root / "unified"):  # the second on hybrid systems
                yield from ((2, path) for path in _groups(mount, group))


def _cgroup_memory(proc_root: Path, cgroup_root: Path) -> CgroupMemory | None:
    """The tightest limit among this process's memory cgroups and their parents."""
    limits = [
        limit
        for version, directory in memory_groups(proc_root, cgroup_root)
        for limit in _limits(version, directory)
    ]
    return min(limits, key=lambda limit: limit.usable_bytes, default=None)


def _groups(mount: Path, group: str) -> Iterator[Path]:
    """The group's directory and its parents; last the mount, in a container its own group."""
    # A path with ".." leads out of the container; what it names is not visible from here.
    parts = [] if ".." in group.split("/") else [part for part in group.split("/") if part]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _limits(version: int, directory: Path) -> Iterator[CgroupMemory]:
    """Every limit that holds for a group, with what it leaves."""
    usage_file, reclaimable, limit_files = _CGROUP_FILES[version]
    stat = _stat(directory)
    usage = read_number(directory / usage_file)
    # Page cache that the kernel gives back on demand is not used up.
    used_bytes = None if usage is None else max(0, usage - stat.get(reclaimable, 0))
    limits = {str(directory / file): read_number(directory / file) for file in limit_files}
    # Version 1 only. The least limit of all parents, also of those a container does not see;
    # what their other groups use stays unknown, so free is then the most it can be.
    inherited = "hierarchical_memory_limit"
    limits[f"{directory / 'memory.stat'} {inherited}"] = stat.get(inherited)
    for source, limit in limits.items():
        if limit is not None and limit < _V1_NO_LIMIT_BYTES:
            free_bytes = None if used_bytes is None else max(0, limit - used_bytes)
            yield CgroupMemory(version, limit, used_bytes, free_bytes, source)


def _stat(directory: Path) -> dict[str, int]:
    """``memory.stat`` of a group."""
    found = re.findall(r"^(\w+) (\d+)$", read(directory / "memory.stat") or "", re.MULTILINE)
    return {key: int(value) for key, value in found}

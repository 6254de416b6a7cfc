"""What processes use: resident memory and its peak, CPU time; and how to give memory back."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
_MADV_PAGEOUT = 21


@dataclass(frozen=True, slots=True)
class Peak:
    """Highest resident memory of a process, and where the figure comes from."""

    bytes: int
    source: str


def process_rss_bytes(pid: int | None = None, *, proc_root: Path = PROC) -> int:
    """Resident memory of a process now, this one by default; 0 if it has ended."""
    resident = _status_bytes(pid, "VmRSS", proc_root)
    if resident is None:
        import psutil

        try:
            return int(psutil.Process(pid).memory_info().rss)
        except psutil.Error:
            return 0
    return resident


def process_held_bytes(pid: int | None = None, *, proc_root: Path = PROC) -> int:
    """What the end of a process would free: its resident memory less the pages of files.

    Where the kernel does not tell them apart, all its resident memory.
    """
    anonymous = _status_bytes(pid, "RssAnon", proc_root)
    if anonymous is None:
        return process_rss_bytes(pid, proc_root=proc_root)
    return anonymous + (_status_bytes(pid, "RssShmem", proc_root) or 0)


def process_data_bytes(pid: int | None = None, *, proc_root: Path = PROC) -> int:
    """What counts against RLIMIT_DATA, whether touched or not; 0 if unknown."""
    return _status_bytes(pid, "VmData", proc_root) or 0


def children_cpu_s() -> float:
    """CPU seconds of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def process_cpu_s(pid: int | None = None) -> float:
    """CPU seconds a process has used, user and system; 0 if it has ended."""
    import psutil

    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def process_peak_bytes(pid: int | None = None, *, proc_root: Path = PROC) -> int:
    """Highest resident memory since the start or the last ``reset_peak``; 0 if it has ended."""
    return process_peak(pid, proc_root=proc_root).bytes


def process_peak(pid: int | None = None, *, proc_root: Path = PROC) -> Peak:
    """As ``process_peak_bytes``, with the source of the figure."""
    peak = _status_bytes(pid, "VmHWM", proc_root)
    if peak is not None:
        return Peak(peak, "VmHWM")
    if pid is None or pid == os.getpid():
        # Kilobytes on Linux, bytes on macOS; never falls, so reset_peak has no effect on it.
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes
        return Peak(peak, "ru_maxrss (since the start of the process, cannot be reset)")
    resident = process_rss_bytes(pid, proc_root=proc_root)
    return Peak(resident, "rss now (a peak in between is not seen)")


def reset_peak(pid: int | None = None, *, proc_root: Path = PROC) -> bool:
    """Make the next ``process_peak_bytes`` start from now; False where the kernel cannot."""
    try:
        # 5 is the kernel's code for "reset the peak resident set size".
        (_process_dir(pid, proc_root) / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def shed_library_pages(*, proc_root: Path = PROC) -> int:
    """Give back this process's pages of library files that only loading needed; bytes asked for.

    Importing torch touches 80 MiB of its files, a training step a fifth of that. The kernel drops
    such pages by itself only once memory is short, which on a small board is too late; dropped
    pages that are needed after all are read again. Without effect where the kernel cannot.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    asked_bytes = 0
    for line in (_read(proc_root / "self/maps") or "").splitlines():
        fields = line.split()
        # Private writable mappings hold relocated addresses; they are left alone.
        if len(fields) >= 6 and fields[5].startswith("/") and "w" not in fields[1]:
            start, _, stop = fields[0].partition("-")
            size_bytes = int(stop, 16) - int(start, 16)
            if advise(int(start, 16), size_bytes, _MADV_PAGEOUT) == 0:
                asked_bytes += size_bytes
    return asked_bytes


def _status_bytes(pid: int | None, key: str, proc_root: Path) -> int | None:
    """One memory figure of /proc/PID/status."""
    text = _read(_process_dir(pid, proc_root) / "status") or ""
    found = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _process_dir(pid: int | None, proc_root: Path) -> Path:
    """Where the kernel shows a process."""
    return proc_root / ("self" if pid is None else str(pid))


def _read(path: Path) -> str | None:
    """Text of a kernel file; ``None`` if it is not there or not ours to read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return None

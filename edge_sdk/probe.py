"""Measure this machine: memory, compute, storage, and what a process uses.

Nothing is guessed: a figure that cannot be read is ``None`` or is listed in ``not_measured`` with
the reason. Whatever needs numpy runs in a child process, so that the caller stays small and a
build that does not fit the CPU (illegal instruction) kills only the child.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import MIB, ProfileError
from edge_sdk.process import process_rss_bytes
from edge_sdk.profile import TORCH_FLOOR_BYTES, Budget, DeviceProfile, budget

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
DMI = Path("/sys/class/dmi/id")

# Near its limit a process first gets slow (page reclaim), then is killed.
MEMORY_SHARE = 0.9
# Training an MLP, a CNN and a transformer with torch ran at 0.3 to 0.75 of the float32 product
# of two 512 x 512 matrices on an idle x86-64 machine.
TRAINING_SHARE = 0.5
STORAGE_SHARE = 0.5

QUICK_LIMIT_S, FULL_LIMIT_S = 2.0, 5.0
# Used where a measurement failed: the low end of what a 64-bit board does.
_CAUTIOUS_FLOPS_PER_S_PER_CORE = 5e8
_CAUTIOUS_MEMORY_BANDWIDTH_BYTES_PER_S = 1e9
_CAUTIOUS_STORAGE_WRITE_BYTES_PER_S = 2e6
_CAUTIOUS_LINK_BYTES_PER_S = 1e6

_CHILD_OPTIONS = {"memory_bandwidth_bytes_per_s": "--bandwidth", "flops_per_s": "--compute"}
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

    Swap, and zram counted as swap, is reported only: it is no memory to train in.
    """

    total_bytes: int | None
    available_bytes: int | None
    swap_bytes: int | None
    zram_bytes: int | None
    cgroup: CgroupMemory | None
    sources: dict[str, str]

    @property
    def cgroup_free_bytes(self) -> int | None:
        """What the tightest cgroup still gives; ``None`` without a limit."""
        return self.cgroup.usable_bytes if self.cgroup else None

    @property
    def usable_bytes(self) -> int | None:
        """The least of what is available and what the cgroup leaves."""
        known = [self.available_bytes, self.cgroup_free_bytes]
        return min((value for value in known if value is not None), default=None)


@dataclass(frozen=True, slots=True)
class Rate:
    """Median of repeated measurements, per second; spread is interquartile range over median."""

    per_s: float
    spread: float
    samples: int


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A measured profile; ``not_measured`` says why a figure is only a cautious estimate."""

    profile: DeviceProfile
    took_s: float
    spreads: dict[str, float]
    not_measured: dict[str, str]


def available_memory(*, proc_root: Path = PROC, cgroup_root: Path = CGROUP) -> Memory:
    """What one process can have now: the machine's free memory and the cgroup's."""
    values = _meminfo(proc_root)
    sources = {
        f"{name}_bytes": f"{proc_root / 'meminfo'} {key}"
        for name, key in _MEMINFO_KEYS.items()
        if key in values
    }
    if proc_root == PROC and not proc_root.is_dir():  # not Linux
        import psutil

        physical = psutil.virtual_memory()
        values = {"MemTotal": physical.total, "MemAvailable": physical.available}
        sources = {"total_bytes": "psutil", "available_bytes": "psutil"}
    cgroup, zram_bytes = _cgroup_memory(proc_root, cgroup_root), _zram_bytes(proc_root)
    if cgroup is not None:
        sources["cgroup"] = cgroup.source
    if zram_bytes is not None:
        sources["zram_bytes"] = str(proc_root / "swaps")
    total_bytes, available_bytes, swap_bytes = (values.get(k) for k in _MEMINFO_KEYS.values())
    return Memory(total_bytes, available_bytes, swap_bytes, zram_bytes, cgroup, sources)


def budget_now(
    profile: DeviceProfile, *, flag_bytes: int | None, trainer_pid: int | None
) -> Budget:
    """Memory the trainer may use now: what is free counts together with what it already has."""
    memory = available_memory()
    own_bytes = process_rss_bytes(trainer_pid) if trainer_pid is not None else 0
    available, group = memory.available_bytes, memory.cgroup_free_bytes
    return budget(
        profile,
        available_bytes=None if available is None else available + own_bytes,
        cgroup_limit_bytes=None if group is None else group + own_bytes,
        flag_bytes=flag_bytes,
    )


def board_name(*, proc_root: Path = PROC, dmi_root: Path = DMI) -> str:
    """The board as its firmware names it, else the kind of machine."""
    model = _printable(_read(proc_root / "device-tree" / "model"))
    if model:
        return model
    parts = [_printable(_read(dmi_root / key)) for key in ("sys_vendor", "product_name")]
    product = " ".join(part for part in parts if part)
    # Boards whose maker left the fields as delivered are not worth naming.
    if product and not re.search(
        r"O\.E\.M\.|System (Product|manufacturer)|Default string", product
    ):
        return _printable(product)
    return _printable(f"{platform.system()} {platform.machine()}") or "unknown"


def measure_compute(budget_s: float) -> Rate:
    """Float32 matrix products in a child process on all cores, FLOP per second."""
    return _one_rate("flops_per_s", budget_s)


def measure_memory_bandwidth(budget_s: float) -> Rate:
    """A large copy in a child process, bytes read plus written per second."""
    return _one_rate("memory_bandwidth_bytes_per_s", budget_s)


def measure_storage(directory: Path, budget_s: float, *, max_bytes: int = 16 * MIB) -> Rate:
    """Write one MiB at a time, each synced, to an unnamed file in ``directory``; bytes/s."""
    chunk = os.urandom(MIB)  # a compressing file system must not flatter the card
    rates: list[float] = []
    end_s = time.monotonic() + budget_s
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            while len(rates) < max(1, max_bytes // MIB) and (not rates or time.monotonic() < end_s):
                start_s = time.perf_counter()
                file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                rates.append(MIB / (time.perf_counter() - start_s))
    except OSError as error:
        raise ProfileError(
            f"{directory}: storage cannot be measured: {error}. "
            "Give a state directory that exists, is writable and has 16 MiB free."
        ) from error
    return _rate(rates)


def probe(quick: bool, state_dir: Path, *, name: str | None = None) -> ProbeResult:
    """Measure this machine within QUICK_LIMIT_S or FULL_LIMIT_S, storage in ``state_dir``."""
    start_s = time.monotonic()
    limit_s = QUICK_LIMIT_S if quick else FULL_LIMIT_S
    memory, board = available_memory(), board_name()
    if memory.total_bytes is None or memory.usable_bytes is None:
        raise ProfileError(
            f"{PROC / 'meminfo'}: memory of this machine cannot be read. "
            "Write a profile by hand or give a shipped one with --profile."
        )
    directory = _existing(state_dir)
    rates, not_measured = _probe_rates(directory, limit_s, start_s)
    not_measured["uplink_bytes_per_s"] = not_measured["downlink_bytes_per_s"] = (
        "needs a server to talk to"
    )
    figures, sources = _figures(rates, not_measured, memory, directory)
    profile = DeviceProfile(
        name=name or _label(board),
        board=board,
        memory_total_bytes=memory.total_bytes,
        memory_bytes=max(1, int(MEMORY_SHARE * min(memory.usable_bytes, memory.total_bytes))),
        torch_floor_bytes=TORCH_FLOOR_BYTES,
        cores=_cores(),
        storage_bytes=int(STORAGE_SHARE * shutil.disk_usage(directory).free),
        accelerator=_accelerator(),
        date=time.strftime("%Y-%m-%d"),
        sources=sources,
        **figures,
    )
    spreads = {key: rate.spread for key, rate in rates.items()}
    return ProbeResult(profile, time.monotonic() - start_s, spreads, not_measured)


def _probe_rates(
    directory: Path, limit_s: float, start_s: float
) -> tuple[dict[str, Rate], dict[str, str]]:
    """Storage first, because it keeps to its time; the child gets what is left."""
    rates: dict[str, Rate] = {}
    failures: dict[str, str] = {}
    try:
        rates["storage_write_bytes_per_s"] = measure_storage(directory, 0.1 * limit_s)
    except ProfileError as error:
        failures["storage_write_bytes_per_s"] = str(error)
    left_s = limit_s - (time.monotonic() - start_s) - 0.1  # 0.1 s to put the result together
    budgets_s = {"memory_bandwidth_bytes_per_s": 0.05 * limit_s, "flops_per_s": 0.2 * limit_s}
    found, reason = _child_rates(budgets_s, max(left_s, 0.1))
    failures.update({key: reason for key in budgets_s if key not in found})
    return rates | found, failures


def _figures(
    rates: dict[str, Rate], not_measured: dict[str, str], memory: Memory, directory: Path
) -> tuple[dict[str, float], dict[str, str]]:
    """The profile's rates and the source of all its figures."""
    cautious = {
        "flops_per_s": _CAUTIOUS_FLOPS_PER_S_PER_CORE * _cores(),
        "memory_bandwidth_bytes_per_s": _CAUTIOUS_MEMORY_BANDWIDTH_BYTES_PER_S,
        "storage_write_bytes_per_s": _CAUTIOUS_STORAGE_WRITE_BYTES_PER_S,
        "uplink_bytes_per_s": _CAUTIOUS_LINK_BYTES_PER_S,
        "downlink_bytes_per_s": _CAUTIOUS_LINK_BYTES_PER_S,
    }
    how = {
        "flops_per_s": f"{TRAINING_SHARE:.0%} of the rate of float32 matrix products",
        "memory_bandwidth_bytes_per_s": "a large copy on one core, reads and writes counted",
        "storage_write_bytes_per_s": f"synced writes of one MiB in {directory}",
    }
    figures = cautious | {key: rate.per_s for key, rate in rates.items()}
    if "flops_per_s" in rates:
        figures["flops_per_s"] *= TRAINING_SHARE
    figures = {key: float(f"{value:.3g}") for key, value in figures.items()}
    bound = memory.sources.get("available_bytes", "the system")
    if memory.cgroup is not None and memory.cgroup_free_bytes == memory.usable_bytes:
        bound = memory.cgroup.source
    sources = {
        "memory_total_bytes": f"measured: {memory.sources.get('total_bytes', 'the system')}",
        "memory_bytes": f"measured: {MEMORY_SHARE:.0%} of what {bound} left",
        "torch_floor_bytes": "estimated: usual size of torch on x86-64, plus a margin",
        "cores": "measured: cores this process may run on",
        "storage_bytes": f"measured: {STORAGE_SHARE:.0%} of what is free in {directory}",
    }
    for key in cautious:
        sources[key] = (
            f"measured: {how[key]}, {rates[key].samples} samples"
            if key in rates
            else f"assumed: cautious value, not measured: {not_measured[key]}"
        )
    return figures, {key: _printable(text, 500) for key, text in sources.items()}


def _one_rate(key: str, budget_s: float) -> Rate:
    """One measurement in the child, or ProfileError with the reason it failed."""
    # Starting Python and numpy from a card takes seconds on the smallest boards.
    rates, reason = _child_rates({key: budget_s}, budget_s + 30.0)
    if key not in rates:
        raise ProfileError(
            f"{key} cannot be measured: {reason}. Give a shipped profile with --profile."
        )
    return rates[key]


def _child_rates(budgets_s: dict[str, float], limit_s: float) -> tuple[dict[str, Rate], str]:
    """Run measurements in a child; what it finished in time, and why the rest is missing."""
    command = [sys.executable, "-m", "edge_sdk.probe"]
    for key, option in _CHILD_OPTIONS.items():
        if key in budgets_s:
            command += [option, str(budgets_s[key])]
    # The child must find this package, however the parent found it.
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            timeout=limit_s,
            env=os.environ | {"PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return _parse_rates(error.stdout or b""), f"not done within {limit_s:.1f} s"
    except OSError as error:
        return {}, f"the measuring process did not start: {error}"
    return _parse_rates(done.stdout), _exit_reason(done.returncode, done.stderr)


def _parse_rates(output: bytes) -> dict[str, Rate]:
    """The child's complete lines; a line cut by a kill is left out."""
    rates = {}
    for line in output.splitlines(keepends=True):
        try:
            if line.endswith(b"\n"):
                key, *figures = json.loads(line)
                rates[key] = Rate(*figures)
        except (ValueError, TypeError):  # another program's output, such as a site hook's
            continue
    return rates


def _exit_reason(code: int, stderr: bytes) -> str:
    """Why the child ended without all results."""
    if code < 0:
        return f"the measuring process was killed: {signal.strsignal(-code) or f'signal {-code}'}"
    last = stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    return f"the measuring process ended with {code}: {last[0][:200] if last else 'no message'}"


def _matmul_rate(budget_s: float) -> Rate:
    """Rate of 512 x 512 float32 products in this process, on as many threads as BLAS takes."""
    import numpy as np

    size = 512  # three matrices of one MiB: out of the first cache, small on any board
    left = np.full((size, size), 1.5, dtype=np.float32)
    result = np.empty_like(left)

    def product() -> float:
        start_s = time.perf_counter()
        np.matmul(left, left, out=result)
        return 2.0 * size**3 / (time.perf_counter() - start_s)

    return _repeat(product, budget_s)


def _copy_rate(budget_s: float) -> Rate:
    """Rate of copying 16 MiB, more than the caches of the boards we know."""
    source, target = bytearray(16 * MIB), bytearray(16 * MIB)

    def copy() -> float:
        start_s = time.perf_counter()
        target[:] = source
        return 2.0 * len(source) / (time.perf_counter() - start_s)

    return _repeat(copy, budget_s)


def _repeat(once: Callable[[], float], budget_s: float) -> Rate:
    """Warm up (threads start, pages are touched), then repeat for ``budget_s``, at least thrice."""
    once()
    end_s = time.monotonic() + budget_s
    rates = [once() for _ in range(3)]
    while time.monotonic() < end_s:
        rates.append(once())
    return _rate(rates)


def _rate(rates: list[float]) -> Rate:
    """Median and spread of at least one sample."""
    median = statistics.median(rates)
    spread = 0.0
    if len(rates) > 1:
        low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
        spread = (high - low) / median
    return Rate(median, spread, len(rates))


def _read(path: Path) -> str | None:
    """Text of a small kernel file; ``None`` if it is not there or not ours to read."""
    try:
        with path.open("rb") as file:
            return file.read(_MAX_KERNEL_FILE_BYTES).decode("utf-8", "replace")
    except OSError:
        return None


def _read_number(path: Path) -> int | None:
    """A file that holds one number; ``None`` for anything else, such as "max"."""
    text = (_read(path) or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _meminfo(proc_root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    found = re.findall(r"^(\w+): +(\d+) kB$", _read(proc_root / "meminfo") or "", re.MULTILINE)
    return {key: int(value) * 1024 for key, value in found}


def _zram_bytes(proc_root: Path) -> int | None:
    """Swap that lies compressed in RAM; ``None`` if the kernel lists no swap at all."""
    text = _read(proc_root / "swaps")
    if text is None:
        return None
    sizes = re.findall(r"^\S*zram\d+\s+\w+\s+(\d+)\s", text, re.MULTILINE)
    return sum(int(size) * 1024 for size in sizes)


def _cgroup_memory(proc_root: Path, cgroup_root: Path) -> CgroupMemory | None:
    """The tightest limit among this process's memory cgroups and their parents."""
    limits: list[CgroupMemory] = []
    for line in (_read(proc_root / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if "memory" in controllers.split(","):
            limits += _limits(1, cgroup_root / "memory", group)
        elif number == "0" and not controllers:
            for mount in (cgroup_root, cgroup_root / "unified"):  # the second on hybrid systems
                limits += _limits(2, mount, group)
    return min(limits, key=lambda limit: limit.usable_bytes, default=None)


def _groups(mount: Path, group: str) -> Iterator[Path]:
    """The group's directory and its parents; last the mount, in a container its own group."""
    # A path with ".." leads out of the container; what it names is not visible from here.
    parts = [] if ".." in group.split("/") else [part for part in group.split("/") if part]
    for depth in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:depth])


def _limits(version: int, mount: Path, group: str) -> Iterator[CgroupMemory]:
    """Every limit that holds for a group, with what it leaves."""
    usage_file, reclaimable, limit_files = _CGROUP_FILES[version]
    for directory in _groups(mount, group):
        stat = _stat(directory)
        usage = _read_number(directory / usage_file)
        # Page cache that the kernel gives back on demand is not used up.
        used_bytes = None if usage is None else max(0, usage - stat.get(reclaimable, 0))
        limits = {str(directory / file): _read_number(directory / file) for file in limit_files}
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
    found = re.findall(r"^(\w+) (\d+)$", _read(directory / "memory.stat") or "", re.MULTILINE)
    return {key: int(value) for key, value in found}


def _cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _accelerator(proc_root: Path = PROC, dev_root: Path = Path("/dev")) -> str:
    """A CUDA device by its driver's files, without loading any CUDA library."""
    for information in sorted((proc_root / "driver" / "nvidia" / "gpus").glob("*/information")):
        found = re.search(r"^Model:\s+(.+)$", _read(information) or "", re.MULTILINE)
        if found:
            return _printable(f"cuda {found[1]}")
    if (dev_root / "nvhost-gpu").exists() or (dev_root / "nvgpu").exists():  # Jetson
        return "cuda integrated"
    return ""


def _existing(directory: Path) -> Path:
    """The directory, or the nearest parent that exists: the same file system in practice."""
    directory = directory.absolute()
    return next(path for path in (directory, *directory.parents) if path.is_dir())


def _label(board: str) -> str:
    """A profile name from a board's name."""
    return re.sub(r"[^a-z0-9]+", "-", board.lower())[:64].strip("-") or "unknown"


def _printable(text: str | None, length: int = 128) -> str:
    """One line of printable text; device trees end theirs with a NUL."""
    kept = "".join(c for c in " ".join((text or "").split()) if c.isprintable())
    return kept[:length].strip()


def main(argv: Sequence[str] | None = None) -> int:
    """The child: measure what is asked and write one JSON line for each, as soon as it is known."""
    parser = argparse.ArgumentParser(prog="python -m edge_sdk.probe", description=main.__doc__)
    for option in _CHILD_OPTIONS.values():
        parser.add_argument(option, type=float, nargs="?", const=0.5, metavar="SECONDS")
    args = parser.parse_args(argv)
    for key, budget_s, measure in (
        ("memory_bandwidth_bytes_per_s", args.bandwidth, _copy_rate),
        ("flops_per_s", args.compute, _matmul_rate),
    ):
        if budget_s is not None:
            rate = measure(budget_s)
            sys.stdout.write(json.dumps([key, rate.per_s, rate.spread, rate.samples]) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measure this machine into a profile.

Nothing is guessed: a figure that cannot be read is ``None`` or is listed in ``not_measured`` with
the reason. What needs much time is left out first.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edge_sdk import __version__
from edge_sdk.condition import Condition, read_condition
from edge_sdk.errors import ProfileError
from edge_sdk.figures import LIMITS
from edge_sdk.measure import Calibration, Rate, calibrate, machine_rates, measure_storage
from edge_sdk.memory import (
    PROC,
    CgroupMemory,
    Memory,
    available_memory,
    is_tegra,
    read,
)
from edge_sdk.profile import TORCH_FLOOR_BYTES, DeviceProfile

__all__ = [
    "CgroupMemory",
    "Memory",
    "ProbeResult",
    "available_memory",
    "board_name",
    "probe",
]

DMI = Path("/sys/class/dmi/id")

# Near its limit a process first gets slow (page reclaim), then is killed.
MEMORY_SHARE = 0.9
# Training an MLP, a CNN and a transformer with torch ran at 0.3 to 0.75 of the float32 product
# of two 512 x 512 matrices on an idle x86-64 machine.
TRAINING_SHARE = 0.5
STORAGE_SHARE = 0.5

QUICK_LIMIT_S, FULL_LIMIT_S = 2.0, 5.0
# To put the result together.
_LAST_S = 0.15
# The part of what is left that torch measures in, and when that is enough; loading it takes time.
_CALIBRATE_SHARE, _CALIBRATE_MOST_S = 0.4, 5.0
# Used where a measurement failed: the low end of what a 64-bit board does.
_CAUTIOUS_FLOPS_PER_S_PER_CORE = 5e8
_CAUTIOUS = {
    "memory_bandwidth_bytes_per_s": 1e9,
    "storage_write_bytes_per_s": 2e6,
    "uplink_bytes_per_s": 1e6,
    "downlink_bytes_per_s": 1e6,
}
_QUICK = "left out by --quick"
# GPUs of the Jetsons by their chip.
_TEGRA = {
    "tegra210": "Maxwell",
    "tegra186": "Pascal",
    "tegra194": "Volta",
    "tegra234": "Ampere",
    "tegra264": "Blackwell",
}


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """A measured profile; ``not_measured`` says why a figure is missing or only an estimate.

    spreads: interquartile range over median, of the profile's rates and of its table ``rates``.
    """

    profile: DeviceProfile
    took_s: float
    limit_s: float
    spreads: dict[str, float]
    not_measured: dict[str, str]
    memory: Memory
    condition: Condition


@dataclass(slots=True)
class _Findings:
    """What was measured so far, and until when there is time."""

    end_s: float
    limit_s: float
    patience_s: float
    rates: dict[str, Rate] = field(default_factory=dict)
    by_kind: dict[str, Rate] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def left_s(self) -> float:
        return max(0.0, self.end_s - time.monotonic() - _LAST_S)


def board_name(*, proc_root: Path = PROC, dmi_root: Path = DMI) -> str:
    """The board as its firmware names it, else the kind of machine."""
    model = _printable(read(proc_root / "device-tree" / "model"))
    if model:
        return model
    parts = [_printable(read(dmi_root / key)) for key in ("sys_vendor", "product_name")]
    product = " ".join(part for part in parts if part)
    # Boards whose maker left the fields as delivered are not worth naming.
    if product and not re.search(
        r"O\.E\.M\.|System (Product|manufacturer)|Default string", product
    ):
        return _printable(product)
    return _printable(f"{platform.system()} {platform.machine()}") or "unknown"


def probe(
    quick: bool,
    state_dir: Path,
    *,
    name: str | None = None,
    broker: str | None = None,
    ca_file: str | None = None,
    limit_s: float | None = None,
    patience_s: float = 0.0,
) -> ProbeResult:
    """Measure this machine within ``limit_s``, by default QUICK_LIMIT_S or FULL_LIMIT_S.

    ``patience_s`` more may pass where torch needs long to load. Storage is measured in
    ``state_dir``, the link only to a ``broker`` that is given.
    """
    start_s = time.monotonic()
    limit_s = limit_s or (QUICK_LIMIT_S if quick else FULL_LIMIT_S)
    memory, board, condition = available_memory(), board_name(), read_condition()
    if memory.total_bytes is None or memory.usable_bytes is None:
        raise ProfileError(
            f"{PROC / 'meminfo'}: memory of this machine cannot be read. "
            "Write a profile by hand or give a shipped one with --profile."
        )
    directory = _existing(state_dir)
    found = _Findings(start_s + limit_s, limit_s, patience_s)
    _measure(found, directory, quick, broker, ca_file)
    floor_bytes = found.calibration.floor_bytes
    profile = DeviceProfile(
        name=name or _label(board),
        board=board,
        memory_total_bytes=memory.total_bytes,
        memory_bytes=max(1, int(MEMORY_SHARE * min(memory.usable_bytes, memory.total_bytes))),
        torch_floor_bytes=floor_bytes or TORCH_FLOOR_BYTES,
        cores=_cores(),
        storage_bytes=int(STORAGE_SHARE * shutil.disk_usage(directory).free),
        accelerator=accelerator(),
        date=time.strftime("%Y-%m-%d"),
        measured_with=_versions(found.calibration),
        rates={key: _rounded(rate.per_s) for key, rate in found.by_kind.items()},
        overhead=found.calibration.overhead,
        sources=_sources(found, memory, directory),
        **_figures(found),
    )
    rates = found.rates | {f"rates.{key}": rate for key, rate in found.by_kind.items()}
    return ProbeResult(
        profile,
        time.monotonic() - start_s,
        limit_s,
        {key: rate.spread for key, rate in rates.items()},
        found.failures | condition.unknown,
        memory,
        condition,
    )


def _measure(
    found: _Findings, directory: Path, quick: bool, broker: str | None, ca_file: str | None
) -> None:
    """Storage and link first, because they keep to their time; the children get what is left."""
    try:
        found.rates |= measure_storage(directory, 0.1 * found.limit_s)
    except ProfileError as error:
        for key in ("storage_write_bytes_per_s", "storage_read_bytes_per_s"):
            found.failures[key] = str(error)
    _measure_link(found, broker, ca_file)
    budgets_s = {"memory_bandwidth_bytes_per_s": 0.05 * found.limit_s}
    budgets_s["flops_per_s"] = (0.2 if quick else 0.08) * found.limit_s
    start_s = time.monotonic()
    rates, reason = machine_rates(budgets_s, max(found.left_s, 0.1))
    start_cost_s = max(0.1, time.monotonic() - start_s - sum(budgets_s.values()))
    found.rates |= rates
    found.failures |= {key: reason for key in budgets_s if key not in rates}
    if quick:
        found.failures |= dict.fromkeys(("torch_floor_bytes", "rates", "overhead"), _QUICK)
        return
    _measure_threads(found, start_cost_s)
    _measure_torch(found)


def _measure_link(found: _Findings, broker: str | None, ca_file: str | None) -> None:
    keys = ("uplink_bytes_per_s", "downlink_bytes_per_s")
    if broker is None:
        found.failures |= dict.fromkeys(keys, "needs a broker to talk to: give --broker")
        return
    from edge_sdk.echo import measure_link

    link = measure_link(broker, 0.2 * found.limit_s, ca_file=ca_file)
    for key, rate in zip(keys, (link.up, link.down), strict=True):
        if rate is None:
            found.failures[key] = link.reason
        else:
            found.rates[key] = rate


def _measure_threads(found: _Findings, start_cost_s: float) -> None:
    """Matrix products with fewer threads than cores: what a device that shares its cores gets."""
    cores, budget_s = _cores(), 0.05 * found.limit_s
    whole = found.rates.get("flops_per_s")
    if whole is not None:
        found.by_kind[_threads_key(cores)] = whole
    fewer = [1, *(2**power for power in range(1, 8) if 2**power < cores)] if cores > 1 else []
    for threads in fewer:
        # Torch needs the larger part of the time.
        if found.left_s < 0.4 * found.limit_s + start_cost_s + budget_s:
            found.failures[f"rates.{_threads_key(threads)}"] = _too_slow(found)
            continue
        rates, reason = machine_rates({"flops_per_s": budget_s}, found.left_s, threads)
        if "flops_per_s" in rates:
            found.by_kind[_threads_key(threads)] = rates["flops_per_s"]
        else:
            found.failures[f"rates.{_threads_key(threads)}"] = reason


def _threads_key(threads: int) -> str:
    return f"numpy_matmul_threads_{threads}_flops_per_s"


def _too_slow(found: _Findings) -> str:
    return f"no time left of {found.limit_s:g} s; give more with --seconds"


def _measure_torch(found: _Findings) -> None:
    reason = "torch is not installed"
    if find_spec("torch") is not None:
        seconds = min(_CALIBRATE_MOST_S, _CALIBRATE_SHARE * found.left_s)
        limit_s = max(found.left_s, 0.1) + found.patience_s
        found.calibration, reason = calibrate(seconds, _cores(), limit_s)
        if reason.startswith("not done"):
            reason += "; give more time with --seconds"
    found.by_kind |= found.calibration.rates
    measured: dict[str, Any] = {
        "rates": found.calibration.rates,
        "overhead": found.calibration.overhead,
        "torch_floor_bytes": found.calibration.floor_bytes,
    }
    found.failures |= {key: reason for key, value in measured.items() if not value}


def _figures(found: _Findings) -> dict[str, Any]:
    """The profile's rates: as measured, else cautious."""
    cautious = _CAUTIOUS | {"flops_per_s": _CAUTIOUS_FLOPS_PER_S_PER_CORE * _cores()}
    figures = cautious | {key: rate.per_s for key, rate in found.rates.items()}
    if "flops_per_s" in found.rates:
        figures["flops_per_s"] *= TRAINING_SHARE
    return {
        key: min(max(_rounded(value), LIMITS[key].low), LIMITS[key].high)
        for key, value in figures.items()
    }


def _sources(found: _Findings, memory: Memory, directory: Path) -> dict[str, str]:
    """Where each figure of the profile comes from."""
    bound = memory.sources.get("available_bytes", "the system")
    if memory.cgroup is not None and memory.cgroup_free_bytes == memory.usable_bytes:
        bound = memory.cgroup.source
    shared = "; processor and GPU share it" if memory.unified else ""
    floor = "estimated: usual size of torch on x86-64, plus a margin"
    if found.calibration.floor_bytes is not None:
        floor = "measured: resident memory after loading torch and one tiny step"
    sources = {
        "memory_total_bytes": (
            f"measured: {memory.sources.get('total_bytes', 'the system')}{shared}"
        ),
        "memory_bytes": f"measured: {MEMORY_SHARE:.0%} of what {bound} left{shared}",
        "torch_floor_bytes": floor,
        "cores": "measured: cores this process may run on",
        "storage_bytes": f"measured: {STORAGE_SHARE:.0%} of what is free in {directory}",
        **_rate_sources(found, directory),
    }
    if found.by_kind:
        spread = max(rate.spread for rate in found.by_kind.values())
        words = "each kind of operation by itself, with numpy or torch"
        sources["rates"] = f"measured: {words}, spread up to {spread:.0%}"
    if found.calibration.overhead:
        sources["overhead"] = "measured: by torch in a process of its own"
    return {key: _printable(text, 500) for key, text in sources.items()}


def _rate_sources(found: _Findings, directory: Path) -> dict[str, str]:
    how = {
        "flops_per_s": f"{TRAINING_SHARE:.0%} of the rate of float32 matrix products",
        "memory_bandwidth_bytes_per_s": "a large copy on one core, reads and writes counted",
        "storage_write_bytes_per_s": f"synced writes of one MiB in {directory}",
        "storage_read_bytes_per_s": f"reads of one MiB in {directory}, dropped from memory before",
        "uplink_bytes_per_s": "messages the broker acknowledged",
        "downlink_bytes_per_s": "messages the broker gave back",
    }
    sources = {}
    for key, words in how.items():
        rate = found.rates.get(key)
        if rate is not None:
            detail = f"{rate.samples} samples, spread {rate.spread:.0%}"
            sources[key] = f"measured: {words}, {detail}"
        elif key != "storage_read_bytes_per_s":
            sources[key] = f"assumed: cautious value, not measured: {found.failures[key]}"
    return sources


def _versions(calibration: Calibration) -> str:
    """What measured: this package, and torch if it did."""
    parts = [f"edge_sdk {__version__}"]
    if calibration != Calibration():
        with suppress(metadata.PackageNotFoundError):
            parts.append(f"torch {metadata.version('torch')}")
    return _printable(", ".join(parts))


def _rounded(value: float) -> float:
    """Three digits: more than the spread of any measurement allows."""
    return float(f"{value:.3g}")


def _cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def accelerator(proc_root: Path = PROC, dev_root: Path = Path("/dev")) -> str:
    """A CUDA device by its driver's files, without loading any CUDA library."""
    for information in sorted((proc_root / "driver" / "nvidia" / "gpus").glob("*/information")):
        found = re.search(r"^Model:\s+(.+)$", read(information) or "", re.MULTILINE)
        if found:
            return _printable(f"cuda {found[1]}")
    compatible = read(proc_root / "device-tree" / "compatible") or ""
    if is_tegra(proc_root):
        chip = next((gpu for chip, gpu in _TEGRA.items() if f"nvidia,{chip}" in compatible), "")
        return f"cuda {chip or 'integrated'}, memory shared with the processor"
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

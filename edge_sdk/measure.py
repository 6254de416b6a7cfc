"""Rates of this machine: arithmetic, copies and storage, each repeated until its time is over.

Whatever needs numpy or torch runs in a child process, so that the caller stays small and a build
that does not fit the CPU (illegal instruction) kills only the child.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_sdk.errors import MIB, ProfileError
from edge_sdk.figures import LIMITS, MAX_TABLE_KEYS, acceptable
from edge_sdk.memory import MALLOC, THREAD_LIMITS

_OPTIONS = {"memory_bandwidth_bytes_per_s": "--bandwidth", "flops_per_s": "--compute"}
# Places in a profile's table of rates for those of the machine by number of threads.
MAX_THREAD_KEYS = 9
# Starting Python and numpy from a card takes seconds on the smallest boards.
_START_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True)
class Rate:
    """Median of repeated measurements, per second; spread is interquartile range over median."""

    per_s: float
    spread: float
    samples: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """What torch does on this machine; rates and overheads by the keys of a profile's tables."""

    rates: dict[str, Rate] = field(default_factory=dict)
    overhead: dict[str, int] = field(default_factory=dict)
    floor_bytes: int | None = None


def measure_compute(budget_s: float) -> Rate:
    """Float32 matrix products in a child process on all cores, FLOP per second."""
    return _one("flops_per_s", budget_s)


def measure_memory_bandwidth(budget_s: float) -> Rate:
    """A large copy in a child process, bytes read plus written per second."""
    return _one("memory_bandwidth_bytes_per_s", budget_s)


def measure_storage(
    directory: Path, budget_s: float, *, max_bytes: int = 16 * MIB
) -> dict[str, Rate]:
    """Rates of writing and reading one MiB at a time in an unnamed file in ``directory``.

    Each write is synced; before reading, the kernel is asked to forget what it kept of the file.
    """
    chunk = os.urandom(MIB)  # a compressing file system must not flatter the card
    most = max(1, max_bytes // MIB)
    try:
        with tempfile.TemporaryFile(dir=directory) as file:

            def write() -> None:
                file.write(chunk)
                file.flush()
                os.fsync(file.fileno())

            written = _until(lambda: _timed(write), 0.7 * budget_s, most)
            with suppress(AttributeError, OSError):  # only asked for, and not everywhere
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            read = _until(lambda: _timed(lambda: file.read(MIB)), 0.3 * budget_s, len(written))
    except OSError as error:
        raise ProfileError(
            f"{directory}: storage cannot be measured: {error}. "
            "Give a state directory that exists, is writable and has 16 MiB free."
        ) from error
    return {
        "storage_write_bytes_per_s": rate([MIB / took_s for took_s in written]),
        "storage_read_bytes_per_s": rate([MIB / took_s for took_s in read]),
    }


def machine_rates(
    budgets_s: dict[str, float], limit_s: float, threads: int | None = None
) -> tuple[dict[str, Rate], str]:
    """Measure with numpy in a child; what it finished in time, and why the rest is missing."""
    words = ["-m", "edge_sdk.measure"]
    for key, option in _OPTIONS.items():
        if key in budgets_s:
            words += [option, str(budgets_s[key])]
    limits = {} if threads is None else dict.fromkeys(THREAD_LIMITS, str(threads))
    output, reason = run_child(words, limit_s, limits)
    found: dict[str, Rate] = {}
    for key, *figures in child_lines(output):
        if key in budgets_s and len(figures) == 3 and figures[0] > 0:
            found[key] = Rate(*figures)
    return found, reason


def calibrate(seconds: float, threads: int, limit_s: float) -> tuple[Calibration, str]:
    """Measure with torch in a child; what it finished in time, and why the rest is missing."""
    words = ["-m", "edge_sdk.calibrate", "--seconds", f"{seconds:.2f}", "--threads", str(threads)]
    surroundings = {**MALLOC, **dict.fromkeys(THREAD_LIMITS, str(threads))}
    output, reason = run_child(words, limit_s, surroundings)
    return parse_calibration(output), reason


def parse_calibration(output: bytes) -> Calibration:
    """What the child's lines say; figures no profile may hold are left out."""
    found = Calibration()
    for kind, *row in child_lines(output):
        match kind, row:
            case "rates", [str(key), value, spread, samples] if acceptable("rates", key, value):
                if len(found.rates) < MAX_TABLE_KEYS - MAX_THREAD_KEYS:
                    found.rates[key] = Rate(float(value), float(spread), int(samples))
            case "overhead", [str(key), value, _, _] if acceptable("overhead", key, round(value)):
                if len(found.overhead) < MAX_TABLE_KEYS:
                    found.overhead[key] = round(value)
            case "floor", ["torch_floor_bytes", value, _, _]:
                limit = LIMITS["torch_floor_bytes"]
                if limit.low <= value <= limit.high:
                    found = replace(found, floor_bytes=round(value))
    return found


def run_child(
    words: Sequence[str], limit_s: float, surroundings: dict[str, str]
) -> tuple[bytes, str]:
    """Run this Python in a process of its own; its output, and why it may be incomplete."""
    # The child must find this package, however the parent found it.
    package_root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            env={**os.environ, **surroundings, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return error.stdout or b"", f"not done within {limit_s:.1f} s"
    except OSError as error:
        return b"", f"the measuring process did not start: {error}"
    return done.stdout, exit_reason(done.returncode, done.stderr)


def child_lines(output: bytes) -> Iterator[list[Any]]:
    """Complete lines that are texts, then finite numbers; what others print is left out."""
    for line in output.splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):  # another program's output, such as a site hook's
            continue
        if isinstance(row, list) and len(row) > 3:
            *words, _, _, _ = row
            if all(isinstance(word, str) for word in words) and all(map(_finite, row[-3:])):
                yield row


def exit_reason(code: int, stderr: bytes) -> str:
    """Why the child ended without all results."""
    if code < 0:
        return f"the measuring process was killed: {signal.strsignal(-code) or f'signal {-code}'}"
    last = stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    return f"the measuring process ended with {code}: {last[0][:200] if last else 'no message'}"


def rate(rates: Sequence[float]) -> Rate:
    """Median and spread of at least one sample."""
    median = statistics.median(rates)
    spread = 0.0
    if len(rates) > 1:
        low, _, high = statistics.quantiles(rates, n=4, method="inclusive")
        spread = (high - low) / median
    return Rate(median, spread, len(rates))


def _one(key: str, budget_s: float) -> Rate:
    """One measurement in the child, or ProfileError with the reason it failed."""
    rates, reason = machine_rates({key: budget_s}, budget_s + _START_LIMIT_S)
    if key not in rates:
        raise ProfileError(
            f"{key} cannot be measured: {reason}. Give a shipped profile with --profile."
        )
    return rates[key]


def _finite(item: object) -> bool:
    return (isinstance(item, int) and abs(item) < 2**63) or (
        isinstance(item, float) and math.isfinite(item)
    )


def _timed(work: Callable[[], object]) -> float:
    """Seconds it took; never zero, whatever the clock's resolution."""
    start_s = time.perf_counter()
    work()
    return max(1e-9, time.perf_counter() - start_s)


def _until(once: Callable[[], float], budget_s: float, most: int) -> list[float]:
    """Repeat until the time is over, at least once and at most so often."""
    end_s = time.monotonic() + budget_s
    results = [once()]
    while len(results) < most and time.monotonic() < end_s:
        results.append(once())
    return results


def _matmul_rate(budget_s: float) -> Rate:
    """Rate of 512 x 512 float32 products in this process, on as many threads as BLAS takes."""
    import numpy as np

    size = 512  # three matrices of one MiB: out of the first cache, small on any board
    left = np.full((size, size), 1.5, dtype=np.float32)
    result = np.empty_like(left)
    return _repeat(lambda: np.matmul(left, left, out=result), 2.0 * size**3, budget_s)


def _copy_rate(budget_s: float) -> Rate:
    """Rate of copying 16 MiB, more than the caches of the boards we know."""
    source, target = bytearray(16 * MIB), bytearray(16 * MIB)
    return _repeat(lambda: target.__setitem__(slice(None), source), 2.0 * len(source), budget_s)


def _repeat(once: Callable[[], object], work: float, budget_s: float) -> Rate:
    """Warm up (threads start, pages are touched), then repeat for ``budget_s``, at least thrice."""
    once()
    end_s = time.monotonic() + budget_s
    rates = [work / _timed(once) for _ in range(3)]
    while time.monotonic() < end_s:
        rates.append(work / _timed(once))
    return rate(rates)


def main(argv: Sequence[str] | None = None) -> int:
    """The child: measure what is asked and write one JSON line for each, as soon as it is known."""
    parser = argparse.ArgumentParser(prog="python -m edge_sdk.measure", description=main.__doc__)
    for option in _OPTIONS.values():
        parser.add_argument(option, type=float, nargs="?", const=0.5, metavar="SECONDS")
    args = parser.parse_args(argv)
    for key, budget_s, measure in (
        ("memory_bandwidth_bytes_per_s", args.bandwidth, _copy_rate),
        ("flops_per_s", args.compute, _matmul_rate),
    ):
        if budget_s is not None:
            found = measure(budget_s)
            sys.stdout.write(json.dumps([key, found.per_s, found.spread, found.samples]) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What an import loads and costs, measured in fresh processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT_CPU_S = 0.15
RUNS = 7


def run_python(code: str) -> tuple[str, float]:
    """Standard output and CPU seconds of a fresh interpreter that runs ``code``."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"{code!r} failed"
    return output, usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("edge_sdk", {"torch", "onnxruntime", "numpy", "paho", "psutil", "click", "msgspec"}),
        ("edge_sdk.cli", {"torch", "onnxruntime", "numpy"}),
        ("edge_sdk.agent", {"torch", "onnxruntime", "numpy"}),
        ("reference_server.cli", {"torch", "onnxruntime"}),
    ],
)
def test_imports_leave_the_heavy_modules_alone(module: str, heavy: set[str]) -> None:
    loaded, _ = run_python(f"import sys, {module}; print(*sys.modules)")
    assert heavy.intersection(loaded.split()) == set()


def test_importing_the_package_is_cheap() -> None:
    run_python("import edge_sdk")  # the first one may have to compile
    # Taken in turns, so that whatever else the machine does weighs on both alike.
    pairs = [(run_python("pass")[1], run_python("import edge_sdk")[1]) for _ in range(RUNS)]
    cost_cpu_s = statistics.median(loaded - bare for bare, loaded in pairs)
    assert cost_cpu_s < LIMIT_CPU_S

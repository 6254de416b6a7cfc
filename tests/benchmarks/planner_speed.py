"""How long planning takes: one choice for a model of 100 blocks, and the table of all boards.

The costs of the model are measured once, in a process of its own. What is timed runs without torch:
the hardest of many budgets is the one whose median is largest.

Keys: choose_ms (median at the hardest budget), choose_worst_ms (slowest of all), plan_all_s.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from edge_sdk.cost import CostTable, bits_per_param
from edge_sdk.errors import MIB, NothingFits
from edge_sdk.plan import Limits, choose
from edge_sdk.strategies import strategy_named
from edge_sdk.wire import Training
from tests.benchmarks.bench import Row, run

TASK = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
from torch.nn import functional
from edge_sdk import Task, Training
from tests.benchmarks.models import Transformer


def data(part, parts):
    return np.zeros((64, 65, 48), np.float32), np.zeros(64, np.int64)


def task():
    return Task(
        name="deep", build_model=lambda: Transformer(96, 98, 3, 65, 48), train_data=data,
        loss=functional.cross_entropy, training=Training(batch_size=32), lossy_prefix=True,
    )
"""
MEMORY_MIB = (220, 260, 300, 400, 700, 1500, 6000)
DEADLINES_S = (30.0, 300.0, 1000.0, 1e5)


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """One row a budget: what was chosen and how long that took."""
    with tempfile.TemporaryDirectory() as directory:
        costs = Path(directory) / "costs.json"
        task = Path(directory) / "task.py"
        task.write_text(TASK.format(root=str(Path.cwd())))
        _edge("plan", "--task", str(task), "--profile", "all", "--save-cost-table", str(costs))
        table = msgspec.json.decode(costs.read_bytes(), type=CostTable)
        start_s = time.perf_counter()
        _edge("plan", "--cost-table", str(costs), "--profile", "all")
        plan_all_s = time.perf_counter() - start_s
    budgets = list(itertools.product(DEADLINES_S, MEMORY_MIB))
    rows = [_row(table, *budget, repeats=3 if quick else 15) for budget in budgets]
    if "torch" in sys.modules:
        sys.exit("planning has loaded torch: nothing measured here counts")
    figures = {
        "choose_ms": max(row["median_ms"] for row in rows),
        "choose_worst_ms": max(row["worst_ms"] for row in rows),
        "plan_all_s": plan_all_s,
    }
    return figures, rows


def _row(table: CostTable, deadline_s: float, memory_mib: int, *, repeats: int) -> Row:
    limits = Limits(
        memory_bytes=memory_mib * MIB,
        bound_by="the profile",
        floor_bytes=180 * MIB,
        flops_per_s=5e9,
        uplink_bytes_per_s=1e6,
        downlink_bytes_per_s=1e6,
        storage_bytes=1 << 40,
        deadline_s=deadline_s,
        engines=("torch", "onnx", "onnx_int8"),
    )
    candidates = strategy_named("last_blocks").candidates(table.spec, table.spec.names)
    times_ms, blocks = [], 0
    for _ in range(repeats):
        start_s = time.perf_counter()
        with suppress(NothingFits):
            blocks = len(_choose(table, candidates, limits))
        times_ms.append(1e3 * (time.perf_counter() - start_s))
    return {
        "deadline_s": deadline_s,
        "memory_mib": memory_mib,
        "blocks": blocks,
        "median_ms": statistics.median(times_ms),
        "worst_ms": max(times_ms),
    }


def _choose(
    table: CostTable, candidates: Sequence[tuple[str, ...]], limits: Limits
) -> tuple[str, ...]:
    return choose(
        table,
        candidates,
        Training(batch_size=32),
        limits,
        num_examples=400,
        codec="balanced",
        bits_per_param=bits_per_param("balanced"),
    ).blocks


def _edge(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)


if __name__ == "__main__":
    run("planner_speed", __doc__, measure)

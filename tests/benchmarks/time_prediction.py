"""Predicted seconds of a training step against measured ones.

    python -m tests.benchmarks.time_prediction [--quick] [--json FILE]

The same cases as `memory_prediction`, after one calibration of the machine. A trainer that has
trained before takes some more steps, three times; the fastest counts, because other work on the
machine can only slow it down.
"""

from __future__ import annotations

import statistics

from tests.benchmarks.bench import Row, run
from tests.benchmarks.training_cases import Machine, Outcome, outcomes

SHARE = 0.30


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Figures over all cases, and a row for each."""
    machine = Machine.calibrated(2.0)
    found = list(outcomes(quick, machine, timed=True))
    ratios = [o.predicted_step_s / o.measured_step_s for o in found]
    figures = {
        "cases": float(len(found)),
        "within_30pct_share": sum(abs(ratio - 1) <= SHARE for ratio in ratios) / len(found),
        "median_ratio": statistics.median(ratios),
    }
    return figures, [row(outcome) for outcome in found]


def row(outcome: Outcome) -> Row:
    """What was said, what was measured."""
    case = outcome.case
    return {
        "model": case.model,
        "trains": case.blocks,
        "batch": case.batch,
        "optimizer": case.optimizer,
        "how": case.how,
        "predicted_ms": 1e3 * outcome.predicted_step_s,
        "measured_ms": 1e3 * outcome.measured_step_s,
        "ratio": outcome.predicted_step_s / outcome.measured_step_s,
    }


if __name__ == "__main__":
    run("time_prediction", __doc__, measure)

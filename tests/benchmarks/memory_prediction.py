"""Predicted peak memory against the measured one of a fresh trainer process.

    python -m tests.benchmarks.memory_prediction [--quick] [--json FILE]

The machine is calibrated once, as `edge-sdk profile` does. Each case then starts a trainer, takes
what it says of its task and its floor, prices one way of training and carries it out.
"""

from __future__ import annotations

from edge_sdk.errors import MIB
from tests.benchmarks.bench import Row, run
from tests.benchmarks.training_cases import Machine, Outcome, outcomes

SHARE, SLACK_BYTES = 0.10, 8 * MIB


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Figures over all cases, and a row for each."""
    machine = Machine.calibrated(2.0)
    found = list(outcomes(quick, machine, timed=False))
    under = [
        (o.measured_bytes - o.predicted_bytes) / (o.floor_bytes + o.measured_bytes) for o in found
    ]
    figures = {
        "cases": float(len(found)),
        "within_share": sum(map(is_within, found)) / len(found),
        "worst_under_pct": 100 * max(0.0, *under),
        "floor_mib": found[0].floor_bytes / MIB,
    }
    return figures, [row(outcome) for outcome in found]


def is_within(outcome: Outcome) -> bool:
    """Within 10 % or 8 MiB, whichever is more."""
    off = abs(outcome.measured_bytes - outcome.predicted_bytes)
    return off <= max(SHARE * outcome.measured_bytes, SLACK_BYTES)


def row(outcome: Outcome) -> Row:
    """What was said, what was measured, MiB above the floor."""
    case = outcome.case
    return {
        "model": case.model,
        "trains": case.blocks,
        "batch": case.batch,
        "optimizer": case.optimizer,
        "how": case.how,
        "predicted_mib": outcome.predicted_bytes / MIB,
        "measured_mib": outcome.measured_bytes / MIB,
        "off_mib": (outcome.measured_bytes - outcome.predicted_bytes) / MIB,
        "within": is_within(outcome),
    }


if __name__ == "__main__":
    run("memory_prediction", __doc__, measure)

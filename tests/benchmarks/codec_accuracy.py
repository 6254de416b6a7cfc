"""What the codecs cost in accuracy, and what they save: federated training with natural clients.

    python -m tests.benchmarks.codec_accuracy [--quick] [--json FILE]

HAPT (21 subjects; tested on 9 others), next characters of plays (99 roles) and pairs of spoken and
written digits (6 speakers), 5 seeds each. FedAvg in one process through the real codec, sums and
update messages. Accuracy is in points and final: the mean of the last three rounds. The drop is
lossless minus codec with the same seed, the mean over data sets and seeds. A ratio is the bytes of
float32 updates of the same tensors, header included, over the bytes sent. The partial run has
devices of three kinds: they train everything, the last block and the head, or the two last and the
head, and send it with `tiny`. Its ratio is the mean over those data sets in which it ends within a
point of full training, all in float32; the number of data sets in which it does is a figure too.
"""

from __future__ import annotations

import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import NamedTuple

import torch

from tests.benchmarks.bench import Row
from tests.benchmarks.bench import run as run_benchmark
from tests.benchmarks.federated import CASES, FINAL_ROUNDS, Case, Run, federated

SEEDS, QUICK_SEEDS, QUICK_ROUNDS = 5, 1, 2
WORKERS = 2


class Arm(NamedTuple):
    """A way to send; depths as for ``federated``."""

    name: str
    codec: str
    depths: tuple[int, ...] = (0,)


REFERENCE = Arm("lossless", "lossless")
ARMS = (
    REFERENCE,
    Arm("balanced", "balanced"),
    Arm("tiny", "tiny"),
    Arm("partial", "tiny", (0, 1, 2)),
)


class Job(NamedTuple):
    """One run: which case, which way, which seed, how many rounds (0: the case's own)."""

    case: int
    arm: Arm
    seed: int
    rounds: int


@cache
def case(number: int) -> Case:
    """A case, its data read once in a process."""
    return CASES[number]()


def carried_out(job: Job) -> Run:
    """The run of a job, on one thread."""
    torch.set_num_threads(1)
    return federated(case(job.case), job.seed, job.arm.codec, job.arm.depths, rounds=job.rounds)


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Figures, and a row for each data set and way to send."""
    rounds = QUICK_ROUNDS if quick else 0
    seeds = range(QUICK_SEEDS if quick else SEEDS)
    jobs = [Job(c, arm, s, rounds) for s in seeds for c in range(len(CASES)) for arm in ARMS]
    with ProcessPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        runs = dict(zip(jobs, pool.map(carried_out, jobs), strict=True))
    rows, partial_ratios = [], []
    drops: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    ratios: dict[str, list[float]] = {arm.name: [] for arm in ARMS}
    for number, made in enumerate(CASES):
        full = [runs[Job(number, REFERENCE, seed, rounds)] for seed in seeds]
        full_bytes = sum(run.float32_bytes for run in full)
        for arm in ARMS:
            mine = [runs[Job(number, arm, seed, rounds)] for seed in seeds]
            lost = [a.final - b.final for a, b in zip(full, mine, strict=True)]
            sent_bytes = sum(run.upload_bytes for run in mine)
            drops[arm.name] += lost
            ratios[arm.name].append(sum(run.float32_bytes for run in mine) / sent_bytes)
            if arm.name == "partial" and statistics.mean(lost) <= 1.0:
                partial_ratios.append(full_bytes / sent_bytes)
            rows.append({
                "data": made.__name__,
                "sent": arm.name,
                "final_accuracy": statistics.mean(run.final for run in mine),
                "drop_points": statistics.mean(lost),
                "drop_spread": statistics.stdev(lost) if len(lost) > 1 else 0.0,
                "bits_per_param": 8 * sent_bytes / sum(run.change_elements for run in mine),
                "upload_mb": sent_bytes / len(mine) / 1e6,
                "fewer_bytes_than_full_float32": full_bytes / sent_bytes,
            })  # fmt: skip
    figures = {
        "balanced_drop_points": statistics.mean(drops["balanced"]),
        "tiny_drop_points": statistics.mean(drops["tiny"]),
        "partial_drop_points": statistics.mean(drops["partial"]),
        "balanced_drop_error": error(drops["balanced"]),
        "tiny_drop_error": error(drops["tiny"]),
        "balanced_ratio": statistics.mean(ratios["balanced"]),
        "tiny_ratio": statistics.mean(ratios["tiny"]),
        "partial_total_ratio": statistics.mean(partial_ratios) if partial_ratios else 0.0,
        "partial_data_sets": len(partial_ratios),
        "final_rounds": FINAL_ROUNDS,
    }
    return figures, rows


def error(values: list[float]) -> float:
    """Standard error of the mean of runs, each of its own seed and data."""
    return statistics.stdev(values) / len(values) ** 0.5


if __name__ == "__main__":
    run_benchmark("codec_accuracy", __doc__, measure)

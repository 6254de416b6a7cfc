"""Full training against the last blocks: memory, operations, seconds, and the smallest cgroup.

    python -m tests.benchmarks.full_against_partial [--quick] [--json FILE]

ViT-Tiny, with its 197 tokens and with 65, and a transformer of 19 million parameters. Every arm
trains in a trainer of its own; memory is its peak above the runtime floor. Operations are the cost
table's. Then, for the larger model, the smallest memory cgroup in which an arm finishes, by
bisection: the process is in it from its start, nothing else bounds it, and every try is a new
process with nothing kept of the one before. Pages of libraries that others on this machine have
read already are not charged to the group; the kernel could take them back, so they do not decide.
The naive arm is a plain torch loop with torch's own Adam and glibc's default allocator.
Needs the right to make memory cgroups.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.blocks import ModelSpec
from edge_sdk.cost import CostTable
from edge_sdk.errors import MIB
from edge_sdk.memory import MALLOC, THREAD_LIMITS
from edge_sdk.plan import Plan
from edge_sdk.rehearse import Rehearsal
from edge_sdk.trainer import Described, Setup, Train
from edge_sdk.ways import Costing, FrozenPrefix, Way
from edge_sdk.wire import BlockEntry, Offer, Training, UpdateMetrics
from tests.benchmarks.bench import Row, run
from tests.benchmarks.smallest_cgroup import (
    TRY_LIMIT_S,
    program_finishes,
    smallest_mib,
    trainer_finishes,
)
from tests.benchmarks.training_cases import OPTIMIZERS, THREADS, Machine

# How finely a limit is sought.
STEP_MIB, QUICK_STEP_MIB = 4, 16
# Resident pages of libraries, which are not charged; what the naive loop is guessed to need.
LIBRARIES_MIB, NAIVE_GUESS_MIB = 90, 600
AT_A_TIME = 2
STORAGE_BYTES = 1 << 32

NAIVE = """
import sys
from pathlib import Path
import torch
from edge_sdk.task import load_task

task, batch, steps = load_task(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
inputs, labels = (torch.from_numpy(array) for array in task.train_data(0, 1))
model = task.build_model()
optimizer = torch.optim.Adam(model.parameters())
for step in range(steps):
    chosen = torch.arange(step * batch, (step + 1) * batch) % len(labels)
    optimizer.zero_grad()
    task.loss(model(inputs[chosen]), labels[chosen]).backward()
    optimizer.step()
torch.save(model.state_dict(), sys.argv[4])
"""


@dataclass(frozen=True)
class Arm:
    """One way to train one model.

    blocks:      how many of its last blocks train, the head apart; 0 is all.
    micro_batch: 0 is the whole batch.
    sought:      whether its smallest cgroup is sought.
    """

    name: str
    model: str
    batch: int
    optimizer: str
    blocks: int = 0
    micro_batch: int = 0
    best: bool = False
    cached: bool = False
    sought: bool = False
    in_quick: bool = False

    def trained(self, spec: ModelSpec) -> tuple[str, ...]:
        """Names of the trained blocks."""
        return spec.names[-self.blocks - 1 :] if self.blocks else spec.names

    def runs(self, quick: bool) -> bool:
        """Whether it is measured."""
        return self.in_quick or not quick

    @property
    def samples(self) -> int:
        """As many as a few steps need."""
        return max(16, 2 * self.batch)

    @property
    def training(self) -> Training:
        """One epoch, which is at least two steps."""
        return msgspec.structs.replace(
            OPTIMIZERS[self.optimizer], batch_size=self.batch, local_epochs=1
        )

    def is_way(self, way: Way) -> bool:
        """Whether the planner's way is this arm."""
        levers = way.levers
        engine, cache = way.prefix.engine, way.prefix.cache
        return (
            (engine, cache) == ("torch", "disk" if self.cached else "none")
            and way.micro_batch == (self.micro_batch or self.batch)
            and (levers.checkpoint, levers.step_in_backward) == (self.best, self.best)
        )

    def plan(self, spec: ModelSpec) -> Plan:
        """What the trainer is told; figures do not matter to it."""
        blocks = self.trained(spec)
        prefix = tuple(name for name in spec.names if name not in blocks)
        return Plan(
            blocks=blocks,
            batch_size=self.batch,
            micro_batch=self.micro_batch or self.batch,
            codec="balanced",
            checkpoint=self.best,
            step_in_backward=self.best,
            prefix=FrozenPrefix(blocks=prefix, cache="disk" if self.cached else "none"),
            peak_bytes=0,
            budget_bytes=1 << 50,
            train_s=0.0,
            round_s=0.0,
            upload_bytes=0,
            flops=0,
        )


VIT, SHORT_VIT, LARGE = "vit-tiny", "vit-tiny-65", "transformer-19m"
NAIVE_LOOP, DESCRIBING = "full, naive loop", "describing the task"
MEASURED = (
    "predicted_mib", "measured_mib", "mflops_per_sample", "predicted_step_s", "step_s",
)  # fmt: skip
ARMS = (
    Arm("full", VIT, 16, "momentum", in_quick=True),
    Arm("full, recomputing, in backward", VIT, 16, "momentum", best=True),
    Arm("last 2", VIT, 16, "momentum", blocks=2, in_quick=True),
    Arm("last 2, cached", VIT, 16, "momentum", blocks=2, cached=True),
    Arm("full", SHORT_VIT, 32, "momentum"),
    Arm("last 2", SHORT_VIT, 32, "momentum", blocks=2),
    Arm("last 2, cached", SHORT_VIT, 32, "momentum", blocks=2, cached=True),
    Arm("full", LARGE, 8, "adam", sought=True),
    Arm("full, recomputing, in backward", LARGE, 8, "adam", best=True, sought=True, in_quick=True),
    Arm("full, micro-batches of 1", LARGE, 8, "adam", micro_batch=1, sought=True),
    Arm("last 2", LARGE, 8, "adam", blocks=2),
    Arm("last 1", LARGE, 8, "adam", blocks=1, sought=True),
    Arm("last 1, cached", LARGE, 8, "adam", blocks=1, cached=True, sought=True, in_quick=True),
    Arm("last 1, cached, micro 1", LARGE, 8, "sgd", blocks=1, micro_batch=1, cached=True,
        sought=True),
)  # fmt: skip


@dataclass(frozen=True)
class Desk:
    """What all tries of an arm share: ``home`` has the task file and the blocks to start from."""

    arm: Arm
    home: Path
    table: CostTable
    entries: tuple[BlockEntry, ...]

    def finishes(self, limit_bytes: int, *, describe: bool = False) -> bool:
        """Whether a new trainer carries the arm out under a limit; or only describes the task."""
        with tempfile.TemporaryDirectory(dir=self.home) as kept:
            setup = Setup(
                job="try",
                task_path=str(self.home / "task.py"),
                part=0,
                parts=1,
                cache_dir=str(self.home / "blocks"),
                spool_dir=f"{kept}/spool",
                prefix_dir=f"{kept}/prefix",
                storage_bytes=STORAGE_BYTES,
                threads=THREADS,
            )
            return trainer_finishes(setup, None if describe else self._order(), limit_bytes)

    def naive_finishes(self, limit_bytes: int) -> bool:
        """Whether the plain loop finishes under a limit."""
        surroundings = {key: value for key, value in os.environ.items() if key not in MALLOC}
        surroundings |= dict.fromkeys(THREAD_LIMITS, str(THREADS))
        with tempfile.TemporaryDirectory(dir=self.home) as kept:
            task, weights = str(self.home / "task.py"), f"{kept}/weights"
            command = [sys.executable, "-c", NAIVE, task, str(self.arm.batch), "2", weights]
            return program_finishes(command, surroundings, limit_bytes)

    def _order(self) -> Train:
        plan = self.arm.plan(self.table.spec)
        offer = Offer(
            round=1,
            ticket=bytes(16),
            version=0,
            base_sha="0" * 64,
            blocks=self.entries,
            strategy="last_blocks",
            open_blocks=self.table.spec.names,
            codec=plan.codec,
            deadline_s=TRY_LIMIT_S,
            training=self.arm.training,
        )
        return Train(offer=offer, plan=plan)


@dataclass(frozen=True)
class Outcome:
    """What was said and measured of one arm; bytes above the floor."""

    floor_bytes: int
    predicted_bytes: int
    measured_bytes: int
    flops_per_sample: int
    predicted_step_s: float
    step_s: float


def measured(arm: Arm, home: Path, machine: Machine, *, timed: bool) -> tuple[Desk, Outcome]:
    """One round in a new trainer for memory, and others for time."""
    home.mkdir()
    task = home / "task.py"
    task.write_text(
        f"import dataclasses\nimport sys\nsys.path.insert(0, {str(Path.cwd())!r})\n"
        "from tests.benchmarks.models import task_named\n\n\n"
        f"def task():\n    whole = task_named({arm.model!r}, batch_size={arm.batch})\n"
        "    inputs, labels = whole.train_data(0, 1)\n"
        f"    some = inputs[:{arm.samples}].copy(), labels[:{arm.samples}].copy()\n"
        "    return dataclasses.replace(whole, train_data=lambda part, parts: some)\n"
    )
    with Rehearsal(task, home, threads=THREADS, storage_bytes=STORAGE_BYTES) as rehearsal:
        described = rehearsal.start()
        assert isinstance(described, Described), described
        spec = described.table.spec
        way = way_of(arm, described.table, machine, described.floor_bytes)
        rounds = [rehearsal.round(arm.plan(spec), arm.training) for _ in range(3 if timed else 1)]
    metrics = [m for m in rounds if isinstance(m, UpdateMetrics)]
    assert len(metrics) == len(rounds), rounds
    return Desk(arm, home, described.table, rehearsal.published.entries), Outcome(
        floor_bytes=described.floor_bytes,
        predicted_bytes=way.peak_bytes - described.floor_bytes,
        measured_bytes=metrics[0].measured_peak_bytes - described.floor_bytes,
        flops_per_sample=way.flops // arm.samples,
        predicted_step_s=way.step_s,
        step_s=min(m.train_s / m.steps for m in metrics),
    )


def way_of(arm: Arm, table: CostTable, machine: Machine, floor_bytes: int) -> Way:
    """The arm as the planner prices it."""
    limits = msgspec.structs.replace(machine.limits(floor_bytes), storage_bytes=STORAGE_BYTES)
    costing = Costing(table, arm.training, limits, arm.samples)
    return next(way for way in costing.ways(arm.trained(table.spec)) if arm.is_way(way))


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Figures, and a row for each arm."""
    machine = Machine.calibrated(0.5 if quick else 2.0)
    with tempfile.TemporaryDirectory() as directory:
        chosen = {arm: Path(directory) / str(n) for n, arm in enumerate(ARMS) if arm.runs(quick)}

        def arm_measured(item: tuple[Arm, Path]) -> tuple[Desk, Outcome]:
            return measured(*item, machine, timed=not quick)

        # Memory does not depend on what else runs; seconds do, a little.
        with ThreadPoolExecutor(AT_A_TIME if quick else 1) as pool:
            both = dict(zip(chosen, pool.map(arm_measured, chosen.items()), strict=True))
        desks = {arm: desk for arm, (desk, _) in both.items()}
        found = {arm: outcome for arm, (_, outcome) in both.items()}
        least = sought(desks, found, quick)
    tables = {arm.model: desk.table for arm, desk in desks.items()}
    figures = {
        **ratios(found, VIT, ""),
        **ratios(found, SHORT_VIT, "_65_tokens"),
        **ratios(found, LARGE, "_19m"),
        **flops_ratios(tables, machine),
        **limits(least),
        "worst_under_pct": 100 * max(map(under, found.values())),
    }
    return figures, [*rows(found, least), *other_rows(least)]


def sought(desks: dict[Arm, Desk], found: dict[Arm, Outcome], quick: bool) -> dict[Any, int]:
    """The smallest cgroups in MiB, by arm or by what else was tried."""
    step_mib = QUICK_STEP_MIB if quick else STEP_MIB
    desk = next(desk for arm, desk in desks.items() if arm.sought)
    tries: dict[Any, tuple[Callable[[int], bool], float]] = {
        NAIVE_LOOP: (desk.naive_finishes, NAIVE_GUESS_MIB)
    }
    for arm in (arm for arm in desks if arm.sought):
        outcome = found[arm]
        peak_bytes = outcome.floor_bytes + outcome.measured_bytes
        tries[arm] = (desks[arm].finishes, peak_bytes / MIB - LIBRARIES_MIB)
    if not quick:
        guess_mib = desk.table.spec.size_bytes / MIB + NAIVE_GUESS_MIB / 3
        tries[DESCRIBING] = (lambda limit: desk.finishes(limit, describe=True), guess_mib)
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        running = {
            what: pool.submit(smallest_mib, finishes, guess_mib, step_mib)
            for what, (finishes, guess_mib) in tries.items()
        }
        return {what: future.result() for what, future in running.items()}


def ratios(found: dict[Arm, Outcome], model: str, suffix: str) -> dict[str, float]:
    """Full training of a model over its last blocks, as far as measured."""
    arms = {arm.name: outcome for arm, outcome in found.items() if arm.model == model}
    result = {}
    for name in ("last 2", "last 2, cached", "last 1, cached"):
        if name in arms and "full" in arms:
            key = name.replace("last ", "last").replace(", ", "_")
            over = arms["full"].measured_bytes / arms[name].measured_bytes
            result[f"memory_ratio_{key}{suffix}"] = over
            result[f"step_ratio_{key}{suffix}"] = arms["full"].step_s / arms[name].step_s
    return result


def flops_ratios(tables: dict[str, CostTable], machine: Machine) -> dict[str, float]:
    """Operations of full training over those of its last blocks."""
    vit = {arm.name: arm for arm in ARMS if arm.model == VIT}
    large = {arm.name: arm for arm in ARMS if arm.model == LARGE}

    def over(arms: dict[str, Arm], part: str) -> float:
        full, some = (
            way_of(arm, tables[arm.model], machine, 0).flops for arm in (arms["full"], arms[part])
        )
        return full / some

    return {
        "flops_ratio_last2": over(vit, "last 2"),
        "flops_ratio_last_stage_cached": over(vit, "last 2, cached"),
        "flops_ratio_last1_cached_19m": over(large, "last 1, cached"),
    }


def limits(least: dict[Any, int]) -> dict[str, float]:
    """The smallest cgroups of full training, naive and at best, and of the last block."""
    best = [mib for arm, mib in least.items() if isinstance(arm, Arm) and not arm.blocks]
    part = {arm.optimizer: mib for arm, mib in least.items() if arm in ARMS and arm.cached}
    result: dict[str, float] = {
        "min_memory_full_mb": least[NAIVE_LOOP],
        "min_memory_full_best_mb": min(best),
        "min_memory_partial_mb": part["adam"],
    }
    if "sgd" in part:
        result["min_memory_partial_sgd_mb"] = part["sgd"]
    if DESCRIBING in least:
        result["min_memory_describing_mb"] = least[DESCRIBING]
    return result


def under(outcome: Outcome) -> float:
    """By what share of the whole process its peak was predicted too low."""
    missing = outcome.measured_bytes - outcome.predicted_bytes
    return max(0.0, missing / (outcome.floor_bytes + outcome.measured_bytes))


def rows(found: dict[Arm, Outcome], least: dict[Any, int]) -> list[Row]:
    """What was said and measured of each arm; MiB above the floor, but for the cgroup."""
    return [
        {
            "model": arm.model,
            "trains": arm.name,
            "batch": arm.batch,
            "optimizer": arm.optimizer,
            "predicted_mib": outcome.predicted_bytes / MIB,
            "measured_mib": outcome.measured_bytes / MIB,
            "mflops_per_sample": outcome.flops_per_sample / 1e6,
            "predicted_step_s": outcome.predicted_step_s,
            "step_s": outcome.step_s,
            "smallest_cgroup_mib": least.get(arm, "-"),
        }
        for arm, outcome in found.items()
    ]


def other_rows(least: dict[Any, int]) -> list[Row]:
    """The smallest cgroups of what is no arm."""
    return [
        {
            "model": LARGE,
            "trains": what,
            "batch": "-" if what == DESCRIBING else 8,
            "optimizer": "-" if what == DESCRIBING else "adam",
            **dict.fromkeys(MEASURED, "-"),
            "smallest_cgroup_mib": least[what],
        }
        for what in (NAIVE_LOOP, DESCRIBING)
        if what in least
    ]


if __name__ == "__main__":
    run("full_against_partial", __doc__, measure)

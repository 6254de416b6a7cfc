"""Cases of local training: what the cost model says of each, and what a fresh trainer measures."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.cost import CostTable, Levers
from edge_sdk.measure import calibrate
from edge_sdk.plan import Limits, Plan
from edge_sdk.rehearse import Rehearsal
from edge_sdk.trainer import Described
from edge_sdk.ways import Costing, FrozenPrefix, Way
from edge_sdk.wire import Training, UpdateMetrics
from tests.benchmarks.models import SAMPLES

OPTIMIZERS = {
    "sgd": Training(optimizer="sgd", momentum=0.0),
    "momentum": Training(optimizer="sgd", momentum=0.9),
    "adam": Training(optimizer="adam"),
}
THREADS = 1
MEMORY_STEPS, TIMED_STEPS = 3, 6


@dataclass(frozen=True)
class Case:
    """One way to train one model; ``micro_batch`` 0 is the whole batch."""

    model: str
    blocks: str
    batch: int
    optimizer: str
    micro_batch: int = 0
    checkpoint: bool = False
    step_in_backward: bool = False

    def trained(self, table: CostTable) -> tuple[str, ...]:
        """The names of the trained blocks: full, last-2 or middle (one block and the head)."""
        names = table.spec.names
        if self.blocks == "full":
            return names
        if self.blocks == "middle":
            return (names[len(names) // 2], names[-1])
        return names[-int(self.blocks.removeprefix("last-")) :]

    @property
    def how(self) -> str:
        """The levers in words."""
        words = [f"micro {self.micro_batch}"] if self.micro_batch else []
        words += ["checkpoint"] * self.checkpoint + ["in backward"] * self.step_in_backward
        return ", ".join(words) or "plain"


@dataclass(frozen=True)
class Outcome:
    """What was said and what was measured; bytes above the floor, seconds a step."""

    case: Case
    floor_bytes: int
    predicted_bytes: int
    measured_bytes: int
    predicted_step_s: float
    measured_step_s: float


def cases(quick: bool) -> list[Case]:
    """At least 60; a few of them when quick."""
    found = []
    for model in ("mlp", "resnet", "transformer", "two-modalities"):
        for blocks in ("last-1", "last-3", "middle", "full"):
            for batch, optimizer in ((1, "sgd"), (8, "adam"), (32, "momentum"), (64, "sgd")):
                batch = max(2, batch) if model == "resnet" else batch
                found.append(Case(model, blocks, batch, optimizer))
    for model in ("transformer", "resnet", "transformer-19m"):
        found.append(Case(model, "full", 16, "adam"))
        found.append(Case(model, "full", 32, "adam", micro_batch=8))
        found.append(Case(model, "last-3", 16, "adam", checkpoint=True))
        found.append(Case(model, "full", 16, "momentum", checkpoint=True, step_in_backward=True))
    found += [Case("recurrent", blocks, 32, "adam") for blocks in ("full", "last-1")]
    return found[1:64:13] + found[-9:-8] if quick else found


@dataclass(frozen=True)
class Machine:
    """One calibration of this machine."""

    rates: dict[str, float]
    overhead: dict[str, int]

    @classmethod
    def calibrated(cls, seconds: float) -> Machine:
        """Calibrate now, as ``edge-sdk profile`` does."""
        found, reason = calibrate(seconds, THREADS, 60 + 3 * seconds)
        if not found.rates:
            sys.exit(f"this machine cannot be calibrated: {reason}")
        return cls({key: rate.per_s for key, rate in found.rates.items()}, found.overhead)

    def limits(self, floor_bytes: int) -> Limits:
        """No limits at all, at this machine's prices."""
        return Limits(
            memory_bytes=1 << 50,
            bound_by="profile",
            floor_bytes=floor_bytes,
            flops_per_s=1e10,
            rates=self.rates,
            overhead=self.overhead,
            uplink_bytes_per_s=1e9,
            downlink_bytes_per_s=1e9,
            deadline_s=1e6,
        )


def outcomes(quick: bool, machine: Machine, *, timed: bool) -> Iterator[Outcome]:
    """Run every case in a trainer of its own."""
    with tempfile.TemporaryDirectory() as directory:
        for number, case in enumerate(cases(quick)):
            yield run_case(case, machine, Path(directory) / str(number), timed=timed)


def run_case(case: Case, machine: Machine, home: Path, *, timed: bool) -> Outcome:
    """One case: predicted from the trainer's own description, measured in its first round."""
    home.mkdir()
    training = Training(
        **{
            **{f: getattr(OPTIMIZERS[case.optimizer], f) for f in ("optimizer", "momentum")},
            "batch_size": case.batch,
            "learning_rate": 1e-5,
            "local_epochs": -(-MEMORY_STEPS * case.batch // SAMPLES),
        }
    )
    task = home / "task.py"
    task.write_text(
        f"import sys\nsys.path.insert(0, {str(Path.cwd())!r})\n"
        "from tests.benchmarks.models import task_named\n\n\n"
        f"def task():\n    return task_named({case.model!r}, batch_size={case.batch})\n"
    )
    with Rehearsal(task, home, threads=THREADS) as rehearsal:
        described = rehearsal.start()
        assert isinstance(described, Described), described
        way = predicted(case, described, machine, training)
        plan = plan_of(case.trained(described.table), way, training, MEMORY_STEPS)
        first = rehearsal.round(plan, training)
        assert isinstance(first, UpdateMetrics), first
        step_s = first.train_s / first.steps
        if timed:
            step_s = min(timed_step_s(rehearsal, plan, training) for _ in range(3))
    return Outcome(
        case=case,
        floor_bytes=described.floor_bytes,
        predicted_bytes=way.peak_bytes - described.floor_bytes,
        measured_bytes=first.measured_peak_bytes - described.floor_bytes,
        predicted_step_s=way.step_s,
        measured_step_s=step_s,
    )


def timed_step_s(rehearsal: Rehearsal, plan: Plan, training: Training) -> float:
    """Seconds of a step, over some steps of a warm trainer."""
    import msgspec

    plan = msgspec.structs.replace(plan, steps=TIMED_STEPS)
    training = msgspec.structs.replace(
        training, local_epochs=-(-TIMED_STEPS * plan.batch_size // SAMPLES)
    )
    metrics = rehearsal.round(plan, training)
    assert isinstance(metrics, UpdateMetrics), metrics
    return metrics.train_s / metrics.steps


def predicted(case: Case, described: Described, machine: Machine, training: Training) -> Way:
    """The way the case trains, as the planner prices it."""
    levers = Levers(
        accumulate=0 < case.micro_batch < case.batch,
        checkpoint=case.checkpoint,
        step_in_backward=case.step_in_backward,
    )
    costing = Costing(
        described.table, training, machine.limits(described.floor_bytes), described.num_examples
    )
    micro_batch = case.micro_batch or case.batch
    for way in costing.ways(case.trained(described.table)):
        if (way.levers, way.micro_batch) == (levers, micro_batch):
            return way
    raise ValueError(f"no way of training is {case}")


def plan_of(blocks: Sequence[str], way: Way, training: Training, steps: int) -> Plan:
    """The plan that carries a way out."""
    return Plan(
        blocks=tuple(blocks),
        batch_size=training.batch_size,
        micro_batch=way.micro_batch,
        codec="balanced",
        steps=steps,
        checkpoint=way.levers.checkpoint,
        step_in_backward=way.levers.step_in_backward,
        prefix=way.prefix if way.levers.cached else FrozenPrefix(blocks=way.prefix.blocks),
        peak_bytes=way.peak_bytes,
        budget_bytes=1 << 50,
        train_s=way.train_s,
        round_s=way.train_s,
        upload_bytes=0,
        flops=way.flops,
    )

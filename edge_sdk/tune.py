"""Measure a few plans on this very device, and how far predictions of them are off.

Every plan is carried out twice, in the trainer's own process: some steps to see what it takes, then
as many as there is time for. What is predicted is memory above the floor, and seconds of a step.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from edge_sdk.allowance import HEADROOM_SHARE, Allowance, engines, limits_of
from edge_sdk.corrections import LEAST_MEMORY_BYTES, LEAST_TIME_S, UNCORRECTED
from edge_sdk.cost import CostTable
from edge_sdk.errors import MIB, ConfigError, NothingFits
from edge_sdk.figures import CORRECTION_LIMITS
from edge_sdk.plan import Plan
from edge_sdk.profile import Correction, DeviceProfile
from edge_sdk.rehearse import Died, Rehearsal
from edge_sdk.strategies import strategy_named
from edge_sdk.trainer import Described, Failed
from edge_sdk.ways import Costing, Limits, Way
from edge_sdk.wire import Training, UpdateMetrics

# Too little memory costs a round: a correction takes little of it away.
LEAST_MEMORY = 0.8
MOST_STEPS, WARM_STEPS, SAMPLED_STEPS = 300, 2, 3
# More of one plan teaches nothing new.
SLICE_S = 5.0
ANY_TIME_S = 1e7


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One plan: predicted uncorrected, and measured; bytes above the floor, seconds of a step.

    what:    why it was chosen; ``judged`` plans count in the correction.
    problem: why it was not measured; memory is then what it had when it was stopped, or 0.
    """

    what: str
    plan: Plan
    judged: bool
    predicted_bytes: int
    measured_bytes: int
    predicted_step_s: float
    measured_step_s: float
    steps: int
    problem: str = ""


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """A plan to be measured; ``once_s`` is what its frozen prefix takes once besides."""

    what: str
    plan: Plan
    judged: bool
    step_s: float
    once_s: float


class Tuned(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured for a task, the correction it leads to, and the one there was before.

    engine_step_s: seconds of a step by what runs the frozen blocks, the fastest first.
    """

    task: str
    floor_bytes: int
    rows: tuple[Measured, ...]
    correction: Correction
    before: Correction
    engine_step_s: dict[str, float]


def tune_task(
    profile: DeviceProfile, task_path: Path, directory: Path, *,
    seconds: float, strategy: str, memory_mb: int | None, part: int, parts: int,
    tell: Callable[[str], None],
) -> Tuned:  # fmt: skip
    """Measure for at most so long; ``tell`` hears what is at work. ConfigError when nothing can be.

    ``directory`` holds the blocks and what is kept of frozen ones meanwhile.
    """
    tell("starting the trainer")
    with Rehearsal(
        task_path, directory, part=part, parts=parts, storage_bytes=profile.storage_bytes,
        threads=max(1, min(profile.cores, os.cpu_count() or 1)),
    ) as rehearsal:  # fmt: skip
        described = rehearsal.start()
        if not isinstance(described, Described):
            raise NothingFits(f"{profile.name}: {described}; free memory and try again")
        table, training = described.table, rehearsal.published.training
        flag_bytes = None if memory_mb is None else memory_mb * MIB
        allowance = Allowance(
            profile, flag_bytes, directory, prefix_dir=directory / "prefix", simulated=True
        )
        limits = limits_of(
            profile, allowance.budget(rehearsal.pid), floor_bytes=described.floor_bytes,
            deadline_s=ANY_TIME_S, available_engines=engines(),
        )  # fmt: skip
        candidates = strategy_named(strategy).candidates(table.spec, table.spec.names)
        found = trials(table, candidates, training, limits, described.num_examples)
        rows = []
        for row in Tuning(rehearsal, training, seconds).measure(found):
            tell(f"measured: {row.what}")
            rows.append(row)
    if not any(row.measured_bytes and row.judged for row in rows):
        raise ConfigError(
            f"{profile.name}: no plan of task {table.task!r} could be measured: {rows[0].problem}; "
            "nothing is written"
        )
    return Tuned(
        task=table.task,
        floor_bytes=described.floor_bytes,
        rows=tuple(rows),
        correction=correction_from(rows),
        before=profile.corrections.get(table.task, UNCORRECTED),
        engine_step_s=engine_steps(rows),
    )


def trials(
    table: CostTable,
    candidates: Sequence[tuple[str, ...]],
    training: Training,
    limits: Limits,
    num_examples: int,
) -> list[Trial]:
    """A few unlike plans within the limits, the most wanted first; NothingFits when none is.

    The first candidate that fits memory, at the largest micro-batch; the same with activations
    computed again; the last candidate at a smaller one; with the frozen prefix kept, and by other
    engines than torch.
    """
    costing = Costing(table, training, limits, num_examples)
    fitting = [blocks for blocks in candidates if _ways(costing, blocks, limits)]
    if not fitting:
        unable = costing.unable(candidates[-1])
        if unable is not None:
            raise NothingFits(f"the cheapest plan ({', '.join(candidates[-1])}) {unable}")
        raise NothingFits(
            f"no plan fits {limits.memory_bytes / MIB:.0f} MiB, allowed by {limits.bound_by}, of "
            f"which torch takes {limits.floor_bytes / MIB:.0f} MiB; raise that limit if the device "
            "has room"
        )
    first, last = fitting[0], fitting[-1]
    frozen = next((blocks for blocks in fitting if costing.cut(blocks).blocks), last)
    found: dict[Plan, Trial] = {}
    for what, blocks, wanted, place in _wanted(first, last, frozen):
        ways = [way for way in _ways(costing, blocks, limits) if wanted(way)]
        if ways:
            way = ways[min(place, len(ways) - 1)]
            plan = _plan(blocks, way, training, limits)
            judged = way.prefix.engine == "torch"
            once_s = way.once_s
            trial = Trial(what=what, plan=plan, judged=judged, step_s=way.step_s, once_s=once_s)
            found.setdefault(plan, trial)
    return list(found.values())


_Wanted = tuple[str, tuple[str, ...], Callable[[Way], bool], int]


def _wanted(
    first: tuple[str, ...], last: tuple[str, ...], frozen: tuple[str, ...]
) -> Iterator[_Wanted]:
    """What to measure: name, blocks, which way, and which of its micro-batches from the largest."""
    yield "largest", first, _plain, 0
    yield "smallest", last, _plain, 2
    yield "activations computed again", first, lambda way: way.levers.checkpoint, 0
    yield "frozen blocks kept", frozen, lambda way: _runs(way, "torch", "memory"), 0
    yield "frozen blocks in torch", frozen, _plain, 0
    yield "frozen blocks in onnx", frozen, lambda way: _runs(way, "onnx", "none"), 0
    yield "frozen blocks in onnx_int8", frozen, lambda way: _runs(way, "onnx_int8", "none"), 0


def _plain(way: Way) -> bool:
    return _runs(way, "torch", "none") and not way.levers.checkpoint


def _runs(way: Way, engine: str, cache: str) -> bool:
    exact = way.prefix.dtype == "float32"
    return exact and (way.prefix.engine, way.prefix.cache) == (engine, cache)


def _ways(costing: Costing, blocks: tuple[str, ...], limits: Limits) -> list[Way]:
    """Those that fit memory, the largest micro-batch first, without steps in backward."""
    found = [way for way in costing.ways(blocks) if not way.levers.step_in_backward]
    found = [way for way in found if way.peak_bytes <= limits.memory_bytes]
    return sorted(found, key=lambda way: -way.micro_batch)


def _plan(blocks: tuple[str, ...], way: Way, training: Training, limits: Limits) -> Plan:
    return Plan(
        blocks=blocks,
        batch_size=training.batch_size,
        micro_batch=way.micro_batch,
        codec="fp16",
        checkpoint=way.levers.checkpoint,
        prefix=way.prefix,
        peak_bytes=way.peak_bytes,
        budget_bytes=int(limits.memory_bytes / (1 - HEADROOM_SHARE)),
        train_s=way.train_s,
        round_s=way.train_s,
        upload_bytes=0,
        flops=way.flops,
    )


class Tuning:
    """Measures trials one after the other, until the time is over."""

    def __init__(
        self, rehearsal: Rehearsal, training: Training, seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._rehearsal, self._training, self._clock = rehearsal, training, clock
        self._end_s = clock() + seconds

    def measure(self, found: Iterable[Trial]) -> Iterator[Measured]:
        """Every trial; those there is no time for with that as the problem."""
        rest = list(found)
        while rest:
            trial = rest.pop(0)
            left_s = self._end_s - self._clock()
            share_s = min(SLICE_S, left_s / (1 + len(rest)))
            if left_s <= 0:
                yield _unmeasured(trial, self._floor_bytes, "no time was left")
            else:
                yield self._measured(trial, share_s)

    @property
    def _floor_bytes(self) -> int:
        assert self._rehearsal.described is not None
        return self._rehearsal.described.floor_bytes

    def _measured(self, trial: Trial, share_s: float) -> Measured:
        plan, floor_bytes = trial.plan, self._floor_bytes
        if plan.prefix.cache != "none":
            epoch_s = trial.once_s + 2 * trial.step_s * self._epoch_steps
            if epoch_s > share_s:
                return _unmeasured(
                    trial,
                    floor_bytes,
                    f"takes about {epoch_s:.0f} s, there is time for {share_s:.0f}",
                )
        self._rehearsal.confine(plan.budget_bytes)
        first = self._round(plan, WARM_STEPS)
        if not isinstance(first, UpdateMetrics):
            return self._failed(trial, first)
        step_s = first.train_s / first.steps
        steps = max(SAMPLED_STEPS, min(MOST_STEPS, int((share_s - first.train_s) / step_s)))
        second = self._round(plan, steps)
        if not isinstance(second, UpdateMetrics):
            return self._failed(trial, second)
        peak_bytes = max(first.measured_peak_bytes, second.measured_peak_bytes)
        return Measured(
            what=trial.what,
            plan=plan,
            judged=trial.judged,
            predicted_bytes=plan.peak_bytes - floor_bytes,
            measured_bytes=max(0, peak_bytes - floor_bytes),
            predicted_step_s=trial.step_s,
            measured_step_s=second.train_s / second.steps,
            steps=second.steps,
        )

    @property
    def _epoch_steps(self) -> int:
        assert self._rehearsal.described is not None
        return -(-self._rehearsal.described.num_examples // self._training.batch_size)

    def _round(self, plan: Plan, steps: int) -> UpdateMetrics | Failed | Died:
        """So many steps; of a plan that keeps its frozen prefix, one epoch: that fills it."""
        kept = plan.prefix.cache != "none"
        epochs = 1 if kept else min(1000, -(-steps // self._epoch_steps))
        training = msgspec.structs.replace(self._training, local_epochs=epochs)
        return self._rehearsal.round(
            msgspec.structs.replace(plan, steps=None if kept else steps), training
        )

    def _failed(self, trial: Trial, answer: Failed | Died) -> Measured:
        """It needs at least what it was allowed; the trainer is started again for the next."""
        if isinstance(answer, Died):
            memory, problem = answer.killed_for_memory, str(answer)
        else:
            memory, problem = answer.kind == "memory", answer.message
        floor_bytes = self._floor_bytes
        had_bytes = trial.plan.budget_bytes - floor_bytes if memory else 0
        if not isinstance(self._rehearsal.restart(), Described):
            self._end_s = self._clock()
        return _unmeasured(trial, floor_bytes, problem, had_bytes)


def _unmeasured(trial: Trial, floor_bytes: int, problem: str, had_bytes: int = 0) -> Measured:
    return Measured(
        what=trial.what,
        plan=trial.plan,
        judged=trial.judged,
        predicted_bytes=trial.plan.peak_bytes - floor_bytes,
        measured_bytes=had_bytes,
        predicted_step_s=trial.step_s,
        measured_step_s=0.0,
        steps=0,
        problem=problem,
    )


def correction_from(found: Iterable[Measured]) -> Correction:
    """The largest ratio of memory, the median ratio of time; 1 where nothing could be judged.

    What is predicted to be tiny says nothing: the runtime's own noise is as large.
    """
    judged = [row for row in found if row.judged]
    memory = [
        row.measured_bytes / row.predicted_bytes
        for row in judged
        if row.measured_bytes and row.predicted_bytes >= LEAST_MEMORY_BYTES
    ]
    times = [
        row.measured_step_s / row.predicted_step_s
        for row in judged
        if row.steps and row.steps * max(row.measured_step_s, row.predicted_step_s) >= LEAST_TIME_S
    ]
    most = CORRECTION_LIMITS["memory"].high
    low, high = CORRECTION_LIMITS["time"].low, CORRECTION_LIMITS["time"].high
    return Correction(
        memory=round(min(max(LEAST_MEMORY, *memory), most), 3) if memory else 1.0,
        time=round(min(max(statistics.median(times), low), high), 3) if times else 1.0,
        samples=max(len(memory), len(times)),
    )


def engine_steps(found: Iterable[Measured]) -> dict[str, float]:
    """Seconds of a step by the engine its frozen prefix runs in each time, the fastest first.

    Of plans that train the same blocks at the same micro-batch; empty when only one was measured.
    """
    rows = [row for row in found if row.steps and row.plan.prefix.cache == "none"]
    rows = [row for row in rows if row.plan.prefix.blocks and not row.plan.checkpoint]
    by_engine: dict[str, float] = {}
    others = [row for row in rows if row.plan.prefix.engine != "torch"]
    for row in rows:
        if any(_alike(row, other) for other in others):
            by_engine.setdefault(row.plan.prefix.engine, row.measured_step_s)
    fastest = sorted(by_engine.items(), key=lambda item: item[1])
    return dict(fastest) if len(fastest) > 1 else {}


def _alike(one: Measured, other: Measured) -> bool:
    return (one.plan.blocks, one.plan.micro_batch) == (other.plan.blocks, other.plan.micro_batch)

"""One local round here as on another board: in its memory, at its speed; predicted and measured."""

from __future__ import annotations

import math
import os
from pathlib import Path

import msgspec

from edge_sdk.allowance import HEADROOM_SHARE, engines, limits_of
from edge_sdk.cost import bits_per_param
from edge_sdk.errors import MIB, NothingFits
from edge_sdk.plan import Plan, choose
from edge_sdk.profile import Budget, DeviceProfile, budget
from edge_sdk.quota import LEAST_CORES, CpuQuota
from edge_sdk.rehearse import Died, Rehearsal
from edge_sdk.strategies import strategy_named
from edge_sdk.trainer import Described, Failed
from edge_sdk.ways import Costing
from edge_sdk.wire import Training, UpdateMetrics

# Of torch's library files, a trainer alone on its machine keeps about half as much.
MANY_FILE_BYTES = 60 * MIB


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """What a plan is made for; None: as the task says, or as the profile does."""

    strategy: str
    codec: str
    deadline_s: float
    memory_mb: int | None
    batch_size: int | None
    part: int
    parts: int


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure, predicted and measured; the name ends in the unit. Ratio is measured over it."""

    name: str
    predicted: float
    measured: float
    ratio: float | None


class Emulated(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    memory_by:   by what means memory was limited.
    cores:       of this machine, that the round could use; 0: not limited.
    cores_by:    by what means.
    wanted_cores: what the board's speed comes to here, at this machine's measured rate.
    plan:        None when nothing fits.
    finished:    within the limit; else ``reason`` says why not.
    """

    board: str
    limit_bytes: int
    memory_by: str
    cores: float
    cores_by: str
    wanted_cores: float
    machine_flops_per_s: float
    plan: Plan | None
    figures: tuple[Figure, ...]
    finished: bool
    reason: str


def emulate(
    board: DeviceProfile, here: DeviceProfile, task_path: Path, directory: Path, terms: Terms
) -> Emulated:
    """Plan for ``board`` and carry the plan out; ``here`` is this machine, measured."""
    flag_bytes = None if terms.memory_mb is None else terms.memory_mb * MIB
    allowed = budget(board, available_bytes=None, cgroup_limit_bytes=None, flag_bytes=flag_bytes)
    wanted = board.flops_per_s / (here.flops_per_s / here.cores)
    cores = min(max(wanted, LEAST_CORES), float(here.cores))
    trial = _Trial(board, allowed, terms)
    with Rehearsal(
        task_path, directory, part=terms.part, parts=terms.parts,
        # More threads than it has time for would wait for one another in a loop.
        threads=max(1, min(board.cores, math.ceil(cores), os.cpu_count() or 1)),
        storage_bytes=board.storage_bytes, limit_bytes=allowed.memory_bytes,
    ) as rehearsal:  # fmt: skip
        memory_by, reason = rehearsal.how_confined, trial.start(rehearsal)
        quota: CpuQuota | None = None
        figures: tuple[Figure, ...] = ()
        if trial.plan is not None:
            quota = rehearsal.slow_down(cores)
            figures, reason = trial.perform(rehearsal)
    return Emulated(
        board=board.name,
        limit_bytes=allowed.memory_bytes,
        memory_by=memory_by,
        cores=quota.cores if quota is not None else 0.0,
        cores_by=_means(quota) if quota is not None else "nothing",
        wanted_cores=wanted,
        machine_flops_per_s=here.flops_per_s,
        plan=trial.plan,
        figures=figures,
        finished=not reason,
        reason=reason,
    )


def _means(quota: CpuQuota) -> str:
    why = quota.why_no_group
    return f"{quota.how} (no cgroup: {why})" if why else quota.how


class _Trial:
    """A plan for a board, from the start of the trainer to its figures."""

    def __init__(self, board: DeviceProfile, allowed: Budget, terms: Terms) -> None:
        self._board, self._allowed, self._terms = board, allowed, terms
        self._training = Training()
        self.plan: Plan | None = None

    def start(self, rehearsal: Rehearsal) -> str:
        """Start the trainer and plan; why that cannot be, else nothing."""
        training = rehearsal.published.training
        self._training = msgspec.structs.replace(
            training, batch_size=self._terms.batch_size or training.batch_size
        )
        memory_by, answer = rehearsal.how_confined, rehearsal.start()
        if not isinstance(answer, Described):
            return (
                f"the trainer does not start in {self._allowed.memory_bytes / MIB:.0f} MiB "
                f"(limited by {memory_by}): {_words(answer)}. {self._smallest(rehearsal)}"
            ).rstrip()
        try:
            self.plan = self._choose(answer)
        except NothingFits as error:
            return f"{error} {self._smallest(rehearsal)}".rstrip()
        return ""

    def perform(self, rehearsal: Rehearsal) -> tuple[tuple[Figure, ...], str]:
        """Carry the plan out; its figures, and why it did not end well."""
        plan, described = self.plan, rehearsal.described
        assert plan is not None
        assert described is not None
        done = rehearsal.round(plan, self._training)
        limit_bytes = self._allowed.memory_bytes
        if not isinstance(done, UpdateMetrics):
            return (), (
                f"the round did not finish in {limit_bytes / MIB:.0f} MiB "
                f"(limited by {rehearsal.how_confined}): {_words(done)}; the plan was to take "
                f"{plan.peak_bytes / MIB:.0f} MiB"
            )
        # Pages of library files that others hold too count in the peak, but not for a cgroup.
        if done.measured_peak_bytes > limit_bytes and not rehearsal.in_cgroup:
            reason = (
                f"the round finished, but with {done.measured_peak_bytes / MIB:.0f} MiB at its "
                f"peak, over the limit of {limit_bytes / MIB:.0f} MiB"
            )
        else:
            reason = ""
        upload_bytes, floor_bytes = rehearsal.upload_bytes, described.floor_bytes
        peak_bytes, above_bytes = done.measured_peak_bytes, plan.peak_bytes - floor_bytes
        flops = rehearsal.count_flops(plan, self._training)
        by_file_bytes = above_bytes + self._board.torch_floor_bytes
        return (
            _figure("peak_bytes", plan.peak_bytes, peak_bytes),
            _figure("above_floor_bytes", above_bytes, peak_bytes - floor_bytes),
            _figure("peak_with_profile_floor_bytes", by_file_bytes, peak_bytes),
            _figure("train_s", plan.train_s, done.train_s),
            _figure("flops", plan.flops, flops),
            _figure("upload_bytes", plan.upload_bytes, upload_bytes),
        ), reason

    def _shared(self, file_bytes: int) -> str:
        if file_bytes < MANY_FILE_BYTES:
            return ""
        return (
            f" ({file_bytes / MIB:.0f} MiB of it pages of library files, which cannot be given "
            "back while other processes here use torch too)"
        )

    def _choose(self, described: Described) -> Plan:
        terms, table = self._terms, described.table
        return choose(
            table,
            strategy_named(terms.strategy).candidates(table.spec, table.spec.names),
            self._training,
            limits_of(
                self._board, self._allowed, floor_bytes=described.floor_bytes,
                deadline_s=terms.deadline_s, available_engines=engines(),
            ),
            num_examples=described.num_examples,
            codec=terms.codec,
            bits_per_param=bits_per_param(terms.codec),
        )  # fmt: skip

    def _smallest(self, rehearsal: Rehearsal) -> str:
        """With how much memory something would fit; TaskError when that is not what is wrong."""
        described, start_bytes = rehearsal.described, 0
        if described is None:
            answer = rehearsal.restart()
            if not isinstance(answer, Described):
                return f"Without a limit: {_words(answer)}."
            described, start_bytes = answer, rehearsal.start_peak_bytes
        limits = limits_of(
            self._board, self._allowed, floor_bytes=described.floor_bytes,
            deadline_s=self._terms.deadline_s, available_engines=engines(),
        )  # fmt: skip
        costing = Costing(described.table, self._training, limits, described.num_examples)
        names = described.table.spec.names
        cheapest = strategy_named(self._terms.strategy).candidates(described.table.spec, names)[-1]
        if costing.unable(cheapest) is not None:
            return ""
        plan_bytes = min(way.peak_bytes for way in costing.ways(cheapest)) / (1 - HEADROOM_SHARE)
        if max(start_bytes, plan_bytes) <= self._allowed.memory_bytes:
            return ""  # it was not for memory
        return (
            f"Here the trainer takes {described.floor_bytes / MIB:.0f} MiB before it trains"
            + (f", {start_bytes / MIB:.0f} MiB while it starts" if start_bytes else "")
            + self._shared(rehearsal.file_bytes)
            + f"; the smallest limit is about {max(start_bytes, plan_bytes) / MIB:.0f} MiB "
            "(--memory-mb, up to the memory_bytes of the profile)."
        )


def _figure(name: str, predicted: float, measured: float) -> Figure:
    ratio = measured / predicted if predicted > 0 else None
    return Figure(name=name, predicted=predicted, measured=measured, ratio=ratio)


def _words(answer: Failed | Died | UpdateMetrics | Described) -> str:
    return answer.message if isinstance(answer, Failed) else str(answer)

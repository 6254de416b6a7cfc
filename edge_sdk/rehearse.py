"""Local rounds in a real trainer process without a server: what a plan costs, measured.

The trainer is the one that works for the agent: same process, orders and limits. The blocks it
starts from are the task's own, and the update it makes is thrown away. This process stays without
torch, as the agent does.
"""

from __future__ import annotations

import queue
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from edge_sdk.apart import Count, Counted, Publish, Published, carry_out
from edge_sdk.confine import Confinement
from edge_sdk.errors import TaskError
from edge_sdk.plan import Plan
from edge_sdk.process import process_held_bytes, process_peak_bytes, process_rss_bytes
from edge_sdk.quota import CpuQuota
from edge_sdk.store import Spool
from edge_sdk.trainer import (
    Described,
    Failed,
    Setup,
    Train,
    Trained,
    Trainer,
    TrainerDied,
    TrainerSaid,
)
from edge_sdk.wire import Offer, Training, UpdateMetrics

# Importing torch, reading the data and watching the model on the slowest board.
START_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Died:
    """The trainer did not survive its start or a round."""

    killed_for_memory: bool
    exit_code: int | None

    def __str__(self) -> str:
        if self.killed_for_memory:
            return "the trainer was killed for memory"
        return f"the trainer died with exit code {self.exit_code}"


class Rehearsal:
    """One trainer, from ``with`` to its end.

    described:    what it said of itself, None before ``start``.
    published:    the task's own terms and the blocks it starts from.
    start_peak_bytes, file_bytes: its highest resident memory until then; and how much it had then
                  in pages of files.
    upload_bytes: size of the last round's update.
    """

    def __init__(
        self,
        task_path: Path,
        directory: Path,
        *,
        threads: int,
        part: int = 0,
        parts: int = 1,
        storage_bytes: int = 0,
        limit_bytes: int | None = None,
    ) -> None:
        """``limit_bytes`` confines the process before it loads anything."""
        self._directory = directory
        self._setup = Setup(
            job="rehearsal",
            task_path=str(task_path),
            part=part,
            parts=parts,
            cache_dir=str(directory / "blocks"),
            spool_dir=str(directory / "spool"),
            prefix_dir=str(directory / "prefix"),
            storage_bytes=storage_bytes,
            threads=threads,
        )
        self._limit_bytes = limit_bytes
        self._inbox: queue.SimpleQueue[TrainerSaid | TrainerDied] = queue.SimpleQueue()
        self._trainer = Trainer(self._setup, self._inbox)
        self._confinement: Confinement | None = None
        self._quota: CpuQuota | None = None
        self._rounds = 0
        self.described: Described | None = None
        self.start_peak_bytes = self.file_bytes = self.upload_bytes = 0

    def __enter__(self) -> Rehearsal:
        order = Publish(setup=self._setup)
        self.published = carry_out(order, Published, self._directory)
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    @property
    def how_confined(self) -> str:
        """By what means its memory is limited, in words; and what is in the way of a cgroup."""
        if self._confinement is None:
            return "nothing"
        why = self._confinement.why_no_group
        return f"{self._confinement.how} (no cgroup: {why})" if why else self._confinement.how

    @property
    def in_cgroup(self) -> bool:
        """Whether the kernel itself keeps it within its memory."""
        return self._confinement is not None and not self._confinement.why_no_group

    @property
    def pid(self) -> int | None:
        """The trainer's, while it lives."""
        return self._trainer.pid

    def confine(self, limit_bytes: int) -> None:
        """From now on the trainer may have so much resident memory."""
        if self._trainer.pid is not None:
            if self._confinement is None:
                self._confinement = Confinement(self._trainer.pid)
            self._confinement.limit(limit_bytes)

    def slow_down(self, cores: float) -> CpuQuota:
        """From now on the trainer may use so many cores; the answer says by what means."""
        assert self._trainer.pid is not None, "slowed down before it was started"
        if self._quota is None:
            self._quota = CpuQuota(self._trainer.pid)
        self._quota.limit(cores)
        return self._quota

    def start(self) -> Described | Failed | Died:
        """Wait until the trainer has described the task.

        TaskError when the task is at fault; under a limit any failure may be the limit's.
        """
        answer = self._heard()
        if isinstance(answer, Described):
            self.described, pid = answer, answer.pid
            self.start_peak_bytes = process_peak_bytes(pid)
            self.file_bytes = max(0, process_rss_bytes(pid) - process_held_bytes(pid))
        elif isinstance(answer, Failed) and answer.kind != "memory" and self._limit_bytes is None:
            raise TaskError(answer.message)
        assert isinstance(answer, (Described, Failed, Died))
        return answer

    def restart(self, limit_bytes: int | None = None) -> Described | Failed | Died:
        """End the trainer and start another; then as ``start``."""
        self._end()
        self._limit_bytes, self._inbox = limit_bytes, queue.SimpleQueue()
        self._trainer = Trainer(self._setup, self._inbox)
        self._begin()
        return self.start()

    def round(self, plan: Plan, training: Training) -> UpdateMetrics | Failed | Died:
        """Carry out one plan, from the task's initial weights."""
        self._rounds += 1
        entries = self.published.entries
        offer = Offer(
            round=self._rounds,
            ticket=bytes(16),
            version=0,
            base_sha="0" * 64,
            blocks=entries,
            strategy="last_blocks",
            open_blocks=tuple(entry.name for entry in entries),
            codec=plan.codec,
            deadline_s=START_LIMIT_S,
            training=training,
        )
        self._trainer.train(Train(offer=offer, plan=plan))
        answer = self._heard()
        if isinstance(answer, Trained):
            spool = Spool(Path(self._setup.spool_dir))
            for entry in spool.entries():
                self.upload_bytes = entry.size_bytes
                spool.remove(entry)
            return answer.metrics
        assert isinstance(answer, (Failed, Died))
        return answer

    def count_flops(self, plan: Plan, training: Training) -> int:
        """Operations of a plan's local steps, counted while one of them runs; ends the trainer."""
        self._end()
        order = Count(
            setup=self._setup, plan=plan, training=training, entries=self.published.entries
        )
        return carry_out(order, Counted, self._directory).flops

    def _begin(self) -> None:
        self._trainer.start()
        if self._limit_bytes is not None:
            self.confine(self._limit_bytes)

    def _end(self) -> None:
        self._trainer.stop()
        for held in (self._confinement, self._quota):
            if held is not None:
                held.release()
        self._confinement = self._quota = None

    def _heard(self) -> Described | Trained | Failed | Died:
        event = self._inbox.get()
        while isinstance(event, TrainerSaid):
            if isinstance(event.answer, (Described, Trained, Failed)):
                return event.answer
            event = self._inbox.get()
        killed = self._confinement is not None and self._confinement.killed_for_memory(
            event.exit_code
        )
        return Died(killed, event.exit_code)

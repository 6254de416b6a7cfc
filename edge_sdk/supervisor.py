"""The trainer as the agent sees it: there when needed, within its budget, lowered, paused, let go.

Theory of operation. An assignment is one offer to be trained on. Each attempt at it needs, in this
order: a device that may train now, a trainer that is alive, memory for it, and a plan for what is
free at that moment. What is missing is waited for while the deadline leaves time; what cannot be
had ends the assignment with a reason. A kernel's kill, a refused allocation and pressure on memory
lower the ceiling of the next attempt; a crash does not. Everything happens in the agent's loop:
``heard`` takes what the trainer said, ``watch`` what the time brings; both return what the agent
has to know, or None.
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_sdk.allowance import Allowance, lowered
from edge_sdk.assignment import (
    FIRST_WAIT_S,
    MAX_WAIT_S,
    Assignment,
    Candidate,
    Damaged,
    Down,
    Fits,
    GaveUp,
    Outcome,
)
from edge_sdk.condition import PRESSURE, Condition, must_pause, read_condition
from edge_sdk.confine import Confinement, sweep_groups
from edge_sdk.errors import MIB, ConfigError, EdgeError, NothingFits, TaskError
from edge_sdk.memory import Memory, available_memory
from edge_sdk.plan import Plan
from edge_sdk.process import (
    children_cpu_s,
    process_cpu_s,
    process_peak_bytes,
    process_rss_bytes,
)
from edge_sdk.profile import Budget, DeviceProfile
from edge_sdk.trainer import (
    Answer,
    Described,
    Failed,
    Setup,
    Train,
    Trained,
    Trainer,
    TrainerDied,
    TrainerSaid,
    Up,
)
from edge_sdk.wire import Offer

MAX_KILLS = 6
MAX_CRASHES = 4
# Budgets tried between a ceiling under which nothing fits and all that is free.
LOWERING_STEPS = 6
# How often the trainer's memory is read while it trains, and the device's condition.
SAMPLE_S, CONDITION_S = 0.25, 5.0
# The longest wait after a kill before the task was ever described.
MAX_FIRST_WAIT_S = 30.0
# Of the time to the deadline, what an offer may wait for memory that others have.
WAIT_SHARE = 0.1
# Memory that was there when the offer came, and is gone, is waited for that long in a round.
MAX_SHORT_S = 60.0
# After a kill memory has to be free for a while before it is trusted; doubling.
FIRST_SETTLE_S, MAX_SETTLE_S = 0.5, 8.0
# A trainer that described its task, on a device that keeps none: an offer may come at once.
LINGER_S = 10.0

log = logging.getLogger("edge_sdk")


class Supervisor:
    """The one owner of the training process of an agent."""

    def __init__(
        self,
        setup: Setup,
        profile: DeviceProfile,
        inbox: queue.SimpleQueue[Any],
        report: Callable[[dict[str, Any]], None],
        *,
        state_dir: Path,
        flag_bytes: int | None = None,
        nursery: str | None = None,
        look: Callable[[Condition | None], Condition] = read_condition,
        memory: Callable[[], Memory] = available_memory,
    ) -> None:
        """``nursery`` forks trainers of simulated devices: their board is not this machine.

        ``look`` reads the state of the board, given what it read before; ``memory`` what is free.
        """
        self._trainer = Trainer(setup, inbox, nursery)
        self._profile, self._report = profile, report
        self._simulated = nursery is not None
        self._allowance = Allowance(
            profile,
            flag_bytes,
            state_dir,
            prefix_dir=Path(setup.prefix_dir),
            simulated=self._simulated,
            memory=memory,
        )
        self._confinement: Confinement | None = None
        self._ready = False
        self._candidate: Candidate | None = None
        self._assignment: Assignment | None = None
        self._look = look
        self._condition: Condition | None = None
        self._rests: str | None = None
        self._deaths = 0
        self._start_due_s: float | None = None
        self._release_due_s: float | None = None
        self._peak_bytes = self._checked_bytes = 0
        self._offered_round = -1
        self.described: Described | None = None
        sweep_groups()

    # -- the process ------------------------------------------------------------------------

    def start(self) -> None:
        """Start the trainer; a no-op while it runs."""
        if self._trainer.running:
            return
        self._ready, self._start_due_s, self._release_due_s = False, None, None
        self._trainer.start(describe=self.described is None)
        if self._trainer.pid is not None:
            self._confine(self._trainer.pid)

    def stop(self) -> None:
        """End the trainer."""
        self._peak_bytes = self.peak_bytes
        self._trainer.stop()
        self._allowance.trainer_ended()
        self._ready, self._release_due_s = False, None
        if self._confinement is not None:
            self._confinement.release()
            self._confinement = None

    @property
    def peak_bytes(self) -> int:
        """Highest resident memory of the trainer in its last assignment."""
        pid = self._trainer.pid
        return (process_peak_bytes(pid) if pid is not None else 0) or self._peak_bytes

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the agent and of all trainers it had."""
        pid = self._trainer.pid
        live_s = process_cpu_s(pid) if pid is not None else 0.0
        return process_cpu_s(os.getpid()) + children_cpu_s() + live_s

    def _confine(self, pid: int) -> None:
        # A simulated device's trainer shares memory with its nursery; it cannot have a group.
        self._confinement = Confinement(pid, grouped=not self._simulated)
        why = self._confinement.why_no_group
        log.info("the trainer is held by %s%s", self._confinement.how, f" ({why})" if why else "")

    # -- the work ---------------------------------------------------------------------------

    def budget(self) -> Budget:
        """Memory the trainer may use now: what is free, and what it holds already."""
        return self._allowance.budget(self._trainer.pid)

    def take_up(self, offer: Offer, fetch_bytes: int) -> Outcome | None:
        """Fits when there is a plan for an offer; None when memory is waited for a little."""
        now_s = time.monotonic()
        until_s = now_s + min(MAX_SHORT_S, WAIT_SHARE * offer.deadline_s)
        self._release_due_s = None
        if offer.round != self._offered_round:
            self._offered_round = offer.round
            self._allowance.offered(offer)
        self._candidate = Candidate(offer, fetch_bytes, until_s, now_s)
        try:
            self._plan(offer, self._allowance.most(), offer.deadline_s, fetch_bytes=fetch_bytes)
        except EdgeError as error:
            return self._give_up(str(error))
        return self._look_for_room(self._candidate, now_s)

    def _look_for_room(self, candidate: Candidate, now_s: float) -> Outcome | None:
        now, offer = self.budget(), candidate.offer
        try:
            self._plan(offer, now, offer.deadline_s, fetch_bytes=candidate.fetch_bytes)
        except EdgeError as error:
            if now_s >= candidate.until_s:
                return self._give_up(str(error))
            candidate.due_s = min(now_s + MAX_WAIT_S, candidate.until_s)
            return None
        self._checked_bytes, self._candidate = now.memory_bytes, None
        self.start()  # it is up by the time the blocks are here
        return Fits()

    def train(self, offer: Offer, deadline_at_s: float) -> Outcome | None:
        """Take on an offer whose blocks are all in the cache."""
        self._assignment = Assignment(offer, deadline_at_s)
        return self._attempt(time.monotonic())

    def extend(self, deadline_at_s: float) -> None:
        """The round is open for longer."""
        if self._assignment is not None:
            self._assignment.deadline_at_s = deadline_at_s

    def train_again(self) -> Outcome | None:
        """After ``Down`` in an assignment: lower, or give up."""
        mine, now_s = self._assignment, time.monotonic()
        if mine is None:
            return None
        if mine.kills >= MAX_KILLS or mine.crashes >= MAX_CRASHES:
            return self._give_up(
                f"the trainer was killed for memory {mine.kills} times and died for other "
                f"reasons {mine.crashes} times in this round"
            )
        return self._attempt(now_s)

    def drop(self) -> None:
        """The assignment is over for the agent: what is being trained is abandoned."""
        if self._assignment is not None and self._assignment.plan is not None:
            self._trainer.give_up()
        self._assignment = self._candidate = None
        self._may_release(0.0)

    def _attempt(self, now_s: float) -> Outcome | None:
        """Start training, or note what has to be waited for."""
        mine = self._assignment
        assert mine is not None
        if mine.deadline_at_s - now_s <= 0:
            return self._give_up(f"the deadline passed: {mine.waits_for or 'no time is left'}")
        why = self._must_rest()
        if why is not None:
            mine.waits_for, mine.due_s = f"training is paused: {why}", now_s + CONDITION_S
            return None
        try:
            plan, now = self._lowest(mine, now_s)
        except NothingFits as error:
            if self.budget().memory_bytes >= self._checked_bytes:
                return self._give_up(str(error))
            mine.enough_since_s = None
            return self._wait_for_memory(mine, str(error), now_s)
        except EdgeError as error:
            return self._give_up(str(error))
        if mine.enough_since_s is None:
            mine.enough_since_s = now_s
        if now_s < mine.enough_since_s + mine.settle_s:
            return self._wait_for_memory(mine, "memory was free only for moments", now_s)
        if self._ready:
            self._begin(mine, plan, now, now_s)
        else:
            self.start()  # it is heard of as soon as it is up
            mine.wait("the trainer is not up yet", now_s)
        return None

    def _wait_for_memory(self, mine: Assignment, why: str, now_s: float) -> Outcome | None:
        """Who took the memory may give it back."""
        if mine.short_since_s is None:
            mine.short_since_s = now_s
            log.warning("round %d: waits for memory: %s", mine.offer.round, why)
        if now_s - mine.short_since_s >= MAX_SHORT_S:
            return self._give_up(f"waited {MAX_SHORT_S:.0f} s for memory: {why}")
        mine.wait(why, now_s)
        return None

    def _begin(self, mine: Assignment, plan: Plan, now: Budget, now_s: float) -> None:
        assert self.described is not None
        mine.plan, mine.used = plan, self._allowance.correction(self.described.table)
        mine.budget_bytes = now.memory_bytes
        mine.highest_bytes, mine.trained_s, mine.resumed_at_s = 0, 0.0, now_s
        mine.due_s, mine.condition_due_s = now_s + SAMPLE_S, now_s + CONDITION_S
        mine.waits_for, mine.wait_s, mine.short_since_s = "", FIRST_WAIT_S, None
        offer = mine.offer
        log.info(
            "round %d: trains %s, peak %d of %d MiB, %.1f s",
            offer.round, ", ".join(plan.blocks), plan.peak_bytes // MIB, plan.budget_bytes // MIB,
            plan.round_s,
        )  # fmt: skip
        for left in plan.left_out:
            log.info("round %d: not %s: %s", offer.round, ", ".join(left.blocks), left.reason)
        self._report(
            {"event": "plan", "round": offer.round, "blocks": plan.blocks, "seconds": plan.round_s}
        )
        if self._confinement is not None:
            self._confinement.limit(mine.budget_bytes)
        self._trainer.train(Train(offer=offer, plan=plan))

    def _lowest(self, mine: Assignment, now_s: float) -> tuple[Plan, Budget]:
        """The plan for now; after a kill one below the ceiling, or else about the smallest."""
        now, left_s = self.budget(), mine.deadline_at_s - now_s
        plan = self._plan(mine.offer, now, left_s)
        low_bytes, high_bytes = mine.ceiling_bytes, now.memory_bytes
        if low_bytes is None or low_bytes >= high_bytes:
            return plan, now
        for _ in range(LOWERING_STEPS):
            try:
                plan = self._plan(mine.offer, now, left_s, ceiling_bytes=low_bytes)
            except NothingFits:
                low_bytes = (low_bytes + high_bytes) // 2
            else:
                break
        return plan, now

    def _plan(
        self,
        offer: Offer,
        allowed: Budget,
        left_s: float,
        *,
        fetch_bytes: int = 0,
        ceiling_bytes: int | None = None,
    ) -> Plan:
        described = self.described
        assert described is not None
        return self._allowance.plan(
            offer,
            described.table,
            allowed,
            floor_bytes=described.floor_bytes,
            num_examples=described.num_examples,
            left_s=left_s,
            fetch_bytes=fetch_bytes,
            ceiling_bytes=ceiling_bytes,
        )

    def _give_up(self, reason: str) -> GaveUp:
        self.drop()
        return GaveUp(reason)

    # -- what the trainer says ----------------------------------------------------------------

    def heard(self, event: TrainerSaid | TrainerDied) -> Outcome | None:
        """An event of the trainer; those of former lives are nothing to anybody."""
        if event.life != self._trainer.life or not self._trainer.running:
            return None
        if isinstance(event, TrainerDied):
            return self._died(event.exit_code)
        return self._said(event.answer)

    def _said(self, answer: Answer) -> Outcome | None:
        if isinstance(answer, (Described, Up)):
            return self._up(answer)
        if not self._ready and isinstance(answer, Failed):
            return self._could_not_start(answer)
        mine = self._assignment
        if mine is None or answer.round != mine.offer.round:
            return None
        if isinstance(answer, Trained):  # without a plan: it was done before it heard to stop
            if mine.plan is not None:
                metrics = answer.metrics
                self._allowance.trained(mine.plan)
                self._learn(mine, mine.plan, metrics.measured_peak_bytes, metrics.train_s)
            self._assignment = None
            self._may_release(0.0)
            return answer
        if mine.plan is None:
            return None
        log.warning("round %d: %s", answer.round, answer.message)
        if answer.kind == "damaged":
            self._assignment = None
            return Damaged(answer.message)
        if answer.kind == "memory":
            self._fell_short(mine)
            return Down()
        if answer.kind == "prefix":
            self._allowance.run_whole()
            mine.plan = None
            return Down()
        return self._give_up(answer.message)

    def _up(self, answer: Described | Up) -> Outcome | None:
        if isinstance(answer, Described):
            self.described = answer
        self._ready, self._deaths = True, 0
        self._trainer.pid = answer.pid
        if self._confinement is None:
            self._confine(answer.pid)
        if self._assignment is not None:
            return self._attempt(time.monotonic())
        self._may_release(LINGER_S)
        return answer if isinstance(answer, Described) else None

    def _could_not_start(self, answer: Failed) -> Outcome | None:
        """It lives, but cannot describe the task; after a first time that is no reason to die."""
        if self.described is None:
            raise TaskError(answer.message)
        self.stop()
        if self._assignment is None:
            return None
        if answer.kind != "memory":
            return self._give_up(answer.message)
        self._fell_short(self._assignment)
        return Down()

    def _died(self, exit_code: int | None) -> Outcome:
        held, mine = self._confinement, self._assignment
        for_memory = held is not None and held.killed_for_memory(exit_code)
        why = "the kernel killed the trainer for memory" if for_memory else "the trainer died"
        log.warning("%s (exit code %s)", why, exit_code)
        self._report({"event": "killed", "memory": for_memory, "exit_code": exit_code})
        self._deaths += 1
        self._peak_bytes = mine.highest_bytes if mine is not None else self._peak_bytes
        self.stop()
        if self.described is None:
            self._start_first_again(for_memory, exit_code)
        elif mine is not None:
            if for_memory:
                self._fell_short(mine)
            else:
                mine.crashes, mine.plan = mine.crashes + 1, None
        return Down()

    def _start_first_again(self, for_memory: bool, exit_code: int | None) -> None:
        if self._deaths >= MAX_CRASHES and not for_memory:
            raise ConfigError(
                f"the trainer died {self._deaths} times before it could describe the task (exit "
                f"code {exit_code}); run `edge-sdk doctor`, and the task file by itself"
            )
        wait_s = (
            min(MAX_FIRST_WAIT_S, FIRST_WAIT_S * 2 ** min(self._deaths, 9)) if for_memory else 0.0
        )
        self._start_due_s = time.monotonic() + wait_s

    def _fell_short(self, mine: Assignment) -> None:
        """There was not the memory the plan needs: the next one plans less or knows better."""
        plan, mine.plan = mine.plan, None
        mine.enough_since_s = None
        mine.settle_s = min(MAX_SETTLE_S, max(FIRST_SETTLE_S, 2 * mine.settle_s))
        if plan is None:
            return  # killed before it had a plan: not the plan's fault
        mine.kills += 1
        assert self.described is not None
        table, floor_bytes = self.described.table, self.described.floor_bytes
        # Predictions were wrong only if it took more than it was to.
        if mine.highest_bytes > plan.peak_bytes:
            self._learn(mine, plan, mine.highest_bytes)
        above_bytes = float(max(0, plan.training_bytes - floor_bytes))
        # The same plan must not come again, whatever is predicted for it now.
        above_bytes *= self._allowance.correction(table).memory / mine.used.memory
        mine.ceiling_bytes = lowered(floor_bytes, above_bytes)
        log.warning("round %d: too little memory; the next plan is lower", mine.offer.round)

    def _learn(self, mine: Assignment, plan: Plan, peak_bytes: int, train_s: float = 0.0) -> None:
        assert self.described is not None
        self._allowance.learn(
            self.described.table,
            plan,
            mine.used,
            floor_bytes=self.described.floor_bytes,
            peak_bytes=peak_bytes,
            train_s=train_s,
        )

    # -- what the time brings -------------------------------------------------------------------

    def due_s(self) -> float | None:
        """When ``watch`` has something to do; None while nothing is trained or waited for."""
        job = self._assignment or self._candidate
        times = (self._start_due_s, job.due_s if job is not None else self._release_due_s)
        return min((due_s for due_s in times if due_s is not None), default=None)

    def watch(self, now_s: float) -> Outcome | None:
        """Read memory and condition when it is time to; pause, lower, start, let go."""
        if self._start_due_s is not None and now_s >= self._start_due_s:
            self.start()
        candidate, mine = self._candidate, self._assignment
        idle = candidate is None and mine is None
        if idle and self._release_due_s is not None and now_s >= self._release_due_s:
            log.info("the trainer's memory is given back until the next offer")
            self.stop()
        if candidate is not None and now_s >= candidate.due_s:
            return self._look_for_room(candidate, now_s)
        if mine is None or now_s < mine.due_s:
            return None
        return self._attempt(now_s) if mine.plan is None else self._sample(mine, now_s)

    def _sample(self, mine: Assignment, now_s: float) -> Outcome | None:
        """While the trainer has a plan: note its memory, and now and then look at the device."""
        mine.due_s = now_s + SAMPLE_S
        if mine.resumed_at_s is not None:
            mine.highest_bytes = max(mine.highest_bytes, process_rss_bytes(self._trainer.pid))
        if now_s < mine.condition_due_s:
            return None
        mine.condition_due_s = now_s + CONDITION_S
        why, working = self._must_rest(), mine.resumed_at_s is not None
        if why is not None and why.startswith(PRESSURE):
            # A pause would keep the very memory that is short.
            self._trainer.give_up()
            self._fell_short(mine)
            mine.wait(why, now_s)
        elif why is not None and working:
            self._pause(mine, now_s, why)
        elif why is None and not working:
            self._resume(mine, now_s)
        return self._unless_too_late(mine, now_s)

    def _must_rest(self) -> str | None:
        """Why this device may not train now; a simulated one may, whatever this machine is at."""
        if self._simulated:
            return None
        self._condition = self._look(self._condition)
        self._rests = must_pause(self._condition, self._profile.policy, self._rests)
        return self._rests

    def _unless_too_late(self, mine: Assignment, now_s: float) -> Outcome | None:
        """Give up while paused, once the deadline leaves less than the rest of the plan takes."""
        if mine.plan is None or mine.resumed_at_s is not None:
            return None
        if mine.deadline_at_s - now_s > max(0.0, mine.plan.train_s - mine.trained_s):
            return None
        return self._give_up(f"paused until too little time was left: {mine.waits_for}")

    def _pause(self, mine: Assignment, now_s: float, why: str) -> None:
        assert mine.resumed_at_s is not None
        mine.trained_s += now_s - mine.resumed_at_s
        mine.resumed_at_s, mine.waits_for = None, why
        log.warning("round %d: training is paused: %s", mine.offer.round, why)
        self._report({"event": "paused", "round": mine.offer.round, "reason": why})
        self._trainer.pause()

    def _resume(self, mine: Assignment, now_s: float) -> None:
        mine.resumed_at_s = now_s
        log.info("round %d: training goes on", mine.offer.round)
        self._report({"event": "resumed", "round": mine.offer.round})
        self._trainer.resume()

    def _may_release(self, linger_s: float) -> None:
        """An idle trainer goes, where the profile says so."""
        if self._profile.policy.release_memory_after_round and self._trainer.running:
            self._release_due_s = time.monotonic() + linger_s

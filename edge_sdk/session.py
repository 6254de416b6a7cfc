"""The device's state machine: event in, next phase and effects out.

Theory of operation. A device is in one of four phases. Whether the broker is reachable is not one
of them: fetching and sending repeat themselves until answered, training goes on without a link.
An offer of a newer round replaces what is being fetched or trained, because the older round is
closed by then. It does not replace an update that is being sent: that one lies in the spool and
leaves it only by its receipt, so the newer offer waits. The agent carries the effects out.
"""

from __future__ import annotations

import random
from enum import Enum

from edge_sdk.errors import ProtocolMisuse


class Phase(Enum):
    """What the device is doing."""

    IDLE = "waiting for an offer"
    FETCHING = "offer accepted, missing blocks are being fetched"
    TRAINING = "the trainer owns the processor"
    SENDING = "an update in the spool has no receipt yet"


class Event(Enum):
    """What can happen to it."""

    OFFERED = "an offer of a newer round"
    FETCHED = "all blocks of the offer are in the cache"
    PLAN_FAILED = "no plan fits, or the task cannot be trained"
    TRAINED = "the update is in the spool"
    DAMAGED = "the trainer found a cached block damaged"
    KILLED = "the trainer died"
    SPOOLED = "an update of an earlier life is in the spool"
    RECEIPT = "the server's verdict on the update being sent"
    DONE = "the job is over"


class Effect(Enum):
    """What the agent must do."""

    FETCH = "fetch the blocks the offer names and the cache lacks"
    TRAIN = "plan, and start the trainer on the plan"
    RETRAIN_LOWER = "plan with less memory, and start the trainer again"
    STOP_TRAINER = "stop the trainer"
    SEND_UPDATE = "open the transfer of the spooled update"
    FORGET_UPDATE = "remove the update from the spool"
    DECLINE = "tell the server that this device sits out, and why"


P, E, F = Phase, Event, Effect

RULES: dict[tuple[Phase, Event], tuple[Phase, tuple[Effect, ...]]] = {
    (P.IDLE, E.OFFERED): (P.FETCHING, (F.FETCH,)),
    (P.IDLE, E.SPOOLED): (P.SENDING, (F.SEND_UPDATE,)),
    (P.IDLE, E.KILLED): (P.IDLE, ()),
    (P.IDLE, E.DONE): (P.IDLE, ()),
    (P.FETCHING, E.OFFERED): (P.FETCHING, (F.FETCH,)),
    (P.FETCHING, E.FETCHED): (P.TRAINING, (F.TRAIN,)),
    (P.FETCHING, E.PLAN_FAILED): (P.IDLE, (F.DECLINE,)),
    (P.FETCHING, E.KILLED): (P.FETCHING, ()),
    (P.FETCHING, E.DONE): (P.IDLE, ()),
    (P.TRAINING, E.OFFERED): (P.FETCHING, (F.STOP_TRAINER, F.FETCH)),
    (P.TRAINING, E.TRAINED): (P.SENDING, (F.SEND_UPDATE,)),
    (P.TRAINING, E.DAMAGED): (P.FETCHING, (F.FETCH,)),
    (P.TRAINING, E.PLAN_FAILED): (P.IDLE, (F.DECLINE,)),
    (P.TRAINING, E.KILLED): (P.TRAINING, (F.RETRAIN_LOWER,)),
    (P.TRAINING, E.DONE): (P.IDLE, (F.STOP_TRAINER,)),
    (P.SENDING, E.RECEIPT): (P.IDLE, (F.FORGET_UPDATE,)),
    (P.SENDING, E.KILLED): (P.SENDING, ()),
    (P.SENDING, E.DONE): (P.SENDING, ()),
}


def transition(phase: Phase, event: Event) -> tuple[Phase, tuple[Effect, ...]]:
    """The next phase and what the agent must do; ProtocolMisuse when the event cannot happen."""
    if (phase, event) not in RULES:
        raise ProtocolMisuse(f"{event.name} ({event.value}) in phase {phase.name} ({phase.value})")
    return RULES[phase, event]


class Retry:
    """When to say something again that nobody answered: doubling waits, full jitter.

    Times are seconds on any monotonic clock, given by the caller.
    """

    def __init__(self, rng: random.Random, first_s: float = 0.5, cap_s: float = 60.0) -> None:
        self._rng, self._first_s, self._cap_s = rng, first_s, cap_s
        self._tries = 0
        self.due_s: float | None = None

    def arm(self, now_s: float) -> None:
        """It was said now; the next time is somewhere within the grown wait."""
        wait_s = min(self._cap_s, self._first_s * 2**self._tries)
        self._tries = min(self._tries + 1, 30)
        self.due_s = now_s + wait_s * self._rng.uniform(0.5, 1.0)

    def restart(self, now_s: float) -> None:
        """Something moved: the next wait is the first one again."""
        self._tries = 0
        self.arm(now_s)

    def answered(self) -> None:
        """It was answered: nothing to repeat."""
        self._tries, self.due_s = 0, None

    def is_due(self, now_s: float) -> bool:
        """Whether it is time to say it again."""
        return self.due_s is not None and now_s >= self.due_s

"""An offer on its way through the supervisor, and what the agent is told about it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.corrections import UNCORRECTED
from edge_sdk.plan import Plan
from edge_sdk.profile import Correction
from edge_sdk.trainer import Described, Trained
from edge_sdk.wire import Offer

# The wait for memory or for a start, doubling.
FIRST_WAIT_S, MAX_WAIT_S = 0.25, 2.0


@dataclass(frozen=True, slots=True)
class Damaged:
    """A block in the cache is not what it should be; it was dropped."""

    message: str


@dataclass(frozen=True, slots=True)
class Down:
    """The plan cannot be carried out; ``train_again`` decides what becomes of that."""


@dataclass(frozen=True, slots=True)
class GaveUp:
    """The assignment is over without an update, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Fits:
    """There is a plan for the offer: its blocks can be fetched."""


Outcome = Described | Trained | Damaged | Down | Fits | GaveUp


@dataclass
class Candidate:
    """An offer that fits this device, but not what is free on it now."""

    offer: Offer
    fetch_bytes: int
    until_s: float
    due_s: float


@dataclass
class Assignment:
    """One offer and how far the work on it is; times are of the monotonic clock."""

    offer: Offer
    deadline_at_s: float
    plan: Plan | None = None
    budget_bytes: int = 0
    used: Correction = UNCORRECTED
    ceiling_bytes: int | None = None
    kills: int = 0
    crashes: int = 0
    highest_bytes: int = 0
    trained_s: float = 0.0
    resumed_at_s: float | None = None
    waits_for: str = ""
    wait_s: float = FIRST_WAIT_S
    short_since_s: float | None = None
    enough_since_s: float | None = None
    settle_s: float = 0.0
    due_s: float = 0.0
    condition_due_s: float = 0.0

    def wait(self, why: str, now_s: float) -> None:
        """Try again later, because of ``why``."""
        self.waits_for, self.due_s = why, now_s + self.wait_s
        self.wait_s = min(MAX_WAIT_S, 2 * self.wait_s)

"""The round's state machine, and when an open round closes. Pure: time is a number passed in.

Theory of operation. A round is PLANNED when its base version is known and nobody has been asked.
OPEN, it counts updates. The one step that may never be undone is OPEN to CLOSING: from then on
nothing is counted, so the sums are final, and merging them is a function that gives the same
bytes however often a killed server repeats it. PUBLISHED, the version is on disk and in the
ledger, and is announced until everybody knows; ARCHIVED, a later version exists and the sums are
erased. A round that cannot reach its quorum, or whose sums cannot be merged, is ABANDONED: its
updates are voided, visibly, and the next round starts from the same base.

``RULES`` holds every transition; whoever stores a phase asks ``transition`` first.

``decide`` looks at an open round and says what to do now. Once every offered device has answered it
closes at once, or abandons when none was accepted; with some, but no quorum, it waits for
newcomers until the deadline. It closes when enough devices are in and the others have been
quiet for ``grace_s``; and at the deadline with a quorum. Without a quorum at the deadline it
extends while the devices still at work could make one, at most ``max_extensions`` times, and
abandons otherwise. A lost device is waited for like any other, but only until the deadline: no
extension is given for its sake. So every open round ends within ``policy.longest_s``. PLANNED
ends by opening or abandoning, CLOSING by a computation; PUBLISHED rests until the next version,
ARCHIVED and ABANDONED are final.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import Enum

from edge_sdk.errors import ConfigError, ProtocolMisuse
from edge_sdk.wire import Verdict


class Phase(Enum):
    """Where a round stands; stored by its name."""

    PLANNED = "the base version is chosen, nobody has been asked"
    OPEN = "devices train, updates are counted"
    CLOSING = "nothing is counted any more, the sums are being merged"
    PUBLISHED = "its version exists and is announced"
    ARCHIVED = "a later version exists, the sums are erased"
    ABANDONED = "it ended without a version, its updates are voided"


class Event(Enum):
    """What can happen to a round."""

    OPENED = "enough devices are there"
    EXTENDED = "the deadline passed, a quorum is still possible"
    CLOSED = "all answered, or the deadline passed with a quorum"
    PUBLISHED = "the new version is durable"
    SUPERSEDED = "a later version is durable"
    ABANDONED = "no quorum is possible, or the sums cannot be merged"


class Effect(Enum):
    """What the coordinator owes after a transition."""

    OFFER = "offer the round, or its new deadline, to the devices"
    MERGE = "merge the sums and write the version"
    ANNOUNCE = "tell everybody about the version"
    ERASE = "erase the sums"
    VOID = "void the updates that were counted"


RULES: dict[tuple[Phase, Event], tuple[Phase, Effect | None]] = {
    (Phase.PLANNED, Event.OPENED): (Phase.OPEN, Effect.OFFER),
    (Phase.PLANNED, Event.ABANDONED): (Phase.ABANDONED, None),
    (Phase.OPEN, Event.EXTENDED): (Phase.OPEN, Effect.OFFER),
    (Phase.OPEN, Event.CLOSED): (Phase.CLOSING, Effect.MERGE),
    (Phase.OPEN, Event.ABANDONED): (Phase.ABANDONED, Effect.VOID),
    (Phase.CLOSING, Event.PUBLISHED): (Phase.PUBLISHED, Effect.ANNOUNCE),
    # Sums that a disk damaged, or that evaluation refuses, must not stop the job for ever.
    (Phase.CLOSING, Event.ABANDONED): (Phase.ABANDONED, Effect.VOID),
    (Phase.PUBLISHED, Event.SUPERSEDED): (Phase.ARCHIVED, Effect.ERASE),
}


def transition(phase: Phase, event: Event) -> tuple[Phase, Effect | None]:
    """The next phase and what the coordinator owes; ProtocolMisuse if illegal."""
    if (phase, event) not in RULES:
        raise ProtocolMisuse(f"a round that is {phase.name} cannot be {event.name}")
    return RULES[phase, event]


@dataclass(frozen=True, kw_only=True)
class RoundPolicy:
    """When a round ends.

    min_devices:    the quorum: fewer accepted updates publish nothing.
    want_devices:   enough: the others then have ``grace_s`` since the last answer.
    deadline_s:     from opening until the deadline.
    extend_s:       added by each of at most ``max_extensions`` extensions.
    """

    min_devices: int = 1
    want_devices: int = 1_000_000
    deadline_s: float = 600.0
    extend_s: float = 300.0
    max_extensions: int = 2
    grace_s: float = 30.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_devices <= self.want_devices:
            raise ConfigError(
                f"a round needs 1 <= min_devices <= want_devices, "
                f"got {self.min_devices} and {self.want_devices}"
            )
        for name in ("deadline_s", "extend_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name} must be finite and > 0, got {value!r}")
        if not self.grace_s >= 0 or self.max_extensions < 0:
            raise ConfigError(
                f"grace_s and max_extensions must be >= 0, "
                f"got {self.grace_s!r} and {self.max_extensions}"
            )

    @property
    def longest_s(self) -> float:
        """No round is open longer than this, whatever fails."""
        return self.given_s(self.max_extensions)

    def given_s(self, extensions: int) -> float:
        """How long a round is open with so many extensions."""
        return self.deadline_s + extensions * self.extend_s


@dataclass(frozen=True, kw_only=True)
class RoundView:
    """What is known of an open round; times are the server's monotonic clock, seconds.

    offered, declined, lost: devices asked, devices that said no, devices not on the network now.
    verdicts: the verdict on each device's update. last_answer_s: when the last verdict or no came.
    """

    offered: Set[str]
    opened_at_s: float
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    declined: Set[str] = frozenset()
    lost: frozenset[str] = frozenset()
    last_answer_s: float | None = None
    extensions: int = 0

    @property
    def accepted(self) -> int:
        """Updates that count."""
        return sum(verdict == "accepted" for verdict in self.verdicts.values())

    @property
    def outstanding(self) -> Set[str]:
        """Devices asked that have not answered, lost ones included."""
        return self.offered - self.verdicts.keys() - self.declined


class Action(Enum):
    """What to do with an open round."""

    WAIT = "nothing yet"
    CLOSE = "close and merge"
    EXTEND = "give the devices at work more time"
    ABANDON = "give up and void"


@dataclass(frozen=True)
class Decision:
    """What to do now, until when nothing else is due, and why."""

    action: Action
    until_s: float
    reason: str


def deadline_s(view: RoundView, policy: RoundPolicy) -> float:
    """The moment at which the round must be decided, extensions given so far included."""
    return view.opened_at_s + policy.given_s(view.extensions)


def opened_at_s(policy: RoundPolicy, extensions: int, remaining_s: float, now_s: float) -> float:
    """When a round with ``remaining_s`` left would have been opened, on a restarted clock."""
    given_s = policy.given_s(extensions)
    return now_s + min(max(remaining_s, 0.0), given_s) - given_s


def decide(view: RoundView, policy: RoundPolicy, now_s: float) -> Decision:
    """What an open round needs at ``now_s``; a WAIT names a moment after it."""
    due_s = deadline_s(view, policy)
    accepted, waiting = view.accepted, len(view.outstanding)
    quorum = accepted >= policy.min_devices
    if quorum and view.offered and not waiting:
        return Decision(Action.CLOSE, now_s, f"all {len(view.offered)} offered devices answered")
    if view.offered and not waiting and not accepted:
        why = f"all {len(view.offered)} offered devices answered, none was accepted"
        return Decision(Action.ABANDON, now_s, why)
    if quorum and view.extensions:
        return Decision(Action.CLOSE, now_s, f"{accepted} accepted, in an extension")
    if now_s >= due_s:
        return _at_deadline(view, policy, now_s)
    if accepted >= policy.want_devices and view.last_answer_s is not None:
        quiet_s = view.last_answer_s + policy.grace_s
        if now_s >= quiet_s:
            return Decision(
                Action.CLOSE, now_s, f"{accepted} accepted, no answer for the grace time"
            )
        due_s = min(due_s, quiet_s)
    return Decision(Action.WAIT, due_s, f"{accepted} accepted, {waiting} at work")


def _at_deadline(view: RoundView, policy: RoundPolicy, now_s: float) -> Decision:
    accepted = view.accepted
    if accepted >= policy.min_devices:
        return Decision(Action.CLOSE, now_s, f"deadline: {accepted} accepted")
    possible = accepted + len(view.outstanding - view.lost)
    short = f"deadline: {accepted} accepted of the {policy.min_devices} needed"
    if possible < policy.min_devices:
        return Decision(Action.ABANDON, now_s, f"{short}, at most {possible} possible")
    if view.extensions >= policy.max_extensions:
        return Decision(Action.ABANDON, now_s, f"{short}, {view.extensions} extensions used")
    return Decision(Action.EXTEND, now_s, f"{short}, {possible} possible")

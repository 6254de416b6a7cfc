"""Who is enrolled, with which facts, last heard when, and who may be offered a round. Pure.

A device is known by the topic it speaks on. Its sessions are numbered by itself, one per start of
its agent: a last will that arrives after the next session's greeting says nothing about the
device, and a device id that keeps changing sessions is probably on two machines.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from edge_sdk.errors import ConfigError, Refused
from edge_sdk.wire import DEVICE_ID, Hello

MAX_DEVICES = 10_000
# A supervised agent that crashes at start changes sessions about as often as two clones do; both
# deserve a look, and neither should get work it will not finish.
TAKEOVERS = 5
TAKEOVER_WINDOW_S = 60.0


class Presence(Enum):
    """What a device is doing, as it or its last will says."""

    READY = "ready"
    TRAINING = "training"
    SLEEPING = "sleeping"
    LOST = "lost"


@dataclass
class Device:
    """One enrolled device; owned by its Fleet."""

    device: str
    facts: Hello
    presence: Presence
    first_heard_s: float
    last_heard_s: float
    sessions: int = 1
    offered_round: int | None = None
    takeovers_s: deque[float] = field(default_factory=lambda: deque(maxlen=TAKEOVERS))

    def flapping(self, now_s: float) -> bool:
        """Whether its sessions change so often that two machines may share its id."""
        times = self.takeovers_s
        return len(times) == TAKEOVERS and now_s - times[0] <= TAKEOVER_WINDOW_S


class Fleet:
    """Every device of a job that has greeted this incarnation of the server."""

    def __init__(self, spec_digest: str, max_devices: int = MAX_DEVICES) -> None:
        if max_devices < 1:
            raise ConfigError(f"max_devices must be at least 1, got {max_devices}")
        self._spec_digest = spec_digest
        self._max_devices = max_devices
        self._devices: dict[str, Device] = {}

    def __len__(self) -> int:
        return len(self._devices)

    def __iter__(self) -> Iterator[Device]:
        """Devices by id, so that every walk over the fleet has the same order."""
        return iter([self._devices[name] for name in sorted(self._devices)])

    def get(self, device: str) -> Device | None:
        """The device called ``device``, if it has greeted."""
        return self._devices.get(device)

    def hello(self, device: str, facts: Hello, now_s: float) -> Device:
        """Enrol a device or renew what is known of it; Refused says what to change."""
        if not re.match(DEVICE_ID, device):
            raise Refused(
                f"device id {device[:80]!r} must be 1 to 64 of the characters a-z, 0-9 and '-'"
            )
        if facts.spec_digest != self._spec_digest:
            raise Refused(
                f"{device}: its task builds model {facts.spec_digest[:12]}, this job trains "
                f"{self._spec_digest[:12]}: give it the server's task file"
            )
        known = self._devices.get(device)
        if known is None:
            return self._enrol(device, facts, now_s)
        if facts.session != known.facts.session:
            known.sessions += 1
            known.takeovers_s.append(now_s)
            known.presence = Presence.READY
        elif known.presence in (Presence.LOST, Presence.SLEEPING):
            known.presence = Presence.READY
        known.facts, known.last_heard_s = facts, now_s
        return known

    def heard(self, device: str, now_s: float) -> None:
        """Note a sign of life; whoever speaks is not lost."""
        known = self._devices.get(device)
        if known is not None:
            known.last_heard_s = now_s
            if known.presence is Presence.LOST:
                known.presence = Presence.READY

    def presence(self, device: str, state: Presence, session: int, now_s: float) -> bool:
        """Note what a device says it does; False when unknown or about an earlier session."""
        known = self._devices.get(device)
        if known is None or known.facts.session != session:
            return False
        known.presence = state
        # A will and a retained message are the broker speaking, not the device.
        if state is not Presence.LOST:
            known.last_heard_s = now_s
        return True

    def eligible(self, round_number: int, now_s: float) -> list[str]:
        """Devices that may be offered this round now, by id: present, not asked, not flapping."""
        return [
            known.device
            for known in self
            if known.presence in (Presence.READY, Presence.TRAINING)
            and known.offered_round != round_number
            and not known.flapping(now_s)
        ]

    def offered(self, device: str, round_number: int) -> None:
        """Note that a device was offered a round; asking twice would be one more update to drop."""
        known = self._devices.get(device)
        if known is not None:
            known.offered_round = round_number

    def lost(self) -> frozenset[str]:
        """Devices whose last will has arrived and that have not come back."""
        return frozenset(d.device for d in self._devices.values() if d.presence is Presence.LOST)

    def count(self) -> dict[str, int]:
        """How many devices are in each presence, for reports."""
        counts = Counter(known.presence for known in self._devices.values())
        return {presence.value: counts[presence] for presence in Presence}

    def forget(self, device: str) -> None:
        """Remove a device; it may greet again."""
        self._devices.pop(device, None)

    def _enrol(self, device: str, facts: Hello, now_s: float) -> Device:
        if len(self._devices) >= self._max_devices:
            raise Refused(
                f"{device}: the fleet is full, {len(self._devices)} of at most "
                f"{self._max_devices} devices; remove some, or start the server with a higher limit"
            )
        enrolled = Device(device, facts, Presence.READY, now_s, now_s)
        self._devices[device] = enrolled
        return enrolled

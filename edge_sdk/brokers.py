"""What an MQTT broker lets a client do: the limits no broker tells in words, as data.

MQTT 5 announces a largest packet and little else; 3.1.1 announces nothing, and the usual answer to
too much is a closed connection. So the limits of brokers somebody else runs are given by name.
Sources: the vendors' public documentation of their default quotas, 2025.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.errors import ConfigError

KIB = 1024
# Fixed header, topic length, packet id, an empty property list; the topic itself comes on top.
PUBLISH_OVERHEAD_BYTES = 5 + 2 + 2 + 1
# A topic of six levels with two names of 64 characters, and a piece's own header.
TOPIC_ALLOWANCE_BYTES = 240
MIN_PIECE_BYTES = 256
SAFE_PACKET_BYTES = 62 * KIB


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerProfile:
    """Limits of one kind of broker; 0: none that matters.

    packet_bytes: largest MQTT packet. retained_bytes: largest retained payload.
    publishes_per_s, bytes_per_s: of one connection, towards the broker.
    retains: whether retained messages reach just those who subscribe to them.
    """

    name: str
    packet_bytes: int = 0
    retained_bytes: int = 0
    publishes_per_s: float = 0.0
    bytes_per_s: float = 0.0
    retains: bool = True

    def piece_bytes(self, wanted_bytes: int, announced_bytes: int | None = None) -> int:
        """Largest piece of at most ``wanted_bytes`` that fits a packet; ConfigError if none does.

        ``announced_bytes``: the largest packet as the broker itself said, if it did. Where nobody
        says anything, a piece is one that every known broker takes.
        """
        limits = [limit for limit in (self.packet_bytes, announced_bytes or 0) if limit]
        packet_bytes = min(limits, default=SAFE_PACKET_BYTES)
        room_bytes = packet_bytes - PUBLISH_OVERHEAD_BYTES - TOPIC_ALLOWANCE_BYTES
        if room_bytes < MIN_PIECE_BYTES:
            raise ConfigError(
                f"the broker takes packets of at most {packet_bytes} bytes; pieces need at least "
                f"{MIN_PIECE_BYTES + PUBLISH_OVERHEAD_BYTES + TOPIC_ALLOWANCE_BYTES}: raise its "
                "largest packet size (mosquitto: max_packet_size)"
            )
        return min(wanted_bytes, room_bytes)


BROKERS = {
    profile.name: profile
    for profile in (
        BrokerProfile(name="generic"),
        BrokerProfile(name="mosquitto", packet_bytes=1 << 20),
        # On every connect it hands retained messages to clients that never asked for them.
        BrokerProfile(name="amqtt", packet_bytes=1 << 20, retains=False),
        BrokerProfile(
            name="aws-iot-core",
            packet_bytes=128 * KIB,
            retained_bytes=128 * KIB,
            publishes_per_s=100.0,
            bytes_per_s=512.0 * KIB,
        ),
        BrokerProfile(name="emqx", packet_bytes=1 << 20, retained_bytes=1 << 20),
        BrokerProfile(
            name="emqx-serverless",
            packet_bytes=1 << 20,
            retained_bytes=1 << 20,
            publishes_per_s=10.0,
        ),
        BrokerProfile(
            name="azure-event-grid",
            packet_bytes=512 * KIB,
            retained_bytes=64 * KIB,
            publishes_per_s=100.0,
        ),
    )
}


def broker_profile(name: str) -> BrokerProfile:
    """The limits called ``name``; ConfigError lists the known ones."""
    if name not in BROKERS:
        raise ConfigError(f"broker profile {name!r} is unknown; known are {', '.join(BROKERS)}")
    return BROKERS[name]


class Pace:
    """When a connection may publish again: token buckets for messages and for bytes.

    Every publish is counted, also one that had to go out before its time: the debt is paid by
    waiting longer afterwards. What a bucket holds and what flows into it in one second are together
    what a broker allows in one.
    """

    # Brokers count in windows that are not ours: a little slower than allowed is never too fast.
    SHARE = 0.9

    def __init__(self, profile: BrokerProfile) -> None:
        allowed = (profile.publishes_per_s, profile.bytes_per_s)
        self._per_s = tuple(per_s * self.SHARE for per_s in allowed)
        self._full = tuple(max(1.0, per_s * (1 - self.SHARE)) for per_s in allowed)
        self._tokens = list(self._full)
        self._at_s: float | None = None

    def spend(self, size_bytes: int, now_s: float) -> None:
        """One message of this size goes out now."""
        self._fill(now_s)
        self._tokens[0] -= 1
        self._tokens[1] -= size_bytes

    def wait_s(self, now_s: float) -> float:
        """Seconds until the next message is within the limits; 0: now."""
        self._fill(now_s)
        waits = [
            (1.0 - tokens) / per_s
            for tokens, per_s in zip(self._tokens, self._per_s, strict=True)
            if per_s
        ]
        return max(0.0, *waits, 0.0)

    def _fill(self, now_s: float) -> None:
        elapsed_s = 0.0 if self._at_s is None else max(0.0, now_s - self._at_s)
        self._at_s = now_s
        for number, (full, per_s) in enumerate(zip(self._full, self._per_s, strict=True)):
            self._tokens[number] = min(full, self._tokens[number] + elapsed_s * per_s)

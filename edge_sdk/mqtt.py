"""``Link``: a connection to an MQTT broker that comes back by itself.

One thread per link owns everything: it connects, moves bytes, keeps the connection alive and
reconnects. Other threads hand it work through ``publish`` and ``subscribe`` and read what happened
from one queue. Nothing of an earlier connection is replayed, and a payload offered while offline is
refused instead of being held in memory.

A PUBACK says that the broker has the message, not that anybody else has: end-to-end receipts are
the callers' business.
"""

from __future__ import annotations

import logging
import random
import secrets
import threading
import time
from functools import partial

from edge_sdk.brokers import BROKERS, PUBLISH_OVERHEAD_BYTES, BrokerProfile, Pace
from edge_sdk.connection import (
    ANSWER_LIMIT_S,
    CLOSE_LIMIT_S,
    MAX_PACKET_BYTES,
    Connection,
    negotiate,
)
from edge_sdk.errors import BrokerRefused, LinkError, ProtocolMisuse
from edge_sdk.link import (
    KEEPALIVE_S,
    Arrived,
    Comeback,
    Drained,
    Greeting,
    Inbox,
    LinkDown,
    LinkEvent,
    LinkUp,
    ProtocolName,
    Shared,
    TakenOver,
    make_setup,
    matches,
    taken_over,
)

__all__ = [
    "Arrived",
    "Drained",
    "Link",
    "LinkDown",
    "LinkEvent",
    "LinkUp",
    "TakenOver",
    "connect_once",
]

_log = logging.getLogger(__name__)


def connect_once(
    url: str, timeout_s: float = 10.0, *, client_id: str | None = None, ca_file: str | None = None
) -> Greeting:
    """Connect, say goodbye and tell what the broker offers; BrokerUnreachable or BrokerRefused.

    Without ``client_id`` a random one is used, so that a running client is not disturbed.
    ``timeout_s`` does not bound how long the system looks for the host's name.
    """
    setup = make_setup(url, client_id or f"edge-check-{secrets.token_hex(4)}", ca_file=ca_file)
    shared = Shared()
    try:
        connection = negotiate(partial(Connection, setup, shared), None, timeout_s)
        connection.say_goodbye()
    finally:
        shared.alarm.close()
    return connection.greeting


class Link:
    """A connection that comes back by itself; events go to ``inbox`` from its own thread."""

    def __init__(
        self,
        url: str,
        client_id: str,
        inbox: Inbox,
        *,
        keepalive_s: int = KEEPALIVE_S,
        ca_file: str | None = None,
        will: tuple[str, bytes] | None = None,
        rng: random.Random | None = None,
        limits: BrokerProfile = BROKERS["generic"],
        session_s: int = 0,
    ) -> None:
        """``will`` is (topic, payload): published retained, at QoS 1, when we vanish.

        ``limits``: what this kind of broker allows beyond what it says itself.
        ``session_s``: how long the broker keeps for us what arrives while we are away; 0: not.
        """
        self._setup = make_setup(url, client_id, keepalive_s, ca_file, will, session_s)
        self._inbox = inbox
        self._comeback = Comeback(rng or random.Random())
        self._shared = Shared(self._deliver, lambda: inbox.put(Drained()))
        self._limits, self._pace = limits, Pace(limits)
        # Guards the six below; no callback takes it, because paho's own locks are taken inside.
        self._lock = threading.Lock()
        self._filters: tuple[str, ...] = ()
        self._passing_filters: tuple[str, ...] = ()
        self._connection: Connection | None = None
        self._connected = False
        self._greeting: Greeting | None = None
        self._held: list[Arrived] | None = None
        self._last_reason = ""
        self._thread = threading.Thread(target=self._run, name=f"link-{client_id}", daemon=True)

    def start(self) -> None:
        """Begin to connect in the background; never raises for the network's sake."""
        self._thread.start()

    def subscribe(self, topic_filter: str) -> None:
        """Receive what matches, from now on and after every reconnection."""
        with self._lock:
            if topic_filter in self._filters:
                return
            self._filters = (*self._filters, topic_filter)
            if self._connection is not None:
                self._connection.subscribe((topic_filter,))
        self._shared.alarm.ring()

    def subscribe_for_now(self, topic_filter: str) -> bool:
        """Receive what matches while this connection lasts; False when there is none."""
        with self._lock:
            if self._connection is None or not self._connected:
                return False
            self._passing_filters = (*self._passing_filters, topic_filter)
            self._connection.subscribe((topic_filter,))
        self._shared.alarm.ring()
        return True

    def unsubscribe(self, topic_filter: str) -> None:
        """No longer receive what only this filter matches."""
        with self._lock:
            self._filters = tuple(f for f in self._filters if f != topic_filter)
            self._passing_filters = tuple(f for f in self._passing_filters if f != topic_filter)
            if self._connection is not None:
                self._connection.unsubscribe(topic_filter)
        self._shared.alarm.ring()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over one message at QoS 1; False, and nothing kept, when not connected."""
        with self._lock:
            if self._connection is None or not self._connected:
                return False
            packet_bytes = len(payload) + len(topic.encode()) + PUBLISH_OVERHEAD_BYTES
            limit_bytes = self._packet_limit_bytes(self._connection.greeting)
            if packet_bytes > limit_bytes:
                raise ProtocolMisuse(
                    f"{topic}: a packet of {packet_bytes} bytes, the broker takes at most "
                    f"{limit_bytes}; send it in pieces"
                )
            self._pace.spend(len(payload), time.monotonic())
            accepted = self._connection.publish(topic, payload, retain)
        self._shared.alarm.ring()
        return accepted

    @property
    def has_room(self) -> bool:
        """Whether a bulk message may be handed over; when not, ``Drained`` tells that it may."""
        return self._connected and self._shared.window.has_room

    def pause_s(self) -> float:
        """Seconds to wait before the next bulk message, by the limits of this kind of broker."""
        with self._lock:
            return self._pace.wait_s(time.monotonic())

    def piece_bytes(self, wanted_bytes: int) -> int:
        """Largest piece of at most ``wanted_bytes`` that this connection's packets have room for.

        ConfigError when the broker takes next to nothing.
        """
        return self._limits.piece_bytes(wanted_bytes, self.max_packet_bytes)

    def wait_below(self, limit_bytes: int, timeout_s: float) -> bool:
        """Wait until at most ``limit_bytes`` are unacknowledged; False when that took too long.

        A lost connection forgets what it had pending, and so ends the wait too.
        """
        return self._shared.window.wait_below(limit_bytes, timeout_s)

    def close(self) -> None:
        """Send what was handed over, say goodbye and stop; takes some seconds at most."""
        self._shared.closing.set()
        self._shared.alarm.ring()
        if self._thread.is_alive():
            self._thread.join(CLOSE_LIMIT_S + 1)
        else:
            self._shared.alarm.close()

    @property
    def connected(self) -> bool:
        """Whether ``publish`` would accept a message."""
        return self._connected

    @property
    def protocol(self) -> ProtocolName | None:
        """MQTT version of this connection or the last one; None before the first."""
        return self._greeting.protocol if self._greeting else None

    @property
    def max_packet_bytes(self) -> int | None:
        """Largest packet the broker takes, if it said so."""
        return self._greeting.max_packet_bytes if self._greeting else None

    @property
    def pending(self) -> int:
        """Messages handed over that the broker has not acknowledged."""
        return self._shared.window.count

    @property
    def handed(self) -> int:
        """Messages handed over since this connection began; the last ``pending`` are under way."""
        return self._shared.window.handed

    @property
    def pending_bytes(self) -> int:
        """Payload bytes handed over that the broker has not acknowledged."""
        return self._shared.window.size_bytes

    @property
    def sent_bytes(self) -> int:
        """Bytes written to the socket over all connections; under TLS, before encryption."""
        return self._shared.sent_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes read from the socket over all connections; under TLS, after decryption."""
        return self._shared.received_bytes

    def _run(self) -> None:
        closing = self._shared.closing
        while not closing.is_set():
            try:
                connection, lived_s = self._live_once()
            except LinkError as error:
                reason = str(error)
                self._comeback.failed(isinstance(error, BrokerRefused))
            else:
                reason = connection.reason
                self._comeback.ended(lived_s, connection.closed_by_broker)
            if closing.is_set():
                break
            self._report_down(reason)
            if self._comeback.taken_over:
                self._inbox.put(taken_over(self._setup, reason))
                break
            closing.wait(self._comeback.wait_s())
        self._shared.alarm.close()

    def _live_once(self) -> tuple[Connection, float]:
        """One connection from greeting to end; LinkError when it never came to be."""
        make = partial(Connection, self._setup, self._shared)
        self._held = []  # what the broker kept for us comes right behind its greeting
        connection = negotiate(make, self.protocol, ANSWER_LIMIT_S)
        born_s = time.monotonic()
        try:
            self._serve(connection)
        except Exception as error:  # a hostile packet may break the parser anywhere
            _log.exception("link %s: connection dropped", self._setup.client_id)
            connection.abort(f"dropped on {type(error).__name__}: {error}")
        finally:
            with self._lock:
                self._connection, self._connected = None, False
                self._passing_filters = ()
            self._shared.window.clear()
            connection.close()
        return connection, time.monotonic() - born_s

    def _serve(self, connection: Connection) -> None:
        with self._lock:
            self._connection, self._greeting = connection, connection.greeting
            known_filters = self._filters
        connection.subscribe_and_wait(known_filters)
        if connection.alive:
            with self._lock:
                self._connected = True
            self._last_reason = ""
            self._inbox.put(LinkUp(connection.greeting.protocol))
            for event in self._held or ():
                self._inbox.put(event)
        self._held = None
        while connection.alive and not self._shared.closing.is_set():
            connection.step()
            connection.check_alive()
        if connection.alive:
            with self._lock:
                self._connected = False
            connection.say_goodbye()

    def _deliver(self, topic: str, payload: bytes) -> None:
        # Some brokers hand retained messages to clients that never subscribed to them.
        if not any(matches(f, topic) for f in (*self._filters, *self._passing_filters)):
            return
        event = Arrived(topic, payload)
        if self._held is None:
            self._inbox.put(event)
        else:
            self._held.append(event)

    def _packet_limit_bytes(self, greeting: Greeting) -> int:
        known = (greeting.max_packet_bytes, self._limits.packet_bytes)
        return min((limit for limit in known if limit), default=MAX_PACKET_BYTES)

    def _report_down(self, reason: str) -> None:
        if reason != self._last_reason:
            self._last_reason = reason
            self._inbox.put(LinkDown(reason))

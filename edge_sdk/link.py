"""What a broker link says and how it decides, without any MQTT library.

The address and credentials, the events, the waiting times, who counts as dead, what is still
unacknowledged, and what a failed connection means to the user. ``mqtt.py`` does the talking.
"""

from __future__ import annotations

import logging
import random
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from urllib.parse import unquote, urlsplit

from edge_sdk.errors import BrokerUnreachable, ConfigError

KEEPALIVE_S = 10
# The silence the standard makes a broker bear; we bear as much.
DEAD_AFTER_KEEPALIVES = 1.5
# A live broker that leaves a message unacknowledged this long has lost it.
ACK_LIMIT_S = 60.0
# The first retry comes nearly at once (a broker restarts in tenths of a second); the cap bounds
# how long a fleet stays away after the broker is back, against how hard it knocks until then.
BACKOFF_FIRST_S = 0.2
BACKOFF_CAP_S = 15.0
# A shorter connection does not reset the backoff, and may be one of a series of take-overs.
SHORT_LIFE_S = 5.0
# One short life is a restart; five in a row, each ended in good order by a broker that took us
# back at the next try, is a second process with our client id.
TAKEOVER_LIMIT = 5
# What the kernel may hold unsent: more only makes pings and receipts wait on a slow link.
NOTSENT_LOWAT_BYTES = 1 << 14
# Bulk data that a connection holds without the broker's acknowledgement, and one message more: it
# keeps a link of 200 ms and 10 Mbit/s busy, is what the process holds in memory, and what a cut
# makes us send again.
SEND_WINDOW_BYTES = 256 * 1024
# On a slow line it is less: as much as is through in this many times the least time one message
# took, and a little. That bridges what TCP sends again after a loss; more would only wait.
STRETCH, STRETCH_S = 2.5, 0.05
LEAST_SEND_WINDOW_BYTES = 60 * 1024

# struct tcp_info of Linux 4.1 and later: where tcpi_last_ack_recv and tcpi_bytes_acked are in it.
_TCP_INFO_LAST_ACK_AT, _TCP_INFO_ACKED_AT, _TCP_INFO_BYTES = 56, 120, 128

_RARELY = 16  # failures after which the wait is at its cap
_BAD_CREDENTIALS, _BAD_CLIENT_ID = (0x86, 0x87), 0x85

ProtocolName = Literal["5", "3.1.1"]
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Connected, and the broker has answered every subscription made so far."""

    protocol: ProtocolName


@dataclass(frozen=True, slots=True)
class LinkDown:
    """Not connected, and trying again; repeated only when the reason changes."""

    reason: str


@dataclass(frozen=True, slots=True)
class TakenOver:
    """Another process keeps connecting with our client id; the link has stopped for good."""

    client_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Arrived:
    """One message on a subscribed topic."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Drained:
    """The broker has acknowledged so much that there is room for bulk messages again."""


LinkEvent = LinkUp | LinkDown | TakenOver | Arrived | Drained


class Inbox(Protocol):
    """Where a link's events go: a queue, or what stands for one."""

    def put(self, event: LinkEvent, /) -> None:
        """Take an event; called in the link's own thread."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a broker is and who we say we are; prints without the credentials."""

    host: str
    port: int
    tls: bool
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a broker offered when it accepted us; ``max_packet_bytes`` None: it set no limit."""

    protocol: ProtocolName
    max_packet_bytes: int | None = None


def parse_address(url: str) -> Address:
    """Read ``mqtt://[user:password@]host[:port]`` or ``mqtts://...``; ConfigError otherwise."""
    advice = "write mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"broker address: {error}; {advice}") from error
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname or port == 0:
        shown = url.rpartition("@")[2]
        raise ConfigError(f"broker address: {shown!r} names no broker; {advice}")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ConfigError(f"broker address: nothing may follow the port, got {parts.path!r}")
    tls = parts.scheme == "mqtts"
    username = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    return Address(parts.hostname, port or (8883 if tls else 1883), tls, username, password)


def backoff_s(failures: int, rng: random.Random) -> float:
    """Seconds to wait after this many failures in a row: exponential, with full jitter."""
    return rng.uniform(0, min(BACKOFF_CAP_S, BACKOFF_FIRST_S * 2**failures))


class Comeback:
    """Decides when to connect again, and when somebody else is using our client id."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._failures = 0
        self._short_lives = 0

    @property
    def taken_over(self) -> bool:
        """Whether coming back would only go on throwing another client out."""
        return self._short_lives >= TAKEOVER_LIMIT

    def failed(self, refused: bool) -> None:
        """No connection came to be; a refusal will not change soon, so ask rarely."""
        self._short_lives = 0
        if refused:
            self._failures = _RARELY

    def ended(self, lived_s: float, by_broker: bool) -> None:
        """A connection ended, in good order by the broker or in any other way."""
        if lived_s >= SHORT_LIFE_S:
            self._failures = 0
        self._short_lives = self._short_lives + 1 if by_broker and lived_s < SHORT_LIFE_S else 0

    def wait_s(self) -> float:
        """Seconds to wait before the next attempt, which is counted."""
        self._failures = min(self._failures + 1, _RARELY)
        return backoff_s(self._failures - 1, self._rng)


@dataclass(frozen=True, slots=True)
class Setup:
    """What all connections of one link have in common."""

    address: Address
    client_id: str
    keepalive_s: int
    tls: ssl.SSLContext | None
    will: tuple[str, bytes] | None
    session_s: int = 0


def make_setup(
    url: str,
    client_id: str,
    keepalive_s: int = KEEPALIVE_S,
    ca_file: str | None = None,
    will: tuple[str, bytes] | None = None,
    session_s: int = 0,
) -> Setup:
    address = parse_address(url)
    try:
        tls = ssl.create_default_context(cafile=ca_file) if address.tls else None
        return Setup(address, client_id, keepalive_s, tls, will, session_s)
    except OSError as error:
        raise ConfigError(
            f"{ca_file}: no CA certificates to check {address} with ({error}); "
            "name a PEM file that can be read"
        ) from error


class Alarm:
    """Wakes a thread that waits in ``select``."""

    def __init__(self) -> None:
        self.bell, self._rope = socket.socketpair()
        self.bell.setblocking(False)
        self._rope.setblocking(False)
        self._rung = False

    def ring(self) -> None:
        """Wake the other side; harmless when it is awake or gone."""
        if not self._rung:  # it has not looked yet at what the last ring was for
            self._rung = True
            with suppress(OSError):
                self._rope.send(b"!")

    def silence(self) -> None:
        """Take all rings back; what they were for is looked at after this."""
        with suppress(BlockingIOError):
            self.bell.recv(4096)
        self._rung = False

    def close(self) -> None:
        """Give both sockets back."""
        self.bell.close()
        self._rope.close()


class Window:
    """Publishes the broker has not acknowledged. Never calls paho while it holds its lock.

    ``drained`` is called, without the lock, when bulk messages may be handed over again. How many
    may be pending follows from how long they take: what only waits would be sent again after a cut.
    """

    def __init__(self, drained: Callable[[], None] = lambda: None) -> None:
        self._drained = drained
        self._changed = threading.Condition()
        self._sent_by_mid: dict[int, tuple[int, float]] = {}
        self._early: set[int] = set()
        self._moved_s = 0.0
        self.handed = 0
        self.count = 0
        self.size_bytes = 0
        self._forget_line()

    @property
    def has_room(self) -> bool:
        """Whether a bulk message may be handed over."""
        return self.size_bytes <= self._limit_bytes

    def reserve(self, size_bytes: int, now_s: float) -> None:
        """Count a message that is about to be handed to paho."""
        with self._changed:
            if self.count == 0:
                self._moved_s = now_s
            self.handed += 1
            self.count += 1
            self.size_bytes += size_bytes

    def name(self, mid: int, size_bytes: int, now_s: float) -> None:
        """Tie it to its packet id, which may have been acknowledged already."""
        with self._changed:
            if mid not in self._early:
                self._sent_by_mid[mid] = (size_bytes, now_s)
                return
            self._early.remove(mid)
            drained = self._release(size_bytes)
        if drained:
            self._drained()

    def acknowledge(self, mid: int, now_s: float) -> None:
        """The broker has it."""
        with self._changed:
            self._moved_s = now_s
            sent = self._sent_by_mid.pop(mid, None)
            if sent is None:
                self._early.add(mid)
                return
            size_bytes, sent_s = sent
            drained = self._release(size_bytes, now_s - sent_s, now_s)
        if drained:
            self._drained()

    def cancel(self, size_bytes: int) -> None:
        """Paho did not take it."""
        with self._changed:
            self.handed -= 1
            self._release(size_bytes)

    def clear(self) -> None:
        """Forget everything: the connection is gone."""
        with self._changed:
            self._sent_by_mid.clear()
            self._early.clear()
            self._forget_line()
            self.handed = self.count = self.size_bytes = 0
            self._changed.notify_all()

    def wait_below(self, limit_bytes: int, timeout_s: float) -> bool:
        """Wait until at most ``limit_bytes`` are pending."""
        with self._changed:
            return self._changed.wait_for(lambda: self.size_bytes <= limit_bytes, timeout_s)

    def overdue(self, now_s: float) -> bool:
        """Whether something is pending and nothing moved for too long."""
        return self.count > 0 and now_s - self._moved_s > ACK_LIMIT_S

    def _release(self, size_bytes: int, took_s: float = 0.0, now_s: float = 0.0) -> bool:
        """Whether that made room for bulk messages again."""
        had_room = self.has_room
        self.count -= 1
        self.size_bytes -= size_bytes
        if size_bytes * 2 >= LEAST_SEND_WINDOW_BYTES and took_s > 0.0:
            self._adapt(size_bytes, took_s, now_s)
        self._changed.notify_all()
        return self.has_room and not had_room

    def _forget_line(self) -> None:
        self._least_s, self._adapted_s = float("inf"), float("-inf")
        self._limit_bytes = LEAST_SEND_WINDOW_BYTES

    def _adapt(self, size_bytes: int, took_s: float, now_s: float) -> None:
        self._least_s = min(self._least_s, took_s)
        if now_s - took_s < self._adapted_s:
            return  # it was under way already, and shows nothing of the last step
        self._adapted_s = now_s
        longer = took_s > STRETCH * self._least_s + STRETCH_S
        limit_bytes = self._limit_bytes + (-size_bytes if longer else size_bytes)
        self._limit_bytes = min(SEND_WINDOW_BYTES, max(LEAST_SEND_WINDOW_BYTES, limit_bytes))


class Vigil:
    """Decides when to ping and when the other side is dead. Time comes in.

    Only received bytes, or a full socket whose bytes arrive, prove that the other side is there:
    the kernel goes on taking writes for minutes after a link died.
    """

    def __init__(self, keepalive_s: float, now_s: float) -> None:
        self.keepalive_s = keepalive_s
        self.dead_after_s = keepalive_s * DEAD_AFTER_KEEPALIVES
        self._sent_s = self._heard_s = now_s
        self._asked = False

    def sent(self, now_s: float) -> None:
        """Bytes were written."""
        self._sent_s = now_s

    def heard(self, now_s: float) -> None:
        """The other side gave a sign of life."""
        self._heard_s = max(self._heard_s, now_s)
        self._asked = False

    def asked(self) -> None:
        """A ping was queued."""
        self._asked = True

    def ping_in_s(self, now_s: float) -> float:
        """Seconds until a ping is due; one question per silence is enough."""
        since_s = self._sent_s if self._asked else min(self._sent_s, self._heard_s)
        return max(0.0, since_s + self.keepalive_s - now_s)

    def dead_in_s(self, now_s: float) -> float:
        """Seconds of silence left before the connection counts as dead."""
        return max(0.0, self._heard_s + self.dead_after_s - now_s)


def plain(error: OSError) -> str:
    """The system's own words for it."""
    return error.strerror or str(error) or type(error).__name__


def explain(address: Address, error: OSError | ValueError) -> BrokerUnreachable:
    """What a failed TCP or TLS handshake means, and what to do about it."""
    seen = plain(error) if isinstance(error, OSError) else str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        what = f"the certificate there is not trusted ({error.verify_message})"
        advice = "name its CA with the CA file option, and check this machine's clock"
    elif isinstance(error, ConnectionRefusedError):
        what = "nobody listens there"
        advice = "start the server or broker, or give the address it printed"
    elif isinstance(error, (socket.gaierror, UnicodeError)):
        what = f"the name {address.host!r} does not resolve ({seen})"
        advice = "check the spelling and this machine's name service, or give an IP address"
    elif isinstance(error, (ssl.SSLError, TimeoutError, ConnectionResetError)) and address.tls:
        what = f"no answer in TLS ({seen})"
        advice = "use mqtt:// for a broker without TLS; if it has TLS, check the network"
    else:
        what = f"no connection ({seen})"
        advice = "check the network and any firewall in between"
    return BrokerUnreachable(f"{address}: {what}; {advice}")


def no_broker(address: Address, seen: str) -> str:
    """The message for something that listens but does not answer as a broker."""
    return (
        f"{address}: something listens there, but it is no MQTT broker this program can talk to: "
        f"{seen}. Check host and port; mqtt:// is for plain MQTT, mqtts:// for TLS"
    )


def refusal(setup: Setup, said: str, code: int) -> str:
    """The message for a broker that answered and said no."""
    if code in _BAD_CREDENTIALS:
        advice = "Check user name and password: mqtt://USER:PASSWORD@HOST:PORT"
    elif code == _BAD_CLIENT_ID:
        advice = "This broker wants another client id: change the device's id"
    else:
        advice = "Try again later, or ask whoever runs the broker"
    return f"{setup.address}: the broker refused client {setup.client_id!r}: {said}. {advice}"


class Shared:
    """What a link's connections and its callers both touch."""

    def __init__(
        self,
        deliver: Callable[[str, bytes], None] = lambda topic, payload: None,
        drained: Callable[[], None] = lambda: None,
    ) -> None:
        self.deliver = deliver
        self.window = Window(drained)
        self.alarm = Alarm()
        self.closing = threading.Event()
        # Written by the link's thread alone, hence exact without a lock.
        self.sent_bytes = 0
        self.received_bytes = 0


def tune(sock: object) -> None:
    """Small messages at once, and little hidden in the kernel; where the system can do it."""
    if isinstance(sock, socket.socket):
        with suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT_BYTES)


def acknowledged(sock: socket.socket) -> tuple[int, float] | None:
    """Bytes the other side's kernel has taken, and for how many seconds it has said nothing.

    None where the system does not tell.
    """
    if sys.platform != "linux":
        return None
    with suppress(OSError, struct.error):
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        (silent_ms,) = struct.unpack_from("=I", info, _TCP_INFO_LAST_ACK_AT)
        return int(struct.unpack_from("=Q", info, _TCP_INFO_ACKED_AT)[0]), silent_ms / 1000
    return None


def taken_over(setup: Setup, reason: str) -> TakenOver:
    """The event for a series of take-overs, the last of which ended with ``reason``."""
    return TakenOver(
        setup.client_id,
        f"the broker at {setup.address} ended {TAKEOVER_LIMIT} connections in a row within "
        f"{SHORT_LIFE_S:.0f} s of accepting them (last: {reason}): another process uses the "
        f"client id {setup.client_id!r}. Stop one of the two, or give this one its own identity",
    )


def matches(topic_filter: str, topic: str) -> bool:
    """Whether a filter names a topic, with "+" for one level and "#" for all that follow."""
    if topic_filter == topic:
        return True
    wanted, levels = topic_filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted, levels = wanted[:-1], levels[: len(wanted) - 1]
    return len(wanted) == len(levels) and all(
        one in ("+", level) for one, level in zip(wanted, levels, strict=True)
    )


def guarded(callback: Callable[..., None]) -> Callable[..., None]:
    """Drop the library's own two arguments; an exception costs one event, not the connection."""

    def call(_client: object, _userdata: object, *arguments: Any) -> None:
        try:
            callback(*arguments)
        except Exception:
            _log.exception("dropped one event from the broker")

    return call

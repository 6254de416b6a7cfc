"""One connection to an MQTT broker, from the TCP handshake to its end. The only importer of paho.

paho parses and packs; when to connect, move bytes, ping and give up is decided here, by the one
thread that owns the connection. Each connection gets a fresh paho client, so nothing of an earlier
one is replayed.
"""

from __future__ import annotations

import logging
import selectors
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from edge_sdk.errors import BrokerRefused, BrokerUnreachable, LinkError
from edge_sdk.link import (
    ACK_LIMIT_S,
    Greeting,
    ProtocolName,
    Setup,
    Shared,
    Vigil,
    acknowledged,
    explain,
    guarded,
    no_broker,
    plain,
    refusal,
    tune,
)

# Some brokers cut at the announced second instead of the 1.5-fold the standard allows.
KEEPALIVE_GRACE_S = 2
TCP_LIMIT_S = 5.0
# A broker without MQTT 5 may keep silent instead of refusing it.
TRY_NEWEST_S = 3.0
ANSWER_LIMIT_S = 10.0
CLOSE_LIMIT_S = 2.0
# Brokers announce 10 to 65535; more than this adds memory, not speed.
INFLIGHT_MAX = 64
# No message of ours comes near it; a longer one is an attack or another protocol.
MAX_PACKET_BYTES = 1 << 20
RECV_BYTES = 1 << 17

_CONNACK_BYTE = 0x20
_SESSION_TAKEN_OVER, _UNSUPPORTED_VERSION = 0x8E, 0x84

_log = logging.getLogger(__name__)


def negotiate(
    make: Callable[[ProtocolName], Connection], known: ProtocolName | None, limit_s: float
) -> Connection:
    """A greeted connection: MQTT 5 unless 3.1.1 is known, 3.1.1 where 5 gets no for an answer."""
    deadline_s = time.monotonic() + limit_s
    if known != "3.1.1":
        connection = make("5")
        try:
            connection.greet(limit_s if known else min(TRY_NEWEST_S, limit_s / 2))
        except _OtherVersion:
            pass
        except _Silent:
            if known:
                raise
        else:
            return connection
    connection = make("3.1.1")
    connection.greet(max(0.1, deadline_s - time.monotonic()))
    return connection


class _Client(paho.Client):
    """paho's client, counting every byte and refusing what no MQTT broker would send.

    ``_sock_send`` and ``_sock_recv`` are the only two places where paho touches the socket's
    data; nothing public shows PUBACKs, pings, headers and half-sent packets as bytes.
    """

    def __init__(self, setup: Setup, shared: Shared, protocol: ProtocolName) -> None:
        newest = protocol == "5"
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id=setup.client_id,
            clean_session=None if newest else setup.session_s == 0,
            protocol=MQTTProtocolVersion.MQTTv5 if newest else MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        self._shared = shared
        self._read_ahead = memoryview(b"")
        self.opening = b""
        self.ending = ""
        self.orderly = False
        # Without it paho would write from whichever thread publishes, and mix up packets.
        self.on_socket_register_write = lambda client, userdata, sock: None

    def ping(self) -> None:
        """Queue a PINGREQ; paho's own timer drops connections that are merely slow."""
        self._send_pingreq()

    def limit_inflight(self, limit: int) -> None:
        """Obey the broker's Receive Maximum, known only once connected."""
        self._max_inflight_messages = limit

    def drop(self) -> None:
        """Close the socket without a goodbye."""
        self._sock_close()

    def _sock_send(self, buf: bytes | bytearray) -> int:
        try:
            count = super()._sock_send(buf)
        except BlockingIOError:
            raise
        except OSError as error:
            self.ending = self.ending or plain(error)
            raise
        self._shared.sent_bytes += count
        return count

    @property
    def has_read_ahead(self) -> bool:
        """Whether bytes were read that no packet has been made of yet."""
        return len(self._read_ahead) > 0

    def _sock_recv(self, bufsize: int) -> bytes:
        # paho asks for a packet's head byte by byte; each call to the system would let another
        # thread have the interpreter, and wait milliseconds to get it back.
        if bufsize > MAX_PACKET_BYTES:
            self.ending = self.ending or f"it sent {bufsize} bytes in one, limit {MAX_PACKET_BYTES}"
            raise ConnectionError(self.ending)
        if not self._read_ahead:
            self._read_ahead = memoryview(self._receive())
        data = bytes(self._read_ahead[:bufsize])
        self._read_ahead = self._read_ahead[len(data) :]
        return data

    def _receive(self) -> bytes:
        try:
            data = super()._sock_recv(RECV_BYTES)
        except BlockingIOError:
            raise
        except OSError as error:
            self.ending = self.ending or plain(error)
            raise
        self._shared.received_bytes += len(data)
        if not data:
            self.orderly = True
            self.ending = self.ending or "the broker closed the connection"
        elif not self.opening:
            self.opening = data
            if data[0] != _CONNACK_BYTE:
                self.ending = f"it answered {data[:21]!r}"
                raise ConnectionError(self.ending)
        return data

    def _ssl_wrap_socket(self, tcp_sock: socket.socket) -> ssl.SSLSocket:
        # Paho's own leaves the socket open when the handshake fails.
        assert self._ssl_context is not None
        return self._ssl_context.wrap_socket(tcp_sock, server_hostname=self._host)


class _Silent(BrokerUnreachable):
    """Connected to something that gave no answer to CONNECT."""


class _OtherVersion(BrokerRefused):
    """The broker does not speak this version of MQTT."""


class Connection:
    """One connection from the TCP handshake to its end, owned by one thread."""

    def __init__(self, setup: Setup, shared: Shared, protocol: ProtocolName) -> None:
        self._setup, self._shared = setup, shared
        self.greeting = Greeting(protocol)
        self.reason = ""
        self.closed_by_broker = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(shared.alarm.bell, selectors.EVENT_READ)
        self._watched = 0
        self._backlog = False
        self._taken_bytes = 0
        self._connack: tuple[ReasonCode, Properties] | None = None
        self._awaited_mid: int | None = None
        self._vigil = Vigil(setup.keepalive_s, time.monotonic())
        self._client = self._make_client(protocol)

    def _make_client(self, protocol: ProtocolName) -> _Client:
        client = _Client(self._setup, self._shared, protocol)
        address = self._setup.address
        if address.username is not None:
            client.username_pw_set(address.username, address.password)
        if self._setup.tls is not None:
            client.tls_set_context(self._setup.tls)
        if self._setup.will is not None:
            topic, payload = self._setup.will
            client.will_set(topic, payload, qos=1, retain=True)
        client.on_connect = guarded(self._on_connect)
        client.on_disconnect = guarded(self._on_disconnect)
        client.on_message = guarded(self._on_message)
        client.on_publish = guarded(self._on_publish)
        client.on_subscribe = guarded(self._on_subscribe)
        return client

    @property
    def alive(self) -> bool:
        """Whether the socket is still open."""
        return self._client.socket() is not None

    def greet(self, limit_s: float) -> None:
        """Connect and wait for CONNACK; on any failure close, and raise what was seen."""
        try:
            self._open(limit_s)
            deadline_s = time.monotonic() + limit_s
            while self.alive and self._connack is None:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or self._shared.closing.is_set():
                    self.abort(f"no answer in {limit_s:.1f} s")
                    break
                self.step(left_s)
            self._judge_greeting()
        except LinkError:
            self.close()
            raise
        except Exception as error:  # a hostile answer may break the parser anywhere
            self.close()
            raise BrokerUnreachable(no_broker(self._setup.address, repr(error))) from error

    def _open(self, limit_s: float) -> None:
        address, client = self._setup.address, self._client
        client.connect_timeout = min(TCP_LIMIT_S, limit_s)
        session_s = self._setup.session_s
        terms: dict[str, Any] = {}
        if self.greeting.protocol == "5":
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.MaximumPacketSize = MAX_PACKET_BYTES
            if session_s:
                properties.SessionExpiryInterval = session_s
            terms = {"properties": properties, "clean_start": session_s == 0}
        announced_s = self._setup.keepalive_s + KEEPALIVE_GRACE_S
        try:
            client.connect(address.host, address.port, announced_s, **terms)
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be a host's
            raise explain(address, error) from error
        tune(client.socket())

    def _judge_greeting(self) -> None:
        if self._connack is None:
            kind = BrokerUnreachable if self._client.opening else _Silent
            raise kind(no_broker(self._setup.address, self._client.ending or self.reason))
        reason, properties = self._connack
        if reason.is_failure:
            refused = _OtherVersion if reason.value == _UNSUPPORTED_VERSION else BrokerRefused
            raise refused(refusal(self._setup, str(reason), reason.value))
        self._accept_terms(properties)

    def _accept_terms(self, properties: Properties) -> None:
        terms = vars(properties)
        self.greeting = Greeting(self.greeting.protocol, terms.get("MaximumPacketSize"))
        self._client.limit_inflight(min(INFLIGHT_MAX, terms.get("ReceiveMaximum", INFLIGHT_MAX)))
        keepalive_s = self._setup.keepalive_s
        if prescribed_s := terms.get("ServerKeepAlive"):
            keepalive_s = min(keepalive_s, max(1, prescribed_s - KEEPALIVE_GRACE_S))
        self._vigil = Vigil(keepalive_s, time.monotonic())

    def subscribe(self, topic_filters: tuple[str, ...]) -> int | None:
        """Queue one SUBSCRIBE for all of these; its packet id."""
        return self._client.subscribe([(topic_filter, 1) for topic_filter in topic_filters])[1]

    def unsubscribe(self, topic_filter: str) -> None:
        """Queue one UNSUBSCRIBE."""
        self._client.unsubscribe(topic_filter)

    def publish(self, topic: str, payload: bytes, retain: bool) -> bool:
        """Queue one PUBLISH at QoS 1."""
        window = self._shared.window
        window.reserve(len(payload), time.monotonic())
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            window.cancel(len(payload))
            return False
        window.name(info.mid, len(payload), time.monotonic())
        return True

    def subscribe_and_wait(self, topic_filters: tuple[str, ...]) -> None:
        """Subscribe, and serve until the answer is here, the connection ends or time is up."""
        self._awaited_mid = self.subscribe(topic_filters) if topic_filters else None
        deadline_s = time.monotonic() + ANSWER_LIMIT_S
        while self.alive and self._awaited_mid is not None and not self._shared.closing.is_set():
            self.step(deadline_s - time.monotonic())
            if time.monotonic() >= deadline_s:
                self.abort(f"no answer to a subscription in {ANSWER_LIMIT_S:.0f} s")

    def step(self, limit_s: float | None = None) -> None:
        """Wait for the socket, the alarm or the next deadline, then move bytes."""
        client, shared = self._client, self._shared
        sock = client.socket()
        if not isinstance(sock, socket.socket):
            return
        buffered = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0
        self._watch(sock)
        ready = self._selector.select(0 if buffered else max(0.0, self._patience_s(limit_s)))
        shared.alarm.silence()
        sent_bytes, received_bytes = shared.sent_bytes, shared.received_bytes
        if buffered or any(key.fileobj is sock for key, _ in ready):
            client.loop_read()
            while client.has_read_ahead and self.alive:
                client.loop_read()
        if client.want_write():
            client.loop_write()
        now_s = time.monotonic()
        wrote = shared.sent_bytes > sent_bytes
        if wrote:
            self._vigil.sent(now_s)
        if shared.received_bytes > received_bytes:
            self._vigil.heard(now_s)
        elif wrote and self._backlog:
            self._look_at(sock, now_s)
        self._backlog = client.want_write()
        if not self.alive:
            self.reason = self.reason or client.ending or "the broker broke the rules of MQTT"
            self.closed_by_broker = self.closed_by_broker or client.orderly

    def _look_at(self, sock: socket.socket, now_s: float) -> None:
        """A full socket has room again: a sign of life, where the other side took the bytes."""
        seen = acknowledged(sock)
        if seen is None:
            self._vigil.heard(now_s)
        elif seen[0] > self._taken_bytes:
            self._taken_bytes = seen[0]
            self._vigil.heard(now_s - seen[1])

    def _watch(self, sock: socket.socket) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._client.want_write() else 0)
        if self._watched == 0:
            self._selector.register(sock, events)
        elif self._watched != events:
            self._selector.modify(sock, events)
        self._watched = events

    def _patience_s(self, limit_s: float | None) -> float:
        if limit_s is not None:
            return limit_s
        now_s = time.monotonic()
        dead_in_s = self._vigil.dead_in_s(now_s)
        # A backlog is traffic enough; a ping would only queue behind it.
        return dead_in_s if self._backlog else min(dead_in_s, self._vigil.ping_in_s(now_s))

    def check_alive(self) -> None:
        """Ping when it is time, and end a connection nothing comes through any more."""
        now_s = time.monotonic()
        if self._vigil.dead_in_s(now_s) == 0:
            self.abort(f"no sign of life from the broker for {self._vigil.dead_after_s:.0f} s")
        elif self._shared.window.overdue(now_s):
            self.abort(f"the broker acknowledged nothing for {ACK_LIMIT_S:.0f} s")
        elif not self._backlog and self._vigil.ping_in_s(now_s) == 0:
            self._vigil.asked()
            self._client.ping()

    def say_goodbye(self) -> None:
        """Send what is queued and DISCONNECT, as far as that goes in a short time."""
        self._client.disconnect()
        deadline_s = time.monotonic() + CLOSE_LIMIT_S
        while self.alive and time.monotonic() < deadline_s:
            self.step(deadline_s - time.monotonic())
        self.close()

    def abort(self, reason: str) -> None:
        """End the connection without a goodbye, and remember why."""
        self.reason = self.reason or reason
        self._client.drop()

    def close(self) -> None:
        """Give sockets back; no further call is allowed."""
        self._client.drop()
        self._selector.close()

    def _on_connect(self, _: object, reason: ReasonCode, properties: Properties) -> None:
        self._connack = (reason, properties)

    def _on_disconnect(self, flags: paho.DisconnectFlags, reason: ReasonCode, _: object) -> None:
        if flags.is_disconnect_packet_from_server:
            self.reason = self.reason or f"the broker ended the connection: {reason}"
            self.closed_by_broker = reason.value == _SESSION_TAKEN_OVER

    def _on_message(self, message: paho.MQTTMessage) -> None:
        self._shared.deliver(message.topic, bytes(message.payload))

    def _on_publish(self, mid: int, reason: ReasonCode, _: object) -> None:
        self._shared.window.acknowledge(mid, time.monotonic())
        if reason.is_failure:
            _log.warning("%s: the broker refused a message: %s", self._setup.client_id, reason)

    def _on_subscribe(self, mid: int, reasons: list[ReasonCode], _: object) -> None:
        if mid == self._awaited_mid:
            self._awaited_mid = None
        for reason in reasons:
            if reason.is_failure:
                _log.warning("%s: subscription refused: %s", self._setup.client_id, reason)

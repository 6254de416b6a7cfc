"""A cloud broker's limits in front of a real mosquitto.

A relay that reads the packets of MQTT 3.1.1 and 5 in both directions and does what the service
does to a client that goes too far: over a size, a count or a QoS it closes the connection (after a
DISCONNECT with the reason, where that is MQTT 5); over a rate AWS IoT Core drops the publish
without a PUBACK and EMQX stops reading for a while. Every violation is counted, so a test can ask
for none, and its control for some.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tests.raw_mqtt import (
    CONNACK,
    PUBACK,
    PUBLISH,
    packet,
    read_varint,
    varint,
)
from tests.relay import LoopThread

CONNECT, SUBSCRIBE, UNSUBSCRIBE = 1, 8, 10
GOODBYE_LIMIT_S = 1.0

_REASONS = {
    "packet_bytes": 0x95,
    "publishes_per_s": 0x96,
    "bytes_per_s": 0x96,
    "topic_slashes": 0x90,
    "qos": 0x9B,
    "retained_bytes": 0x97,
    "subscriptions": 0x97,
    "filters_per_subscribe": 0x97,
    "unacknowledged": 0x93,
}
_RECEIVE_MAXIMUM, _MAXIMUM_QOS, _RETAIN_AVAILABLE, _MAXIMUM_PACKET = 0x21, 0x24, 0x25, 0x27
# Bytes of CONNACK's properties; 0 is a string or data with its length in front, -2 a pair of them.
_PROPERTY_BYTES = {
    key: size
    for size, keys in (
        (0, (0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F)),
        (1, (0x24, 0x25, 0x28, 0x29, 0x2A)),
        (2, (0x13, 0x21, 0x22)),
        (4, (0x11, 0x27)),
        (-2, (0x26,)),
    )
    for key in keys
}


OverRate = Literal["close", "discard", "pause"]


@dataclass
class Limits:
    """What one connection may do; None is no limit. May be changed while connections are open.

    packet_bytes:    a whole packet of the client's.
    publishes_per_s: one second's worth may come at once; so with ``bytes_per_s``, whole packets.
    over_rate:       ``close``, ``discard`` without PUBACK, or ``pause``: read no more for a while.
    retained_bytes:  a retained payload.
    unacknowledged:  QoS 1 publishes without PUBACK, announced as Receive Maximum.
    refuse_mqtt_5:   the CONNACK code for MQTT 5, as of 3.1.1 (1) or of 5 (0x84).
    """

    packet_bytes: int | None = None
    publishes_per_s: float | None = None
    bytes_per_s: float | None = None
    over_rate: OverRate = "close"
    topic_slashes: int | None = None
    qos: int = 2
    retained_bytes: int | None = None
    subscriptions: int | None = None
    filters_per_subscribe: int | None = None
    unacknowledged: int | None = None
    refuse_mqtt_5: Literal[1, 0x84] | None = None


AWS_IOT_CORE = Limits(
    packet_bytes=128 << 10,
    publishes_per_s=100,
    bytes_per_s=512 << 10,
    over_rate="discard",
    topic_slashes=7,
    qos=1,
    subscriptions=50,
    filters_per_subscribe=8,
    unacknowledged=100,
)
EMQX = Limits(packet_bytes=1 << 20)
EMQX_SERVERLESS = replace(EMQX, publishes_per_s=10, over_rate="pause", subscriptions=10)
AZURE_EVENT_GRID = Limits(packet_bytes=1 << 20, qos=1, retained_bytes=64 << 10)


class LimitedBroker:
    """Listens on ``port`` in front of a broker; ``limits`` is a copy of one's own to change."""

    def __init__(
        self, target_port: int, limits: Limits, *, host: str = "127.0.0.1", target_host: str = ""
    ) -> None:
        self.limits = replace(limits)
        self.violations: Counter[str] = Counter()
        self.connections = 0
        self.publishes = 0
        self.largest_packet_bytes = 0
        self.port = 0
        self.host = host
        self._target = (target_host or host, target_port)
        self._thread = LoopThread()
        self._sessions: set[_Session] = set()
        self._server: asyncio.Server | None = None

    def __enter__(self) -> LimitedBroker:
        self._thread.start()
        self._thread.call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.call(self._shut())
        self._thread.stop()

    @property
    def url(self) -> str:
        """The address a client should use instead of the broker's."""
        return f"mqtt://{self.host}:{self.port}"

    def drop_connections(self) -> None:
        """Close all of them now, as a broker does whose configuration was changed."""
        self._thread.call(self._drop())

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._drop()

    async def _drop(self) -> None:
        tasks = [session.task for session in self._sessions]
        for session in self._sessions:
            session.drop()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        self.connections += 1
        session = _Session(self, (reader, writer), (far_reader, far_writer))
        self._sessions.add(session)
        try:
            await session.run()
        finally:
            self._sessions.discard(session)
            session.drop()


class _Violation(Exception):
    """The client broke the limit of that name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Bucket:
    """Lets through so much a second; a whole second's worth may be saved."""

    def __init__(self) -> None:
        self._level = 0.0
        self._seen_s = time.monotonic()

    def early_s(self, amount: float, per_s: float | None) -> float:
        """0 where it may pass, and is booked; else how long it is too early, and is not."""
        if per_s is None:
            return 0.0
        now_s = time.monotonic()
        self._level = max(0.0, self._level - (now_s - self._seen_s) * per_s)
        self._seen_s = now_s
        # A bucket that is empty takes anything: a packet above the rate is late, not impossible.
        if self._level and self._level + amount > per_s:
            return (self._level + amount - per_s) / per_s
        self._level += amount
        return 0.0


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Session:
    """One client's connection and the one made for it."""

    def __init__(self, broker: LimitedBroker, near: Stream, far: Stream) -> None:
        self._broker = broker
        self._reader, self._writer = near
        self._far_reader, self._far_writer = far
        self._level = 4
        self._filters: set[bytes] = set()
        self._publishes, self._bytes = _Bucket(), _Bucket()
        self._unacknowledged = 0
        task = asyncio.current_task()
        assert task is not None
        self.task = task

    async def run(self) -> None:
        """Until one of the three ends it."""
        ways = [asyncio.ensure_future(way) for way in (self._up(), self._down())]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in await asyncio.gather(*ways, return_exceptions=True):
                if isinstance(end, _Violation):
                    await self._say_goodbye(end.name)
                elif isinstance(end, Exception) and not isinstance(end, (OSError, EOFError)):
                    raise end

    def drop(self) -> None:
        """Close both connections; that ends ``run``."""
        for end in (self._writer, self._far_writer):
            end.transport.abort()

    async def _up(self) -> None:
        while True:
            head, size_bytes = await _read_head(self._reader)
            whole_bytes = len(head) + size_bytes
            limit = self._broker.limits.packet_bytes
            self._refuse_if(limit is not None and whole_bytes > limit, "packet_bytes")
            self._broker.largest_packet_bytes = max(self._broker.largest_packet_bytes, whole_bytes)
            body = await self._reader.readexactly(size_bytes)
            if await self._admit(head[0], body, whole_bytes):
                self._far_writer.write(head + body)
                await self._far_writer.drain()

    async def _down(self) -> None:
        while True:
            head, size_bytes = await _read_head(self._far_reader)
            body = await self._far_reader.readexactly(size_bytes)
            kind = head[0] >> 4
            # A refusal may be in the older form, without properties.
            if kind == CONNACK and self._level == 5 and len(body) > 2:
                self._writer.write(packet(head[0], connack_body(body, self._broker.limits)))
            else:
                self._unacknowledged -= kind == PUBACK
                self._writer.write(head + body)
            await self._writer.drain()

    async def _admit(self, first: int, body: bytes, whole_bytes: int) -> bool:
        kind = first >> 4
        if kind == CONNECT:
            return await self._admit_connect(body)
        if kind == SUBSCRIBE:
            self._check_subscribe(list(_filters(body, self._level, with_options=True)))
        elif kind == UNSUBSCRIBE:
            self._filters -= {name for name, _ in _filters(body, self._level, with_options=False)}
        elif kind == PUBLISH:
            self._broker.publishes += 1
            self._check_publish(first, body)
            if not await self._admit_rate(whole_bytes):
                return False
            self._unacknowledged += first >> 1 & 3 == 1
        return True

    async def _admit_connect(self, body: bytes) -> bool:
        self._level = body[2 + int.from_bytes(body[:2], "big")]
        code = self._broker.limits.refuse_mqtt_5
        if self._level < 5 or code is None:
            return True
        self._writer.write(packet(0x20, bytes([0, code]) + (b"\x00" if code >= 0x80 else b"")))
        await self._writer.drain()
        raise EOFError

    def _check_publish(self, first: int, body: bytes) -> None:
        limits, qos = self._broker.limits, first >> 1 & 3
        topic_end = 2 + int.from_bytes(body[:2], "big")
        self._check_slashes(body[2:topic_end])
        self._refuse_if(qos > limits.qos, "qos")
        full = limits.unacknowledged is not None and self._unacknowledged >= limits.unacknowledged
        self._refuse_if(qos == 1 and full, "unacknowledged")
        if first & 1 and limits.retained_bytes is not None:
            start = topic_end + (2 if qos else 0)
            if self._level == 5:
                start = sum(read_varint(body, start) or (len(body), 0))
            self._refuse_if(len(body) - start > limits.retained_bytes, "retained_bytes")

    def _check_subscribe(self, wanted: list[tuple[bytes, int]]) -> None:
        limits = self._broker.limits
        most = limits.filters_per_subscribe
        self._refuse_if(most is not None and len(wanted) > most, "filters_per_subscribe")
        for name, options in wanted:
            self._check_slashes(name)
            self._refuse_if(options & 3 > limits.qos, "qos")
            self._filters.add(name)
        most = limits.subscriptions
        self._refuse_if(most is not None and len(self._filters) > most, "subscriptions")

    def _check_slashes(self, topic: bytes) -> None:
        most = self._broker.limits.topic_slashes
        self._refuse_if(most is not None and topic.count(b"/") > most, "topic_slashes")

    async def _admit_rate(self, whole_bytes: int) -> bool:
        limits = self._broker.limits
        rates = (
            (self._publishes, "publishes_per_s", 1, limits.publishes_per_s),
            (self._bytes, "bytes_per_s", whole_bytes, limits.bytes_per_s),
        )
        for bucket, name, amount, per_s in rates:
            if not (early_s := bucket.early_s(amount, per_s)):
                continue
            self._refuse_if(limits.over_rate == "close", name)
            self._broker.violations[name] += 1
            if limits.over_rate == "discard":
                return False
            while early_s:
                await asyncio.sleep(early_s)
                early_s = bucket.early_s(amount, per_s)
        return True

    def _refuse_if(self, broken: bool, name: str) -> None:
        if broken:
            self._broker.violations[name] += 1
            raise _Violation(name)

    async def _say_goodbye(self, name: str) -> None:
        """The reason, where the client can read one; a 3.1.1 client gets a reset."""
        if self._level < 5:
            linger = struct.pack("ii", 1, 0)
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return
        try:
            self._writer.write(packet(0xE0, bytes([_REASONS[name], 0])))
            self._writer.write_eof()
            # Closed with bytes unread, the kernel would reset, and the reason would be lost.
            await asyncio.wait_for(_read_on(self._reader), GOODBYE_LIMIT_S)
        except (OSError, asyncio.TimeoutError):
            pass


async def _read_head(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    """A fixed header and how many bytes follow it."""
    head = await reader.readexactly(2)
    while (length := read_varint(head, 1)) is None:
        head += await reader.readexactly(1)
    return head, length[0]


async def _read_on(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


def _filters(body: bytes, level: int, *, with_options: bool) -> Iterator[tuple[bytes, int]]:
    """Each topic filter of a SUBSCRIBE or UNSUBSCRIBE and its options, 0 where it has none."""
    position = 2
    if level == 5:
        position = sum(read_varint(body, position) or (len(body), 0))
    while position + 2 <= len(body):
        end = position + 2 + int.from_bytes(body[position : position + 2], "big")
        yield body[position + 2 : end], body[end] if with_options else 0
        position = end + with_options


def connack_body(body: bytes, limits: Limits) -> bytes:
    """MQTT 5's CONNACK as a broker with these limits would have sent it."""
    length = read_varint(body, 2)
    assert length is not None, f"CONNACK without properties: {body.hex()}"
    ours = [(key, value) for key, value in _properties(body[length[1] :])]
    lowered = {
        _MAXIMUM_PACKET: limits.packet_bytes,
        _RECEIVE_MAXIMUM: limits.unacknowledged,
        _MAXIMUM_QOS: limits.qos if limits.qos < 2 else None,
        _RETAIN_AVAILABLE: 0 if limits.retained_bytes == 0 else None,
    }
    for key, limit in lowered.items():
        if limit is not None:
            present = [int.from_bytes(value, "big") for known, value in ours if known == key]
            ours = [(known, value) for known, value in ours if known != key]
            ours.append((key, min([limit, *present]).to_bytes(_PROPERTY_BYTES[key], "big")))
    properties = b"".join(bytes([key]) + value for key, value in ours)
    return body[:2] + varint(len(properties)) + properties


def _properties(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position < len(data):
        key, start = data[position], position + 1
        size = _PROPERTY_BYTES[key]
        position = start + size
        if size <= 0:
            position = start
            for _ in range(1 if size == 0 else 2):
                position += 2 + int.from_bytes(data[position : position + 2], "big")
        yield key, data[start:position]

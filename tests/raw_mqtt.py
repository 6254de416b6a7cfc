"""MQTT clients by the hundred in one process, on bare sockets, for loads that measure a broker.

A ``Swarm`` owns one selector and one receive buffer; its clients speak 3.1.1 or 5, publish with a
window of unacknowledged QoS 1 messages and acknowledge what they receive. Nothing is done per byte
in Python, so that a benchmark weighs the broker. ``python -m tests.raw_mqtt`` prints what one raw
subscriber receives from many raw senders: what any other receiver has to be compared with.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, cast

from tests.brokers import OpenBroker

ROOT = Path(__file__).resolve().parent.parent
RECEIVE_BYTES = 1 << 18
BUFFERS_A_SEND = 16
CONNECT_LIMIT_S = 10.0
CONNACK, PUBLISH, PUBACK, SUBACK, DISCONNECT = 2, 3, 4, 9, 14

OnMessage = Callable[["Client", bytes, memoryview], None]


def varint(number: int) -> bytes:
    """MQTT's variable byte integer."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def read_varint(data: bytes | memoryview, position: int) -> tuple[int, int] | None:
    """Number and the position behind it, None where it is not complete."""
    number = 0
    for index in range(4):
        if position + index >= len(data):
            return None
        byte = data[position + index]
        number |= (byte & 127) << 7 * index
        if byte < 128:
            return number, position + index + 1
    raise ValueError("a variable byte integer of more than 4 bytes")


def packet(first: int, *parts: bytes) -> bytes:
    """A packet with that first byte and the parts as its body."""
    return bytes([first]) + varint(sum(map(len, parts))) + b"".join(parts)


def text(value: bytes) -> bytes:
    """A string with its length, as packets have it."""
    return len(value).to_bytes(2, "big") + value


def connect_packet(client_id: bytes, level: int) -> bytes:
    """A CONNECT with a clean start and without keepalive."""
    properties = b"\x00" if level == 5 else b""
    return packet(0x10, b"\x00\x04MQTT", bytes([level, 2, 0, 0]), properties, text(client_id))


def subscribe_packet(level: int, packet_id: int, *filters: bytes, qos: int = 1) -> bytes:
    """A SUBSCRIBE to all of these."""
    properties = b"\x00" if level == 5 else b""
    wanted = b"".join(text(name) + bytes([qos]) for name in filters)
    return packet(0x82, packet_id.to_bytes(2, "big"), properties, wanted)


def publish_head(
    level: int, topic: bytes, packet_id: int, payload_bytes: int, *, qos: int = 1, retain: int = 0
) -> bytes:
    """A PUBLISH up to where its payload begins."""
    head = text(topic) + (packet_id.to_bytes(2, "big") if qos else b"")
    head += b"\x00" if level == 5 else b""
    return bytes([0x30 | qos << 1 | retain]) + varint(len(head) + payload_bytes) + head


class Client:
    """One connection of a swarm; its counters are the swarm's user's to read.

    refused_code: CONNACK's or DISCONNECT's reason where the broker gave one that is not success.
    refused:      PUBACKs that said so; only MQTT 5 can.
    """

    def __init__(self, swarm: Swarm, client_id: str, on_message: OnMessage | None) -> None:
        self.client_id = client_id
        self.connected = self.closed = False
        self.refused_code = 0
        self.acknowledged = self.refused = self.subscriptions = 0
        self.messages = self.payload_bytes = 0
        self._swarm, self._level, self._on_message = swarm, swarm.level, on_message
        self._waiting: deque[tuple[bytes, bytes | memoryview, int, int]] = deque()
        self._unacknowledged: set[int] = set()
        self._last_id = 0
        self._out: deque[memoryview] = deque()
        self._rest = bytearray()
        self._skip_bytes = 0
        self._skipped_id = b""
        self._watches_write = False
        self.socket = socket.create_connection(swarm.address, CONNECT_LIMIT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._out.append(memoryview(connect_packet(client_id.encode(), self._level)))

    @property
    def pending(self) -> int:
        """Publishes given to it that no PUBACK has answered yet."""
        return len(self._waiting) + len(self._unacknowledged)

    def subscribe(self, *filters: str, qos: int = 1) -> None:
        """Ask for these; ``subscriptions`` counts what was granted."""
        names = [name.encode() for name in filters]
        data = subscribe_packet(self._level, self._next_id(), *names, qos=qos)
        self._out.append(memoryview(data))
        self.flush()

    def publish(
        self, topic: str, payload: bytes | memoryview, *, qos: int = 1, retain: bool = False
    ) -> None:
        """Queue a message; it leaves when the window has room. The payload is not copied."""
        self._waiting.append((topic.encode(), payload, qos, int(retain)))
        self._fill()
        self.flush()

    def close(self) -> None:
        """Without a goodbye."""
        if not self.closed:
            self.closed = True
            self._swarm.forget(self)
            self.socket.close()

    def flush(self) -> None:
        """Send what the socket takes now."""
        try:
            while self._out and not self.closed:
                sent_bytes = self.socket.sendmsg(list(islice(self._out, BUFFERS_A_SEND)))
                while sent_bytes:
                    first = self._out[0]
                    if sent_bytes < len(first):
                        self._out[0] = first[sent_bytes:]
                        break
                    sent_bytes -= len(first)
                    self._out.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.close()
        if not self.closed and bool(self._out) != self._watches_write:
            self._watches_write = bool(self._out)
            self._swarm.watch(self, write=self._watches_write)

    def receive(self, buffer: memoryview) -> None:
        """Take what is there; ``buffer`` is only lent."""
        try:
            count = self.socket.recv_into(buffer)
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not count:
            self.close()
            return
        self._take(buffer[:count])
        self._fill()
        self.flush()

    def _fill(self) -> None:
        while self.connected and self._waiting and len(self._unacknowledged) < self._swarm.window:
            topic, payload, qos, retain = self._waiting.popleft()
            packet_id = 0
            if qos:
                packet_id = self._next_id()
                self._unacknowledged.add(packet_id)
            size_bytes = len(payload)
            head = publish_head(self._level, topic, packet_id, size_bytes, qos=qos, retain=retain)
            self._out.append(memoryview(head))
            if size_bytes:
                self._out.append(memoryview(payload))

    def _next_id(self) -> int:
        self._last_id = self._last_id % 0xFFFF + 1
        return self._last_id

    def _take(self, data: memoryview) -> None:
        if self._skip_bytes:
            skipped_bytes = min(self._skip_bytes, len(data))
            self._skip_bytes -= skipped_bytes
            self.payload_bytes += skipped_bytes
            data = data[skipped_bytes:]
            if not self._skip_bytes:
                self._arrived(self._skipped_id)
        if self._rest:
            self._rest += data
            data, self._rest = memoryview(self._rest), bytearray()
        position = 0
        while position < len(data) and not self.closed:
            end = self._take_packet(data, position)
            if end is None:
                self._rest = bytearray(data[position:])
                return
            position = end

    def _take_packet(self, data: memoryview, position: int) -> int | None:
        """Where the next packet begins, None where this one is not complete."""
        first = data[position]
        length = read_varint(data, position + 1)
        if length is None:
            return None
        body, end = length[1], length[0] + length[1]
        if first >> 4 == PUBLISH:
            return self._take_publish(data, first, body, end)
        if end > len(data):
            return None
        self._take_control(first >> 4, data[body:end])
        return end

    def _take_control(self, kind: int, body: memoryview) -> None:
        if kind == CONNACK:
            self.refused_code = body[1]
            self.connected = not self.refused_code
        elif kind == PUBACK:
            self._unacknowledged.discard(int.from_bytes(body[:2], "big"))
            self.acknowledged += 1
            self.refused += len(body) > 2 and body[2] >= 0x80
        elif kind == SUBACK:
            self.subscriptions += _granted(body, self._level)
        elif kind == DISCONNECT and len(body):
            self.refused_code = body[0]

    def _take_publish(self, data: memoryview, first: int, body: int, end: int) -> int | None:
        if self._on_message is not None and end > len(data):
            return None
        if body + 2 > len(data):
            return None
        topic_end = body + 2 + int.from_bytes(data[body : body + 2], "big")
        payload = topic_end + (2 if first & 6 else 0)
        if payload > len(data):
            return None
        packet_id = bytes(data[topic_end:payload])
        if self._level == 5:
            properties = read_varint(data, payload)
            if properties is None or sum(properties) > len(data):
                return None
            payload = sum(properties)
        here = min(end, len(data))
        self.payload_bytes += here - payload
        if here < end:
            self._skip_bytes, self._skipped_id = end - here, packet_id
            return here
        if self._on_message is not None:
            self._on_message(self, bytes(data[body + 2 : topic_end]), data[payload:end])
        self._arrived(packet_id)
        return end

    def _arrived(self, packet_id: bytes) -> None:
        """Count a message that is complete, and acknowledge it where it was QoS 1."""
        self.messages += 1
        if packet_id:
            self._out.append(memoryview(b"\x40\x02" + packet_id))


def _granted(body: memoryview, level: int) -> int:
    codes = 2
    if level == 5 and (properties := read_varint(body, 2)) is not None:
        codes = sum(properties)
    return sum(code < 0x80 for code in body[codes:])


class Swarm:
    """Clients that one thread drives; ``level`` 4 is MQTT 3.1.1. Use as a context manager."""

    def __init__(
        self, port: int, *, host: str = "127.0.0.1", level: int = 4, window: int = 8
    ) -> None:
        """``window``: QoS 1 publishes of one client that may wait for their PUBACK."""
        self.address, self.level, self.window = (host, port), level, window
        self.clients: list[Client] = []
        self._selector = selectors.DefaultSelector()
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))

    def __enter__(self) -> Swarm:
        return self

    def __exit__(self, *_: object) -> None:
        for client in self.clients:
            client.close()
        self._selector.close()

    def connect(self, client_id: str, on_message: OnMessage | None = None) -> Client:
        """A new client, its CONNECT on the way; without ``on_message`` it only counts."""
        client = Client(self, client_id, on_message)
        self.clients.append(client)
        self._selector.register(client.socket, selectors.EVENT_READ, client)
        client.flush()
        return client

    def run(self, until: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Move bytes until that holds; False where it did not within the time."""
        deadline_s = time.monotonic() + timeout_s
        while not until():
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            for key, events in self._selector.select(left_s):
                client = cast("Client", key.data)
                if events & selectors.EVENT_WRITE:
                    client.flush()
                if events & selectors.EVENT_READ and not client.closed:
                    client.receive(self._buffer)
        return True

    def watch(self, client: Client, *, write: bool) -> None:
        """Call ``flush`` when the client's socket takes bytes, or no more."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if write else 0)
        self._selector.modify(client.socket, events, client)

    def forget(self, client: Client) -> None:
        """It is about to close."""
        self._selector.unregister(client.socket)

    @property
    def pending(self) -> int:
        """Publishes of all clients that wait for their PUBACK."""
        return sum(client.pending for client in self.clients)


@dataclass(frozen=True)
class FanIn:
    """What one raw subscriber received; the seconds are from its first byte to its last."""

    payload_bytes: int
    messages: int
    seconds: float
    cpu_s: float

    @property
    def mb_per_s(self) -> float:
        """10^6 bytes of payload a second."""
        return self.payload_bytes / 1e6 / self.seconds


def fan_in(
    port: int,
    *,
    host: str = "127.0.0.1",
    senders: int = 200,
    bytes_each: int = 1_000_000,
    publish_bytes: int = 60 << 10,
    window: int = 8,
    timeout_s: float = 60.0,
) -> FanIn:
    """Send from here, receive in another process; TimeoutError where something is missing."""
    expected_bytes = senders * bytes_each
    words = ["--subscribe", f"--host={host}", f"--port={port}", f"--bytes={expected_bytes}"]
    command = [sys.executable, "-m", __name__ if __name__ != "__main__" else "tests.raw_mqtt"]
    payload = memoryview(bytes(bytes_each))
    with subprocess.Popen(
        [*command, *words, f"--timeout={timeout_s}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as receiver:
        lines = cast("IO[str]", receiver.stdout)
        try:
            if lines.readline() != "subscribed\n":
                raise TimeoutError(f"the subscriber got no subscription at {host}:{port}")
            with Swarm(port, host=host, window=window) as swarm:
                for number in range(senders):
                    sender = swarm.connect(f"sender-{number}")
                    for start in range(0, bytes_each, publish_bytes):
                        sender.publish(f"raw/{number}", payload[start : start + publish_bytes])
                if not swarm.run(lambda: swarm.pending == 0, timeout_s):
                    raise TimeoutError(f"{swarm.pending} publishes without PUBACK")
                # amqtt forgets what it has acknowledged when the sender leaves without goodbye.
                figures = json.loads(lines.readline() or "null")
        finally:
            receiver.kill()
    if figures is None or figures["payload_bytes"] != expected_bytes:
        raise TimeoutError(f"sent {expected_bytes} bytes, the subscriber has {figures}")
    return FanIn(**figures)


def _subscriber(options: argparse.Namespace) -> Iterator[str]:
    """Lines to print: that it is subscribed, and what it received."""
    with Swarm(options.port, host=options.host) as swarm:
        client = swarm.connect("raw-subscriber")
        client.subscribe("raw/#")
        if not swarm.run(lambda: client.subscriptions == 1, options.timeout):
            return
        yield "subscribed"
        swarm.run(lambda: client.payload_bytes > 0, options.timeout)
        start_s = time.monotonic()
        swarm.run(lambda: client.payload_bytes >= options.bytes, options.timeout)
        seconds = time.monotonic() - start_s
        figures = FanIn(client.payload_bytes, client.messages, seconds, time.process_time())
        yield json.dumps(asdict(figures))


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, help="of a broker that runs; default: start mosquitto")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--senders", type=int, default=200)
    parser.add_argument("--bytes", type=int, default=1_000_000, help="of each sender")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S")
    parser.add_argument("--subscribe", action="store_true", help="be the one who receives")
    options = parser.parse_args()
    if options.subscribe:
        for line in _subscriber(options):
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        return
    with tempfile.TemporaryDirectory() as place:
        broker = None
        if options.port is None:
            broker = OpenBroker("mosquitto", Path(place))
            broker.start()
            options.port = broker.port
        try:
            figures = fan_in(
                options.port,
                host=options.host,
                senders=options.senders,
                bytes_each=options.bytes,
                window=options.window,
                timeout_s=options.timeout,
            )
        finally:
            if broker is not None:
                broker.stop()
    sys.stdout.write(
        f"{figures.mb_per_s:.1f} MB/s, {figures.payload_bytes} bytes in {figures.messages} "
        f"messages, subscriber CPU {figures.cpu_s:.2f} s\n"
    )


if __name__ == "__main__":
    _main()

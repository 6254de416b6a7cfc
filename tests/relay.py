"""A TCP relay with bad manners: counts every byte, cuts mid-packet, stalls, refuses, is slow.

It stands between a client and a broker in this process and works on plain TCP, so the real
protocol stacks run on both sides. Cuts are resets, as a lost link ends; their places come from the
seed.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

CHUNK_BYTES = 1 << 14
SMALLEST_CHUNK_BYTES = 512
# A slow link forwards this often; more at a time would be a burst.
SLICE_S = 0.01
# What a slow link holds back before its sender has to wait, as a modem's buffer does.
BUFFER_BYTES = 64_000
# A slow link's streams hold back little before their buffer: it would only hide in front of it.
SLOW_HELD_BYTES = 1 << 13
# Chunks in the air of a link with delay, so that a dead receiver cannot fill this process.
AIRBORNE_CHUNKS = 1024
CONTROL_LIMIT_S = 5.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class LoopThread:
    """An event loop in a thread of its own, for tools that tests drive from outside."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def start(self) -> None:
        """Run the loop."""
        self._thread.start()

    def call(self, action: Coroutine[Any, Any, None]) -> None:
        """Run it there and wait for its end."""
        asyncio.run_coroutine_threadsafe(action, self.loop).result(CONTROL_LIMIT_S)

    def stop(self) -> None:
        """Stop the loop and wait for the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Way:
    """One direction of the link, shared by all its connections: when bytes may pass."""

    def __init__(self, rate_bytes_per_s: float | None) -> None:
        self._rate_bytes_per_s = rate_bytes_per_s
        self._free_at_s = 0.0
        self.chunk_bytes = CHUNK_BYTES
        if rate_bytes_per_s is not None:
            slice_bytes = int(rate_bytes_per_s * SLICE_S)
            self.chunk_bytes = min(CHUNK_BYTES, max(SMALLEST_CHUNK_BYTES, slice_bytes))

    def passed_at_s(self, size_bytes: int, now_s: float) -> float:
        """Book the link for that many bytes; when the last of them is through."""
        if self._rate_bytes_per_s is None:
            return now_s
        self._free_at_s = max(now_s, self._free_at_s) + size_bytes / self._rate_bytes_per_s
        return self._free_at_s

    def wait_s(self, now_s: float) -> float:
        """How long a sender has to wait until the buffer takes more."""
        if self._rate_bytes_per_s is None:
            return 0.0
        return max(0.0, self._free_at_s - now_s - BUFFER_BYTES / self._rate_bytes_per_s)


@dataclass
class Pair:
    """One client's connection and the one made for it."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    up_left: int | None
    stall_left: int | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Relay:
    """Listens on ``port`` and forwards to ``target``; use as a context manager.

    ``delay_s`` and ``rate_bytes_per_s`` hold for each way; all connections share the rate.
    """

    def __init__(
        self,
        target_port: int,
        *,
        target_host: str = "127.0.0.1",
        host: str = "127.0.0.1",
        seed: int = 0,
        delay_s: float = 0.0,
        rate_bytes_per_s: float | None = None,
    ) -> None:
        self._target = (target_host, target_port)
        self._host = host
        self._delay_s = delay_s
        self._up, self._down = Way(rate_bytes_per_s), Way(rate_bytes_per_s)
        self._slow = rate_bytes_per_s is not None
        self._held_bytes = SLOW_HELD_BYTES if self._slow else CHUNK_BYTES * 4
        self._rng = random.Random(seed)
        self._cut_range: tuple[int, int] | None = None
        self._pairs: list[Pair] = []
        self._changed = threading.Condition()
        self._thread = LoopThread()
        self._loop = self._thread.loop
        self._server: asyncio.Server | None = None
        self._flowing: asyncio.Event
        self.port = 0
        self.up_bytes = 0
        self.down_bytes = 0
        self.connections = 0
        self.cuts = 0
        self.stalled = False

    def __enter__(self) -> Relay:
        self._thread.start()
        self._thread.call(self._prepare())
        self._thread.call(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.call(self._shut())
        self._thread.stop()

    @property
    def url(self) -> str:
        """The address a client should use instead of the broker's."""
        return f"mqtt://{self._host}:{self.port}"

    def cut(self) -> None:
        """Reset every connection now."""
        self._thread.call(self._cut_all())

    def cut_after_up_bytes(self, count: int) -> None:
        """Reset each present connection once this many more bytes went up, not one byte later."""
        self._thread.call(self._arm(count))

    def cut_every(self, low_bytes: int, high_bytes: int) -> None:
        """Reset every later connection after a random number of bytes up within these bounds."""
        self._cut_range = (low_bytes, high_bytes)

    def stall(self) -> None:
        """Keep connections open and forward nothing, like a dead link."""
        self._loop.call_soon_threadsafe(self._stop_flow)

    def stall_after_up_bytes(self, count: int, client_port: int) -> None:
        """As ``stall``, as soon as the client at that port has sent this many more bytes up."""
        self._thread.call(self._arm_stall(count, client_port))

    def stall_for(self, seconds: float) -> None:
        """Stall now and flow again by itself; an outage that closes nothing. Does not wait."""
        self.stall()
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self.flow)

    def flow(self) -> None:
        """Forward again what waited."""
        self.stalled = False
        self._loop.call_soon_threadsafe(self._flowing.set)

    def refuse(self) -> None:
        """Reset all connections and stop listening: the next attempt is refused."""
        self._thread.call(self._stop_listening())
        self.cut()

    def accept(self) -> None:
        """Listen again, on the same port."""
        self._thread.call(self._listen())

    def wait_until(self, condition: Callable[[Relay], bool], timeout_s: float = 5.0) -> bool:
        """Wait until a statement about the counters and ``open_connections`` holds."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self), timeout_s)

    @property
    def open_connections(self) -> int:
        """Connections alive right now."""
        return len(self._pairs)

    async def _prepare(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _listen(self) -> None:
        listener = socket.create_server((self._host, self.port))
        if self._slow:  # the kernel's buffer would swallow megabytes that the link cannot carry
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._server = await asyncio.start_server(
            self._accepted, sock=listener, limit=self._held_bytes
        )
        self.port = listener.getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _shut(self) -> None:
        await self._stop_listening()
        await self._cut_all()

    async def _cut_all(self) -> None:
        tasks = [task for pair in self._pairs for task in pair.tasks]
        for pair in list(self._pairs):
            self._reset(pair)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _arm(self, count: int) -> None:
        for pair in self._pairs:
            pair.up_left = count

    async def _arm_stall(self, count: int, client_port: int) -> None:
        for pair in self._pairs:
            if pair.writers[0].get_extra_info("peername")[1] == client_port:
                pair.stall_left = count

    def _stop_flow(self) -> None:
        self._flowing.clear()
        with self._changed:
            self.stalled = True
            self._changed.notify_all()

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await self._reach_target()
        except OSError:
            writer.transport.abort()
            return
        up_left = self._rng.randint(*self._cut_range) if self._cut_range else None
        pair = Pair((writer, far_writer), up_left)
        pair.tasks = [
            asyncio.create_task(action)
            for way, source, sink in (
                (self._up, reader, far_writer),
                (self._down, far_reader, writer),
            )
            for action in self._carry(pair, way, source, sink)
        ]
        self._pairs.append(pair)
        with self._changed:
            self.connections += 1
            self._changed.notify_all()

    async def _reach_target(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        sock = socket.socket()
        sock.setblocking(False)
        if self._slow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        try:
            await self._loop.sock_connect(sock, self._target)
        except OSError:
            sock.close()
            raise
        return await asyncio.open_connection(sock=sock, limit=self._held_bytes)

    def _carry(
        self, pair: Pair, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> tuple[Coroutine[Any, Any, None], Coroutine[Any, Any, None]]:
        """Both ends of one direction: what takes bytes in and what lets them out."""
        airborne: asyncio.Queue[tuple[float, bytes]]
        airborne = asyncio.Queue(AIRBORNE_CHUNKS if self._delay_s else 1)
        take = self._take(pair, way, reader, airborne)
        return take, self._pump(pair, airborne, writer, up=way is self._up)

    async def _take(
        self,
        pair: Pair,
        way: Way,
        reader: asyncio.StreamReader,
        airborne: asyncio.Queue[tuple[float, bytes]],
    ) -> None:
        data = b"first"
        try:
            while data:
                await self._flowing.wait()
                await asyncio.sleep(way.wait_s(time.monotonic()))
                data = await reader.read(way.chunk_bytes)
                through_s = way.passed_at_s(len(data), time.monotonic())
                await airborne.put((through_s + self._delay_s, data))
        except OSError:
            self._reset(pair)

    async def _pump(
        self,
        pair: Pair,
        airborne: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        *,
        up: bool,
    ) -> None:
        try:
            while True:
                due_s, data = await airborne.get()
                if (early_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(early_s)
                await self._flowing.wait()
                if not data:
                    break
                self._count(len(data), up)
                if up and self._counted_out(pair, data, writer):
                    return
                writer.write(data)
                await writer.drain()
            self._close(pair)
        except OSError:
            self._reset(pair)

    def _counted_out(self, pair: Pair, data: bytes, writer: asyncio.StreamWriter) -> bool:
        """Cut or stall where that was ordered; whether the connection is gone."""
        if pair.up_left is not None:
            if len(data) >= pair.up_left:
                writer.write(data[: pair.up_left])
                self._reset(pair)
                return True
            pair.up_left -= len(data)
        if pair.stall_left is not None:
            pair.stall_left -= len(data)
            if pair.stall_left <= 0:
                pair.stall_left = None
                self._stop_flow()
        return False

    def _count(self, size_bytes: int, up: bool) -> None:
        with self._changed:
            if up:
                self.up_bytes += size_bytes
            else:
                self.down_bytes += size_bytes
            self._changed.notify_all()

    def _reset(self, pair: Pair) -> None:
        for writer in pair.writers:
            sock = writer.get_extra_info("socket")
            if sock is not None and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
        if pair in self._pairs:
            with self._changed:
                self.cuts += 1
        self._forget(pair)

    def _close(self, pair: Pair) -> None:
        for writer in pair.writers:
            writer.close()
        self._forget(pair)

    def _forget(self, pair: Pair) -> None:
        for task in pair.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        with self._changed:
            if pair in self._pairs:
                self._pairs.remove(pair)
            self._changed.notify_all()


def eventually(condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
    """Poll for something that no event announces; AssertionError when it does not come true."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"did not happen within {timeout_s} s"
        time.sleep(0.01)

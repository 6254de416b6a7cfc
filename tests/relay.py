"""A TCP relay with bad manners: counts every byte, cuts mid-packet, stalls, refuses.

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
CONTROL_LIMIT_S = 5.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass
class Pair:
    """One client's connection and the one made for it."""

    writers: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    up_left: int | None
    stall_left: int | None = None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)


class Relay:
    """Listens on ``port`` and forwards to ``target``; use as a context manager."""

    def __init__(self, target_port: int, *, target_host: str = "127.0.0.1", seed: int = 0) -> None:
        self._target = (target_host, target_port)
        self._rng = random.Random(seed)
        self._cut_range: tuple[int, int] | None = None
        self._pairs: list[Pair] = []
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
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
        self._control(self._prepare())
        self._control(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._control(self._shut())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        """The address a client should use instead of the broker's."""
        return f"mqtt://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Reset every connection now."""
        self._control(self._cut_all())

    def cut_after_up_bytes(self, count: int) -> None:
        """Reset each present connection once this many more bytes went up, not one byte later."""
        self._control(self._arm(count))

    def cut_every(self, low_bytes: int, high_bytes: int) -> None:
        """Reset every later connection after a random number of bytes up within these bounds."""
        self._cut_range = (low_bytes, high_bytes)

    def stall(self) -> None:
        """Keep connections open and forward nothing, like a dead link."""
        self._loop.call_soon_threadsafe(self._stop_flow)

    def stall_after_up_bytes(self, count: int, client_port: int) -> None:
        """As ``stall``, as soon as the client at that port has sent this many more bytes up."""
        self._control(self._arm_stall(count, client_port))

    def flow(self) -> None:
        """Forward again what waited."""
        self.stalled = False
        self._loop.call_soon_threadsafe(self._flowing.set)

    def refuse(self) -> None:
        """Reset all connections and stop listening: the next attempt is refused."""
        self._control(self._stop_listening())
        self.cut()

    def accept(self) -> None:
        """Listen again, on the same port."""
        self._control(self._listen())

    def wait_until(self, condition: Callable[[Relay], bool], timeout_s: float = 5.0) -> bool:
        """Wait until a statement about the counters and ``open_connections`` holds."""
        with self._changed:
            return self._changed.wait_for(lambda: condition(self), timeout_s)

    @property
    def open_connections(self) -> int:
        """Connections alive right now."""
        return len(self._pairs)

    def _control(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result(CONTROL_LIMIT_S)

    async def _prepare(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

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
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        up_left = self._rng.randint(*self._cut_range) if self._cut_range else None
        pair = Pair((writer, far_writer), up_left)
        pair.tasks = [
            asyncio.create_task(self._pump(pair, reader, far_writer, up=True)),
            asyncio.create_task(self._pump(pair, far_reader, writer, up=False)),
        ]
        self._pairs.append(pair)
        with self._changed:
            self.connections += 1
            self._changed.notify_all()

    async def _pump(
        self, pair: Pair, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, up: bool
    ) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                await self._flowing.wait()
                self._count(len(data), up)
                if up and pair.up_left is not None:
                    if len(data) >= pair.up_left:
                        writer.write(data[: pair.up_left])
                        self._reset(pair)
                        return
                    pair.up_left -= len(data)
                if up and pair.stall_left is not None:
                    pair.stall_left -= len(data)
                    if pair.stall_left <= 0:
                        pair.stall_left = None
                        self._stop_flow()
                writer.write(data)
                await writer.drain()
            await self._flowing.wait()
            self._close(pair)
        except OSError:
            self._reset(pair)

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

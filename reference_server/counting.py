"""Counts complete updates: check, decode, fold and commit, several in one transaction.

In a thread of its own, because a fold and a commit take tens of milliseconds, in which the main
loop has others to answer. Updates that wait are counted together: the sums of a block are read and
written once for all of them, so that under load each update costs the server less, not more.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import EdgeError, MalformedMessage, PeerError, WrongUpdate
from edge_sdk.merge import BlockSum
from edge_sdk.parts import Incoming
from edge_sdk.store import read_piece
from edge_sdk.strategies import Strategy
from edge_sdk.wire import Open, UpdateHeader, decode_update
from reference_server.ledger import Answer, Ledger, LoadSum, SaveSum, Upload

# What one transaction counts: it bounds how long those wait who come in the middle of it.
MAX_BATCH = 64
# While others are still sending, how long an update may wait to be counted together with theirs.
GATHER_S = 1.0
# Receiving goes first: what has arrived is safe on the disk, and whoever sends is waiting.
NICENESS = 5


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """What an update of the open round must match."""

    round: int
    base_sha: str
    codec: str
    open_blocks: tuple[str, ...]
    piece_bytes: int


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """An update all of whose pieces are here, and the terms it was opened under."""

    device: str
    message: Open
    incoming: Incoming
    terms: RoundTerms


@dataclass(frozen=True)
class Counted:
    """The verdict on an arrival; None: its pieces together do not have the announced hash."""

    arrival: Arrival
    answer: Answer | None


@dataclass(frozen=True)
class CountingFailed:
    """The ledger or the disk failed: nothing more is counted."""

    error: Exception


class _Order(Enum):
    """What the thread is told beside arrivals."""

    NOW = "count what waits"
    END = "stop"


@dataclass(frozen=True)
class _Update:
    """An arrival, read."""

    arrival: Arrival
    header: UpdateHeader
    # Where in the file each block's encoded change lies: (first byte, size).
    places: dict[str, tuple[int, int]]

    def part(self, block: str) -> memoryview:
        """The encoded change of a block."""
        return memoryview(read_piece(self.arrival.incoming.path, *self.places[block]))

    def upload(self) -> Upload:
        """What the ledger keeps of it."""
        return Upload(
            round=self.header.round,
            device=self.arrival.device,
            base_sha=self.header.base_sha,
            digest=self.arrival.message.sha256,
            samples=self.header.num_examples,
            size_bytes=self.arrival.message.size_bytes,
            metrics={**msgspec.to_builtins(self.header.metrics), "blocks": list(self.places)},
        )


class _Unusable(Exception):
    """One update of a batch cannot be folded."""

    def __init__(self, number: int, reason: PeerError) -> None:
        super().__init__(str(reason))
        self.number, self.reason = number, reason


class Counting:
    """The thread that counts; ``done`` is called in it with each ``Counted``."""

    def __init__(
        self,
        job: str,
        spec: ModelSpec,
        strategy: Strategy,
        ledger: Ledger,
        done: Callable[[Counted | CountingFailed], None],
    ) -> None:
        self._job, self._spec, self._strategy, self._ledger = job, spec, strategy, ledger
        self._done = done
        self._arrivals: queue.SimpleQueue[Arrival | _Order] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="counting", daemon=True)
        self._thread.start()

    def put(self, arrival: Arrival) -> None:
        """Count this one, soon."""
        self._arrivals.put(arrival)

    def hurry(self) -> None:
        """Nobody else is sending: count what waits now."""
        self._arrivals.put(_Order.NOW)

    def close(self) -> None:
        """Finish what is being counted, and stop; may be called twice."""
        self._arrivals.put(_Order.END)
        self._thread.join()

    def _run(self) -> None:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            while batch := self._next_batch():
                self._count(batch)
        except Exception as error:
            self._done(CountingFailed(error))

    def _next_batch(self) -> list[Arrival]:
        """What came within the time to gather, at most a batch; empty at the end."""
        batch: list[Arrival] = []
        until_s = float("inf")
        while len(batch) < MAX_BATCH:
            timeout_s = until_s - time.monotonic() if batch else None
            try:
                arrival = self._arrivals.get(timeout=timeout_s and max(0.0, timeout_s))
            except queue.Empty:
                break
            if isinstance(arrival, Arrival):
                until_s = until_s if batch else time.monotonic() + GATHER_S
                batch.append(arrival)
            elif arrival is _Order.END:
                self._arrivals.put(arrival)  # for the next call
                break
            elif batch:
                break
        return batch

    def _count(self, batch: Sequence[Arrival]) -> None:
        updates = [update for arrival in batch if (update := self._read(arrival)) is not None]
        while updates:
            uploads = [update.upload() for update in updates]
            try:
                answers = self._ledger.count_updates(self._job, uploads, self._folder(updates))
            except _Unusable as unusable:
                self._reject(updates.pop(unusable.number).arrival, unusable.reason)
                continue
            for update, answer in zip(updates, answers, strict=True):
                self._done(Counted(update.arrival, answer))
            return

    def _read(self, arrival: Arrival) -> _Update | None:
        """Check everything that can be checked before a byte is decompressed."""
        try:
            arrival.incoming.verify()
        except MalformedMessage:
            self._done(Counted(arrival, None))
            return None
        try:
            header, _ = decode_update(_mapped(arrival.incoming))
            message = arrival.message
            if (header.round, header.ticket) != (message.round, message.ticket):
                raise WrongUpdate(
                    "the update's round or ticket is not the one it was announced with"
                )
            self._half(arrival.terms, {}).check(header)
            return _Update(arrival, header, _places(header, message.size_bytes))
        except PeerError as error:
            self._reject(arrival, error)
            return None

    def _reject(self, arrival: Arrival, reason: EdgeError) -> None:
        message = arrival.message
        upload = Upload(
            round=message.round,
            device=arrival.device,
            base_sha="",
            digest=message.sha256,
            samples=0,
        )
        text = str(reason)[:1900]
        answer = self._ledger.record_verdict(self._job, upload, "rejected", text)
        self._done(Counted(arrival, answer))

    def _folder(
        self, updates: Sequence[_Update]
    ) -> Callable[[LoadSum, SaveSum, Sequence[int]], list[list[str]]]:
        def fold(load: LoadSum, save: SaveSum, numbers: Sequence[int]) -> list[list[str]]:
            # Block by block: the sums of one block are in memory, however many there are.
            for block in self._spec.names:
                mine = [number for number in numbers if block in updates[number].places]
                if mine:
                    total = self._fold_block(block, load(block), updates, mine)
                    save(block, total.to_bytes(), total.samples, total.devices)
            return [list(updates[number].places) for number in numbers]

        return fold

    def _fold_block(
        self, block: str, stored: bytes | None, updates: Sequence[_Update], numbers: Sequence[int]
    ) -> BlockSum:
        spec = self._spec.block(block)
        sums = {block: BlockSum.zero(spec) if stored is None else BlockSum.from_bytes(spec, stored)}
        for number in numbers:
            update = updates[number]
            half = self._half(update.arrival.terms, sums)
            try:
                half.receive(update.header, [(block, update.part(block))])
            except PeerError as error:
                raise _Unusable(number, error) from error
        return sums[block]

    def _half(self, terms: RoundTerms, sums: dict[str, BlockSum]) -> Any:
        return self._strategy.server_round(
            self._spec, terms.open_blocks, terms.codec, _SumsInMemory(sums)
        )


class _SumsInMemory:
    """The sums at hand, as a strategy sees them."""

    def __init__(self, sums: dict[str, BlockSum]) -> None:
        self._sums = sums

    def load(self, block: str) -> BlockSum:
        """The sum so far."""
        return self._sums[block]

    def save(self, block: str, total: BlockSum) -> None:
        """Replace the sum."""
        self._sums[block] = total


def _mapped(incoming: Incoming) -> memoryview:
    """The content, of which only what is looked at is read into memory."""
    with incoming.path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _places(header: UpdateHeader, size_bytes: int) -> dict[str, tuple[int, int]]:
    """Where the encoded changes lie: one after another, up to the end."""
    places, start = {}, size_bytes - sum(size for _, size in header.blocks)
    for name, size in header.blocks:
        places[name] = (start, size)
        start += size
    return places

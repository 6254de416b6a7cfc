"""The device's half of a download: the blocks an offer names and the cache lacks, one by one.

A block that the server has put into a slot is read from there, by a subscription that lasts until
it is here; whatever does not come that way, or was never put there, is asked for by piece. Pieces
go straight to the disk, so a block takes no memory, and a fetch goes on after a kill.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

from edge_sdk.errors import PeerError
from edge_sdk.mqtt import Link
from edge_sdk.parts import Incoming, sweep_parts
from edge_sdk.store import BlockCache
from edge_sdk.wire import BlockEntry, Piece, Topics, Want, encode

# Pieces asked for ahead: enough to fill a link of 100 ms and 40 Mbit/s, and a megabyte at most.
WINDOW_PIECES = 16
# Some brokers hand a new subscriber about a thousand retained messages and drop the rest.
MAX_RETAINED_PIECES = 900

log = logging.getLogger("edge_sdk")


class Fetch:
    """Fetches blocks into the cache. All calls come from one thread."""

    def __init__(
        self,
        cache: BlockCache,
        link: Link,
        topics: Topics,
        device: str,
        rng: random.Random,
        clock: Callable[[], float],
    ) -> None:
        self._cache, self._link, self._topics = cache, link, topics
        self._up, self._rng, self._clock = topics.up(device), rng, clock
        self._entries: Sequence[BlockEntry] = ()
        self._slots: Sequence[int] = ()
        self._piece_bytes = 0
        self._incoming: Incoming | None = None
        self._slot_filter = ""

    @property
    def active(self) -> bool:
        """Whether something is being fetched."""
        return self._incoming is not None

    def begin(self, entries: Sequence[BlockEntry], slots: Sequence[int], piece_bytes: int) -> bool:
        """Fetch those of a version's blocks that are not here; True when all are.

        What is being fetched already goes on undisturbed.
        """
        slots = slots if len(slots) == len(entries) else (-1,) * len(entries)
        same = (entries, slots, piece_bytes) == (self._entries, self._slots, self._piece_bytes)
        if same and self.active:
            return False
        self.stop()
        self._entries, self._slots, self._piece_bytes = entries, slots, piece_bytes
        return self._next()

    def stop(self) -> None:
        """Fetch no more; what has arrived of a block stays for the next time."""
        self._leave_slot()
        self._incoming = None

    def take(self, piece: Piece) -> bool:
        """Keep a piece; True when that was the last one of the last block."""
        incoming = self._incoming
        if incoming is None:
            return False
        try:
            incoming.take(piece)
        except PeerError as error:
            log.warning("dropped a piece: %s", error)
        if incoming.complete:
            self._leave_slot()
            return self._next()
        self._ask()
        return False

    def reconnected(self) -> None:
        """A new connection: ask for what is missing, and take no slot from its beginning again."""
        self._slot_filter = ""
        if self._incoming is not None:
            self._incoming.forget_asked()
            self._ask()

    def due_s(self) -> float | None:
        """When to call ``repeat``, on the clock."""
        return self._incoming.deadline_s if self._incoming is not None else None

    def repeat(self) -> None:
        """Ask again for what did not come in time."""
        if self._incoming is not None and self._clock() >= self._incoming.deadline_s:
            self._ask()

    def _next(self) -> bool:
        """Take over what is complete and start with the next block; True when there is none."""
        self._take_over()
        for index, entry in enumerate(self._entries):
            if not self._cache.has(entry.sha256):
                self._incoming = self._continued(entry)
                if not self._take_over():
                    self._start(index)
                    return False
        return True

    def _take_over(self) -> bool:
        """Whether a block was complete, and is in the cache now."""
        incoming = self._incoming
        if incoming is None or not incoming.complete:
            return False
        incoming.moved_to(self._cache.path(incoming.sha256))
        self._incoming = None
        return True

    def _continued(self, entry: BlockEntry) -> Incoming:
        stem = self._cache.stem(entry.sha256)
        sweep_parts(stem.parent, keep=(stem,))
        return Incoming(stem, entry.sha256, entry.size_bytes, self._piece_bytes, self._rng)

    def _start(self, index: int) -> None:
        incoming, slot = self._incoming, self._slots[index]
        assert incoming is not None
        fresh = incoming.received == 0 and incoming.pieces <= MAX_RETAINED_PIECES
        if not (slot >= 0 and fresh and self._read_slot(slot, index)):
            self._ask()

    def _read_slot(self, slot: int, index: int) -> bool:
        topic_filter = self._topics.retained(slot, index, "+")
        if self._incoming is None or not self._link.subscribe_for_now(topic_filter):
            return False
        self._slot_filter = topic_filter
        self._incoming.expect_all(self._clock())
        return True

    def _leave_slot(self) -> None:
        if self._slot_filter:
            self._link.unsubscribe(self._slot_filter)
            self._slot_filter = ""

    def _ask(self) -> None:
        incoming = self._incoming
        assert incoming is not None
        ranges = incoming.want(self._clock(), WINDOW_PIECES)
        if ranges:
            want = Want(sha256=incoming.sha256, piece_bytes=incoming.piece_bytes, ranges=ranges)
            self._link.publish(self._up, encode(want))

"""The device's half of a download: the blocks an offer names and the cache lacks, one by one.

A block that the server has put into a slot is read from there, by a subscription that lasts until
it is here; whatever does not come that way, or was never put there, is asked for by piece. Where
the server knows the difference to a block in the cache, that is asked for instead, once: should it
not lead to the block, the block itself is fetched. Pieces go straight to the disk, so a block takes
no memory, and a fetch goes on after a kill.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from edge_sdk.errors import PeerError
from edge_sdk.mqtt import Link
from edge_sdk.parts import Incoming, sweep_parts
from edge_sdk.store import BlockCache
from edge_sdk.wire import Delta, Offer, Piece, Topics, Want, encode

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
        self._offer: Offer | None = None
        self._slots: Sequence[int] = ()
        self._incoming: Incoming | None = None
        self._target = Path()
        self._spent: set[str] = set()
        self._slot_filter = ""

    @property
    def active(self) -> bool:
        """Whether something is being fetched."""
        return self._incoming is not None

    def begin(self, offer: Offer) -> bool:
        """Fetch those of an offer's blocks that are not here; True when all are.

        What is being fetched already goes on undisturbed.
        """
        if self.active and _sources(offer) == _sources(self._offer):
            return False
        self.stop()
        self._offer, count = offer, len(offer.blocks)
        self._slots = offer.slots if len(offer.slots) == count else (-1,) * count
        self._spent &= {delta.sha256 for delta in offer.deltas}
        return self._next()

    def missing_bytes(self, offer: Offer) -> int:
        """How many bytes ``begin`` would fetch."""
        return sum(
            (self._delta(offer, index) or entry).size_bytes
            for index, entry in enumerate(offer.blocks)
            if not self._cache.has(entry.sha256)
        )

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
        offer = self._offer
        if offer is None:
            return True
        for index, entry in enumerate(offer.blocks):
            if not self._cache.has(entry.sha256):
                delta = self._delta(offer, index)
                self._continue(offer, index, delta)
                if not self._take_over():
                    self._start(index, whole=delta is None)
                    return False
        return True

    def _take_over(self) -> bool:
        """Whether a block was complete, and is in the cache now."""
        incoming = self._incoming
        if incoming is None or not incoming.complete:
            return False
        incoming.moved_to(self._target)
        self._spent.add(incoming.sha256)
        self._incoming = None
        return True

    def _delta(self, offer: Offer, index: int) -> Delta | None:
        """The difference that leads from what is here to a block, unless it was tried."""
        for delta in offer.deltas:
            fresh = delta.block == index and delta.sha256 not in self._spent
            if fresh and self._cache.starting_with(delta.base.hex()):
                return delta
        return None

    def _continue(self, offer: Offer, index: int, delta: Delta | None) -> None:
        """Begin with a block, or the difference to it, where an earlier try ended."""
        entry = offer.blocks[index]
        whole, self._target = self._cache.stem(entry.sha256), self._cache.path(entry.sha256)
        if delta is not None:
            self._target = self._cache.delta_path(entry.sha256, delta.base)
        stem = whole if delta is None else self._target.with_suffix("")
        sweep_parts(stem.parent, keep=(stem,))
        what = delta or entry
        self._incoming = Incoming(stem, what.sha256, what.size_bytes, offer.piece_bytes, self._rng)

    def _start(self, index: int, *, whole: bool) -> None:
        incoming, slot = self._incoming, self._slots[index]
        assert incoming is not None
        fresh = incoming.received == 0 and incoming.pieces <= MAX_RETAINED_PIECES
        if not (whole and slot >= 0 and fresh and self._read_slot(slot, index)):
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


def _sources(offer: Offer | None) -> tuple[object, ...]:
    """All that says what is fetched, and from where."""
    return () if offer is None else (offer.blocks, offer.slots, offer.deltas, offer.piece_bytes)

"""The blocks of the current version in the broker, retained: sent once, whatever the fleet.

Every block has two slots. A new version of a block goes into the one that does not hold the version
before, so that a device in the middle of a fetch is not disturbed, and a block that did not change
stays where it is. Which block lies where is on the disk before the first piece is sent; a digest of
it travels in the retained head, which is sent last. On every connection the server reads the head
that the broker has: if it is this one, the blocks are there too, else all are sent again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edge_sdk.brokers import BrokerProfile
from edge_sdk.feed import Feed
from edge_sdk.fetch import MAX_RETAINED_PIECES
from edge_sdk.mqtt import Link
from edge_sdk.pieces import piece_count, piece_range
from edge_sdk.store import disk_errors, write_atomically
from edge_sdk.wire import PIECE_OVERHEAD_BYTES, BlockEntry, Topics, encode_piece
from reference_server.versions import VersionStore

log = logging.getLogger("reference_server")


class _Held(msgspec.Struct, frozen=True):
    """What lies in a slot; 0 pieces: nothing. ``most``: as many as were ever there, and may be."""

    sha256: str = ""
    pieces: int = 0
    most: int = 0


class _Place(msgspec.Struct, frozen=True):
    """The two slots of one block, and which of them is the current one."""

    slots: tuple[_Held, _Held] = (_Held(), _Held())
    current: int = 0

    def with_block(self, sha256: str, pieces: int) -> _Place:
        """The block in the other slot, which becomes the current one."""
        other = 1 - self.current
        held = _Held(sha256, pieces, max(pieces, self.slots[other].most))
        slots = (held, self.slots[1]) if other == 0 else (self.slots[0], held)
        return _Place(slots, other)

    def has(self, sha256: str, pieces: int) -> bool:
        """Whether the current slot holds that block."""
        held = self.slots[self.current]
        return (held.sha256, held.pieces) == (sha256, pieces)

    def emptied(self) -> _Place:
        """Nothing in either slot, but what is still to be deleted."""
        first, second = self.slots
        return _Place((_Held(most=first.most), _Held(most=second.most)), self.current)


class _Layout(msgspec.Struct, frozen=True):
    """Where all blocks lie, by their number in the model."""

    piece_bytes: int = 0
    places: tuple[_Place, ...] = ()


class Broadcast:
    """Keeps a version's blocks in the broker. All calls come from one thread."""

    def __init__(
        self,
        path: Path,
        link: Link,
        topics: Topics,
        versions: VersionStore,
        broker: BrokerProfile,
    ) -> None:
        """``path``: where the layout is kept."""
        self._path, self._link, self._topics = path, link, topics
        self._versions, self._broker = versions, broker
        self._feed = Feed(link)
        self._entries: Sequence[BlockEntry] = ()
        self._connected = self._checking = self._intact = False
        self._layout = self._load()

    @property
    def ready(self) -> bool:
        """Whether all is in the broker, or handed over in front of whatever is said next."""
        return not self._checking and self._feed.idle

    @property
    def digest(self) -> str:
        """Names the layout, in 16 hexadecimal digits."""
        return hashlib.sha256(msgspec.json.encode(self._layout)).hexdigest()[:16]

    def place(self, entries: Sequence[BlockEntry], piece_bytes: int) -> None:
        """Bring the broker up to a version: what changed goes into the slots not in use."""
        self._entries = entries
        if not self._broker.retains:
            return
        known = self._layout
        if not known.places:
            known = _Layout(piece_bytes, tuple(_Place() for _ in entries))
        elif known.piece_bytes != piece_bytes:
            known = _Layout(piece_bytes, tuple(place.emptied() for place in known.places))
        places = []
        for entry, place in zip(entries, known.places, strict=True):
            wanted = (entry.sha256, self._pieces(entry, piece_bytes))
            places.append(place if place.has(*wanted) else place.with_block(*wanted))
        self._keep(_Layout(piece_bytes, tuple(places)))
        # What is not sent now is sent once it is known what the broker has.
        for number, (old, new) in enumerate(zip(known.places, places, strict=True)):
            if new != old and self._connected:
                self._send(number)

    def connected(self) -> None:
        """A new connection: find out whether the broker still has what it was given."""
        self._feed.reconnected()
        self._connected = True
        self._checking, self._intact = bool(self._layout.places), False
        if self._checking:
            self._link.publish(self._topics.echo, b"?")

    def lost(self) -> None:
        """The connection is gone."""
        self._connected = self._checking = False

    def heard_head(self, layout: str) -> None:
        """The head that the broker has."""
        self._intact = self._intact or layout == self.digest

    def heard_echo(self) -> None:
        """All that the broker had retained arrived before this."""
        if self._checking:
            self._checking = False
            for number in range(0 if self._intact else len(self._layout.places)):
                self._send(number)

    def slots(self) -> tuple[int, ...]:
        """Of each block of the version, the slot that holds it; -1: none does."""
        if not self._layout.places:
            return (-1,) * len(self._entries)
        return tuple(p.current if p.slots[p.current].pieces else -1 for p in self._layout.places)

    def pump(self) -> None:
        """Send on; call it when the link drains and at ``due_in_s``."""
        self._feed.pump()

    def due_in_s(self) -> float | None:
        """Seconds until ``pump`` is to be called; None: not before the link says something."""
        return self._feed.due_in_s()

    def clear(self) -> None:
        """Delete all that lies in the broker."""
        for number, place in enumerate(self._layout.places):
            for slot, held in enumerate(place.slots):
                self._delete(number, slot, range(held.most))
        self._keep(_Layout())

    def _pieces(self, entry: BlockEntry, piece_bytes: int) -> int:
        """Pieces of a block that the broker is to keep; 0 for one it cannot hold."""
        payload_bytes = piece_bytes + PIECE_OVERHEAD_BYTES
        if 0 < self._broker.retained_bytes < payload_bytes:
            return 0
        count = piece_count(entry.size_bytes, piece_bytes)
        return count if count <= MAX_RETAINED_PIECES else 0

    def _send(self, number: int) -> None:
        entry, place = self._entries[number], self._layout.places[number]
        held, slot = place.slots[place.current], place.current
        piece_bytes = self._layout.piece_bytes

        def make(index: int) -> tuple[str, bytes]:
            start, stop = piece_range(index, entry.size_bytes, piece_bytes)
            data = self._versions.read_piece(entry.sha256, start, stop - start)
            piece = encode_piece(entry.sha256, index, held.pieces, data)
            return self._topics.retained(slot, number, index), piece

        self._feed.order(str(number), held.sha256, range(held.pieces), make, retain=True)
        for one, other in enumerate(place.slots):
            self._delete(number, one, range(other.pieces, other.most))

    def _delete(self, number: int, slot: int, pieces: range) -> None:
        for index in pieces:
            self._link.publish(self._topics.retained(slot, number, index), b"", retain=True)

    def _keep(self, layout: _Layout) -> None:
        self._layout = layout
        write_atomically(self._path, msgspec.json.encode(layout))

    def _load(self) -> _Layout:
        if not self._path.is_file():
            return _Layout()
        try:
            with disk_errors("read", self._path):
                return msgspec.json.decode(self._path.read_bytes(), type=_Layout)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            log.warning("%s is not a layout (%s): all blocks are sent again", self._path, error)
            return _Layout()

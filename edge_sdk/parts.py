"""A whole on its way here, on disk: pieces at their places and a journal of those that arrived.

It takes no memory to speak of, whatever its size, and survives the receiver: after a kill the
journal says which pieces are there, after a power cut their checksums say which really are.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from random import Random

from edge_sdk.errors import MalformedMessage
from edge_sdk.pieces import Assembly, Ranges, Window, piece_range
from edge_sdk.store import READ_CHUNK_BYTES, disk_errors, read_piece
from edge_sdk.wire import Piece

PART_SUFFIX, JOURNAL_SUFFIX = ".part", ".journal"

# A window of pieces takes two seconds on a 4 Mbit/s link; sooner would ask for what is under way.
RETRY_S = 2.0
RETRY_MAX_S = 30.0

_HEAD = struct.Struct("<4sIQ32s")
_RECORD = struct.Struct("<II")
_MAGIC = b"ejp1"


class Incoming:
    """One whole being received: where its pieces are, and what to ask for next.

    The size is the one the receiver was promised, never a piece's. Every method that touches the
    disk raises StateError when that fails.
    """

    def __init__(
        self, stem: Path, sha256: str, size_bytes: int, piece_bytes: int, rng: Random
    ) -> None:
        """Continue what lies at ``stem`` if it is of this whole, else begin anew.

        MalformedMessage when the sizes cannot be.
        """
        self.sha256, self.size_bytes = sha256, size_bytes
        self.piece_bytes = piece_bytes
        self.stem = stem
        self.path = stem.with_name(stem.name + PART_SUFFIX)
        self._journal = stem.with_name(stem.name + JOURNAL_SUFFIX)
        self._rng = rng
        self._transfer = bytes.fromhex(sha256)[:8]
        self._assembly = Assembly(size_bytes, piece_bytes)
        self._resume()
        self.forget_asked()

    @classmethod
    def found(cls, stem: Path, rng: Random) -> Incoming | None:
        """Continue whatever lies at ``stem``; None when nothing does that can be used."""
        try:
            with stem.with_name(stem.name + JOURNAL_SUFFIX).open("rb") as journal:
                magic, piece_bytes, size_bytes, digest = _HEAD.unpack(journal.read(_HEAD.size))
        except (OSError, struct.error):
            return None
        if magic != _MAGIC or not piece_bytes:
            return None
        return cls(stem, digest.hex(), size_bytes, piece_bytes, rng)

    @property
    def complete(self) -> bool:
        """Whether every piece has arrived."""
        return self._assembly.complete

    @property
    def pieces(self) -> int:
        """Number of pieces of the whole."""
        return self._assembly.pieces

    @property
    def received(self) -> int:
        """Number of pieces that have arrived."""
        return self._assembly.received

    @property
    def deadline_s(self) -> float:
        """When to call ``want`` although nothing arrived."""
        return self._window.deadline_s

    @property
    def silent_tries(self) -> int:
        """How often in a row it was asked again without any answer."""
        return self._window.silent_tries

    def forget_asked(self) -> None:
        """The link or the sender was lost: what was asked for will not come."""
        self._window = Window(
            self._assembly, retry_s=RETRY_S, retry_max_s=RETRY_MAX_S, rng=self._rng
        )

    def expect_all(self, now_s: float) -> None:
        """All pieces were asked for in another way; ask for what is missing after a silence."""
        self._window.expect_all(now_s)

    def want(self, now_s: float, window_pieces: int) -> Ranges:
        """Ranges [first, stop) to ask for now; empty while waiting."""
        return self._window.want(now_s, window_pieces)

    def take(self, piece: Piece) -> bool:
        """Put a piece in its place; False when it is another transfer's or a duplicate.

        MalformedMessage when it fits nowhere.
        """
        index, data = piece.index, piece.data
        if piece.transfer != self._transfer:
            return False
        offset = self._assembly.place_of(index, len(data))
        if offset is None:
            return False
        with disk_errors("write", self.path):
            _write_at(self.path, offset, data)
            _append(self._journal, _RECORD.pack(index, piece.crc))
        self._assembly.mark(index)
        return True

    def verify(self) -> None:
        """Check the complete content against its hash; MalformedMessage when it differs."""
        digest = hashlib.sha256()
        for chunk in self._chunks():
            digest.update(chunk)
        if digest.hexdigest() != self.sha256:
            raise MalformedMessage(
                f"{self.size_bytes} bytes arrived with SHA-256 {digest.hexdigest()}, announced was "
                f"{self.sha256}; all of it has to be sent again"
            )

    def moved_to(self, target: Path) -> None:
        """The complete content becomes the file ``target``."""
        with disk_errors("write", target):
            os.replace(self.path, target)
            self._journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete what has arrived; may be called twice."""
        with disk_errors("delete", self.path):
            self._journal.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def _resume(self) -> None:
        with disk_errors("read", self._journal):
            known = self._known_pieces()
            if known is None or not self.path.is_file():
                self._begin()
                return
            old, arrived = known
            for index in range(self._assembly.pieces):
                start, stop = piece_range(index, self.size_bytes, self.piece_bytes)
                if all(n in arrived for n in range(start // old, -(-stop // old))):
                    self._assembly.mark(index)
            if old != self.piece_bytes:
                self._rewrite_journal()

    def _known_pieces(self) -> tuple[int, set[int]] | None:
        """Piece size and intact pieces of an earlier try; None: there was none of this whole."""
        try:
            journal = self._journal.read_bytes()
        except FileNotFoundError:
            return None
        if len(journal) < _HEAD.size:
            return None
        magic, old, size_bytes, digest = _HEAD.unpack_from(journal)
        if (magic, size_bytes, digest.hex()) != (_MAGIC, self.size_bytes, self.sha256) or not old:
            return None
        end = len(journal) - (len(journal) - _HEAD.size) % _RECORD.size
        records = _RECORD.iter_unpack(journal[_HEAD.size : end])
        return old, {index for index, crc in records if self._is_intact(index, old, crc)}

    def _is_intact(self, index: int, piece_bytes: int, crc: int) -> bool:
        if index * piece_bytes >= self.size_bytes or not self.path.is_file():
            return False
        start, stop = piece_range(index, self.size_bytes, piece_bytes)
        data = read_piece(self.path, start, stop - start)
        return len(data) == stop - start and zlib.crc32(data) == crc

    def _begin(self) -> None:
        self.path.write_bytes(b"")
        self._journal.write_bytes(self._head())

    def _rewrite_journal(self) -> None:
        """The same pieces, cut anew."""
        records = [self._head()]
        for first, stop in self._assembly.arrived():
            for index in range(first, stop):
                start, end = piece_range(index, self.size_bytes, self.piece_bytes)
                data = read_piece(self.path, start, end - start)
                records.append(_RECORD.pack(index, zlib.crc32(data)))
        temporary = self._journal.with_suffix(".new")
        temporary.write_bytes(b"".join(records))
        os.replace(temporary, self._journal)

    def _head(self) -> bytes:
        return _HEAD.pack(_MAGIC, self.piece_bytes, self.size_bytes, bytes.fromhex(self.sha256))

    def _chunks(self) -> Iterator[bytes]:
        with disk_errors("read", self.path), self.path.open("rb") as file:
            while chunk := file.read(READ_CHUNK_BYTES):
                yield chunk


def stems(directory: Path) -> list[Path]:
    """All that is on its way in a directory."""
    with disk_errors("read", directory):
        return [path.with_suffix("") for path in sorted(directory.glob(f"*{JOURNAL_SUFFIX}"))]


def sweep_parts(directory: Path, keep: Collection[Path] = ()) -> None:
    """Delete all that is on its way in a directory, but what is at the stems to ``keep``."""
    kept = {stem.name + suffix for stem in keep for suffix in (PART_SUFFIX, JOURNAL_SUFFIX)}
    with disk_errors("sweep", directory):
        for suffix in (PART_SUFFIX, JOURNAL_SUFFIX):
            for path in directory.glob(f"*{suffix}"):
                if path.name not in kept:
                    path.unlink(missing_ok=True)


def _write_at(path: Path, offset: int, data: bytes | memoryview) -> None:
    # Opened for each piece: a server with thousands of transfers would run out of handles.
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        written = os.pwrite(handle, data, offset)
        if written < len(data):  # a disk that fills up in the middle of a write
            os.pwrite(handle, data[written:], offset + written)
    finally:
        os.close(handle)


def _append(path: Path, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    try:
        os.write(handle, data)
    finally:
        os.close(handle)

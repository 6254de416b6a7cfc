"""Receiver-driven transfers in numbered pieces: what has arrived, what to ask for, when to ask.

The receiver knows the size and the SHA-256 of the whole beforehand. It asks for a window of pieces,
asks for more when half of them have arrived, and asks again for what is missing when it hears
nothing for too long. Lost, repeated and reordered pieces, and a sender that restarts, all end in
the same rule: the sender keeps no state, the receiver asks for what it lacks.
"""

from __future__ import annotations

import hashlib
from random import Random

from edge_sdk.errors import MalformedMessage, ProtocolMisuse

MAX_PIECES = 1 << 20  # one byte of bookkeeping each; at 128 KiB a piece this is 128 GiB
_MAX_DOUBLINGS = 16  # past any cap in use, and far from where a float overflows

# A window of pieces takes two seconds on a 4 Mbit/s link; sooner would ask for what is under way.
RETRY_S = 2.0
RETRY_MAX_S = 30.0

Ranges = tuple[tuple[int, int], ...]


def piece_count(size_bytes: int, piece_bytes: int) -> int:
    """Number of pieces of a whole; MalformedMessage if its sizes cannot be."""
    count = -(-size_bytes // piece_bytes) if piece_bytes > 0 else -1
    if size_bytes < 0 or not 0 <= count <= MAX_PIECES:
        raise MalformedMessage(
            f"a whole of {size_bytes} bytes in pieces of {piece_bytes}: sizes must be positive "
            f"and the pieces at most {MAX_PIECES}; use larger pieces"
        )
    return count


def piece_range(index: int, size_bytes: int, piece_bytes: int) -> tuple[int, int]:
    """First byte of a piece and the byte after its last; MalformedMessage beyond the end."""
    count = piece_count(size_bytes, piece_bytes)
    if not 0 <= index < count:
        raise MalformedMessage(
            f"piece {index} of a whole of {size_bytes} bytes in pieces of {piece_bytes}: "
            f"there are {count}, counted from 0; the piece is dropped"
        )
    start = index * piece_bytes
    return start, min(start + piece_bytes, size_bytes)


class Assembly:
    """Which pieces of one whole have arrived."""

    def __init__(self, size_bytes: int, piece_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.piece_bytes = piece_bytes
        self.pieces = piece_count(size_bytes, piece_bytes)
        self.received = 0
        self._arrived = bytearray(self.pieces)  # one byte each: bytearray searches itself fast

    @property
    def complete(self) -> bool:
        """Whether every piece has arrived."""
        return self.received == self.pieces

    def place(self, index: int, length: int) -> int | None:
        """Count a piece as arrived: the offset where it belongs, or None for a duplicate."""
        start, stop = piece_range(index, self.size_bytes, self.piece_bytes)
        if length != stop - start:
            raise MalformedMessage(
                f"piece {index} has {length} bytes, its place has {stop - start}; "
                "the piece is dropped"
            )
        if self._arrived[index]:
            return None
        self._arrived[index] = 1
        self.received += 1
        return start

    def missing(self, limit: int, start: int = 0) -> Ranges:
        """Ranges [first, stop) of the first ``limit`` missing pieces from piece ``start`` on."""
        ranges = []
        first = self._arrived.find(0, start)
        while first >= 0 and limit > 0:
            end = min(first + limit, self.pieces)
            stop = self._arrived.find(1, first, end)
            stop = end if stop < 0 else stop
            ranges.append((first, stop))
            limit -= stop - first
            first = self._arrived.find(0, stop)
        return tuple(ranges)

    def missing_before(self, stop: int) -> int:
        """How many pieces below ``stop`` are missing."""
        return self._arrived.count(0, 0, stop)


class Window:
    """When to ask for which pieces of an assembly.

    Call ``want`` after each piece and at ``deadline_s``; what it returns is to be asked for now.
    The wait for an answer is ``retry_s`` plus a random part of a span that doubles with every
    silent try up to ``retry_max_s``, so that a fleet cut off at once does not come back at once.
    """

    def __init__(
        self,
        assembly: Assembly,
        *,
        window_pieces: int,
        retry_s: float,
        retry_max_s: float,
        rng: Random,
    ) -> None:
        if window_pieces < 1 or not 0 < retry_s <= retry_max_s:
            raise ProtocolMisuse(
                f"a window of {window_pieces} pieces, retries after {retry_s} to {retry_max_s} s: "
                "needs at least 1 piece and 0 < retry_s <= retry_max_s"
            )
        self.deadline_s = float("-inf")
        self._assembly = assembly
        self._window_pieces = window_pieces
        self._retry_s = retry_s
        self._retry_max_s = retry_max_s
        self._rng = rng
        self._asked_below = 0
        self._received = assembly.received
        self._silent_tries = 0

    def want(self, now_s: float) -> Ranges:
        """Ranges [first, stop) to ask for now; empty while waiting or when all has arrived."""
        if self._assembly.complete:
            return ()
        if self._assembly.received > self._received:
            self._received = self._assembly.received
            self._silent_tries = 0
            self.deadline_s = now_s + self._patience_s()
        elif now_s >= self.deadline_s:
            self._asked_below = 0
            self.deadline_s = now_s + self._patience_s()
            self._silent_tries += 1
        return self._ask()

    def _ask(self) -> Ranges:
        awaited = self._assembly.missing_before(self._asked_below)
        if 2 * awaited > self._window_pieces:
            return ()
        ranges = self._assembly.missing(self._window_pieces - awaited, self._asked_below)
        if ranges:
            self._asked_below = ranges[-1][1]
        return ranges

    def _patience_s(self) -> float:
        doublings = min(self._silent_tries, _MAX_DOUBLINGS)
        return self._retry_s + self._rng.uniform(
            0.0, min(self._retry_max_s, self._retry_s * 2.0**doublings)
        )


class Incoming:
    """One whole on its way here: its bytes so far, and what to ask for next.

    Holds the whole in memory; the size is the one the receiver was promised, never a piece's.
    """

    def __init__(
        self, sha256: str, size_bytes: int, piece_bytes: int, window_pieces: int, rng: Random
    ) -> None:
        self.sha256 = sha256
        self.piece_bytes = piece_bytes
        self._assembly = Assembly(size_bytes, piece_bytes)  # refuses impossible sizes
        self.content = bytearray(size_bytes)
        self._window_pieces, self._rng = window_pieces, rng
        self._transfer = bytes.fromhex(sha256)[:8]
        self.forget_asked()

    @property
    def complete(self) -> bool:
        """Whether every piece has arrived."""
        return self._assembly.complete

    @property
    def deadline_s(self) -> float:
        """When to call ``want`` although nothing arrived."""
        return self._window.deadline_s

    def forget_asked(self) -> None:
        """The link was lost: what was asked for will not come."""
        self._window = Window(
            self._assembly,
            window_pieces=self._window_pieces,
            retry_s=RETRY_S,
            retry_max_s=RETRY_MAX_S,
            rng=self._rng,
        )

    def take(self, transfer: bytes, index: int, data: bytes) -> bool:
        """Put a piece in its place; False when it is another transfer's or a duplicate."""
        if transfer != self._transfer:
            return False
        offset = self._assembly.place(index, len(data))
        if offset is None:
            return False
        self.content[offset : offset + len(data)] = data
        return True

    def verify(self) -> None:
        """Check the complete content against its hash; MalformedMessage when it differs."""
        actual = hashlib.sha256(self.content).hexdigest()
        if actual != self.sha256:
            raise MalformedMessage(
                f"{len(self.content)} bytes arrived with SHA-256 {actual}, "
                f"announced was {self.sha256}"
            )

    def want(self, now_s: float) -> Ranges:
        """Ranges [first, stop) to ask for now; empty while waiting."""
        return self._window.want(now_s)

"""Receiver-driven transfers in numbered pieces: what has arrived, what to ask for, when to ask.

The receiver knows the size and the SHA-256 of the whole beforehand. It asks for a window of pieces,
asks for more when half of them have arrived, and asks again for what is missing when it hears
nothing for too long. Lost, repeated and reordered pieces, and a sender that restarts, all end in
the same rule: the sender keeps no state, the receiver asks for what it lacks.
"""

from __future__ import annotations

from random import Random

from edge_sdk.errors import MalformedMessage, ProtocolMisuse

MAX_PIECES = 1 << 20  # one byte of bookkeeping each; at 128 KiB a piece this is 128 GiB
_MAX_DOUBLINGS = 16  # past any cap in use, and far from where a float overflows

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

    def place_of(self, index: int, length: int) -> int | None:
        """Offset where a piece belongs, or None when it is here; MalformedMessage if nowhere."""
        start, stop = piece_range(index, self.size_bytes, self.piece_bytes)
        if length != stop - start:
            raise MalformedMessage(
                f"piece {index} has {length} bytes, its place has {stop - start}; "
                "the piece is dropped"
            )
        return None if self._arrived[index] else start

    def mark(self, index: int) -> None:
        """Count a piece that was missing as arrived."""
        self._arrived[index] = 1
        self.received += 1

    def arrived(self) -> Ranges:
        """Ranges [first, stop) of all pieces that have arrived."""
        ranges = []
        first = self._arrived.find(1)
        while first >= 0:
            stop = self._arrived.find(0, first)
            stop = self.pieces if stop < 0 else stop
            ranges.append((first, stop))
            first = self._arrived.find(1, stop)
        return tuple(ranges)

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
        retry_s: float,
        retry_max_s: float,
        rng: Random,
    ) -> None:
        if not 0 < retry_s <= retry_max_s:
            raise ProtocolMisuse(
                f"retries after {retry_s} to {retry_max_s} s: needs 0 < retry_s <= retry_max_s"
            )
        self.deadline_s = float("-inf")
        self._assembly = assembly
        self._retry_s = retry_s
        self._retry_max_s = retry_max_s
        self._rng = rng
        self._asked_below = 0
        self._received = assembly.received
        self.silent_tries = 0

    def expect_all(self, now_s: float) -> None:
        """Everything was asked for by other means: ask only after a silence."""
        self._asked_below = self._assembly.pieces
        self.deadline_s = now_s + self._patience_s()

    def want(self, now_s: float, window_pieces: int) -> Ranges:
        """Ranges [first, stop) to ask for now; empty while waiting or when all has arrived.

        ``window_pieces``: how many may be under way; more are asked for when half of them are here.
        """
        if self._assembly.complete:
            return ()
        if self._assembly.received > self._received:
            self._received = self._assembly.received
            self.silent_tries = 0
            self.deadline_s = now_s + self._patience_s()
        elif now_s >= self.deadline_s:
            self._asked_below = 0
            self.deadline_s = now_s + self._patience_s()
            self.silent_tries += 1
        return self._ask(window_pieces)

    def _ask(self, window_pieces: int) -> Ranges:
        awaited = self._assembly.missing_before(self._asked_below)
        if 2 * awaited > window_pieces:
            return ()
        ranges = self._assembly.missing(window_pieces - awaited, self._asked_below)
        if ranges:
            self._asked_below = ranges[-1][1]
        return ranges

    def _patience_s(self) -> float:
        doublings = min(self.silent_tries, _MAX_DOUBLINGS)
        return self._retry_s + self._rng.uniform(
            0.0, min(self._retry_max_s, self._retry_s * 2.0**doublings)
        )

"""The device's half of an upload: announce an update, send what is asked for, await the receipt.

The update lies in the spool from before the first word about it until its receipt. Nothing else is
state: after a kill, a power cut or a lost link the update is announced again, and the server, which
keeps what has arrived, asks for the rest.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice

from edge_sdk.feed import Feed
from edge_sdk.mqtt import Link
from edge_sdk.session import Retry
from edge_sdk.store import Spool, SpoolEntry
from edge_sdk.wire import (
    DEFAULT_PIECE_BYTES,
    MAX_PIECE_BYTES,
    Open,
    Receipt,
    Topics,
    Want,
    encode,
    encode_piece,
)

# One answer to a Want: what a server may make this device send, whatever it asks for.
MAX_PIECES_PER_WANT = 64
# A piece passes in so little that nothing waits long behind it, and a cut costs little.
PIECE_S = 0.5
MIN_PIECE_BYTES = 4096
# A new connection and the first word of a server that is there already come together.
ONCE_S = 1.0


def piece_limit_bytes(uplink_bytes_per_s: float) -> int:
    """Largest piece worth sending over such a link."""
    return int(min(MAX_PIECE_BYTES, max(MIN_PIECE_BYTES, PIECE_S * uplink_bytes_per_s)))


class Outbox:
    """Delivers one update at a time. All calls come from one thread."""

    def __init__(
        self,
        spool: Spool,
        link: Link,
        topics: Topics,
        device: str,
        rng: random.Random,
        clock: Callable[[], float],
        piece_bytes: int = DEFAULT_PIECE_BYTES,
    ) -> None:
        """``piece_bytes``: the largest piece that suits this device's link."""
        self._spool, self._link = spool, link
        self._up, self._data = topics.up(device), topics.data(device)
        self._clock, self._piece_bytes = clock, piece_bytes
        self._feed = Feed(link)
        # A server that folds other updates answers after a second or two; sooner would be noise.
        self._open = Retry(rng, 2.0)
        self._announced_s = float("-inf")
        self.entry: SpoolEntry | None = None

    @property
    def handed_pieces(self) -> int:
        """Pieces handed to the link so far."""
        return self._feed.handed_pieces

    def deliver(self, entry: SpoolEntry) -> None:
        """Begin with an update of the spool, or announce it again."""
        self.entry = entry
        message = Open(
            round=entry.round,
            ticket=bytes.fromhex(entry.ticket),
            sha256=entry.sha256,
            size_bytes=entry.size_bytes,
            piece_bytes=self._link.piece_bytes(self._piece_bytes),
        )
        now_s = self._clock()
        if self._link.publish(self._up, encode(message)):
            self._announced_s = now_s
        self._open.arm(now_s)

    def reconnected(self) -> None:
        """A new connection: what was under way is lost, the server says what it lacks."""
        self._feed.reconnected()
        if self.entry is not None:
            self.deliver(self.entry)

    def announce(self) -> None:
        """Say again what is being delivered: the server may be another one than before."""
        # Said twice, pieces would be asked for twice, too.
        if self.entry is not None and self._clock() - self._announced_s > ONCE_S:
            self.deliver(self.entry)

    def wanted(self, want: Want) -> None:
        """Send what the server lacks; no ranges mean that it will ask in time."""
        entry = self.entry
        if entry is None or want.sha256 != entry.sha256:
            return
        if want.piece_bytes > self._link.piece_bytes(want.piece_bytes):
            self.deliver(entry)  # the broker takes less than when it was announced
            return
        self._open.restart(self._clock())
        total = -(-entry.size_bytes // want.piece_bytes)
        wanted = (index for first, stop in want.ranges for index in range(first, min(stop, total)))

        def make(index: int) -> tuple[str, bytes]:
            data = self._spool.read_piece(entry, index * want.piece_bytes, want.piece_bytes)
            return self._data, encode_piece(entry.sha256, index, total, data)

        content = f"{entry.sha256}/{want.piece_bytes}"
        self._feed.order(entry.sha256, content, islice(wanted, MAX_PIECES_PER_WANT), make)
        self.pump()

    def answered(self, receipt: Receipt) -> bool:
        """Whether a receipt is that of the update being delivered, which ends the delivery."""
        entry = self.entry
        if entry is None or (receipt.round, receipt.sha256) != (entry.round, entry.sha256):
            return False
        self._feed.drop(entry.sha256)
        self._open.answered()
        return True

    def forget(self) -> None:
        """Remove the update, which has its receipt, from the spool."""
        if self.entry is not None:
            self._spool.remove(self.entry)
            self.entry = None

    def pump(self) -> None:
        """Send on; call it when the link drains and when ``due_s`` has come."""
        now_s = self._clock()
        handed = self._feed.handed_pieces
        self._feed.pump()
        if self._feed.handed_pieces > handed or self._link.pending:
            self._open.restart(now_s)  # what is still under way cannot have been answered
        elif self.entry is not None and self._open.is_due(now_s):
            self.deliver(self.entry)

    def due_s(self) -> float | None:
        """When to call ``pump``, on the clock; None: nothing is being delivered."""
        if self.entry is None:
            return None
        pause_s = self._feed.due_in_s()
        times = [] if pause_s is None else [self._clock() + pause_s]
        times += [] if self._open.due_s is None else [self._open.due_s]
        return min(times, default=None)

"""Pieces that were asked for, handed to the link as it has room and the broker's limits allow.

Between this and the broker there is at most one window of pieces in memory, whatever was asked for
by how many: a piece is read when its turn comes. Receivers take turns, so that a large transfer
does not hold up a small one.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from edge_sdk.errors import EdgeError
from edge_sdk.mqtt import Link

Make = Callable[[int], tuple[str, bytes]]

log = logging.getLogger("edge_sdk")


@dataclass(slots=True)
class _Order:
    """What one receiver asked for: ``make`` turns a piece's number into (topic, payload)."""

    content: str
    make: Make
    retain: bool
    indexes: deque[int] = field(default_factory=deque)
    # Number of a piece under way to when it was handed over, counted in messages.
    under_way: dict[int, int] = field(default_factory=dict)


class Feed:
    """Orders by receiver, served in turn. All calls come from one thread."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._orders: dict[str, _Order] = {}
        self._turn: deque[str] = deque()
        self.handed_pieces = 0

    @property
    def idle(self) -> bool:
        """Whether everything that was asked for has been handed to the link."""
        return not self._turn

    def order(
        self,
        receiver: str,
        content: str,
        indexes: Iterable[int],
        make: Make,
        *,
        retain: bool = False,
    ) -> None:
        """Send these pieces of ``content`` too; other content replaces what was asked for before.

        What waits already, or is under way to the broker, is not sent a second time.
        """
        order = self._orders.get(receiver)
        if order is None or order.content != content:
            order = self._orders[receiver] = _Order(content, make, retain)
        order.make = make
        acknowledged = self._link.handed - self._link.pending
        order.under_way = {i: n for i, n in order.under_way.items() if n > acknowledged}
        known = {*order.indexes, *order.under_way}
        order.indexes.extend(i for i in dict.fromkeys(indexes) if i not in known)
        if order.indexes and receiver not in self._turn:
            self._turn.append(receiver)

    def drop(self, receiver: str) -> None:
        """Forget what a receiver asked for."""
        if self._orders.pop(receiver, None) is not None and receiver in self._turn:
            self._turn.remove(receiver)

    def reconnected(self) -> None:
        """A new connection: what was asked for on the last one will be asked for again."""
        self._orders.clear()
        self._turn.clear()

    def pump(self) -> None:
        """Hand over what there is room for; call it when the link drains and at ``due_in_s``."""
        while self._turn and self._link.has_room and self._link.pause_s() == 0:
            receiver = self._turn.popleft()
            order = self._orders[receiver]
            if order.indexes and self._hand_over(receiver, order) and order.indexes:
                self._turn.append(receiver)

    def due_in_s(self) -> float | None:
        """Seconds until ``pump`` is to be called; None: not before the link says something."""
        if not self._turn or not self._link.has_room:
            return None
        return self._link.pause_s()

    def _hand_over(self, receiver: str, order: _Order) -> bool:
        index = order.indexes.popleft()
        try:
            topic, payload = order.make(index)
            accepted = self._link.publish(topic, payload, retain=order.retain)
        except EdgeError as error:  # its file is gone, or a new broker takes less: they ask again
            log.warning("piece %d for %s is not sent: %s", index, receiver, error)
            self.drop(receiver)
            return False
        if not accepted:
            order.indexes.appendleft(index)
            self._turn.appendleft(receiver)
            return False
        order.under_way[index] = self._link.handed
        self.handed_pieces += 1
        return True

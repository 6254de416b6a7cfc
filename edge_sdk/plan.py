"""Which blocks a device trains, at which micro-batch, within its budgets; and why not more.

The strategy names the candidates in the order of preference; the first that fits memory and time
is taken, in the way that takes least time. Deterministic, and monotone: a larger budget never leads
to an earlier candidate being skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import msgspec

from edge_sdk.cost import CostTable
from edge_sdk.errors import MIB, NothingFits
from edge_sdk.ways import Costing, FrozenPrefix, Limits, Way
from edge_sdk.wire import Training

__all__ = ["FrozenPrefix", "LeftOut", "Limits", "Plan", "choose"]

# The share of a deadline a plan may fill: predictions of time are good to about a third.
DEADLINE_SHARE = 0.75


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A better plan that was not taken, and the limit in its way."""

    blocks: tuple[str, ...]
    reason: str


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a device will do in a round, with what that is predicted to cost.

    steps:            optimiser steps; None: all steps of the local epochs.
    checkpoint:       activations inside a block are dropped and computed again in backward.
    step_in_backward: a parameter is updated, and its gradient dropped, as soon as that is complete;
                      only with ``micro_batch == batch_size``.
    training_bytes:   as ``peak_bytes``, without what blocks take on their way into the model.
    """

    blocks: tuple[str, ...]
    batch_size: int
    micro_batch: int
    codec: str
    steps: int | None = None
    checkpoint: bool = False
    step_in_backward: bool = False
    prefix: FrozenPrefix = FrozenPrefix()
    peak_bytes: int
    training_bytes: int = 0
    budget_bytes: int
    train_s: float
    round_s: float
    upload_bytes: int
    flops: int
    left_out: tuple[LeftOut, ...] = ()


def choose(
    table: CostTable,
    candidates: Sequence[tuple[str, ...]],
    training: Training,
    limits: Limits,
    *,
    num_examples: int,
    codec: str,
    bits_per_param: float,
) -> Plan:
    """The best plan within the limits; NothingFits when there is none.

    Best is the first candidate that has the time for all its local steps, trained in the way that
    takes least of it. When none has, the last one takes the steps there is time for.
    """
    if not candidates:
        raise NothingFits("the offer opens no block to this device: sit this round out")
    desk = _Desk(table, training, limits, num_examples, bits_per_param)
    place = desk.first_fitting(candidates)
    all_fit = place < len(candidates)
    chosen = candidates[place] if all_fit else candidates[-1]
    better = candidates[: len(candidates) if not all_fit else place]
    left_out = [
        LeftOut(blocks=b, reason=desk.obstacle(b))
        for b in dict.fromkeys((*better[:1], *better[-1:]))
    ]
    way = desk.fitting(chosen) or desk.shortened(chosen)
    if way is None:
        why = desk.costing.unable(chosen) or (
            f"{desk.obstacle(chosen)}. Lower the batch size, raise the deadline, or raise the "
            "device's budget if it has room"
        )
        raise NothingFits(f"cheapest plan ({', '.join(chosen)}) {why}.")
    steps = desk.affordable_steps(chosen, way)
    share = steps / desk.costing.steps
    train_s = way.once_s + way.step_s * steps
    return Plan(
        blocks=chosen,
        batch_size=training.batch_size,
        micro_batch=way.micro_batch,
        codec=codec,
        steps=None if steps == desk.costing.steps else steps,
        checkpoint=way.levers.checkpoint,
        step_in_backward=way.levers.step_in_backward,
        prefix=way.prefix,
        peak_bytes=way.peak_bytes,
        training_bytes=way.training_bytes,
        budget_bytes=limits.memory_bytes,
        train_s=train_s,
        round_s=train_s + desk.moving_s(chosen),
        upload_bytes=desk.upload_bytes(chosen),
        flops=round(way.flops * share),
        left_out=tuple(left_out),
    )


class _Desk:
    """Compares the ways to train candidates with what a device may spend."""

    def __init__(
        self,
        table: CostTable,
        training: Training,
        limits: Limits,
        num_examples: int,
        bits_per_param: float,
    ) -> None:
        self.costing = Costing(table, training, limits, num_examples)
        self._table, self._limits, self._bits = table, limits, bits_per_param
        self._ways: dict[tuple[str, ...], list[Way]] = {}

    def first_fitting(self, candidates: Sequence[tuple[str, ...]]) -> int:
        """The place of the first candidate that fits, their number if none does."""
        start = 0
        for end, blocks in enumerate(candidates):
            follows = end + 1 < len(candidates)
            if follows and self.costing.is_no_dearer(candidates[end + 1], blocks):
                continue
            if self.fitting(blocks) is not None:
                return _first(start, end, lambda n: self.fitting(candidates[n]) is not None)
            start = end + 1
        return len(candidates)

    def fitting(self, blocks: tuple[str, ...]) -> Way | None:
        """The way to take all local steps that is expected to take least time, then memory."""
        left_s, best = self._usable_s(blocks), None
        for _, group in groupby(self._all(blocks), key=lambda way: (way.levers, way.prefix)):
            # From the largest micro-batch, which is the quickest, to the smallest in memory.
            ways = [way for way in group if way.train_s <= left_s]
            if not ways or (best is not None and ways[0].expected_s > best.expected_s):
                continue
            place = _first(0, len(ways), self._is_small(ways))
            if place < len(ways) and (best is None or _rank(ways[place]) < _rank(best)):
                best = ways[place]
        return best

    def shortened(self, blocks: tuple[str, ...]) -> Way | None:
        """The way that takes most local steps in time, None when not even one.

        Output of the frozen prefix is not kept: filled as samples come up, with the prefix's
        weights beside the training, that would be priced wrongly.
        """
        ways = [
            way
            for way in self._small(blocks)
            if way.prefix.cache == "none" and self.affordable_steps(blocks, way)
        ]
        return max(
            ways,
            key=lambda way: (self.affordable_steps(blocks, way), -way.peak_bytes),
            default=None,
        )

    def affordable_steps(self, blocks: tuple[str, ...], way: Way) -> int:
        """How many local steps there is time for."""
        left_s, steps = self._usable_s(blocks), self.costing.steps
        if way.train_s <= left_s:
            return steps
        left_s -= way.once_s
        return min(steps, int(left_s / way.step_s + 1e-9)) if left_s > 0 else 0

    def obstacle(self, blocks: tuple[str, ...]) -> str:
        """What stands in the way of training these blocks."""
        limits = self._limits
        unable = self.costing.unable(blocks)
        if unable is not None:
            return unable
        small = list(self._small(blocks))
        if not small:
            least = min(self._all(blocks), key=lambda way: way.peak_bytes)
            return (
                f"needs {least.peak_bytes / MIB:.0f} MiB at the least, "
                f"{limits.memory_bytes / MIB:.0f} MiB allowed by {limits.bound_by}"
            )
        quickest_s = min(way.train_s for way in small) + self.moving_s(blocks)
        return (
            f"takes {quickest_s:.2f} s, {limits.deadline_s * DEADLINE_SHARE:.2f} s of the round's "
            "deadline are usable"
        )

    def moving_s(self, blocks: tuple[str, ...]) -> float:
        """Seconds of download and upload."""
        limits = self._limits
        up_s = self.upload_bytes(blocks) / limits.uplink_bytes_per_s
        return up_s + limits.fetch_bytes / limits.downlink_bytes_per_s

    def upload_bytes(self, blocks: tuple[str, ...]) -> int:
        """Expected size of the update."""
        elements = sum(b.elements for b in self._table.blocks if b.name in blocks)
        return round(elements * self._bits / 8)

    def _usable_s(self, blocks: tuple[str, ...]) -> float:
        return self._limits.deadline_s * DEADLINE_SHARE - self.moving_s(blocks)

    def _small(self, blocks: tuple[str, ...]) -> Iterator[Way]:
        return (way for way in self._all(blocks) if self._has_room(way))

    def _is_small(self, ways: Sequence[Way]) -> Callable[[int], bool]:
        return lambda place: self._has_room(ways[place])

    def _has_room(self, way: Way) -> bool:
        limits = self._limits
        room_bytes = min(limits.memory_bytes, limits.training_bytes)
        return way.loading_bytes <= limits.memory_bytes and way.training_bytes <= room_bytes

    def _all(self, blocks: tuple[str, ...]) -> list[Way]:
        if blocks not in self._ways:
            self._ways[blocks] = list(self.costing.ways(blocks))
        return self._ways[blocks]


def _first(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The first of some numbers that fits, ``high`` if none; all after one that fits do."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _rank(way: Way) -> tuple[float, int]:
    """What is preferred of ways that fit: the least."""
    return way.expected_s, way.peak_bytes

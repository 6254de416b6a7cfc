"""One training step put together from a table's segments: how high memory stands, how long it is.

Memory at a point is what was there before the step, what earlier segments keep for backward, what
passes from segment to segment, and how far the segment at work rises above that. Weights, gradients
and optimiser state are added by arithmetic. Time is the sum of what the segments do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from edge_sdk.cost import (
    ENCODE_BYTES_PER_ELEMENT,
    FROZEN,
    LOWEST,
    PASSED,
    TRAINED,
    CostTable,
    Crossing,
    Duration,
    Line,
    Work,
    last_reader,
    states,
    units,
    works_of,
)
from edge_sdk.wire import Training

# Adam steps a large parameter in slices of half a mebibyte.
STEP_TEMPORARY_BYTES = 1 << 19


class Outline:
    """What steps on a table have in common whatever is trained: bytes by block, blocks by place."""

    def __init__(self, table: CostTable) -> None:
        self.table = table
        self.places = [segment.block for segment in table.segments]
        self.weights = {b.name: b.size_bytes for b in table.spec.blocks}
        parameters = {
            b.name: [t.size_bytes for t in b.tensors if t.kind == "parameter" and t.is_float]
            for b in table.spec.blocks
        }
        self.gradients = {name: sum(sizes) for name, sizes in parameters.items()}
        self.largest = [max(parameters[block], default=0) for block in self.places]
        self.elements = {b.name: sum(t.elements for t in b.tensors) for b in table.spec.blocks}
        self.names = table.spec.names
        self.spans = [(c.born, last_reader(c)) for c in table.crossings]
        self._states: dict[tuple[str, ...], list[str]] = {}

    def states(self, trained: tuple[str, ...]) -> list[str]:
        """By place, as ``cost.states``."""
        if trained not in self._states:
            self._states[trained] = states(self.table, set(trained))
        return self._states[trained]


class Sizes:
    """A table's sizes at one micro-batch, bytes: by state and place, and by crossing."""

    def __init__(self, outline: Outline, micro_batch: int) -> None:
        rows = outline.table.segments

        def tops(lines: Sequence[Sequence[Line]]) -> list[int]:
            return [
                max([fixed + each * micro_batch for fixed, each in some], default=0)
                for some in lines
            ]

        self.rise = {
            FROZEN: tops([s.rise_frozen for s in rows]),
            PASSED: tops([s.rise_passed for s in rows]),
            TRAINED: tops([s.rise_trained for s in rows]),
        }
        self.kept = {
            FROZEN: [0] * len(rows),
            PASSED: [s.kept_passed.at(micro_batch) for s in rows],
            TRAINED: [s.kept_trained.at(micro_batch) for s in rows],
        }
        self.back = {
            PASSED: tops([s.back_passed for s in rows]),
            TRAINED: tops([s.back_trained for s in rows]),
        }
        # Gradients of parameters are held elsewhere but for the one that is being made.
        apart = tops([s.back_accumulated for s in rows])
        self.back_apart = {
            PASSED: self.back[PASSED],
            TRAINED: [a + b for a, b in zip(apart, outline.largest, strict=True)],
        }
        for by_state in (self.rise, self.kept, self.back, self.back_apart):
            by_state[LOWEST] = by_state[TRAINED]
        self.carry = [s.carry.at(micro_batch) for s in rows]
        self.crossings = [c.size.at(micro_batch) for c in outline.table.crossings]
        self.samples = micro_batch
        self.batch = outline.table.batch_bytes_per_sample * micro_batch


class Paces:
    """Durations of a table's segments at given prices, by what a segment does."""

    def __init__(self, table: CostTable, prices: Mapping[str, float]) -> None:
        rows, tariff = table.segments, Tariff(prices)
        self.forward = [tariff.duration(s.work_forward) for s in rows]
        self.frozen = [tariff.duration(s.work_frozen) for s in rows]
        self.backward = {
            TRAINED: [tariff.duration(s.work_trained) for s in rows],
            LOWEST: [tariff.duration(s.work_lowest) for s in rows],
            PASSED: [tariff.duration(s.work_passed) for s in rows],
        }


class Tariff:
    """Prices by kind of work: seconds per operator, floating-point operation and byte."""

    def __init__(self, prices: Mapping[str, float]) -> None:
        self._prices = prices
        self._of_kind: dict[str, tuple[float, float, float]] = {}

    def duration(self, works: Sequence[Work]) -> Duration:
        """How long some work takes."""
        fixed_s = per_sample_s = 0.0
        for w in works:
            operator_s, flop_s, byte_s = self._of_kind.get(w.kind) or self._read(w.kind)
            fixed_s += operator_s * w.operators + flop_s * w.flops_fixed
            fixed_s += byte_s * w.moved_bytes_fixed
            per_sample_s += flop_s * w.flops_per_sample + byte_s * w.moved_bytes_per_sample
        return Duration(fixed_s, per_sample_s)

    def _read(self, kind: str) -> tuple[float, float, float]:
        operator_s, flop_s, byte_s = (
            sum(amount * self._prices[key] for key, amount in units(kind, *one))
            for one in ((1, 0, 0), (0, 1, 0), (0, 0, 1))
        )
        self._of_kind[kind] = operator_s, flop_s, byte_s
        return self._of_kind[kind]


class Step:
    """What is known of a training step before the micro-batch is: who trains, and how.

    checkpoint: activations of recomputable blocks are dropped and computed again.
    skipped:    frozen blocks that are not run, their weights not in memory.
    brought:    bytes a sample that are there in their place.
    """

    def __init__(
        self,
        outline: Outline,
        trained: tuple[str, ...],
        training: Training,
        *,
        checkpoint: bool = False,
        skipped: Collection[str] = (),
        brought: int = 0,
    ) -> None:
        self._outline, self._table, self._brought = outline, outline.table, brought
        self.states = outline.states(trained)
        skipped = set(skipped)
        self._runs = [block not in skipped for block in outline.places]
        again = set(outline.table.recomputable) if checkpoint else set()
        self._recomputes = [
            state != FROZEN and block in again
            for block, state in zip(outline.places, self.states, strict=True)
        ]
        # What runs again keeps nothing before, as what is frozen.
        self._ahead = [
            (place, FROZEN if self._recomputes[place] else state)
            for place, state in enumerate(self.states)
            if self._runs[place]
        ]
        # From the top down: those a gradient reaches, and whether they run again before.
        self._back = [
            (place, state, self._recomputes[place])
            for place, state in reversed(list(enumerate(self.states)))
            if state != FROZEN
        ]
        self._weights = sum(n for name, n in outline.weights.items() if name not in skipped)
        self._gradients = sum(outline.gradients[name] for name in trained)
        self._states_bytes = self._gradients * _optimizer_states(training)
        encoding = max((outline.elements[name] for name in trained), default=0)
        self._encoding = self._weights + ENCODE_BYTES_PER_ELEMENT * encoding
        self._place_crossings()
        self._place_gradients(set(trained))

    def _place_crossings(self) -> None:
        """Where each crossing comes into memory and leaves it."""
        self._born: list[list[int]] = [[] for _ in self.states]
        self._gone: list[list[int]] = [[] for _ in self.states]  # in forward, after the last use
        self._freed: list[list[int]] = [[] for _ in self.states]  # in backward
        self._from_cache: list[int] = []
        self._saved: list[int] = []
        self._trains = [state in (TRAINED, LOWEST) for state in self.states]
        self._passes = [state == PASSED for state in self.states]
        for number, (crossing, (born, reader)) in enumerate(
            zip(self._table.crossings, self._outline.spans, strict=True)
        ):
            if self._runs[born]:
                self._born[born].append(number)
            elif self._runs[reader]:
                self._from_cache.append(number)
            keeper = self._keeper(crossing)
            if keeper >= 0:
                self._freed[keeper].append(number)
                self._saved.append(number)
            else:
                self._gone[crossing.last_use].append(number)

    def _place_gradients(self, trained: Collection[str]) -> None:
        """After the backward of which segment a block's gradients are there."""
        last = {block: place for place, block in enumerate(self._outline.places)}
        self._gradient_after = [0] * len(self.states)
        for block, place in last.items():
            if block in trained:
                self._gradient_after[place] = self._outline.gradients[block]

    def _keeper(self, crossing: Crossing) -> int:
        """The lowest segment that keeps a crossing for its backward; -1: nobody."""
        last_use = crossing.last_use
        lowest = last_use if self._recomputes[last_use] else len(self.states)
        for place in crossing.savers_trained:
            if place < lowest and self._trains[place]:
                lowest = place
        for place in crossing.savers_passed:
            if place < lowest and self._passes[place]:
                lowest = place
        return lowest if lowest < len(self.states) else -1

    def peak_bytes(
        self, sizes: Sizes, *, accumulate: bool = False, step_in_backward: bool = False
    ) -> int:
        """The highest memory stands above the runtime floor, in training or encoding.

        accumulate:       gradients of earlier micro-batches are there.
        step_in_backward: a gradient is gone as soon as it is complete.
        """
        held = self._weights + self._states_bytes + sizes.batch
        before = held + self._gradients * accumulate
        backward = self._backward(before, sizes, apart=accumulate or step_in_backward)
        stepping = held + STEP_TEMPORARY_BYTES + (0 if step_in_backward else self._gradients)
        return max(self._forward(before, sizes), backward, stepping, self._encoding)

    def duration(self, paces: Paces) -> Duration:
        """Seconds of one pass forward and back."""
        parts: list[Duration] = []
        for place, state in enumerate(self.states):
            if not self._runs[place]:
                continue
            if state == FROZEN:
                parts.append(paces.frozen[place])
                continue
            parts += (paces.forward[place], paces.backward[state][place])
            if self._recomputes[place]:
                parts.append(paces.forward[place])
        return Duration(sum([p[0] for p in parts]), sum([p[1] for p in parts]))

    def flops_per_sample(self) -> int:
        """Floating-point operations of a pass forward and back."""
        rows = zip(self._table.segments, self.states, self._runs, self._recomputes, strict=True)
        return sum(
            work.flops_per_sample
            for segment, state, runs, again in rows
            if runs
            for work in works_of(segment, state, again=again)
        )

    def _forward(self, level: int, sizes: Sizes) -> int:
        crossings = sizes.crossings
        given, brought = sum([crossings[c] for c in self._from_cache]), self._brought
        # What is made of a kept output before the first block runs comes beside it.
        level += given + (brought * sizes.samples if brought * sizes.samples > given else 0)
        highest = level
        for place, state in self._ahead:
            top = level + sizes.rise[state][place]
            if top > highest:
                highest = top
            level += sizes.kept[state][place]
            for c in self._born[place]:
                level += crossings[c]
            for c in self._gone[place]:
                level -= crossings[c]
        return highest

    def _backward(self, level: int, sizes: Sizes, *, apart: bool) -> int:
        """From the top down. What is kept is what the segments at and below a place hold.

        ``apart``: gradients were counted before, or are gone before the next one.
        """
        crossings, kept = sizes.crossings, sizes.kept
        level += sum([crossings[c] for c in self._saved])
        level += sum([kept[state][place] for place, state, again in self._back if not again])
        highest = level
        backs = sizes.back_apart if apart else sizes.back
        for place, state, again in self._back:
            rise = backs[state][place]
            if again:
                rise = max(sizes.rise[state][place], kept[state][place] + rise)
            top = level + sizes.carry[place] + rise
            if top > highest:
                highest = top
            if not again:
                level -= kept[state][place]
            for c in self._freed[place]:
                level -= crossings[c]
            if not apart:
                level += self._gradient_after[place]
        return highest


def _optimizer_states(training: Training) -> int:
    if training.optimizer == "sgd":
        return int(training.momentum != 0.0)
    return 2

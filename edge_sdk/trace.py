"""From watched passes over a model to its cost table.

Three passes are watched, each at two batch sizes, because what a pass takes grows linearly with the
batch: without gradients (frozen blocks), with everything trained, and with only the first block of
each chain trained, which makes every block above pass a gradient on without having one of its own.
From their segments ``cost`` puts any set of trained blocks together.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch

from edge_sdk.blocks import TRUNK, ModelSpec
from edge_sdk.cost import BlockCost, CostTable, Crossing, Kind, Line, Segment, Work, upper_hull
from edge_sdk.errors import TaskError
from edge_sdk.model import BlockModel
from edge_sdk.recompute import block_modules, recomputed_blocks
from edge_sdk.train import Samples, batch_statistics, view_of
from edge_sdk.watch import (
    BACKWARD,
    FORWARD,
    LOWEST,
    Counts,
    Store,
    Watch,
    leaves,
    left_as_it_was,
    to_meta,
    watch_pass,
    without_memory,
)

SMALL_BATCH = 2
# Watching a model of a hundred blocks takes seconds here, a minute or two on the smallest board.
CHILD_LIMIT_S = 300.0
Sample = Callable[[int], tuple[Any, Any]]


def cost_table(model: BlockModel, samples: Samples) -> CostTable:
    """What a task's model costs, in this process; it stays as it was.

    Batches up to the task's are interpolated, larger ones extrapolated. TaskError when the model
    or its loss fails on its own data.
    """
    return _without_data(model, samples) or _on_data(model, samples)


def cost_table_apart(
    model: BlockModel, samples: Samples, limit_s: float = CHILD_LIMIT_S
) -> CostTable:
    """As ``cost_table``, in a child process: what watching loads, 50 MiB, is gone with it."""
    return _in_child(lambda: _without_data(model, samples), limit_s) or _on_data(model, samples)


def _sample(model: BlockModel, samples: Samples, distinct: int) -> Sample:
    """Batches of some samples, over and over."""

    def first(count: int) -> tuple[Any, Any]:
        index = torch.arange(count) % min(distinct, samples.count)
        return view_of(model.task, samples, index, 0), samples.targets_at(index)

    return first


def _in_child(work: Callable[[], CostTable | None], limit_s: float) -> CostTable | None:
    """What ``work`` returns in a forked process; None when that fails or takes too long."""
    ours, theirs = Pipe(duplex=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*multi-threaded", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            # The threads of a fork's parent are not there in it; whoever waits for one, as OpenMP
            # does, waits for ever. A lock that one of them held is what the limit is for.
            torch.set_num_threads(1)
            theirs.send_bytes(msgspec.msgpack.encode(work()))
        finally:
            os._exit(0)
    theirs.close()
    with ours:
        data = _received(ours, limit_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return msgspec.msgpack.decode(data, type=CostTable | None) if data else None


def _received(end: Connection, limit_s: float) -> bytes:
    """What arrives in time; nothing when the other end closes without a word."""
    with suppress(EOFError):
        if end.poll(limit_s):
            return end.recv_bytes()
    return b""


def _without_data(model: BlockModel, samples: Samples) -> CostTable | None:
    """The table from tensors without memory; None for a model that needs data to run."""
    sample = _sample(model, samples, samples.count)
    large = max(SMALL_BATCH + 1, model.task.training.batch_size)
    try:
        with left_as_it_was(model), without_memory(model):
            return _table(model, lambda n: to_meta(sample(n)), large)
    except Exception:  # it looks at values, or holds tensors of its own: anything may come of that
        return None


def _on_data(model: BlockModel, samples: Samples) -> CostTable:
    buffers = {name: buffer.clone() for name, buffer in model.module.named_buffers()}
    # A model that looks at its data does the same on a batch that holds the same samples twice.
    sample = _sample(model, samples, SMALL_BATCH)
    try:
        with left_as_it_was(model):
            return _table(model, sample, 2 * SMALL_BATCH)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"task {model.task.name!r}: the model or its loss fails on its own data: {error}"
        ) from error
    finally:
        for name, buffer in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.module.get_submodule(owner), leaf, buffer)


@dataclass(frozen=True)
class _Pair:
    """The same pass at two batch sizes: its sizes as lines over the batch."""

    small: Watch
    large: Watch
    batches: tuple[int, int]

    def line(self, small: float, large: float) -> Line:
        """The line through two sizes, rounded up."""
        low, high = self.batches
        slope = (large - small) / (high - low)
        return Line(max(0, round(small - slope * low)), max(0, -int(-slope // 1)))

    def total(self, wanted: Callable[[Store], bool]) -> Line:
        """Size of all pieces of memory that are ``wanted``."""
        pairs = [
            (a, b) for a, b in zip(self.small.stores, self.large.stores, strict=True) if wanted(a)
        ]
        return self.line(sum(a.size_bytes for a, _ in pairs), sum(b.size_bytes for _, b in pairs))

    def rises(self, backward: bool, gradients: bool) -> list[tuple[Line, ...]]:
        """Per segment, how far memory rises above where it stood when the segment began."""
        found: list[list[Line]] = [[] for _ in self.small.segments]
        level, start, place = (0, 0), (0, 0), -1
        for a, b in zip(self.small.events, self.large.events, strict=True):
            if a.backward != backward:
                continue
            if a.segment != place:
                start, place = level, a.segment
            if gradients or not a.store.gradient:
                level = (
                    level[0] + a.sign * a.store.size_bytes,
                    level[1] + b.sign * b.store.size_bytes,
                )
            if a.sign > 0:
                found[place].append(self.line(level[0] - start[0], level[1] - start[1]))
        return [upper_hull(lines) for lines in found]

    def carries(self) -> list[Line]:
        """Per segment, what is in flight when its backward begins: gradients of activations."""
        found = [Line(0, 0)] * len(self.small.segments)
        levels: list[tuple[int, int]] = [(0, 0)] * len(found)
        level, place = (0, 0), -1
        for a, b in zip(self.small.events, self.large.events, strict=True):
            if not a.backward:
                continue
            if a.segment != place:
                place = a.segment
                levels[place] = max(levels[place], level)
            kept = a.store.frees_in_backward and a.store.savers
            if not kept and not a.store.gradient:
                level = (
                    level[0] + a.sign * a.store.size_bytes,
                    level[1] + b.sign * b.store.size_bytes,
                )
        for place, (low, high) in enumerate(levels):
            found[place] = self.line(max(0, low), max(0, high))
        return found

    def work(self, phase: str, segment: int) -> tuple[Work, ...]:
        """What a segment does in a phase, by kind."""
        small = self.small.work.get((phase, segment), {})
        large = self.large.work.get((phase, segment), {})
        return tuple(
            self._work(kind, small.get(kind, Counts()), large.get(kind, Counts()))
            for kind in sorted(small.keys() | large.keys())
        )

    def _work(self, kind: Kind, small: Counts, large: Counts) -> Work:
        flops, moved = (
            self.line(small.flops, large.flops),
            self.line(small.moved_bytes, large.moved_bytes),
        )
        return Work(
            kind=kind,
            operators=small.operators,
            flops_fixed=flops.fixed,
            flops_per_sample=flops.per_sample,
            moved_bytes_fixed=moved.fixed,
            moved_bytes_per_sample=moved.per_sample,
        )


def _pair(model: BlockModel, sample: Sample, large: int, trained: Sequence[str]) -> _Pair:
    small, big = (watch_pass(model, trained, *sample(n)) for n in (SMALL_BATCH, large))
    if small.segments != big.segments or small.outline() != big.outline():
        raise TaskError(
            f"task {model.task.name!r}: the model or its loss does other things with {large} "
            f"samples than with {SMALL_BATCH}, so what it costs cannot be told; compute "
            "on the whole batch at once"
        )
    return _Pair(small, big, (SMALL_BATCH, large))


def _table(model: BlockModel, sample: Sample, large: int) -> CostTable:
    spec = model.spec
    with _outputs(model) as sizes:
        frozen = _pair(model, sample, large, ())
    # Kept can be what is computed once in a pass.
    outputs = {name: frozen.line(*both) for name, both in sizes.items() if len(both) == 2}
    trained = _pair(model, sample, large, spec.names)
    passed = _passed_pair(model, sample, large, trained)
    if passed.small.segments != trained.small.segments:
        passed = trained
    if frozen.small.segments != trained.small.segments:
        frozen = trained
    segments = _segments(frozen, trained, passed)
    batch = [sum(t.numel() * t.element_size() for t in leaves(sample(n))) for n in (1, 2)]
    crossings = _crossings(trained, passed)
    return CostTable(
        task=model.task.name,
        spec=spec,
        blocks=tuple(
            _block_cost(spec, name, segments, crossings, outputs.get(name, Line(0, 0)))
            for name in spec.names
        ),
        segments=segments,
        crossings=crossings,
        batch_bytes_per_sample=batch[1] - batch[0],
        recomputable=tuple(recomputed_blocks(model)),
        cuttable=tuple(name for name in spec.names if name in outputs),
        batch_statistics=tuple(sorted(batch_statistics(model), key=spec.names.index)),
        views=model.task.augment_views if model.task.augment else 1,
        random_prefix=model.task.random_prefix,
        lossy_prefix=model.task.lossy_prefix,
    )


@contextmanager
def _outputs(model: BlockModel) -> Iterator[dict[str, list[int]]]:
    """Within, bytes of what blocks that are one module return, if it is a tensor, in every pass."""
    sizes: dict[str, list[int]] = {}

    def note(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.setdefault(name, []).append(output.numel() * output.element_size())

    handles = [
        model.module.get_submodule(path).register_forward_hook(
            lambda _module, _inputs, output, name=name: note(name, output)
        )
        for name, path in block_modules(model).items()
    ]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _passed_pair(model: BlockModel, sample: Sample, large: int, trained: _Pair) -> _Pair:
    """Only the first blocks trained; all of them when the loss does not depend on those alone."""
    try:
        return _pair(model, sample, large, _first_blocks(model.spec, trained.small.segments))
    except TaskError:
        return trained


def _first_blocks(spec: ModelSpec, used: Sequence[str]) -> tuple[str, ...]:
    """The first block of each chain that is used and has a parameter to train."""
    first: dict[str, str] = {}
    for block in spec.blocks:
        able = any(t.kind == "parameter" and t.is_float for t in block.tensors)
        if able and block.name in used:
            first.setdefault(block.chain, block.name)
    if len(first) > 1:
        first.pop(TRUNK, None)
    return tuple(first.values())


def _segments(frozen: _Pair, trained: _Pair, passed: _Pair) -> tuple[Segment, ...]:
    forward = [pair.rises(False, True) for pair in (frozen, trained, passed)]
    backward = trained.rises(True, True)
    accumulated = trained.rises(True, False)
    through = passed.rises(True, False)
    carries = trained.carries()
    rows = []
    for place, block in enumerate(trained.small.segments):
        rows.append(
            Segment(
                block=block,
                inputs=tuple(sorted(trained.small.inputs[place])),
                kept_trained=_kept(trained, place),
                kept_passed=_kept(passed, place),
                rise_frozen=forward[0][place],
                rise_trained=forward[1][place],
                rise_passed=forward[2][place],
                back_trained=backward[place],
                back_accumulated=accumulated[place],
                back_passed=through[place],
                carry=carries[place],
                work_forward=trained.work(FORWARD, place),
                work_frozen=frozen.work(FORWARD, place),
                work_trained=trained.work(BACKWARD, place),
                work_lowest=trained.work(LOWEST, place),
                work_passed=passed.work(BACKWARD, place),
            )
        )
    return tuple(rows)


def _kept(pair: _Pair, place: int) -> Line:
    """What a segment keeps for its own backward alone."""
    return pair.total(
        lambda s: (
            s.born == place and s.savers == {place} and s.frees_in_backward and s.last_use == place
        )
    )


def _crossings(trained: _Pair, passed: _Pair) -> tuple[Crossing, ...]:
    """Memory made in one segment and read or kept in later ones."""
    rows: Counter[tuple[Any, ...]] = Counter()
    sizes: dict[tuple[Any, ...], Line] = {}
    savers_passed = _savers(passed)
    for a, b in zip(trained.small.stores, trained.large.stores, strict=True):
        if not _crosses(a):
            continue
        place = (a.born, a.last_use)
        waiting = savers_passed.get(place)
        through = waiting.pop(0) if waiting else tuple(sorted(a.savers))
        key = (*place, tuple(sorted(a.savers)), through)
        line, before = trained.line(a.size_bytes, b.size_bytes), sizes.get(key, Line(0, 0))
        sizes[key] = Line(before.fixed + line.fixed, before.per_sample + line.per_sample)
        rows[key] += 1
    return tuple(
        Crossing(
            born=key[0],
            last_use=key[1],
            size=sizes[key],
            savers_trained=key[2],
            savers_passed=key[3],
        )
        for key in sorted(rows)
    )


def _crosses(store: Store) -> bool:
    later = max((store.last_use, *store.savers))
    return later > store.born and not store.gradient


def _savers(pair: _Pair) -> dict[tuple[int, int], list[tuple[int, ...]]]:
    found: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for store in pair.small.stores:
        if _crosses(store):
            place = (store.born, store.last_use)
            found.setdefault(place, []).append(tuple(sorted(store.savers)))
    return found


def _block_cost(
    spec: ModelSpec,
    name: str,
    segments: Sequence[Segment],
    crossings: Iterable[Crossing],
    output: Line,
) -> BlockCost:
    block = spec.block(name)
    mine = {place: s for place, s in enumerate(segments) if s.block == name}
    shared = sum(c.size.per_sample for c in crossings if min(c.savers_trained, default=-1) in mine)
    return BlockCost(
        name=name,
        params=block.params,
        size_bytes=block.size_bytes,
        elements=sum(t.elements for t in block.tensors),
        activation_bytes_per_sample=shared + sum(s.kept_trained.per_sample for s in mine.values()),
        flops_forward_per_sample=_flops(w for s in mine.values() for w in s.work_forward),
        flops_backward_per_sample=_flops(w for s in mine.values() for w in s.work_trained),
        output_bytes_per_sample=output.per_sample,
    )


def _flops(works: Iterable[Work]) -> int:
    return sum(work.flops_per_sample for work in works)

"""What training given blocks costs: peak bytes, floating-point operations, seconds, upload bytes.

A model is described by its segments, the runs of operators of one block, in the order they run. For
each a table says how far memory rises in it and what it keeps, forward and backward, in the states
a block can be in: trained, frozen with a gradient passing through, frozen without. Peak memory is
the highest point of a walk through the segments, forward and back, on top of weights, gradients
and optimiser state. Backward stops at the lowest trained block; frozen blocks above it pass a
gradient on, which is why low trainable layers are dear (CAFF, arXiv 2411.07826).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from edge_sdk.blocks import TRUNK, ModelSpec
from edge_sdk.errors import ConfigError
from edge_sdk.wire import Training

Bytes = Annotated[int, Meta(ge=0, le=(1 << 53))]
Kind = Literal[
    "matmul", "convolution", "grouped", "attention", "recurrent", "cells", "elementwise", "maths",
    "norm", "window", "gather", "random",
]  # fmt: skip
Amount = Annotated[float, Meta(ge=0, le=1e18)]

# Encoding a change begins with its base, read from the cache: as it travels, unpacked, as tensors.
ENCODE_BYTES_PER_ELEMENT = 12


class CodecFigures(NamedTuple):
    """What a codec costs and loses, the planner's figures.

    bits_per_param: of one float element on the wire, measured on recorded changes, rounded up.
    distortion:     mean square error over the mean square of a tensor's change.
    """

    bits_per_param: float
    distortion: float


CODEC_FIGURES = {
    "lossless": CodecFigures(24.0, 0.0),
    "fp16": CodecFigures(14.0, 1e-7),
    "balanced": CodecFigures(1.6, 0.23),
    "tiny": CodecFigures(0.6, 3.0),
}


def bits_per_param(codec: str) -> float:
    """Planning figure: bits one float element costs with ``codec``; ConfigError if unknown."""
    if codec not in CODEC_FIGURES:
        raise ConfigError(f"codec {codec!r} is unknown; known are {', '.join(CODEC_FIGURES)}")
    return CODEC_FIGURES[codec].bits_per_param


class Line(NamedTuple):
    """A size in bytes as a function of the micro-batch."""

    fixed: int
    per_sample: int

    def at(self, micro_batch: int) -> int:
        """The size at a micro-batch."""
        return self.fixed + self.per_sample * micro_batch


class Work(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What operators of one kind do in one pass: see ``edge_sdk.operators`` for the kinds."""

    kind: Kind
    operators: Amount
    flops_fixed: Bytes
    flops_per_sample: Bytes
    moved_bytes_fixed: Bytes
    moved_bytes_per_sample: Bytes


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A run of operators of one block.

    inputs:  the segments whose results it reads.
    kept_*:  what stays in memory from its forward to its backward.
    rise_*:  how far memory rises above where it stood when its forward began; the largest line
             counts. ``back_*``: the same for its backward, gradients of parameters included only
             in ``back_trained``.
    carry:   gradients in flight when its backward begins.
    work_*:  of forward (frozen: without gradients), and of backward: trained; trained with nothing
             trained below; frozen with a gradient passing through.
    """

    block: str
    inputs: tuple[int, ...]
    kept_trained: Line
    kept_passed: Line
    rise_frozen: tuple[Line, ...]
    rise_trained: tuple[Line, ...]
    rise_passed: tuple[Line, ...]
    back_trained: tuple[Line, ...]
    back_accumulated: tuple[Line, ...]
    back_passed: tuple[Line, ...]
    carry: Line
    work_forward: tuple[Work, ...]
    work_frozen: tuple[Work, ...]
    work_trained: tuple[Work, ...]
    work_lowest: tuple[Work, ...]
    work_passed: tuple[Work, ...]


class Crossing(msgspec.Struct, frozen=True, kw_only=True):
    """Memory made in one segment and read, or kept for backward, by later ones."""

    born: int
    last_use: int
    size: Line
    savers_trained: tuple[int, ...]
    savers_passed: tuple[int, ...]


class BlockCost(msgspec.Struct, frozen=True, kw_only=True):
    """One block's share of a training step; activations are what autograd keeps for backward.

    output_bytes_per_sample: what its module returns, if the block is exactly one.
    """

    name: str
    params: Bytes
    size_bytes: Bytes
    elements: Bytes
    activation_bytes_per_sample: Bytes
    flops_forward_per_sample: Bytes
    flops_backward_per_sample: Bytes
    output_bytes_per_sample: Bytes = 0


class CostTable(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Costs of a task's model, its blocks in the model's order; enough to plan without torch.

    batch_bytes_per_sample: inputs and targets of one sample.
    recomputable:  blocks whose activations can be dropped and computed again.
    cuttable:      blocks whose output can be taken from a cache instead.
    batch_statistics: blocks that normalise over the batch: trained, they need two samples at once.
    views, random_prefix, lossy_prefix: as the task says.
    """

    task: str
    spec: ModelSpec
    blocks: tuple[BlockCost, ...]
    segments: tuple[Segment, ...]
    crossings: tuple[Crossing, ...]
    batch_bytes_per_sample: Bytes
    recomputable: tuple[str, ...] = ()
    cuttable: tuple[str, ...] = ()
    batch_statistics: tuple[str, ...] = ()
    views: Annotated[int, Meta(ge=1, le=65536)] = 1
    random_prefix: bool = False
    lossy_prefix: bool = False

    def __post_init__(self) -> None:
        if tuple(b.name for b in self.blocks) != self.spec.names:
            raise ConfigError("cost table: its blocks are not those of its model; make it anew")


def upper_hull(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Those of some lines that are the largest at some micro-batch of 1 or more."""
    hull: list[Line] = []
    for line in sorted(set(lines), key=lambda each: (each.per_sample, each.fixed)):
        while hull and line.at(1) >= hull[-1].at(1):
            hull.pop()
        while len(hull) > 1 and _is_below(hull[-1], hull[-2], line):
            hull.pop()
        hull.append(line)
    return tuple(hull)


def _is_below(middle: Line, flat: Line, steep: Line) -> bool:
    """Whether a line is nowhere above both a flatter and a steeper one."""
    # Where flat and steep meet, x = (flat.fixed - steep.fixed) / (steep.slope - flat.slope).
    run, rise = steep.per_sample - flat.per_sample, flat.fixed - steep.fixed
    return (
        middle.fixed * run + middle.per_sample * rise <= flat.fixed * run + flat.per_sample * rise
    )


# Kinds whose kernels take long to set up; kinds that compute; kinds that mostly move memory.
# Values: rules of thumb for a machine that was not calibrated, against its plain operators, its
# training rate and its memory bandwidth; ratios as measured on x86-64.
_CALLS = {
    "attention": 8, "convolution": 4, "grouped": 8, "recurrent": 25, "cells": 0.7, "gather": 2,
    "random": 1,
}  # fmt: skip
_PRODUCTS = {
    "matmul": 1.2, "convolution": 1.0, "grouped": 0.2, "attention": 0.7, "recurrent": 0.6,
    "cells": 1.0,
}  # fmt: skip
_MOVERS = {
    "matmul": 0.6, "convolution": 1.0, "grouped": 1.0, "cells": 2.0, "elementwise": 1.0,
    "maths": 0.5, "norm": 0.8, "window": 0.15, "gather": 0.5, "random": 0.06,
}  # fmt: skip
# What a plain operator costs at least, in the operations the machine could do meanwhile.
OPERATOR_FLOPS = 7e5
# Library code and buffers that operators touch for the first time when training begins.
OVERHEAD_BYTES = {
    "step": 2 << 20, "matmul": 4 << 20, "elementwise": 1 << 20, "maths": 4 << 20, "norm": 2 << 20,
    "attention": 2 << 20, "convolution": 14 << 20, "grouped": 2 << 20, "window": 1 << 20,
    "recurrent": 8 << 20, "cells": 2 << 20, "random": 1 << 20,
}  # fmt: skip
# Operators of an update for each parameter tensor, and bytes moved for each element, in place.
_UPDATES = {"plain": (1, 3), "sgd": (3, 8), "adam": (7, 19), "adamw": (8, 21)}


def units(kind: str, operators: float, flops: float, moved_bytes: float) -> list[tuple[str, float]]:
    """What is paid for some work: (key of the rate, how many units of it)."""
    call = f"{kind}_operator_s" if kind in _CALLS else "operator_s"
    if kind not in _PRODUCTS:
        return [(call, operators), (f"{kind}_bytes_per_s", moved_bytes)]
    paid = [(call, operators), (f"{kind}_flops_per_s", flops)]
    # Products of thin matrices are as fast as memory delivers them.
    return [*paid, (f"{kind}_bytes_per_s", moved_bytes)] if kind in _MOVERS else paid


FROZEN, PASSED, LOWEST, TRAINED = "frozen", "passed", "lowest", "trained"


class Levers(NamedTuple):
    """How a step is taken, see ``plan.Plan``; ``cached``: the frozen prefix is not run."""

    accumulate: bool = False
    checkpoint: bool = False
    step_in_backward: bool = False
    cached: bool = False


def states(table: CostTable, trained: Collection[str]) -> list[str]:
    """Per segment: frozen, passing a gradient through, trained at the lowest place, or trained."""
    found: list[str] = []
    for segment in table.segments:
        fed = False
        for place in segment.inputs:  # a loop: planning calls this for every candidate
            if found[place] != FROZEN:
                fed = True
                break
        if segment.block in trained:
            found.append(TRAINED if fed else LOWEST)
        else:
            found.append(PASSED if fed else FROZEN)
    return found


def prefix_ends(spec: ModelSpec, prefix: Collection[str]) -> tuple[str, ...]:
    """The blocks of a prefix whose output is kept: the last of each chain; of the trunk alone."""
    chosen = set(prefix)
    last = {block.chain: block.name for block in spec.blocks if block.name in chosen}
    return (last[TRUNK],) if TRUNK in last else tuple(last.values())


def last_reader(crossing: Crossing) -> int:
    """The last segment that reads a crossing or keeps it."""
    return max((crossing.last_use, *crossing.savers_trained))


def price_list(
    flops_per_s: float, memory_bandwidth_bytes_per_s: float, rates: Mapping[str, float]
) -> dict[str, float]:
    """Seconds per unit of work by the keys of ``units``: measured rates, else rules of thumb."""
    found = {"operator_s": OPERATOR_FLOPS / flops_per_s}
    found |= {f"{k}_operator_s": n * found["operator_s"] for k, n in _CALLS.items()}
    found |= {f"{kind}_flops_per_s": 1 / (flops_per_s * n) for kind, n in _PRODUCTS.items()}
    bandwidth = memory_bandwidth_bytes_per_s
    found |= {f"{kind}_bytes_per_s": 1 / (bandwidth * n) for kind, n in _MOVERS.items()}
    for key, value in rates.items():
        if key in found:
            found[key] = 1 / value if key.endswith("_per_s") else value
    return found


def overhead_bytes(table: CostTable, overhead: Mapping[str, int]) -> int:
    """Memory of the runtime beyond its floor, for the kinds of operators a model uses."""
    kinds = {w.kind for s in table.segments for w in s.work_forward + s.work_trained}
    return sum(
        overhead.get(f"{k}_bytes", OVERHEAD_BYTES.get(k, 0)) for k in sorted(kinds | {"step"})
    )


class Duration(NamedTuple):
    """Seconds of a pass: what it takes at any batch, and for each sample more."""

    fixed_s: float
    per_sample_s: float

    def __add__(self, other: Any) -> Duration:
        return Duration(self.fixed_s + other.fixed_s, self.per_sample_s + other.per_sample_s)

    def at(self, samples: int) -> float:
        """Seconds of a pass over so many samples."""
        return self.fixed_s + self.per_sample_s * samples


def duration(works: Iterable[Work], prices: Mapping[str, float]) -> Duration:
    """How long some work takes."""
    fixed_s = per_sample_s = 0.0
    for w in works:
        for key, amount in units(w.kind, w.operators, w.flops_fixed, w.moved_bytes_fixed):
            fixed_s += amount * prices[key]
        for key, amount in units(w.kind, 0, w.flops_per_sample, w.moved_bytes_per_sample):
            per_sample_s += amount * prices[key]
    return Duration(fixed_s, per_sample_s)


def works_of(segment: Segment, state: str, *, again: bool = False) -> tuple[Work, ...]:
    """What a segment does in a training step; ``again``: its forward runs twice."""
    if state == FROZEN:
        return segment.work_frozen
    back = {TRAINED: segment.work_trained, LOWEST: segment.work_lowest, PASSED: segment.work_passed}
    return segment.work_forward + segment.work_forward * again + back[state]


def update_work(table: CostTable, trained: Collection[str], training: Training) -> Work:
    """What the optimiser does in one step."""
    tensors = [
        t
        for b in table.spec.blocks
        if b.name in trained
        for t in b.tensors
        if t.kind == "parameter"
    ]
    rule = training.optimizer if training.momentum or training.optimizer != "sgd" else "plain"
    operators, moved_bytes = _UPDATES[rule]
    return Work(
        kind="elementwise",
        operators=operators * len(tensors),
        flops_fixed=0,
        flops_per_sample=0,
        moved_bytes_fixed=moved_bytes * sum(t.elements for t in tensors),
        moved_bytes_per_sample=0,
    )

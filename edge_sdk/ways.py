"""Every way to train given blocks on a device, with what it costs.

A way is a micro-batch, whether activations are computed again, whether parameters are stepped in
backward, and how the frozen prefix runs. The space is small enough to look at all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Literal, NamedTuple

import msgspec

from edge_sdk.cost import (
    FROZEN,
    CostTable,
    Duration,
    Levers,
    duration,
    overhead_bytes,
    prefix_ends,
    price_list,
    update_work,
)
from edge_sdk.errors import MIB
from edge_sdk.step import Outline, Paces, Sizes, Step, Tariff
from edge_sdk.wire import Training

# The prefix is run over so many samples at once when its output is kept.
FILL_BATCH = 16
# ONNX Runtime in a process that has torch: its library, a thread pool, an arena.
ENGINE_BYTES = 40 * MIB
# Picking samples and the loop around a step cost as much as so many operators.
LOOP_OPERATORS = 12
# Finding where a model can be cut, once, takes some runs over so many samples, and as much as this
# many operators.
CUT_RUNS, CUT_OPERATORS = 4, 20_000
# Kept output: looked up once a batch; each sample is once stored, twice as dearly on disk, and
# read from there.
LOOK_UP_OPERATORS, READ_OPERATORS, WRITE_OPERATORS = 3, 0.7, 15
# Checking what was read takes as long as moving it so many times.
CHECKED_MOVES = 3
# As does converting half precision, at twice its size.
CONVERTED_MOVES = 6
# Putting a block into the model holds it as it travels, unpacked, and as tensors.
LOADED_COPIES = 3
# More kept output than this share of the budget will not stay in the system's own cache.
CACHED_SHARE = 0.25


Engine = Literal["torch", "onnx", "onnx_int8"]
Cache = Literal["none", "memory", "disk"]
Dtype = Literal["float32", "float16"]


class _Speed(NamedTuple):
    """An engine against torch: at convolutions, at other products, at the rest; when it is ready.

    Measured on x86-64 without special int8 instructions; ready after so many operators' time.
    """

    convolution: float
    product: float
    rest: float
    ready_operators: float


_SPEEDS: dict[Engine, _Speed] = {
    "torch": _Speed(1.0, 1.0, 1.0, 0.0),
    "onnx": _Speed(1.8, 1.15, 1.5, 9e4),
    "onnx_int8": _Speed(0.5, 1.2, 1.5, 1.3e5),
}


class FrozenPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """How the frozen blocks below the lowest trained one are run.

    blocks: the frozen blocks that feed no gradient, from the input upwards; may be empty.
    engine: what computes their output: torch without autograd, or ONNX Runtime in float32 or int8.
    cache:  whether each sample's output is kept after the first time, and where.
    dtype:  how a kept output is stored.
    """

    blocks: tuple[str, ...] = ()
    engine: Engine = "torch"
    cache: Cache = "none"
    dtype: Dtype = "float32"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a device may spend on one round, and how fast it is.

    memory_bytes:  peak resident memory of the training process; ``bound_by`` names its source.
    floor_bytes:   what that process holds before the model exists.
    rates, overhead: as in a profile; where empty, rules of thumb.
    storage_bytes: what a prefix cache may take.
    fetch_bytes:   blocks still to be downloaded.
    unchanged_rounds: per block, for how many rounds it has not changed: a prefix that stood still
                   so far is expected to stand still as long again, so keeping its output pays.
    filled_prefix: the frozen prefix whose output is kept already.
    engines:       what can run a frozen prefix here.
    training_bytes: less than ``memory_bytes`` once that was too much for training; blocks on their
                   way into the model are not counted.
    memory_correction, time_correction: measured over predicted, learnt on this device: of the
                   memory above the floor, and of the seconds of training.
    """

    memory_bytes: int
    bound_by: str
    floor_bytes: int
    flops_per_s: float
    memory_bandwidth_bytes_per_s: float = 4e9
    rates: dict[str, float] = {}
    overhead: dict[str, int] = {}
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    storage_bytes: int = 0
    storage_write_bytes_per_s: float = 2e6
    storage_read_bytes_per_s: float = 2e7
    deadline_s: float
    fetch_bytes: int = 0
    unchanged_rounds: dict[str, int] = {}
    filled_prefix: tuple[str, ...] = ()
    engines: tuple[Engine, ...] = ("torch",)
    training_bytes: int = 1 << 62
    memory_correction: float = 1.0
    time_correction: float = 1.0


class Way(NamedTuple):
    """One way to train some blocks for a round.

    expected_s: training time when what is kept of a frozen prefix serves as long as expected.
    train_s:    training time of this round, ``once_s`` of it to fill the prefix's cache.
    step_s:     of one optimiser step.
    loading_bytes: of the process while blocks are put into the model.
    weigh, tally: compute ``training_bytes`` and ``flops``, which are dearer to know than the rest.
    """

    expected_s: float
    micro_batch: int
    levers: Levers
    prefix: FrozenPrefix
    train_s: float
    step_s: float
    once_s: float
    loading_bytes: int
    weigh: Callable[[], int]
    tally: Callable[[], int]

    @property
    def flops(self) -> int:
        """Floating-point operations of all local steps, the frozen prefix apart not counted."""
        return self.tally()

    @property
    def training_bytes(self) -> int:
        """The highest the process's memory stands while it trains, or keeps a prefix's output."""
        return self.weigh()

    @property
    def peak_bytes(self) -> int:
        """The highest the process's memory stands in the round."""
        return max(self.weigh(), self.loading_bytes)


class Cut(NamedTuple):
    """The frozen prefix of some trained blocks.

    bytes_per_sample: what the blocks above it read.
    standing:         for how many rounds none of its blocks has changed.
    places:           of its segments; ``paces``: of the engines that run it, once known.
    """

    blocks: tuple[str, ...]
    can_be_kept: bool
    bytes_per_sample: int
    places: list[int]
    standing: int
    paces: dict[Engine, Duration]


class Costing:
    """Prices the ways to train on one device, for one task and one round's terms."""

    def __init__(
        self, table: CostTable, training: Training, limits: Limits, num_examples: int
    ) -> None:
        self._table, self._training, self._limits = table, training, limits
        self._samples = num_examples
        self._prices = price_list(
            limits.flops_per_s, limits.memory_bandwidth_bytes_per_s, limits.rates
        )
        self._outline, self._paces = Outline(table), Paces(table, self._prices)
        self._overhead_bytes = overhead_bytes(table, limits.overhead)
        self._weights = sum(self._outline.weights.values())
        largest = max(self._outline.weights.values())
        # In the first round all of them are, before anything has run.
        loading = (self._weights + LOADED_COPIES * largest) * limits.memory_correction
        self._loading_bytes = limits.floor_bytes + round(loading)
        self._cuttable = frozenset(table.cuttable)
        self._normed = frozenset(table.batch_statistics)
        self._outputs = {b.name: b.output_bytes_per_sample for b in table.blocks}
        self._update_s = {
            name: duration([update_work(table, (name,), training)], self._prices).fixed_s
            for name in table.spec.names
        }
        self._sizes: dict[int, Sizes] = {}
        self._cuts: dict[tuple[str, ...], Cut] = {}
        self._engines: dict[Engine, list[Duration]] = {"torch": self._paces.frozen}
        self._micro_batches = _halvings(min(training.batch_size, num_examples))
        self._steps_an_epoch = -(-num_examples // training.batch_size)
        self.steps = training.local_epochs * self._steps_an_epoch

    def ways(self, blocks: tuple[str, ...]) -> Iterator[Way]:
        """All ways to train ``blocks``; of those that are equally quick, the plainest first.

        None where batch statistics need more samples at once than a batch has.
        """
        if self.unable(blocks) is not None:
            return
        update_s = sum(self._update_s[name] for name in blocks)
        smallest = 1 if self._normed.isdisjoint(blocks) else 2
        cut = self.cut(blocks)
        again = (False, True) if self._table.recomputable else (False,)
        plain = [FrozenPrefix(blocks=cut.blocks)]
        for skipped, prefixes in (((), plain), (cut.blocks, self._kept(cut))):
            for checkpoint in again if prefixes else ():
                step = Step(
                    self._outline,
                    blocks,
                    self._training,
                    checkpoint=checkpoint,
                    skipped=skipped,
                    brought=cut.bytes_per_sample if skipped else 0,
                )
                levers = Levers(checkpoint=checkpoint, cached=bool(skipped))
                passes = list(self._passes(step, levers, update_s, smallest))
                for prefix in prefixes:
                    yield from self._with(prefix, cut, passes)

    def cut(self, blocks: tuple[str, ...]) -> Cut:
        """The frozen prefix of ``blocks``."""
        if blocks not in self._cuts:
            self._cuts[blocks] = self._cut(blocks)
        return self._cuts[blocks]

    def unable(self, blocks: tuple[str, ...]) -> str | None:
        """Why these blocks cannot be trained at any cost, and what to do; None when they can."""
        normed = next((name for name in blocks if name in self._normed), None)
        if normed is None or self._micro_batches[0] > 1:
            return None
        return (
            f"takes statistics over a batch in block {normed!r}, and a batch has 1 sample; raise "
            "the batch size and the number of samples to 2 or more, or normalise with GroupNorm "
            "or LayerNorm"
        )

    def is_no_dearer(self, blocks: tuple[str, ...], others: tuple[str, ...]) -> bool:
        """Whether ``blocks`` fit wherever ``others`` do: they are a part, as easy to cut off."""
        if not set(blocks) <= set(others):
            return False
        cut, other = self.cut(blocks), self.cut(others)
        if not other.can_be_kept:
            return True
        if self._limits.filled_prefix == other.blocks != cut.blocks:
            return False
        return cut.can_be_kept and cut.bytes_per_sample <= other.bytes_per_sample

    def _cut(self, blocks: tuple[str, ...]) -> Cut:
        outline, places = self._outline, self._outline.places
        states = outline.states(blocks)
        above = {block for block, state in zip(places, states, strict=True) if state != FROZEN}
        below = [block not in above for block in places]
        prefix = tuple([name for name in outline.names if name not in above])
        ends = prefix_ends(self._table.spec, prefix)
        unchanged = self._limits.unchanged_rounds
        able = bool(prefix) and not self._table.random_prefix
        return Cut(
            blocks=prefix,
            can_be_kept=able and self._cuttable.issuperset(ends),
            bytes_per_sample=sum([self._outputs[name] for name in ends]),
            places=[place for place, frozen in enumerate(below) if frozen],
            standing=min([unchanged.get(name, 0) for name in prefix], default=0),
            paces={},
        )

    # -- passes through the part that is trained ----------------------------------------------

    def _passes(
        self, step: Step, levers: Levers, update_s: float, smallest: int
    ) -> Iterator[_Pass]:
        """A step at every micro-batch of at least ``smallest`` samples, largest first."""
        pace = step.duration(self._paces)
        for place, micro_batch in enumerate(self._micro_batches):
            if micro_batch < smallest:
                return
            most = self._most_at_once(micro_batch, smallest)
            train_s = self._train_s(pace, micro_batch, update_s)
            # A gradient is complete only after the last micro-batch.
            for in_backward in (False,) if place else (False, True):
                yield _Pass(
                    # Whole batches stay whole, however few samples there are.
                    micro_batch=micro_batch if place else self._training.batch_size,
                    levers=levers._replace(accumulate=place > 0, step_in_backward=in_backward),
                    train_s=train_s,
                    weigh=self._scale(step, most, place > 0, in_backward),
                    tally=partial(self._flops, step),
                )

    def _most_at_once(self, micro_batch: int, smallest: int) -> int:
        """The largest part of a batch that is run: one of 2 takes in a sample left over."""
        rest = self._samples % self._training.batch_size
        is_odd = self._micro_batches[0] % 2 or rest % 2
        return 3 if micro_batch == smallest == 2 and is_odd else micro_batch

    def _scale(
        self, step: Step, micro_batch: int, accumulate: bool, in_backward: bool
    ) -> Callable[[], int]:
        @cache
        def weigh() -> int:
            sizes = self._sizes_at(micro_batch)
            return step.peak_bytes(sizes, accumulate=accumulate, step_in_backward=in_backward)

        return weigh

    def _train_s(self, pace: Duration, micro_batch: int, update_s: float) -> float:
        """Seconds of all local steps."""
        full, rest = divmod(self._samples, self._training.batch_size)
        passes = full * -(-min(self._training.batch_size, self._samples) // micro_batch)
        passes += -(-rest // micro_batch)
        loop_s = LOOP_OPERATORS * self._prices["operator_s"]
        epoch_s = passes * (pace.fixed_s + loop_s) + self._samples * pace.per_sample_s
        # After each pass parameters are updated, or its gradient is added to the one before.
        epoch_s += passes * update_s
        return self._training.local_epochs * epoch_s * self._limits.time_correction

    def _flops(self, step: Step) -> int:
        return step.flops_per_sample() * self._samples * self._training.local_epochs

    def _sizes_at(self, micro_batch: int) -> Sizes:
        if micro_batch not in self._sizes:
            self._sizes[micro_batch] = Sizes(self._outline, micro_batch)
        return self._sizes[micro_batch]

    # -- the frozen prefix --------------------------------------------------------------------

    def _kept(self, cut: Cut) -> list[FrozenPrefix]:
        """The ways to run a frozen prefix apart from the rest."""
        found: list[FrozenPrefix] = []
        if not cut.can_be_kept:
            return found
        lossy = self._table.lossy_prefix
        dtypes: tuple[Dtype, ...] = ("float32", "float16") if lossy else ("float32",)
        caches: tuple[Cache, ...] = ("memory", "disk")
        for engine in self._limits.engines:
            if engine == "onnx_int8" and not lossy:
                continue
            if engine != "torch":
                found.append(FrozenPrefix(blocks=cut.blocks, engine=engine))
            for dtype in dtypes:
                for where in caches:
                    kept = FrozenPrefix(blocks=cut.blocks, engine=engine, cache=where, dtype=dtype)
                    room = where == "memory" or self._kept_bytes(kept, cut) <= (
                        self._limits.storage_bytes
                    )
                    found += [kept] * room
        return found

    def _with(self, prefix: FrozenPrefix, cut: Cut, passes: list[_Pass]) -> Iterator[Way]:
        """Passes together with a way to run the frozen prefix."""
        round_s, once_s, least_bytes, beside_bytes = self._prefix_costs(prefix, cut)
        shared_s = once_s / (1 + cut.standing)
        for each in passes:
            train_s = each.train_s + round_s
            yield Way(
                expected_s=train_s + shared_s,
                micro_batch=each.micro_batch,
                levers=each.levers,
                prefix=prefix,
                train_s=train_s + once_s,
                step_s=train_s / self.steps,
                once_s=once_s,
                loading_bytes=self._loading_bytes,
                weigh=partial(self._whole_bytes, each.weigh, least_bytes, beside_bytes),
                tally=each.tally,
            )

    def _prefix_costs(self, prefix: FrozenPrefix, cut: Cut) -> tuple[float, float, int, int]:
        """Seconds of the prefix in the round, and once to keep it; its own peak, what it adds."""
        if prefix.cache == "none" and prefix.engine == "torch":
            return 0.0, 0.0, 0, 0
        epochs, samples = self._training.local_epochs, self._samples
        # Every view is kept before training begins.
        views = epochs if prefix.cache == "none" else self._table.views
        run_s = views * self._run_s(prefix, cut) * self._limits.time_correction
        if prefix.cache == "none":
            ready_s = self._ready_s(prefix.engine, cut)
            return run_s + ready_s, 0.0, 0, ENGINE_BYTES + 2 * self._weights
        filling = self._weights + self._forward_bytes(min(FILL_BATCH, samples))
        if prefix.engine != "torch":
            filling += ENGINE_BYTES + self._weights
        filled = self._limits.filled_prefix == prefix.blocks
        read_s, write_s = self._keeping_s(prefix, cut)
        return (
            read_s * epochs,
            0.0 if filled else run_s + write_s + self._ready_s(prefix.engine, cut),
            self._weights if filled else filling,
            self._kept_bytes(prefix, cut) if prefix.cache == "memory" else 0,
        )

    def _run_s(self, prefix: FrozenPrefix, cut: Cut) -> float:
        """Seconds to run the prefix once over all samples."""
        pace = self._pace(prefix.engine, cut)
        batch = self._training.batch_size if prefix.cache == "none" else FILL_BATCH
        return -(-self._samples // batch) * pace.fixed_s + self._samples * pace.per_sample_s

    def _ready_s(self, engine: Engine, cut: Cut) -> float:
        """Seconds until a prefix can be run apart: the cut is found, the engine is loaded."""
        operators = CUT_OPERATORS + _SPEEDS[engine].ready_operators
        cutting_s = CUT_RUNS * self._pace("torch", cut).at(min(FILL_BATCH, self._samples))
        return cutting_s + operators * self._prices["operator_s"]

    def _pace(self, engine: Engine, cut: Cut) -> Duration:
        """How long an engine takes for the prefix."""
        if engine not in cut.paces:
            if engine not in self._engines:
                tariff = Tariff(self._engine_prices(_SPEEDS[engine]))
                rows = self._table.segments
                self._engines[engine] = [tariff.duration(s.work_frozen) for s in rows]
            paces = [self._engines[engine][place] for place in cut.places]
            cut.paces[engine] = Duration(sum([p[0] for p in paces]), sum([p[1] for p in paces]))
        return cut.paces[engine]

    def _engine_prices(self, speed: _Speed) -> dict[str, float]:
        def quicker(key: str) -> float:
            if not key.endswith("flops_per_s"):
                return speed.rest
            inner = key.startswith(("convolution", "grouped"))
            return speed.convolution if inner else speed.product

        return {key: price / quicker(key) for key, price in self._prices.items()}

    def _keeping_s(self, prefix: FrozenPrefix, cut: Cut) -> tuple[float, float]:
        """Seconds to read all kept output once, and to write it."""
        kept_bytes, limits = self._kept_bytes(prefix, cut), self._limits
        operator_s = self._prices["operator_s"]
        moving_s = kept_bytes * self._prices["elementwise_bytes_per_s"]
        if prefix.dtype == "float16":
            moving_s *= CONVERTED_MOVES
        read_s = self._steps_an_epoch * LOOK_UP_OPERATORS * operator_s + moving_s
        write_s = self._samples * WRITE_OPERATORS * operator_s + moving_s
        if prefix.cache == "memory":
            return read_s, write_s
        read_s += self._samples * READ_OPERATORS * operator_s + CHECKED_MOVES * moving_s
        if kept_bytes > CACHED_SHARE * limits.memory_bytes:
            read_s += kept_bytes / limits.storage_read_bytes_per_s
        return read_s, 2 * write_s + kept_bytes / limits.storage_write_bytes_per_s

    def _kept_bytes(self, prefix: FrozenPrefix, cut: Cut) -> int:
        half = 2 if prefix.dtype == "float16" else 1
        return self._samples * self._table.views * cut.bytes_per_sample // half

    def _forward_bytes(self, batch: int) -> int:
        """How far memory rises while the prefix runs over a batch."""
        sizes = self._sizes_at(batch)
        return max(sizes.rise[FROZEN], default=0) + max(sizes.crossings, default=0) + sizes.batch

    def _whole_bytes(self, weigh: Callable[[], int], least_bytes: int, beside_bytes: int) -> int:
        """What a pass weighs, or its prefix at the least, with what is there beside."""
        peak_bytes = max(weigh(), least_bytes) + beside_bytes
        above = (peak_bytes + self._overhead_bytes) * self._limits.memory_correction
        return self._limits.floor_bytes + round(above)


class _Pass(NamedTuple):
    """All local steps at one micro-batch, the frozen prefix apart; see ``Way``."""

    micro_batch: int
    levers: Levers
    train_s: float
    weigh: Callable[[], int]
    tally: Callable[[], int]


def _halvings(batch_size: int) -> list[int]:
    """Halvings of a batch, largest first."""
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes

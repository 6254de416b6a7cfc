"""All ways to train some blocks: which there are, and what the frozen prefix adds to their cost."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_sdk.cost import CostTable, overhead_bytes
from edge_sdk.ways import (
    ENGINE_BYTES,
    FILL_BATCH,
    LOOP_OPERATORS,
    Costing,
    FrozenPrefix,
    Way,
)
from edge_sdk.wire import Training
from tests.toy_tables import Row, cut_of, limits_with, table_of

TABLE = table_of(*[Row(out=64_000)] * 4)
LAST = TABLE.spec.names[2:]
PREFIX = TABLE.spec.names[:2]
TRAINING = Training(batch_size=12, local_epochs=2)
SAMPLES = 100


def ways_of(
    table: CostTable = TABLE,
    blocks: tuple[str, ...] = LAST,
    training: Training = TRAINING,
    samples: int = SAMPLES,
    **limits: Any,
) -> list[Way]:
    return list(Costing(table, training, limits_with(**limits), samples).ways(blocks))


def kinds(ways: list[Way]) -> set[tuple[str, str, str]]:
    return {(way.prefix.engine, way.prefix.cache, way.prefix.dtype) for way in ways}


def way_with(ways: list[Way], micro_batch: int = 12, **prefix: str) -> Way:
    """The plainest way of that kind."""
    wanted = {"engine": "torch", "cache": "none", "dtype": "float32", **prefix}
    return next(
        way
        for way in ways
        if way.micro_batch == micro_batch
        and all(getattr(way.prefix, key) == value for key, value in wanted.items())
    )


# --- which ways there are ------------------------------------------------------------------------


def test_batches_are_halved_and_a_step_in_backward_needs_the_whole_one() -> None:
    plain = msgspec.structs.replace(TABLE, recomputable=(), cuttable=())
    found = [
        (w.micro_batch, w.levers.accumulate, w.levers.step_in_backward) for w in ways_of(plain)
    ]
    assert found == [
        (12, False, False), (12, False, True), (6, True, False), (3, True, False), (1, True, False)
    ]  # fmt: skip


NORMED = msgspec.structs.replace(TABLE, batch_statistics=("b1", "b3"))


def test_batch_statistics_need_two_samples() -> None:
    assert {way.micro_batch for way in ways_of(NORMED)} == {12, 6, 3}
    assert {way.micro_batch for way in ways_of(NORMED, ("b2",))} == {12, 6, 3, 1}


@pytest.mark.parametrize(("batch_size", "samples"), [(1, 100), (8, 1)])
def test_a_lone_sample_has_no_statistics(batch_size: int, samples: int) -> None:
    costing = Costing(NORMED, Training(batch_size=batch_size), limits_with(), samples)
    assert list(costing.ways(("b2", "b3"))) == []
    assert (costing.unable(("b2", "b3")) or "").startswith(
        "takes statistics over a batch in block 'b3', and a batch has 1 sample; raise"
    )
    assert costing.unable(("b2",)) is None
    assert {way.micro_batch for way in costing.ways(("b2",))} == {batch_size}


@pytest.mark.parametrize(
    ("batch_size", "samples", "most"),
    [(4, 100, 2), (4, 101, 3), (4, 102, 2), (5, 100, 3), (2, 100, 2), (2, 9, 3), (64, 5, 3)],
)
def test_two_at_a_time_may_have_to_take_in_a_third(
    batch_size: int, samples: int, most: int
) -> None:
    plain = msgspec.structs.replace(TABLE, recomputable=(), cuttable=())
    normed = msgspec.structs.replace(plain, batch_statistics=("b3",))

    def peak_bytes(table: CostTable, batch_size: int, micro_batch: int, samples: int) -> int:
        ways = ways_of(table, training=Training(batch_size=batch_size), samples=samples)
        return next(way.peak_bytes for way in ways if way.micro_batch == micro_batch)

    found = peak_bytes(normed, batch_size, 2, samples)
    whole = batch_size == 2
    assert found == peak_bytes(plain, most if whole else 2 * most, most, 12)


@pytest.mark.parametrize("batch_size", [20, 64])
def test_few_samples_make_one_whole_batch(batch_size: int) -> None:
    ways = ways_of(training=Training(batch_size=batch_size), samples=10)
    assert {way.micro_batch for way in ways} == {batch_size, 5, 2, 1}
    assert all(way.micro_batch == batch_size for way in ways if way.levers.step_in_backward)
    ten = ways_of(training=Training(batch_size=10), samples=10)
    assert [way.peak_bytes for way in ways] == [way.peak_bytes for way in ten]
    assert [way.train_s for way in ways] == [way.train_s for way in ten]


def test_blocks_are_recomputed_only_where_that_is_possible() -> None:
    assert {way.levers.checkpoint for way in ways_of()} == {False, True}
    table = msgspec.structs.replace(TABLE, recomputable=())
    assert {way.levers.checkpoint for way in ways_of(table)} == {False}


def test_the_prefix_is_what_no_gradient_passes() -> None:
    assert {way.prefix.blocks for way in ways_of()} == {PREFIX}
    assert {way.prefix for way in ways_of(blocks=TABLE.spec.names)} == {FrozenPrefix()}


def test_a_prefix_is_kept_in_memory_or_on_disk() -> None:
    assert kinds(ways_of()) == {
        ("torch", "none", "float32"), ("torch", "memory", "float32"), ("torch", "disk", "float32")
    }  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"random_prefix": True}, {"cuttable": ("b0", "b2", "b3")}, {"cuttable": ()}],
)
def test_some_prefixes_cannot_be_kept(change: dict[str, Any]) -> None:
    table = msgspec.structs.replace(TABLE, **change)
    ways = ways_of(table, engines=("torch", "onnx", "onnx_int8"))
    assert kinds(ways) == {("torch", "none", "float32")}
    assert not any(way.levers.cached for way in ways)


def test_what_is_lossy_needs_the_tasks_leave() -> None:
    engines = ("torch", "onnx", "onnx_int8")
    exact = kinds(ways_of(engines=engines))
    assert {engine for engine, _, _ in exact} == {"torch", "onnx"}
    assert {dtype for _, _, dtype in exact} == {"float32"}
    lossy = kinds(ways_of(msgspec.structs.replace(TABLE, lossy_prefix=True), engines=engines))
    assert len(lossy) == 1 + 2 + 3 * 4
    assert exact < lossy


def test_only_engines_that_are_here_run() -> None:
    assert {engine for engine, _, _ in kinds(ways_of(engines=("torch",)))} == {"torch"}


@pytest.mark.parametrize("views", [1, 5])
def test_storage_bounds_what_is_kept_on_disk(views: int) -> None:
    table = msgspec.structs.replace(TABLE, views=views, lossy_prefix=True)
    kept = SAMPLES * views * cut_of(table, *LAST).bytes_per_sample
    assert kept == SAMPLES * views * 64_000

    def on_disk(storage_bytes: int) -> set[str]:
        return {d for _, c, d in kinds(ways_of(table, storage_bytes=storage_bytes)) if c == "disk"}

    assert on_disk(kept) == {"float32", "float16"}
    assert on_disk(kept - 1) == on_disk(kept // 2) == {"float16"}
    assert on_disk(kept // 2 - 1) == set()


# --- what they cost ------------------------------------------------------------------------------


def test_seconds_of_all_steps() -> None:
    rates = {"operator_s": 1e-3, "matmul_flops_per_s": 1e8, "matmul_bytes_per_s": 1e6,
             "elementwise_bytes_per_s": 1e8}  # fmt: skip
    plain = Training(batch_size=12, momentum=0.0, local_epochs=2)
    ways = ways_of(training=plain, rates=rates)
    # Operators: two frozen forwards; forward and backward of b2, of b3; the loop around.
    fixed_s = (2 * 2 + (2 + 2) + (2 + 4) + LOOP_OPERATORS) * 1e-3
    update_s = 2 * 1e-3 + 2 * 3 * 100_000 / 1e8
    sample_s = (2 + 2 + 3) * (1_000_000 / 1e8 + 100_000 / 1e6)
    epoch_s = 9 * (fixed_s + update_s) + 100 * sample_s
    whole = way_with(ways)
    assert whole.train_s == whole.expected_s == pytest.approx(2 * epoch_s)
    assert whole.step_s == pytest.approx(2 * epoch_s / 18)
    passes = 8 * 2 + 1  # the last batch has four samples
    halves = way_with(ways, 6)
    assert halves.train_s == pytest.approx(2 * (passes * (fixed_s + update_s) + 100 * sample_s))
    assert halves.step_s == pytest.approx(halves.train_s / 18)
    assert whole.flops == halves.flops == 2 * 100 * (2 + 2 + 3) * 1_000_000


def test_corrections_are_of_seconds_and_of_memory_above_the_floor() -> None:
    plain, corrected = ways_of(), ways_of(time_correction=2.0, memory_correction=1.5)
    floor_bytes = 80 << 20
    for before, after in zip(plain, corrected, strict=True):
        assert after.peak_bytes - floor_bytes == pytest.approx(
            1.5 * (before.peak_bytes - floor_bytes), abs=1
        )
        if before.prefix.cache == "none":
            assert after.train_s == pytest.approx(2 * before.train_s)


def test_peaks_are_above_the_floor_with_the_runtimes_overhead() -> None:
    lean, plain = (
        way_with(ways_of(overhead={"matmul_bytes": 0, "step_bytes": 0})),
        way_with(ways_of()),
    )
    assert plain.peak_bytes - lean.peak_bytes == overhead_bytes(TABLE, {})
    lower = way_with(ways_of(floor_bytes=1 << 20))
    assert plain.peak_bytes - lower.peak_bytes == 79 << 20


def test_a_kept_prefix_is_run_once_and_read_every_epoch() -> None:
    often = Training(batch_size=12, local_epochs=10)
    rates = {"operator_s": 1e-9, "elementwise_bytes_per_s": 1e12}
    slow = {"storage_write_bytes_per_s": 5e5, "rates": rates}
    ways = ways_of(training=often, **slow)
    plain, disk, memory = (way_with(ways, cache=cache) for cache in ("none", "disk", "memory"))
    once_s = SAMPLES * 2 * (1_000_000 / 1.2e9 + 100_000 / 2.4e9)
    # In the round it is run less often than without, even with finding out where to cut.
    assert 8 * once_s < plain.train_s - (memory.train_s - memory.once_s) < 10 * once_s
    assert memory.once_s >= once_s
    assert disk.once_s == pytest.approx(memory.once_s + SAMPLES * 64_000 / 5e5, rel=0.01)
    assert memory.train_s < disk.train_s
    for way in (disk, memory):
        assert way.train_s == pytest.approx(way.once_s + 90 * way.step_s)
        assert way.flops == plain.flops - 10 * SAMPLES * 2 * 1_000_000
        assert way.levers.cached
    assert not plain.levers.cached


def test_every_view_is_run_and_kept_at_once() -> None:
    one, many = (
        way_with(
            ways_of(msgspec.structs.replace(TABLE, views=views), rates={"operator_s": 1e-6}),
            cache="disk",
        )
        for views in (1, 7)
    )
    assert many.once_s > 3 * one.once_s


def test_half_precision_halves_what_is_kept() -> None:
    table = msgspec.structs.replace(TABLE, lossy_prefix=True)
    # So much is kept that it is what memory is needed for.
    ways = ways_of(table, samples=10_000)
    full, half = (way_with(ways, cache="memory", dtype=d) for d in ("float32", "float16"))
    assert full.peak_bytes - half.peak_bytes == 10_000 * 64_000 // 2


def test_putting_blocks_into_the_model_takes_three_times_the_largest() -> None:
    heavy = table_of(Row(params=5_000_000), *[Row()] * 3)
    last, one = heavy.spec.names[3:], Training(batch_size=1)
    loading_bytes = (80 << 20) + 20_000_000 + 3 * 400_000 + 3 * 20_000_000
    assert {way.peak_bytes for way in ways_of(heavy, last, one)} == {loading_bytes}
    assert min(way.peak_bytes for way in ways_of(heavy, heavy.spec.names, one)) > loading_bytes


def test_filling_needs_the_whole_model_and_a_forward_pass() -> None:
    heavy = table_of(*[Row(params=50_000)] * 3, Row(params=2_000))
    last, one = heavy.spec.names[3:], Training(batch_size=1)
    disk = way_with(ways_of(heavy, last, one), 1, cache="disk")
    whole = (80 << 20) + overhead_bytes(heavy, {}) + 3 * 200_000 + 8_000
    assert disk.peak_bytes == whole + FILL_BATCH * (15_000 + 10_000 + 1000)
    filled = ways_of(heavy, last, one, filled_prefix=heavy.spec.names[:3])
    again = way_with(filled, 1, cache="disk")
    assert again.once_s == 0
    assert again.train_s == pytest.approx(disk.train_s - disk.once_s)
    assert again.peak_bytes == whole


def test_a_prefix_that_stood_still_is_expected_to_go_on() -> None:
    unchanged = {"b0": 9, "b1": 4, "b2": 0, "b3": 0}
    new, old = (
        way_with(ways_of(), cache="disk"),
        way_with(ways_of(unchanged_rounds=unchanged), cache="disk"),
    )
    assert new.expected_s == pytest.approx(new.train_s)
    assert old.train_s == pytest.approx(new.train_s)
    assert old.expected_s == pytest.approx(new.train_s - new.once_s * 4 / 5)


def test_an_engine_beside_torch_takes_memory() -> None:
    table = msgspec.structs.replace(TABLE, lossy_prefix=True)
    ways = ways_of(table, engines=("torch", "onnx", "onnx_int8"))
    weights = 4 * sum(block.params for block in table.blocks)
    cached = way_with(ways_of(table, filled_prefix=PREFIX), cache="disk")
    for engine in ("onnx", "onnx_int8"):
        way = way_with(ways, engine=engine)
        assert way.once_s == 0
        assert way.levers.cached
        assert way.peak_bytes - cached.peak_bytes == ENGINE_BYTES + 2 * weights


def test_parts_that_are_as_easy_to_cut_are_no_dearer() -> None:
    def verdict(table: CostTable, less: slice, more: slice, **limits: Any) -> bool:
        costing = Costing(table, TRAINING, limits_with(**limits), SAMPLES)
        return costing.is_no_dearer(table.spec.names[less], table.spec.names[more])

    last, two, every = slice(3, 4), slice(2, 4), slice(0, 4)
    assert verdict(TABLE, last, two)
    assert verdict(TABLE, two, every)
    assert not verdict(TABLE, two, last)
    assert not verdict(TABLE, slice(0, 1), two)
    wider = table_of(Row(), Row(out=10_000), Row(out=20_000), Row())
    assert not verdict(wider, last, two)
    assert verdict(msgspec.structs.replace(wider, random_prefix=True), last, two)
    uncut = msgspec.structs.replace(TABLE, cuttable=("b0", "b1", "b3"))
    assert not verdict(uncut, last, two)
    assert not verdict(TABLE, last, two, filled_prefix=PREFIX)

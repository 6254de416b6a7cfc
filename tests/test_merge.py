"""Sums of partial updates: the laws of merging, exactness at the limits, and what is refused."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.codec import CODECS, INTEGER_LIMIT, encode_change, max_change_bytes
from edge_sdk.errors import ProtocolMisuse, StateError, WrongUpdate
from edge_sdk.merge import MAX_SAMPLES, BlockSum

Tensors = dict[str, NDArray[Any]]

BLOCK = Block(
    name="body.1",
    tensors=(
        TensorSpec(name="weight", shape=(6, 5), dtype="float32"),
        TensorSpec(name="wide", shape=(70, 1000), dtype="float32"),
        TensorSpec(name="scale", shape=(), dtype="float64"),
        TensorSpec(name="half", shape=(3,), dtype="float16"),
        TensorSpec(name="empty", shape=(0,), dtype="float32"),
        TensorSpec(name="count", shape=(), dtype="int64", kind="buffer"),
        TensorSpec(name="table", shape=(4,), dtype="uint8", kind="buffer"),
        TensorSpec(name="mask", shape=(4,), dtype="bool", kind="buffer"),
    ),
)

contributions = st.lists(
    st.tuples(st.integers(0, 2**31), st.integers(1, 5000), st.sampled_from(CODECS)),
    min_size=1,
    max_size=8,
)


def one(dtype: str, elements: int) -> Block:
    return Block(name="b", tensors=(TensorSpec(name="t", shape=(elements,), dtype=dtype),))  # type: ignore[arg-type]


def model(seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    tensors: Tensors = {}
    for spec in BLOCK.tensors:
        high = 2 if spec.dtype == "bool" else 200
        values = (
            rng.standard_normal(spec.shape) if spec.is_float else rng.integers(0, high, spec.shape)
        )
        tensors[spec.name] = np.asarray(values, spec.dtype)
    return tensors


def update(seed: int, codec: str) -> tuple[Tensors, bytes]:
    """What one device has trained from ``model(0)``, and its payload."""
    trained = model(seed + 1)
    return trained, encode_change(codec, BLOCK, model(0), trained, np.random.default_rng(seed))


def body_of(codec: str, payload: bytes) -> bytearray:
    if codec in ("lossless", "fp16") and len(payload) == max_change_bytes(codec, BLOCK):
        return bytearray(payload)
    return bytearray(zstandard.ZstdDecompressor().decompress(payload))


def fold(parts: Iterable[tuple[int, int, str]]) -> BlockSum:
    total = BlockSum.zero(BLOCK)
    for seed, weight, codec in parts:
        total.fold(codec, update(seed, codec)[1], weight)
    return total


def raw_change(block: Block, *values: float) -> bytes:
    """The body that says lossless that the block's one tensor changed by these values."""
    word = "<f4" if block.tensors[0].is_float else "<i8"
    words = np.array(values, word)
    return words.view(np.uint8).reshape(len(values), -1).T.tobytes()


def add(total: BlockSum, *values: float, weight: int) -> None:
    total.fold("lossless", raw_change(total.block, *values), weight)


def raw(tensors: Tensors) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


# --- the laws ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(parts=contributions)
def test_everyone_trains_everything_is_federated_averaging(
    parts: list[tuple[int, int, str]],
) -> None:
    parts = [(seed, weight, "lossless") for seed, weight, _ in parts]
    published = fold(parts).publish(model(0))
    models = [update(seed, "lossless")[0] for seed, _, _ in parts]
    weights = [weight for _, weight, _ in parts]
    for spec in BLOCK.tensors:
        stack = np.stack([np.asarray(trained[spec.name], np.float64) for trained in models])
        mean = np.average(stack, axis=0, weights=weights)
        if spec.is_float:
            # A float32 change of about 1 is good to 2**-24; float16 rounds the result to 2**-11.
            error = 4e-3 if spec.dtype == "float16" else 2e-6
            np.testing.assert_allclose(published[spec.name], mean, rtol=0, atol=error)
        else:
            assert np.all(np.abs(np.asarray(published[spec.name], np.float64) - mean) <= 0.5 + 1e-9)


def test_what_nobody_trained_stays_bit_for_bit() -> None:
    base = model(0)
    base["weight"].reshape(-1)[:3] = [math.nan, -0.0, -math.inf]
    before = raw(base)
    assert raw(BlockSum.zero(BLOCK).publish(base)) == before
    stored = BlockSum.from_bytes(BLOCK, BlockSum.zero(BLOCK).to_bytes())
    assert raw(stored.publish(base)) == before


@settings(max_examples=40, deadline=None)
@given(parts=contributions, data=st.data())
def test_any_order_and_any_number_of_workers_give_the_same_bytes(
    parts: list[tuple[int, int, str]], data: st.DataObject
) -> None:
    expected = fold(parts)
    workers = data.draw(st.integers(1, 4))
    sums = [BlockSum.zero(BLOCK) for _ in range(workers)]
    for seed, weight, codec in data.draw(st.permutations(parts)):
        place = data.draw(st.integers(0, workers - 1))
        sums[place].fold(codec, update(seed, codec)[1], weight)
        if data.draw(st.booleans()):  # a worker restarts from its database
            sums[place] = BlockSum.from_bytes(BLOCK, sums[place].to_bytes())
    total = BlockSum.zero(BLOCK)
    for part in data.draw(st.permutations(sums)):
        total.merge(part)
    assert total.to_bytes() == expected.to_bytes()
    assert raw(total.publish(model(0))) == raw(expected.publish(model(0)))


@settings(max_examples=30, deadline=None)
@given(parts=contributions)
def test_weights_add_up_to_the_contributors_samples(parts: list[tuple[int, int, str]]) -> None:
    total = fold(parts)
    assert total.samples == sum(weight for _, weight, _ in parts)
    assert total.devices == len(parts)


@settings(max_examples=60, deadline=None)
@given(
    folds=st.lists(
        st.tuples(st.integers(-127, 127), st.integers(-30, 0), st.integers(1, MAX_SAMPLES // 8)),
        min_size=1,
        max_size=8,
    )
)
def test_sums_are_exact_integers(folds: list[tuple[int, int, int]]) -> None:
    block = one("float32", 1)
    total = BlockSum.zero(block)
    for q, exponent, weight in folds:
        add(total, math.ldexp(q, exponent), weight=weight)
    exact = sum(Fraction(q) * Fraction(2) ** exponent * weight for q, exponent, weight in folds)
    assert int(total.numerators()["t"][0]) == exact * 2**30
    mean = float(exact / sum(weight for _, _, weight in folds))
    published = total.publish({"t": np.zeros(1, np.float32)})["t"][0]
    assert published == pytest.approx(mean, rel=2**-23, abs=1e-30)


def test_a_mean_of_devices_with_different_samples_by_hand() -> None:
    block = one("float32", 2)
    total = BlockSum.zero(block)
    add(total, 1.0, -1.0, weight=1)
    add(total, 0.0, 2.0, weight=3)
    published = total.publish({"t": np.array([10.0, 10.0], np.float32)})["t"]
    np.testing.assert_array_equal(published, np.array([10.25, 11.25], np.float32))


def test_integer_tensors_take_the_rounded_mean_and_keep_their_dtype() -> None:
    block = one("int64", 3)
    total = BlockSum.zero(block)
    add(total, 10, -3, 2**36, weight=3)
    add(total, 20, -4, 2**36, weight=1)
    base = {"t": np.array([2**62, 5, -1])}
    np.testing.assert_array_equal(total.publish(base)["t"], [2**62 + 12, 2, 2**36 - 1])
    assert total.publish(base)["t"].dtype == np.int64


# --- the limits --------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weights", [[MAX_SAMPLES], [MAX_SAMPLES - 5, 5], [1 << 25, (1 << 25) - 1]])
def test_the_largest_sums_do_not_overflow(sign: int, weights: list[int]) -> None:
    grid, counts = one("float32", 1), one("int64", 1)
    largest, most = BlockSum.zero(grid), BlockSum.zero(counts)
    for weight in weights:
        add(largest, sign * 128.0, weight=weight)
        add(most, sign * INTEGER_LIMIT, weight=weight)
    assert int(largest.numerators()["t"][0]) == sign * MAX_SAMPLES << 37
    assert largest.publish({"t": np.zeros(1, np.float32)})["t"][0] == sign * 128
    assert most.publish({"t": np.zeros(1, np.int64)})["t"][0] == sign * INTEGER_LIMIT
    assert BlockSum.from_bytes(grid, largest.to_bytes()).to_bytes() == largest.to_bytes()


@pytest.mark.parametrize(
    ("dtype", "base", "change", "published"),
    [
        ("uint8", 250, 255, 255),
        ("uint8", 5, -255, 0),
        ("bool", True, 1, True),
        ("bool", False, -1, False),
        ("int64", 2**63 - 2, 100, 2**63 - 1),
        ("int64", -(2**63), -100, -(2**63)),
        ("int32", 2**31 - 1, 7, 2**31 - 1),
        ("float16", 65504.0, 128, 65504.0),
    ],
)
def test_a_hostile_mean_stops_at_the_ends_of_the_dtype(
    dtype: str, base: float, change: float, published: float
) -> None:
    block = one(dtype, 1)
    total = BlockSum.zero(block)
    add(total, change, weight=2)
    array = total.publish({"t": np.array([base], dtype)})["t"]
    assert array.dtype == dtype
    assert array[0] == published


@pytest.mark.parametrize("weight", [0, -1, MAX_SAMPLES + 1, 2**70])
def test_impossible_weights_are_refused(weight: int) -> None:
    total = BlockSum.zero(BLOCK)
    with pytest.raises(WrongUpdate, match=f"a weight of {weight} samples on top of 0.*67108863"):
        total.fold("balanced", update(1, "balanced")[1], weight)
    assert total.to_bytes() == BlockSum.zero(BLOCK).to_bytes()


def test_samples_over_the_limit_are_refused_in_all() -> None:
    block = one("float32", 1)
    full, other = BlockSum.zero(block), BlockSum.zero(block)
    add(full, 1, weight=MAX_SAMPLES)
    add(other, 1, weight=1)
    before = full.to_bytes()
    with pytest.raises(WrongUpdate, match="a weight of 1 samples on top of 67108863"):
        add(full, 1, weight=1)
    with pytest.raises(WrongUpdate, match="a weight of 1 samples on top of 67108863"):
        full.merge(other)
    assert full.to_bytes() == before


# --- all or nothing ----------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS)
def test_a_payload_whose_last_element_is_bad_leaves_the_sum_as_it_was(codec: str) -> None:
    total = fold([(1, 7, codec)])
    before = total.to_bytes()
    body = body_of(codec, encode_change(codec, BLOCK, model(0), model(0), np.random.default_rng(0)))
    lowest_bytes_of_integers = len(body) - 8 * 9
    body[lowest_bytes_of_integers + 8] = 2  # the last element of ``mask``, which is a bool
    with pytest.raises(WrongUpdate, match="tensor 'mask', element 3"):
        total.fold(codec, zstandard.ZstdCompressor().compress(bytes(body)), 5)
    assert (total.to_bytes(), total.samples, total.devices) == (before, 7, 1)


@settings(max_examples=150, deadline=None)
@given(codec=st.sampled_from(CODECS), data=st.data())
def test_whatever_is_refused_changes_nothing(codec: str, data: st.DataObject) -> None:
    total = fold([(1, 7, "fp16")])
    before = total.to_bytes()
    body = body_of(codec, update(3, codec)[1])
    for place in data.draw(st.lists(st.integers(0, len(body) - 1), min_size=1, max_size=3)):
        body[place] ^= data.draw(st.integers(1, 255))
    try:
        total.fold(codec, zstandard.ZstdCompressor().compress(bytes(body)), 5)
    except WrongUpdate:
        assert (total.to_bytes(), total.samples, total.devices) == (before, 7, 1)
    else:
        limit = total.samples * INTEGER_LIMIT
        assert all(np.abs(n).max(initial=0) <= limit for n in total.numerators().values())


@pytest.mark.parametrize("codec", CODECS)
def test_folding_makes_nothing_of_the_updates_size(codec: str) -> None:
    block = one("float32", 2_000_000)
    base = {"t": np.zeros(2_000_000, np.float32)}
    new = {"t": np.random.default_rng(0).standard_normal(2_000_000).astype(np.float32) * 1e-3}
    payload = encode_change(codec, block, base, new, np.random.default_rng(1))
    total = BlockSum.zero(block)
    tracemalloc.start()
    total.fold(codec, payload, 3)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    body_bytes = {"lossless": 4, "fp16": 2, "balanced": 0.5, "tiny": 0.25}[codec] * 2_000_000
    assert peak_bytes < body_bytes + 4_000_000


# --- stored sums -------------------------------------------------------------------------------


def test_damaged_stored_sums_are_refused() -> None:
    total = fold([(1, 7, "balanced"), (2, 9, "lossless")])
    blob = total.to_bytes()
    assert BlockSum.from_bytes(BLOCK, blob).to_bytes() == blob
    for damaged in (b"", blob[:-1], blob + b"\0"):
        with pytest.raises(StateError, match=f"has {len(damaged)} bytes, expected {len(blob)}"):
            BlockSum.from_bytes(BLOCK, damaged)
    for samples, devices in ((-1, 2), (16, -1), (1, 2), (0, 2), (16, 0), (MAX_SAMPLES + 1, 2)):
        header = np.array([samples, devices], "<i8").tobytes()
        with pytest.raises(StateError, match=f"claims {samples} samples of {devices} devices"):
            BlockSum.from_bytes(BLOCK, header + blob[16:])
    with pytest.raises(StateError, match=r"holds numerators from .* the limit is"):
        BlockSum.from_bytes(BLOCK, blob[:16] + b"\x7f" * (len(blob) - 16))


def test_sums_of_different_blocks_do_not_add_up() -> None:
    with pytest.raises(ProtocolMisuse, match=r"'body.1' and of block 'b' do not add up"):
        BlockSum.zero(BLOCK).merge(BlockSum.zero(one("float32", 1)))


def test_publishing_onto_another_model_is_our_own_bug() -> None:
    with pytest.raises(ProtocolMisuse, match="tensor 'weight' is missing"):
        fold([(1, 1, "balanced")]).publish({})


def test_numerators_are_a_view_that_cannot_be_written() -> None:
    numerators = fold([(1, 1, "balanced")]).numerators()
    assert numerators["weight"].shape == (6, 5)
    with pytest.raises(ValueError, match="read-only"):
        numerators["weight"][0, 0] = 1

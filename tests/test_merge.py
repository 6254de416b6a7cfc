"""Sums of partial updates: the laws of merging, exactness at the limits, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.codec import CODECS, INTEGER_LIMIT, decode_change, encode_change
from edge_sdk.errors import ProtocolMisuse, StateError, WrongUpdate
from edge_sdk.merge import MAX_SAMPLES, BlockSum, Change

Tensors = dict[str, NDArray[Any]]

BLOCK = Block(
    name="body.1",
    tensors=(
        TensorSpec(name="weight", shape=(6, 5), dtype="float32"),
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


def fold(parts: Iterable[tuple[int, int, str]]) -> BlockSum:
    total = BlockSum.zero(BLOCK)
    for seed, weight, codec in parts:
        total.add(decode_change(codec, BLOCK, update(seed, codec)[1]), weight)
    return total


def changes(block: Block, *q: object, exponent: int = 0) -> list[Change]:
    return [(block.tensors[0], np.array(q), exponent)]


def raw(tensors: Tensors) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.items()}


# --- the laws ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(parts=contributions)
def test_everyone_trains_everything_is_federated_averaging(
    parts: list[tuple[int, int, str]],
) -> None:
    parts = [(seed, weight, "fp32") for seed, weight, _ in parts]
    published = fold(parts).publish(model(0))
    models = [update(seed, "fp32")[0] for seed, _, _ in parts]
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
        sums[place].add(decode_change(codec, BLOCK, update(seed, codec)[1]), weight)
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
        total.add([(block.tensors[0], np.array([q], np.int8), exponent)], weight)
    exact = sum(Fraction(q) * Fraction(2) ** exponent * weight for q, exponent, weight in folds)
    assert int(total.numerators()["t"][0]) == exact * 2**30
    mean = float(exact / sum(weight for _, _, weight in folds))
    published = total.publish({"t": np.zeros(1, np.float32)})["t"][0]
    assert published == pytest.approx(mean, rel=2**-23, abs=1e-30)


def test_a_mean_of_devices_with_different_samples_by_hand() -> None:
    block = one("float32", 2)
    total = BlockSum.zero(block)
    total.add(changes(block, 4, -4, exponent=-2), weight=1)
    total.add(changes(block, 0, 8, exponent=-2), weight=3)
    published = total.publish({"t": np.array([10.0, 10.0], np.float32)})["t"]
    np.testing.assert_array_equal(published, np.array([10.25, 11.25], np.float32))


def test_integer_tensors_take_the_rounded_mean_and_keep_their_dtype() -> None:
    block = one("int64", 3)
    total = BlockSum.zero(block)
    total.add(changes(block, 10, -3, 2**36), weight=3)
    total.add(changes(block, 20, -4, 2**36), weight=1)
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
        largest.add(changes(grid, sign * 128), weight)
        most.add(changes(counts, sign * INTEGER_LIMIT), weight)
    assert int(largest.numerators()["t"][0]) == sign * MAX_SAMPLES << 37
    assert largest.publish({"t": np.zeros(1, np.float32)})["t"][0] == sign * 128
    assert most.publish({"t": np.zeros(1, np.int64)})["t"][0] == sign * INTEGER_LIMIT
    assert BlockSum.from_bytes(grid, largest.to_bytes()).to_bytes() == largest.to_bytes()


@pytest.mark.parametrize(
    ("dtype", "base", "q", "exponent", "published"),
    [
        ("uint8", 250, 255, 0, 255),
        ("uint8", 5, -255, 0, 0),
        ("bool", True, 1, 0, True),
        ("bool", False, -1, 0, False),
        ("int64", 2**63 - 2, 100, 0, 2**63 - 1),
        ("int64", -(2**63), -100, 0, -(2**63)),
        ("int32", 2**31 - 1, 7, 0, 2**31 - 1),
        ("float16", 65504.0, 1, 7, 65504.0),
    ],
)
def test_a_hostile_mean_stops_at_the_ends_of_the_dtype(
    dtype: str, base: float, q: int, exponent: int, published: float
) -> None:
    block = one(dtype, 1)
    total = BlockSum.zero(block)
    total.add(changes(block, q, exponent=exponent), weight=2)
    array = total.publish({"t": np.array([base], dtype)})["t"]
    assert array.dtype == dtype
    assert array[0] == published


@pytest.mark.parametrize("weight", [0, -1, MAX_SAMPLES + 1, 2**70])
def test_impossible_weights_are_refused(weight: int) -> None:
    total = BlockSum.zero(BLOCK)
    with pytest.raises(WrongUpdate, match=f"a weight of {weight} samples on top of 0.*67108863"):
        total.add(decode_change("int8", BLOCK, update(1, "int8")[1]), weight)
    assert total.to_bytes() == BlockSum.zero(BLOCK).to_bytes()


def test_samples_over_the_limit_are_refused_in_all() -> None:
    block = one("float32", 1)
    full, other = BlockSum.zero(block), BlockSum.zero(block)
    full.add(changes(block, 1), MAX_SAMPLES)
    other.add(changes(block, 1), 1)
    before = full.to_bytes()
    with pytest.raises(WrongUpdate, match="a weight of 1 samples on top of 67108863"):
        full.add(changes(block, 1), 1)
    with pytest.raises(WrongUpdate, match="a weight of 1 samples on top of 67108863"):
        full.merge(other)
    assert full.to_bytes() == before


# --- all or nothing ----------------------------------------------------------------------------


def bad_updates() -> Iterator[tuple[str, list[Change]]]:
    good = list(decode_change("fp32", BLOCK, update(3, "fp32")[1]))
    spec, q, _ = good[2]
    yield "an update of 6 tensors", good[:-1]
    yield "tensor 'weight' at place 7", [*good, good[0]]
    yield "tensor 'scale' at place 0", [good[1], good[0], *good[2:]]
    for text, hostile in (
        ("with exponent -31", (spec, q, -31)),
        ("with exponent 8", (spec, q, 8)),
        (r"int64 \(2,\) with", (spec, q[:2], -24)),
        (r"float64 \(3,\) with", (spec, q.astype(float), -24)),
        ("changes from 129 to 129 in units of 2..0", (spec, np.array([129] * 3), 0)),
        ("changes from 65 to 65 in units of 2..1", (spec, np.array([65] * 3, np.int8), 1)),
        ("changes from -9223372036854775808", (spec, np.array([-(2**63)] * 3), -30)),
    ):
        yield text, [*good[:2], hostile, *good[3:]]
    yield "'count': .* with exponent 1", [*good[:4], (*good[4][:2], 1), *good[5:]]


@pytest.mark.parametrize(("text", "update_"), list(bad_updates()))
def test_a_bad_tensor_leaves_the_sum_as_it_was(text: str, update_: list[Change]) -> None:
    total = fold([(1, 7, "int8")])
    before = total.to_bytes()
    with pytest.raises(WrongUpdate, match=f"block 'body.1'.*{text}"):
        total.add(iter(update_), 5)
    assert total.to_bytes() == before


def test_a_payload_that_turns_bad_midway_leaves_the_sum_as_it_was() -> None:
    total = fold([(1, 7, "fp16")])
    before = total.to_bytes()
    integers = np.zeros(9, "<i8")
    integers[8] = 2  # the last element of ``mask``, which is a bool
    payload = bytes(2 * 34) + integers.view(np.uint8).reshape(9, 8).T.tobytes()
    with pytest.raises(WrongUpdate, match="tensor 'mask', element 3"):
        total.add(decode_change("fp16", BLOCK, payload), 5)
    assert total.to_bytes() == before


# --- stored sums -------------------------------------------------------------------------------


def test_damaged_stored_sums_are_refused() -> None:
    total = fold([(1, 7, "int8"), (2, 9, "fp32")])
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
        fold([(1, 1, "int8")]).publish({})


def test_numerators_are_a_view_that_cannot_be_written() -> None:
    numerators = fold([(1, 1, "int8")]).numerators()
    assert numerators["weight"].shape == (6, 5)
    with pytest.raises(ValueError, match="read-only"):
        numerators["weight"][0, 0] = 1

"""A version as the difference to another: bit for bit, small where published in whole steps."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk import codec, grid
from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.errors import DamagedBlock
from edge_sdk.frames import Array
from edge_sdk.merge import BlockSum

MAX_BITS = 9.0
LAYER = Block(
    name="layer",
    tensors=(
        TensorSpec(name="weight", shape=(400, 256), dtype="float32"),
        TensorSpec(name="wide", shape=(90, 100), dtype="float64"),
        TensorSpec(name="half", shape=(40, 10), dtype="float16"),
        TensorSpec(name="few", shape=(codec.SMALL_ELEMENTS,), dtype="float32"),
        TensorSpec(name="mean", shape=(256,), dtype="float32", kind="buffer"),
        TensorSpec(name="count", shape=(), dtype="int64", kind="buffer"),
        TensorSpec(name="mask", shape=(9,), dtype="bool", kind="buffer"),
    ),
)
STEPPED = ("weight", "wide")
PLAIN = Block(name="plain", tensors=LAYER.tensors[:1])

Tensors = dict[str, Array]


def weights(block: Block, rng: np.random.Generator) -> Tensors:
    return {s.name: np.asarray(0.05 * rng.standard_normal(s.shape), s.dtype) for s in block.tensors}


def trained(block: Block, base: Tensors, rng: np.random.Generator) -> Tensors:
    """Weights after local training: changes of many sizes, as an optimiser makes them."""
    new = {}
    for spec in block.tensors:
        sizes = 1e-3 * np.exp(rng.standard_normal(spec.shape))
        change = sizes * rng.standard_normal(spec.shape) if spec.is_float else 0
        new[spec.name] = np.asarray(base[spec.name] + change, spec.dtype)
    return new


def total(name: str, block: Block, base: Tensors, devices: int) -> BlockSum:
    """The sum of what so many devices changed."""
    rng, added = np.random.default_rng(1), BlockSum.zero(block)
    for device in range(devices):
        new = trained(block, base, rng)
        added.fold(name, codec.encode_change(name, block, base, new, rng), 50 + device)
    return added


def one(dtype: str, count: int) -> Block:
    spec = TensorSpec(name="t", shape=(count,), dtype=dtype)  # type: ignore[arg-type]
    return Block(name="b", tensors=(spec,))


def survives(block: Block, base: Tensors, new: Tensors) -> bytes:
    payload = codec.encode_block_delta(block, base, new)
    decoded = codec.decode_block_delta(block, base, payload)
    assert codec.block_hash(block, decoded) == codec.block_hash(block, new)
    return payload


# --- publishing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lossless", "fp16"])
def test_codecs_that_do_not_quantise_publish_the_exact_mean(name: str) -> None:
    base = weights(LAYER, np.random.default_rng(0))
    added = total(name, LAYER, base, 3)
    exact, published = added.publish(base), added.publish(base, name)
    assert codec.block_hash(LAYER, published) == codec.block_hash(LAYER, exact)


@pytest.mark.parametrize("name", ["balanced", "tiny"])
def test_what_is_quantised_is_published_in_whole_steps_near_the_mean(name: str) -> None:
    base = weights(LAYER, np.random.default_rng(0))
    added = total(name, LAYER, base, 3)
    exact, published = added.publish(base), added.publish(base, name)
    for spec in LAYER.tensors:
        if spec.name not in STEPPED:
            assert published[spec.name].tobytes() == exact[spec.name].tobytes(), spec.name
            continue
        change = exact[spec.name].astype(np.float64) - base[spec.name]
        noise = published[spec.name].astype(np.float64) - exact[spec.name]
        assert 0 < np.mean(noise**2) < np.mean(change**2) / 5500, spec.name


@pytest.mark.parametrize("devices", [1, 5, 20])
@pytest.mark.parametrize("name", ["balanced", "tiny"])
def test_a_version_in_whole_steps_is_told_in_few_bits(name: str, devices: int) -> None:
    base = weights(PLAIN, np.random.default_rng(0))
    added = total(name, PLAIN, base, devices)
    bits = 8 * len(survives(PLAIN, base, added.publish(base, name))) / PLAIN.params
    exactly = 8 * len(survives(PLAIN, base, added.publish(base))) / PLAIN.params
    assert bits <= MAX_BITS < exactly
    assert 8 * len(codec.encode_block(PLAIN, added.publish(base, name))) / PLAIN.params > 3 * bits


def test_a_mean_too_small_for_any_step_is_published_exactly() -> None:
    base = weights(PLAIN, np.random.default_rng(0))
    added = BlockSum.zero(PLAIN)
    added.fold("balanced", codec.encode_change(
        "balanced", PLAIN, base, base, np.random.default_rng(0)), 1)  # fmt: skip
    assert codec.block_hash(PLAIN, added.publish(base, "balanced")) == codec.block_hash(PLAIN, base)


# --- round trips --------------------------------------------------------------------------------


def test_every_dtype_survives_beside_the_others() -> None:
    base = weights(LAYER, np.random.default_rng(0))
    survives(LAYER, base, total("balanced", LAYER, base, 3).publish(base, "balanced"))
    survives(LAYER, base, weights(LAYER, np.random.default_rng(1)))


def floats(width: int) -> st.SearchStrategy[list[float]]:
    special = st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0])
    return st.lists(special | st.floats(width=width), min_size=6, max_size=6)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(["float16", "float32", "float64"]))
def test_whatever_floats_there_are_survive(data: st.DataObject, dtype: str) -> None:
    drawn = floats(8 * np.dtype(dtype).itemsize)
    base, new = ({"t": np.array(data.draw(drawn), dtype)} for _ in range(2))
    survives(one(dtype, 6), base, new)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(["float32", "float64"]),
    code=st.integers(grid.CODES.start, grid.CODES.stop - 1),
    counts=st.lists(st.integers(-(2**31) + 1, 2**31 - 1), min_size=6, max_size=6),
)
def test_whatever_lies_whole_steps_away_survives(
    data: st.DataObject, dtype: str, code: int, counts: list[int]
) -> None:
    base = np.array(data.draw(floats(8 * np.dtype(dtype).itemsize)), dtype)
    new = grid.moved(base, np.array(counts), code)
    survives(one(dtype, 6), {"t": base}, {"t": new})


def test_a_step_is_found_in_the_two_versions_alone() -> None:
    rng = np.random.default_rng(0)
    old = (0.05 * rng.standard_normal(200_000)).astype(np.float32)
    for scale in (1e-6, 1e-3, 1.0):
        counts = np.rint(32 * rng.standard_normal(old.size)).astype(np.int32)
        code = grid.step_code(old.size * scale**2, old.size)
        assert code is not None
        found = grid.steps_between(old, grid.moved(old, counts, code))
        assert found is not None
        assert (found.code, found.counts.tobytes()) == (code, counts.tobytes())
    assert grid.steps_between(old, old) is None
    assert grid.steps_between(old, rng.standard_normal(old.size).astype(np.float32)) is None


# --- hostile bytes --------------------------------------------------------------------------------


def content() -> tuple[Tensors, NDArray[np.uint8]]:
    """A base, and the content of a difference to it."""
    base = weights(LAYER, np.random.default_rng(0))
    payload = survives(LAYER, base, total("balanced", LAYER, base, 2).publish(base, "balanced"))
    return base, np.frombuffer(zstandard.decompress(payload), np.uint8).copy()


def test_every_step_there_can_be_decodes_to_something() -> None:
    base, body = content()
    for code in range(256):
        body[:4] = code
        payload = zstandard.compress(body.tobytes())
        assert codec.decode_block_delta(LAYER, base, payload).keys() == base.keys()


def test_any_words_decode_to_something_or_are_refused() -> None:
    base, body = content()
    rng = np.random.default_rng(0)
    for _ in range(20):
        body[:] = rng.integers(0, 256, body.size, np.uint8)
        with suppress(DamagedBlock):  # a bool that is neither
            codec.decode_block_delta(LAYER, base, zstandard.compress(body.tobytes()))


def test_a_difference_of_another_length_is_refused() -> None:
    base, body = content()
    for other in (body[1:], body[4:], np.append(body, np.uint8(0))):
        with pytest.raises(DamagedBlock, match="the zstd frame names"):
            codec.decode_block_delta(LAYER, base, zstandard.compress(other.tobytes()))
    with pytest.raises(DamagedBlock, match="the limit is"):
        codec.decode_block_delta(LAYER, base, bytes(2 * body.size))

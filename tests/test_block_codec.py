"""Whole blocks and differences of blocks: bit for bit, and damaged bytes end in a named error."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk import codec
from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.errors import DamagedBlock
from tests.codec_cases import (
    FLOATS,
    INTEGERS,
    LAYER,
    blocks,
    frame,
    one,
    pair,
    random_tensors,
    rle_frame,
)

# --- whole blocks, down ------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(block=blocks(), seed=st.integers(0, 2**32 - 1))
def test_a_block_survives_bit_for_bit(block: Block, seed: int) -> None:
    tensors = random_tensors(block, np.random.default_rng(seed))
    raw = b"".join(codec.raw_parts(block, tensors))
    assert len(raw) == block.size_bytes
    for payload in (codec.encode_block(block, tensors), raw):
        assert len(payload) <= block.size_bytes
        decoded = codec.decode_block(block, payload)
        assert list(decoded) == [spec.name for spec in block.tensors]
        for spec in block.tensors:
            assert decoded[spec.name].dtype == spec.dtype
            assert decoded[spec.name].shape == spec.shape
            assert decoded[spec.name].flags.writeable
        assert b"".join(codec.raw_parts(block, decoded)) == raw
        assert codec.block_hash(block, decoded) == codec.block_hash(block, tensors)


def test_nan_payloads_and_minus_zero_survive() -> None:
    block = one("float32", 4)
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0xFF800000], np.uint32)
    decoded = codec.decode_block(block, codec.encode_block(block, {"t": bits.view(np.float32)}))
    np.testing.assert_array_equal(decoded["t"].view(np.uint32), bits)


def test_weights_shrink_and_noise_falls_back_to_the_raw_content() -> None:
    block = one("float32", 50_000)
    weights = random_tensors(block, np.random.default_rng(0))
    assert len(codec.encode_block(block, weights)) < 0.88 * block.size_bytes
    noise = {"t": np.frombuffer(np.random.default_rng(0).bytes(200_000), np.float32)}
    assert codec.encode_block(block, noise) == b"".join(codec.raw_parts(block, noise))


def test_the_address_of_a_block_is_fixed_for_ever() -> None:
    block = one("float32", 2)
    known = "9bf01a7d790b008d031ba4fb3928d9b1924c7bfbc56f5f2bcf70dd1c627d5060"
    assert codec.block_hash(block, {"t": np.array([1.0, -2.0], np.float32)}) == known


def test_blocks_of_equal_content_but_other_names_shapes_or_dtypes_have_their_own_address() -> None:
    def address(name: str, dtype: str, *shape: int) -> str:
        spec = TensorSpec(name=name, shape=shape, dtype=dtype)  # type: ignore[arg-type]
        block = Block(name="b", tensors=(spec,))
        return codec.block_hash(block, {name: np.zeros(shape, dtype)})

    addresses = {
        *(address("norm1.bias", "float32", 4), address("norm2.bias", "float32", 4)),
        *(address("norm1.bias", "float32", 2, 2), address("norm1.bias", "float64", 2)),
    }
    assert len(addresses) == 4


def test_damaged_blocks_are_refused() -> None:
    tensors = random_tensors(LAYER, np.random.default_rng(0))
    payload = codec.encode_block(LAYER, tensors)
    for damaged in (*(payload[:n] for n in range(len(payload))), payload + b"x", payload * 2):
        with pytest.raises(DamagedBlock, match=r"block 'body.1'"):
            codec.decode_block(LAYER, damaged)
    with pytest.raises(DamagedBlock, match="names 4294967295 bytes"):
        codec.decode_block(LAYER, rle_frame(0xFFFFFFFF, 1000))
    with pytest.raises(DamagedBlock, match="'t': a bool of value 3"):
        codec.decode_block(one("bool", 2), b"\x01\x03")


# --- differences of blocks, down ---------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(block=blocks(), seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([0.0, 1e-4, 1e3]))
def test_a_difference_of_blocks_survives_bit_for_bit(block: Block, seed: int, scale: float) -> None:
    base, new = pair(block, seed, scale)
    payload = codec.encode_block_delta(block, base, new)
    decoded = codec.decode_block_delta(block, base, payload)
    assert codec.block_hash(block, decoded) == codec.block_hash(block, new)
    for spec in block.tensors:
        assert (decoded[spec.name].dtype, decoded[spec.name].shape) == (spec.dtype, spec.shape)
        assert decoded[spec.name].flags.writeable


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_any_two_bit_patterns_have_a_difference(dtype: str) -> None:
    rng = np.random.default_rng(0)
    width = np.dtype(dtype).itemsize
    block = one(dtype, 5000)
    base, new = (rng.integers(0, 256, (5000, width), np.uint8) for _ in range(2))
    if dtype == "bool":
        base, new = base & 1, new & 1
    arrays = [{"t": bits.reshape(-1).view(dtype)} for bits in (base, new)]
    payload = codec.encode_block_delta(block, *arrays)
    decoded = codec.decode_block_delta(block, arrays[0], payload)
    assert decoded["t"].tobytes() == arrays[1]["t"].tobytes()


def test_a_small_difference_is_shorter_than_the_block() -> None:
    block = one("float32", 50_000)
    rng = np.random.default_rng(0)
    base = random_tensors(block, rng)
    new = {"t": base["t"] + (1e-4 * rng.standard_normal(50_000)).astype(np.float32)}
    whole = len(codec.encode_block(block, new))
    assert len(codec.encode_block_delta(block, base, new)) < 0.75 * whole
    assert len(codec.encode_block_delta(block, base, base)) < 100


def test_damaged_differences_are_refused() -> None:
    base, new = pair(LAYER)
    payload = codec.encode_block_delta(LAYER, base, new)
    for damaged in (*(payload[:n] for n in range(len(payload))), payload + b"x", payload * 2):
        with pytest.raises(DamagedBlock, match=r"block 'body.1'"):
            codec.decode_block_delta(LAYER, base, damaged)
    with pytest.raises(DamagedBlock, match="names 4294967295 bytes"):
        codec.decode_block_delta(LAYER, base, rle_frame(0xFFFFFFFF, 1000))
    falsehood = {"t": np.array([True, False])}
    with pytest.raises(DamagedBlock, match="'t': a bool of value 2"):
        codec.decode_block_delta(one("bool", 2), falsehood, frame(b"\x02\x00"))

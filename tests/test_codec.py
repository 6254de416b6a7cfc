"""Codecs: round trips, unbiased rounding, and hostile payloads that end in a named error."""

from __future__ import annotations

import math
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk import codec
from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.cost import bits_per_param
from edge_sdk.errors import DamagedBlock, ProtocolMisuse, WrongUpdate

Tensors = dict[str, NDArray[Any]]
FLOATS = ("float32", "float16", "float64")
INTEGERS = ("int64", "int32", "uint8", "bool")

LAYER = Block(
    name="body.1",
    tensors=(
        TensorSpec(name="weight", shape=(40, 30), dtype="float32"),
        TensorSpec(name="bias", shape=(40,), dtype="float32"),
        TensorSpec(name="scale", shape=(), dtype="float64"),
        TensorSpec(name="half", shape=(5,), dtype="float16"),
        TensorSpec(name="empty", shape=(0, 3), dtype="float32"),
        TensorSpec(name="count", shape=(), dtype="int64", kind="buffer"),
        TensorSpec(name="mask", shape=(7,), dtype="bool", kind="buffer"),
        TensorSpec(name="table", shape=(6,), dtype="uint8", kind="buffer"),
        TensorSpec(name="index", shape=(6,), dtype="int32", kind="buffer"),
    ),
)


def one(dtype: str, *shape: int) -> Block:
    return Block(name="b", tensors=(TensorSpec(name="t", shape=shape, dtype=dtype),))  # type: ignore[arg-type]


def random_tensors(block: Block, rng: np.random.Generator, scale: float = 0.05) -> Tensors:
    tensors: Tensors = {}
    for spec in block.tensors:
        if spec.is_float:
            tensors[spec.name] = np.asarray(scale * rng.standard_normal(spec.shape), spec.dtype)
        else:
            high = 2 if spec.dtype == "bool" else 200
            tensors[spec.name] = np.asarray(rng.integers(0, high, spec.shape), spec.dtype)
    return tensors


def moved(block: Block, base: Tensors, rng: np.random.Generator, scale: float) -> Tensors:
    noise = random_tensors(block, rng, scale)
    return {
        spec.name: (base[spec.name] + noise[spec.name]).astype(spec.dtype)
        if spec.is_float
        else noise[spec.name]
        for spec in block.tensors
    }


def pair(block: Block, seed: int = 0, scale: float = 1e-3) -> tuple[Tensors, Tensors]:
    rng = np.random.default_rng(seed)
    base = random_tensors(block, rng)
    return base, moved(block, base, rng, scale)


def encode(name: str, block: Block, base: Tensors, new: Tensors, seed: int = 0) -> bytes:
    return codec.encode_change(name, block, base, new, np.random.default_rng(seed))


def decode(name: str, block: Block, payload: bytes) -> dict[str, NDArray[np.float64]]:
    return {
        spec.name: q.astype(np.float64) * math.ldexp(1.0, exponent)
        for spec, q, exponent in codec.decode_change(name, block, payload)
    }


def body_of(name: str, block: Block, payload: bytes) -> bytearray:
    size_bytes = codec.max_change_bytes(name, block)
    if len(payload) == size_bytes:
        return bytearray(payload)
    return bytearray(zstandard.ZstdDecompressor().decompress(payload))


def rle_frame(claimed_bytes: int, blocks: int) -> bytes:
    """A zstd frame that names ``claimed_bytes`` and holds ``blocks`` runs of 128 KiB each."""
    run = ((131072 << 3) | 0b010).to_bytes(3, "little") + b"\0"
    last = ((131072 << 3) | 0b011).to_bytes(3, "little") + b"\0"
    header = b"\x28\xb5\x2f\xfd\xa0" + claimed_bytes.to_bytes(4, "little")
    return header + run * (blocks - 1) + last


def tolerance(name: str, change: NDArray[np.float64], exponent: int) -> NDArray[np.float64]:
    if name == "int8":
        return np.full(change.shape, math.ldexp(1.0, exponent))
    if name == "fp16":
        return np.maximum(np.abs(change) * 2.0**-11, 2.0**-25)
    return np.maximum(np.abs(change) * 2.0**-24, 2.0**-31)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    dtypes = st.sampled_from(FLOATS + INTEGERS)
    drawn = draw(st.lists(st.tuples(shapes, dtypes), max_size=5))
    tensors = tuple(
        TensorSpec(name=f"t{number}", shape=shape, dtype=dtype)
        for number, (shape, dtype) in enumerate(drawn)
    )
    return Block(name="b", tensors=tensors)


# --- changes, up -------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(codec.CODECS),
    block=blocks(),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 1e-12, 1e-5, 1e-2, 1.0, 20.0]),
)
def test_a_change_survives_the_round_trip(name: str, block: Block, seed: int, scale: float) -> None:
    base, new = pair(block, seed, scale)
    payload = encode(name, block, base, new)
    assert len(payload) <= codec.max_change_bytes(name, block)
    decoded = list(codec.decode_change(name, block, payload))
    assert [spec for spec, _, _ in decoded] == list(block.tensors)
    for spec, q, exponent in decoded:
        assert q.shape == spec.shape
        assert q.dtype.kind == "i"
        change = np.subtract(new[spec.name], base[spec.name], dtype=np.float64)
        if spec.is_float:
            got = q * math.ldexp(1.0, exponent)
            assert np.all(np.abs(got - change) <= tolerance(name, change, exponent))
        else:
            assert exponent == 0
            np.testing.assert_array_equal(q, change.astype(np.int64))


@pytest.mark.parametrize("name", codec.CODECS)
def test_a_real_layer_survives_with_every_dtype(name: str) -> None:
    base, new = pair(LAYER)
    decoded = decode(name, LAYER, encode(name, LAYER, base, new))
    for key in ("count", "mask", "table", "index"):
        np.testing.assert_array_equal(decoded[key], np.subtract(new[key], base[key], dtype=float))
    error = decoded["weight"] - (new["weight"].astype(float) - base["weight"])
    assert np.abs(error).max() < {"fp32": 2**-30, "fp16": 2**-18, "int8": 2**-11}[name]


def test_an_already_rounded_change_is_exact_in_fp32() -> None:
    block = one("float32", 5000)
    base = {"t": np.zeros(5000, np.float32)}
    steps = np.random.default_rng(0).integers(-(2**23), 2**23, 5000)
    new = {"t": (steps * 2.0**-30).astype(np.float32)}
    [(_, q, exponent)] = codec.decode_change("fp32", block, encode("fp32", block, base, new))
    assert exponent == -30
    np.testing.assert_array_equal(q, steps)


def test_int8_rounding_is_unbiased() -> None:
    values = np.array([0.3, -0.3, 0.01, -0.99, 1.5, 0.0], np.float32) * 2.0**-10
    repeats = 20_000
    block = one("float32", repeats, 6)
    base = {"t": np.zeros((repeats, 6), np.float32)}
    new = {"t": np.tile(values, (repeats, 1))}
    [(_, q, exponent)] = codec.decode_change("int8", block, encode("int8", block, base, new, 7))
    step = math.ldexp(1.0, exponent)
    mean = q.mean(axis=0) * step
    five_sigma = 5 * 0.5 * step / math.sqrt(repeats)
    assert np.all(np.abs(mean - values) <= five_sigma)
    assert np.all(q[:, 5] == 0)


@pytest.mark.parametrize("rms", [1e-9, 1e-4, 0.3, 20.0])
def test_the_int8_step_follows_rms_and_peak(rms: float) -> None:
    block = one("float32", 4096)
    rng = np.random.default_rng(3)
    base = {"t": np.zeros(4096, np.float32)}
    change = np.clip(rms * rng.standard_normal(4096), -128, 128).astype(np.float32)
    [(_, q, exponent)] = codec.decode_change(
        "int8", block, encode("int8", block, base, {"t": change})
    )
    measured = math.sqrt(float(np.mean(change.astype(float) ** 2)))
    by_rms = round(math.log2(measured / 8))
    by_peak = math.ceil(math.log2(float(np.abs(change).max()) / 127))
    assert exponent == max(-30, by_rms, by_peak)
    assert np.abs(q).max() <= 127


def test_the_largest_change_fits_every_codec() -> None:
    block = one("float32", 3)
    base = {"t": np.zeros(3, np.float32)}
    new = {"t": np.array([128.0, -128.0, 0.0], np.float32)}
    for name in codec.CODECS:
        np.testing.assert_array_equal(
            decode(name, block, encode(name, block, base, new))["t"], new["t"]
        )


@pytest.mark.parametrize("name", codec.CODECS)
def test_no_change_costs_next_to_nothing(name: str) -> None:
    block = one("float32", 1_000_000)
    base = {"t": np.ones(1_000_000, np.float32)}
    payload = encode(name, block, base, base)
    assert len(payload) < 200
    assert not decode(name, block, payload)["t"].any()


@pytest.mark.parametrize("name", codec.CODECS)
def test_planning_figures_are_what_gaussian_changes_cost(name: str) -> None:
    block = one("float32", 200_000)
    base, new = pair(block, scale=1e-3)
    bits = 8 * len(encode(name, block, base, new)) / 200_000
    assert bits == pytest.approx(bits_per_param(name), rel=0.1)


def test_the_same_seed_gives_the_same_bytes() -> None:
    base, new = pair(LAYER)
    assert encode("int8", LAYER, base, new, 5) == encode("int8", LAYER, base, new, 5)
    assert encode("int8", LAYER, base, new, 5) != encode("int8", LAYER, base, new, 6)


def test_memory_order_of_the_arrays_does_not_matter() -> None:
    base, new = pair(LAYER)
    turned = {key: np.array(value, order="F") for key, value in new.items()}
    assert encode("fp32", LAYER, base, turned) == encode("fp32", LAYER, base, new)


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 128.1, -1e30])
def test_a_diverged_change_is_refused_at_the_source(name: str, value: float) -> None:
    base, new = pair(LAYER)
    new["weight"][39, 29] = value
    with pytest.raises(
        WrongUpdate, match=r"'body.1', tensor 'weight', element 1199.*limit is \+-128"
    ):
        encode(name, LAYER, base, new)


def test_minus_infinity_that_did_not_change_is_no_change() -> None:
    block = one("float32", 2, 2)
    mask = {"t": np.array([[0.0, -math.inf], [0.0, 0.0]], np.float32)}
    for name in codec.CODECS:
        assert not decode(name, block, encode(name, block, mask, mask))["t"].any()


def test_integers_beyond_the_limit_are_refused_even_when_the_difference_wraps() -> None:
    block = one("int64", 1)
    low, high = np.iinfo(np.int64).min, np.iinfo(np.int64).max
    for old, now in ((low, high), (0, codec.INTEGER_LIMIT + 1), (high, low)):
        with pytest.raises(WrongUpdate, match="element 0"):
            encode("fp32", block, {"t": np.array([old])}, {"t": np.array([now])})
    edge = {"t": np.array([-codec.INTEGER_LIMIT])}
    assert (
        decode("fp32", block, encode("fp32", block, {"t": np.array([0])}, edge))["t"] == edge["t"]
    )


def test_tensors_that_are_not_the_models_are_our_own_bug() -> None:
    block = one("float32", 3)
    good = {"t": np.zeros(3, np.float32)}
    with pytest.raises(ProtocolMisuse, match="'t' is missing"):
        encode("fp32", block, good, {})
    with pytest.raises(ProtocolMisuse, match=r"got float64 \(3,\), the model says float32"):
        encode("fp32", block, good, {"t": np.zeros(3)})
    with pytest.raises(ProtocolMisuse, match="no codec 'zip'"):
        encode("zip", block, good, good)


# --- hostile changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", codec.CODECS)
def test_every_truncation_and_every_extra_byte_is_refused(name: str) -> None:
    payload = encode(name, LAYER, *pair(LAYER))
    for length in range(len(payload)):
        with pytest.raises(WrongUpdate, match=r"block 'body.1'"):
            list(codec.decode_change(name, LAYER, payload[:length]))
    for rest in (b"\0", b"x" * 20, b"x" * 20_000):
        with pytest.raises(WrongUpdate):
            list(codec.decode_change(name, LAYER, payload + rest))


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(codec.CODECS), data=st.data())
def test_flipped_bits_are_refused_or_stay_within_the_limits(name: str, data: st.DataObject) -> None:
    payload = bytearray(encode(name, LAYER, *pair(LAYER)))
    flips = st.tuples(st.integers(0, len(payload) - 1), st.integers(1, 255))
    for place, mask in data.draw(st.lists(flips, min_size=1, max_size=4)):
        payload[place] ^= mask
    try:
        decoded = decode(name, LAYER, bytes(payload))
    except WrongUpdate:
        return
    for spec in LAYER.tensors:
        limit = codec.CHANGE_LIMIT if spec.is_float else codec.integer_limit(spec)
        assert np.all(np.abs(decoded[spec.name]) <= limit)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(codec.CODECS), noise=st.binary(max_size=300))
def test_noise_is_refused(name: str, noise: bytes) -> None:
    for payload in (noise, b"\x28\xb5\x2f\xfd" + noise):
        with pytest.raises(WrongUpdate):
            list(codec.decode_change(name, LAYER, payload))


def bomb(size_bytes: int) -> bytes:
    return rle_frame(size_bytes, 100_000)


def second_frame(size_bytes: int) -> bytes:
    frame = zstandard.ZstdCompressor().compress(bytes(size_bytes))
    return frame + frame


def skippable_frame(size_bytes: int) -> bytes:
    frame = zstandard.ZstdCompressor().compress(bytes(size_bytes))
    return frame + b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"rest"


def unnamed_size(size_bytes: int) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size_bytes))


def one_byte_less(size_bytes: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size_bytes - 1))


def gigabytes(_: int) -> bytes:
    return rle_frame(0xFFFFFFFF, 32_768)


def wide_window(size_bytes: int) -> bytes:
    frame = zstandard.ZstdCompressor().compress(bytes(size_bytes))
    # No single segment, window 2**27, size named in 4 bytes, then the blocks of a real frame.
    header = zstandard.frame_header_size(frame)
    return b"\x28\xb5\x2f\xfd\x80\x88" + size_bytes.to_bytes(4, "little") + frame[header:]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (bomb, "not one whole zstd frame"),
        (second_frame, "not one whole zstd frame .* unused data"),
        (skippable_frame, "not one whole zstd frame .* unused data"),
        (unnamed_size, "the zstd frame names 18446744073709551615 bytes"),
        (one_byte_less, "the zstd frame names 1000000 bytes .* the block has 1000001"),
        (gigabytes, "the zstd frame names 4294967295 bytes"),
        (wide_window, "a window of 134217728, .* limit is 8388608"),
    ],
)
def test_hostile_frames_cost_no_more_than_the_block(
    make: Callable[[int], bytes], text: str
) -> None:
    block = one("float32", 1_000_000)
    size_bytes = codec.max_change_bytes("int8", block)
    payload = make(size_bytes)
    assert len(payload) < size_bytes, "must get past the check of the length"
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(WrongUpdate, match=f"block 'b': .*{text}"):
            list(codec.decode_change("int8", block, payload))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * size_bytes
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf, 128.25, -60000.0])
@pytest.mark.parametrize(("name", "dtype"), [("fp32", "<f4"), ("fp16", "<f2")])
def test_values_that_no_honest_device_sends_are_refused(
    name: str, dtype: str, value: float
) -> None:
    refuses_last_word(name, dtype, value)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "dtype"), [("fp32", "<f4"), ("fp16", "<f2")])
def test_the_limit_is_sharp(name: str, dtype: str, sign: int) -> None:
    limit = np.array(sign * 128.0, dtype)
    body = limit.reshape(1, 1).view(np.uint8).T.tobytes()
    assert decode(name, one("float32", 1), body)["t"] == limit
    refuses_last_word(name, dtype, float(np.nextafter(limit, np.array(sign * np.inf, dtype))))


def refuses_last_word(name: str, dtype: str, value: float) -> None:
    block = one("float32", 40_000)
    words = np.zeros(40_000, dtype)
    words[39_999] = value
    body = words.view(np.uint8).reshape(40_000, -1).T.tobytes()
    for payload in (body, zstandard.ZstdCompressor().compress(body)):
        with pytest.raises(WrongUpdate, match=r"tensor 't', element 39999: .*limit is \+-128"):
            list(codec.decode_change(name, block, payload))


@pytest.mark.parametrize(
    ("exponent", "word", "text"),
    [
        (8, 0, "exponent 8, the limits are -30 and 7"),
        (-31, 0, "exponent -31"),
        (-128, 0, "exponent -128"),
        (127, 127, "exponent 127"),
        (7, 2, "a change of 256, the limit is"),
        (1, -65, "a change of -130, the limit is"),
        (-10, -128, "a change of -0.125, the limit is"),
    ],
)
def test_hostile_int8_words_are_refused(exponent: int, word: int, text: str) -> None:
    block = one("float32", 9)
    body = bytes([exponent & 0xFF]) + bytes(8) + bytes([word & 0xFF])
    with pytest.raises(WrongUpdate, match=text):
        list(codec.decode_change("int8", block, body))


@pytest.mark.parametrize(
    ("dtype", "value"), [("bool", 2), ("uint8", -256), ("int32", 2**32), ("int64", -(2**63))]
)
def test_integer_changes_that_the_dtype_cannot_make_are_refused(dtype: str, value: int) -> None:
    body = np.array([value], "<i8").tobytes()
    with pytest.raises(WrongUpdate, match="tensor 't', element 0"):
        list(codec.decode_change("int8", one(dtype, 1), body))


def test_a_wrong_exponent_is_refused_before_anything_is_yielded() -> None:
    body = body_of("int8", LAYER, encode("int8", LAYER, *pair(LAYER)))
    body[4] = 100
    with pytest.raises(WrongUpdate, match="tensor 'empty': exponent 100"):
        codec.decode_change("int8", LAYER, body)


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

"""Codecs: round trips, unbiased rounding, and hostile payloads that end in a named error."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk import codec, quantise
from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.cost import CODEC_FIGURES, bits_per_param
from edge_sdk.errors import ProtocolMisuse, WrongUpdate
from edge_sdk.frames import Buffer
from tests.codec_cases import LAYER, Tensors, blocks, frame, one, pair, rle_frame

GOLDEN = Path(__file__).parent / "golden"
WHOLE = ("lossless", "fp16")
FORMS = {"balanced": quantise.BALANCED, "tiny": quantise.TINY}


def encode(name: str, block: Block, base: Tensors, new: Tensors, seed: int = 0) -> bytes:
    return codec.encode_change(name, block, base, new, np.random.default_rng(seed))


def units(name: str, block: Block, payload: Buffer) -> NDArray[np.int64]:
    """The decoded change of all elements of a block, in the units of their tensors."""
    total = np.zeros(sum(spec.elements for spec in block.tensors), np.int64)
    for where, q, factor in codec.decode_change(name, block, payload):
        total[where] += q.astype(np.int64) * factor
    return total


def decode(name: str, block: Block, payload: Buffer) -> dict[str, NDArray[np.float64]]:
    total, start, tensors = units(name, block, payload), 0, {}
    for spec in block.tensors:
        part = total[start : start + spec.elements].reshape(spec.shape)
        tensors[spec.name] = part * (2.0**-30 if spec.is_float else 1.0)
        start += spec.elements
    return tensors


def body_of(name: str, block: Block, payload: bytes) -> bytearray:
    if name in WHOLE and len(payload) == codec.max_change_bytes(name, block):
        return bytearray(payload)
    return bytearray(zstandard.ZstdDecompressor().decompress(payload))


def tolerance(name: str, spec: TensorSpec, change: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far one element may be off."""
    if name in FORMS and spec.kind == "parameter" and spec.elements > codec.SMALL_ELEMENTS:
        form, rms = FORMS[name], float(np.sqrt(np.mean(change**2)))
        step = min(max(1.07 * form.step_per_rms * rms, 2.0**-19), form.max_step)
        return np.full(change.shape, 0.51 * step)
    if name == "fp16":
        return np.maximum(np.abs(change) * 2.0**-11, 2.0**-25)
    return np.maximum(np.abs(change) * 2.0**-24, 2.0**-31)


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
    decoded = decode(name, block, payload)
    for spec in block.tensors:
        change = np.subtract(new[spec.name], base[spec.name], dtype=np.float64)
        if spec.is_float:
            off = np.abs(decoded[spec.name] - change)
            assert np.all(off <= tolerance(name, spec, change))
        else:
            np.testing.assert_array_equal(decoded[spec.name], change)


@pytest.mark.parametrize("name", codec.CODECS)
def test_a_real_layer_survives_with_every_dtype(name: str) -> None:
    base, new = pair(LAYER)
    decoded = decode(name, LAYER, encode(name, LAYER, base, new))
    for key in ("count", "mask", "table", "index"):
        np.testing.assert_array_equal(decoded[key], np.subtract(new[key], base[key], dtype=float))
    for spec in LAYER.tensors[:5]:
        change = np.subtract(new[spec.name], base[spec.name], dtype=np.float64)
        assert np.all(np.abs(decoded[spec.name] - change) <= tolerance(name, spec, change))


def test_an_already_rounded_change_is_exact_in_lossless() -> None:
    block = one("float32", 5000)
    base = {"t": np.zeros(5000, np.float32)}
    steps = np.random.default_rng(0).integers(-(2**23), 2**23, 5000)
    new = {"t": (steps * 2.0**-30).astype(np.float32)}
    payload = encode("lossless", block, base, new)
    np.testing.assert_array_equal(units("lossless", block, payload), steps)


@pytest.mark.parametrize("name", FORMS)
def test_the_mean_of_many_is_the_change_whatever_it_is(name: str) -> None:
    rng = np.random.default_rng(5)
    change = np.concatenate([np.zeros(100), rng.standard_normal(300), rng.laplace(size=300)])
    change = (1e-3 * np.append(change, [9, -9, 30.0])).astype(np.float32)
    block = one("float32", change.size)
    base, repeats = {"t": np.zeros(change.size, np.float32)}, 2000
    total = np.zeros(change.size)
    for seed in range(repeats):
        total += decode(name, block, encode(name, block, base, {"t": change}, seed))["t"]
    rms = float(np.sqrt(np.mean(change.astype(float) ** 2)))
    deviation = 1.07 * FORMS[name].step_per_rms * rms / math.sqrt(12 * repeats)
    off = (total / repeats - change) / deviation
    assert np.abs(off).max() < 5
    assert abs(off.mean()) < 4 / math.sqrt(change.size)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tails", ["normal", "laplace"])
def test_the_error_is_uniform_white_and_as_large_as_stated(name: str, tails: str) -> None:
    rng = np.random.default_rng(1)
    change = (1e-3 * getattr(rng, tails)(size=(400, 500))).astype(np.float32)
    block = one("float32", 400, 500)
    base = {"t": np.zeros((400, 500), np.float32)}
    error = decode(name, block, encode(name, block, base, {"t": change}))["t"] - change
    stated = CODEC_FIGURES[name].distortion
    assert np.mean(error**2) / np.mean(change.astype(float) ** 2) == pytest.approx(stated, rel=0.13)
    assert abs(np.corrcoef(error.ravel(), change.ravel())[0, 1]) < 0.01
    # Noise that all rows or all columns share would be one coherent direction in the weights.
    for axis in (0, 1):
        means = error.mean(axis) * math.sqrt(error.shape[axis]) / error.std()
        assert np.abs(means).max() < 5
    largest = np.linalg.svd(error / error.std(), compute_uv=False)[0]
    assert largest < 1.05 * (math.sqrt(400) + math.sqrt(500))


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("rms", [1e-5, 1e-4, 0.3, 2.0])
def test_the_step_follows_the_rms(name: str, rms: float) -> None:
    code = quantise.step_code(FORMS[name], rms)
    m, e = quantise.step_parts(code)
    assert m * 2.0**e == pytest.approx(FORMS[name].step_per_rms * rms, rel=0.07)


def test_steps_stop_at_the_limits() -> None:
    for form in FORMS.values():
        assert quantise.step_parts(quantise.step_code(form, 1e-30)) == (8, -22)
        m, e = quantise.step_parts(quantise.step_code(form, 1e9))
        assert (m * 2**e, quantise.step_code(form, 1e9)) == (form.max_step, form.last_step_code)
        assert (form.peak + 0.5) * form.max_step <= codec.CHANGE_LIMIT


@pytest.mark.parametrize("name", FORMS)
def test_outliers_are_sent_apart_and_exactly(name: str) -> None:
    block = one("float32", 100_000)
    change = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * 1e-3
    places = [0, 7, 65_535, 65_536, 99_999]
    change[places] = [0.5, -1.0, 2.0, -4.0, 0.25]
    base = {"t": np.zeros(100_000, np.float32)}
    decoded = decode(name, block, encode(name, block, base, {"t": change}))["t"]
    np.testing.assert_array_equal(decoded[places], change[places])
    assert np.abs(decoded - change).max() < 0.1


def test_the_largest_change_fits_every_codec() -> None:
    block = one("float32", 3)
    base = {"t": np.zeros(3, np.float32)}
    new = {"t": np.array([128.0, -128.0, 0.0], np.float32)}
    for name in codec.CODECS:
        np.testing.assert_array_equal(
            decode(name, block, encode(name, block, base, new))["t"], new["t"]
        )


@pytest.mark.parametrize("name", FORMS)
def test_a_change_all_of_it_far_too_large_is_refused_at_the_source(name: str) -> None:
    block, base = one("float32", 1000), {"t": np.zeros(1000, np.float32)}
    new = {"t": np.full(1000, 127.9, np.float32)}
    with pytest.raises(WrongUpdate, match=r"changes are too large for codec .* the limit is 62"):
        encode(name, block, base, new)


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
    assert 0.85 * bits_per_param(name) < bits < bits_per_param(name)


def test_the_same_seed_gives_the_same_bytes() -> None:
    base, new = pair(LAYER)
    for name in FORMS:
        assert encode(name, LAYER, base, new, 5) == encode(name, LAYER, base, new, 5)
        assert encode(name, LAYER, base, new, 5) != encode(name, LAYER, base, new, 6)


def test_memory_order_of_the_arrays_does_not_matter() -> None:
    base, new = pair(LAYER)
    turned = {key: np.array(value, order="F") for key, value in new.items()}
    assert encode("lossless", LAYER, base, turned) == encode("lossless", LAYER, base, new)


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
            encode("lossless", block, {"t": np.array([old])}, {"t": np.array([now])})
    edge = {"t": np.array([-codec.INTEGER_LIMIT])}
    assert (
        decode("lossless", block, encode("lossless", block, {"t": np.array([0])}, edge))["t"]
        == edge["t"]
    )


def test_tensors_that_are_not_the_models_are_our_own_bug() -> None:
    block = one("float32", 3)
    good = {"t": np.zeros(3, np.float32)}
    with pytest.raises(ProtocolMisuse, match="'t' is missing"):
        encode("lossless", block, good, {})
    with pytest.raises(ProtocolMisuse, match=r"got float64 \(3,\), the model says float32"):
        encode("lossless", block, good, {"t": np.zeros(3)})
    with pytest.raises(ProtocolMisuse, match="no codec 'zip'"):
        encode("zip", block, good, good)


# --- hostile changes ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", codec.CODECS)
def test_every_truncation_and_every_extra_byte_is_refused(name: str) -> None:
    payload = encode(name, LAYER, *pair(LAYER))
    for length in range(len(payload)):
        with pytest.raises(WrongUpdate, match=r"block 'body.1'"):
            codec.decode_change(name, LAYER, payload[:length])
    for rest in (b"\0", b"x" * 20, b"x" * 20_000):
        with pytest.raises(WrongUpdate):
            codec.decode_change(name, LAYER, payload + rest)


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
            codec.decode_change(name, LAYER, payload)


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
        (one_byte_less, "the zstd frame names 999999 bytes .* the block has 1000000"),
        (gigabytes, "the zstd frame names 4294967295 bytes"),
        (wide_window, "a window of 134217728, .* limit is 8388608"),
    ],
)
def test_hostile_frames_cost_no_more_than_the_block(
    make: Callable[[int], bytes], text: str
) -> None:
    block = one("float32", 250_000)
    size_bytes = codec.max_change_bytes("lossless", block)
    payload = make(size_bytes)
    assert len(payload) < size_bytes, "must get past the check of the length"
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(WrongUpdate, match=f"block 'b': .*{text}"):
            codec.decode_change("lossless", block, payload)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * size_bytes
    assert time.perf_counter() - started < 1.0


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf, 128.25, -60000.0])
@pytest.mark.parametrize(("name", "dtype"), [("lossless", "<f4"), ("fp16", "<f2")])
def test_values_that_no_honest_device_sends_are_refused(
    name: str, dtype: str, value: float
) -> None:
    refuses_last_word(name, dtype, value)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "dtype"), [("lossless", "<f4"), ("fp16", "<f2")])
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
            codec.decode_change(name, block, payload)


@pytest.mark.parametrize(
    ("dtype", "value"), [("bool", 2), ("uint8", -256), ("int32", 2**32), ("int64", -(2**63))]
)
def test_integer_changes_that_the_dtype_cannot_make_are_refused(dtype: str, value: int) -> None:
    body = np.array([value], "<i8").tobytes()
    with pytest.raises(WrongUpdate, match="tensor 't', element 0"):
        codec.decode_change("lossless", one(dtype, 1), body)


def coded(name: str, elements: int = 1000) -> tuple[Block, bytearray, int]:
    """A block of one tensor, the body of a change of it, and the place of its step."""
    block = one("float32", elements)
    body = body_of(name, block, encode(name, block, *pair(block)))
    return block, body, FORMS[name].code_bytes(elements) + quantise.SEED_BYTES


@pytest.mark.parametrize("name", FORMS)
def test_hostile_steps_and_escapes_are_refused_before_anything_is_decoded(name: str) -> None:
    block, body, step = coded(name)
    assert units(name, block, frame(body)).any()
    wrong = bytearray(body)
    wrong[step] = FORMS[name].last_step_code + 1
    with pytest.raises(WrongUpdate, match=r"tensor 't': step number \d+, the limit is"):
        codec.decode_change(name, block, frame(wrong))
    with pytest.raises(WrongUpdate, match="0 codes say that an element is sent apart and 1 are"):
        codec.decode_change(name, block, frame(body + b"\0\0\0\0"))
    wrong = bytearray(body)
    wrong[3] = 0xFF
    with pytest.raises(WrongUpdate, match=f"{8 // FORMS[name].bits} codes say"):
        codec.decode_change(name, block, frame(wrong))
    for value in (math.nan, -math.inf, 128.5):
        words = np.full(8 // FORMS[name].bits, value, "<f4").view(np.uint8)
        escapes = words.reshape(-1, 4).T.tobytes()
        with pytest.raises(WrongUpdate, match=r"sent apart changed by .*, the limit is \+-128"):
            codec.decode_change(name, block, frame(wrong + escapes))
    with pytest.raises(WrongUpdate, match="the zstd frame names"):
        codec.decode_change(name, block, frame(body + bytes(4 * (1000 // 16 + 1))))


@pytest.mark.parametrize("name", FORMS)
def test_escapes_in_the_padding_are_dropped(name: str) -> None:
    form = FORMS[name]
    block, body, _ = coded(name)
    before = units(name, block, frame(body))
    last = form.code_bytes(1000)
    body[last - 8 : last] = b"\xff" * 8
    sent = 8 * form.lanes
    words = np.full(sent, 0.5, "<f4").view(np.uint8).reshape(sent, 4)
    after = units(name, block, frame(body + words.T.tobytes()))
    first = (1000 // sent) * sent
    np.testing.assert_array_equal(after[:first], before[:first])
    np.testing.assert_array_equal(after[first:], 1 << 29)


@pytest.mark.parametrize("name", FORMS)
def test_no_code_decodes_beyond_the_limit(name: str) -> None:
    block, body, step = coded(name)
    body[step] = FORMS[name].last_step_code
    rng = np.random.default_rng(0)
    for _ in range(20):
        codes = rng.integers(0, FORMS[name].escape, 8 * len(body)).reshape(-1, FORMS[name].lanes)
        packed = (codes << FORMS[name].bits * np.arange(FORMS[name].lanes)).sum(1).astype(np.uint8)
        body[: FORMS[name].code_bytes(1000)] = packed[: FORMS[name].code_bytes(1000)].tobytes()
        assert np.abs(units(name, block, frame(body))).max() <= codec.INTEGER_LIMIT


# --- what was ever sent is understood for ever -------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("codec-*.json")), ids=lambda path: path.stem)
def test_payloads_of_every_version_are_decoded(path: Path) -> None:
    golden = json.loads(path.read_text())
    block = msgspec.convert(golden["block"], Block)
    for name, change in golden["changes"].items():
        decoded = units(name, block, bytes.fromhex(change["payload"]))
        assert decoded.tolist() == change["units"], name
    base = codec.decode_block(block, bytes.fromhex(golden["base"]))
    new = codec.decode_block(block, bytes.fromhex(golden["new"]))
    moved = codec.decode_block_delta(block, base, bytes.fromhex(golden["delta"]))
    assert codec.block_hash(block, base) == golden["base_sha256"]
    assert codec.block_hash(block, new) == golden["new_sha256"] == codec.block_hash(block, moved)


def test_there_are_golden_payloads_of_every_codec() -> None:
    stored = [json.loads(path.read_text()) for path in GOLDEN.glob("codec-*.json")]
    assert {name for golden in stored for name in golden["changes"]} == set(codec.CODECS)

"""Tensors to bytes and back: the change of one block on the way up, a whole block on the way down.

Theory of operation
-------------------
Up: a CHANGE is new minus base, element by element. Whatever the codec, it decodes to integers q
and one exponent per tensor, change = q * 2**exponent, exactly. The server therefore only adds
integers, and every order of arrival gives the same bytes. Floats end on a grid of 2**-30, integer
tensors on a grid of 1. A float may change by at most 128, which is 2**37 grid units, and an
integer by at most 2**37, so 2**26 - 1 samples always fit into an int64 sum (`merge.py`).

======  =====================================  ===========================================
codec   one word per element                   exponent
======  =====================================  ===========================================
fp32    change rounded to the grid, float32    -30
fp16    change rounded to nearest, float16     -24, the smallest float16 there is
int8    change over a step, rounded at random  chosen per tensor, one byte in front
any     integer tensors: int64 difference      0
======  =====================================  ===========================================

The step of int8 is a power of two near an eighth of the rms, so that the entropy and with it the
size is about 5 bits whatever the model, and is raised where the largest change needs it. Rounding
up with the probability of the fraction left is unbiased: the mean over devices converges to what
fp32 gives, and no error feedback has to be stored or lost.

Body: [exponents, int8 only] [float words] [int64 words], each group over all tensors of the block
in its order and cut into byte planes (all lowest bytes first), which is what makes the entropy
coder see signs and magnitudes instead of noise. The payload is the body as one zstd frame, or the
body itself where that is no longer; its length tells which. Down: the same with exact words per
dtype, and the raw little-endian content, the bytes that are hashed, as the form of last resort.

Hostile bytes: every length, shape and dtype comes from the block, none from the payload. A payload
is never longer than its body; a frame must name exactly the body's size, which is then the size of
the one buffer it is decompressed into; one frame, no window over 8 MiB, nothing after it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NoReturn

import numpy as np
import zstandard
from numpy.typing import NDArray

from edge_sdk.blocks import DTYPE_BYTES, Block, TensorSpec, content_hash
from edge_sdk.cost import BITS_PER_PARAM
from edge_sdk.errors import DamagedBlock, PeerError, ProtocolMisuse, WrongUpdate

CODECS = tuple(BITS_PER_PARAM)
GRID_EXPONENT = -30
LIMIT_EXPONENT = 7
CHANGE_LIMIT = 2.0**LIMIT_EXPONENT
INTEGER_LIMIT = 1 << (LIMIT_EXPONENT - GRID_EXPONENT)
MAX_WINDOW_BYTES = 8 * 1024 * 1024
CHUNK_ELEMENTS = 1 << 14  # float64 scratch of 128 KiB: stays in the second-level cache

Buffer = bytes | bytearray | memoryview
Array = NDArray[Any]
Tensors = Mapping[str, Array]

_WORDS: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype("<f4"),
    "fp16": np.dtype("<f2"),
    "int8": np.dtype("i1"),
}
_INTEGER_WORD = np.dtype("<i8")
_EXPONENTS = {"fp32": GRID_EXPONENT, "fp16": -24}
# Mask of the sign, bits of 128.0: NaN, infinity and everything larger compare above them.
_LIMIT_BITS = {"fp32": ("<u4", 0x7FFFFFFF, 0x43000000), "fp16": ("<u2", 0x7FFF, 0x5800)}
_INT8_PEAK = 127
_STEPS_PER_RMS = 8
_LEVEL = 1
_INTEGER_SPANS = {"bool": 1, "uint8": 255, "int32": (1 << 32) - 1, "int64": INTEGER_LIMIT}


def max_change_bytes(codec: str, block: Block) -> int:
    """Longest payload ``encode_change`` can make and ``decode_change`` accepts, bytes."""
    return sum(width * count for width, count in _change_groups(codec, block))


def encode_change(
    codec: str, block: Block, base: Tensors, new: Tensors, rng: np.random.Generator
) -> bytes:
    """Payload for the change from ``base`` to ``new``; WrongUpdate if not finite or too large."""
    body = np.empty(max_change_bytes(codec, block), np.uint8)
    scales, floats, integers = _cut(body, _change_groups(codec, block))
    at_scale = at_float = at_integer = 0
    for spec in block.tensors:
        old, now = flat_array(block, spec, base), flat_array(block, spec, new)
        if not spec.is_float:
            _put(integers, at_integer, _integer_change(block, spec, old, now))
            at_integer += spec.elements
            continue
        if codec == "int8":
            exponent = _step_exponent(block, spec, old, now)
            scales[0, at_scale] = exponent & 0xFF
            at_scale += 1
        else:
            exponent = _EXPONENTS[codec]
        for part, change in _float_changes(block, spec, old, now):
            _put(floats, at_float + part.start, _rounded(codec, change, exponent, rng))
        at_float += spec.elements
    packed = _compress(body)
    return packed if len(packed) < body.size else body.tobytes()


def decode_change(
    codec: str, block: Block, payload: Buffer
) -> Iterator[tuple[TensorSpec, Array, int]]:
    """Yield (tensor, q, exponent) in the block's order: change = q * 2**exponent, exactly.

    Sizes and exponents are checked before this returns, the values of a tensor before it is
    yielded. Raises WrongUpdate, whatever the bytes.
    """
    size_bytes = max_change_bytes(codec, block)
    content = _decompress(payload, size_bytes, f"block {block.name!r}", WrongUpdate)
    groups = _cut(np.frombuffer(content, np.uint8), _change_groups(codec, block))
    exponents = _read_exponents(codec, block, groups[0])
    return _decoded(codec, block, groups[1], groups[2], exponents)


def encode_block(block: Block, tensors: Tensors) -> bytes:
    """Lossless payload of a whole block; its raw content where compression does not pay."""
    body = np.empty(block.size_bytes, np.uint8)
    planes = dict(zip(DTYPE_BYTES, _cut(body, _block_groups(block)), strict=True))
    at = dict.fromkeys(DTYPE_BYTES, 0)
    for spec in block.tensors:
        _put(planes[spec.dtype], at[spec.dtype], _little(flat_array(block, spec, tensors)))
        at[spec.dtype] += spec.elements
    packed = _compress(body)
    return packed if len(packed) < body.size else b"".join(raw_parts(block, tensors))


def decode_block(block: Block, payload: Buffer) -> dict[str, Array]:
    """Tensors of a block, writable; ``payload`` is from ``encode_block`` or the raw content.

    Raises DamagedBlock. The caller compares ``block_hash`` with the hash it asked for.
    """
    content = _decompress(payload, block.size_bytes, f"block {block.name!r}", DamagedBlock)
    body = np.frombuffer(content, np.uint8)
    read = _read_raw if len(payload) == block.size_bytes else _read_planes
    tensors = {}
    for spec, words in read(block, body):
        if spec.dtype == "bool" and words.size and words.view(np.uint8).max() > 1:
            raise DamagedBlock(
                f"block {block.name!r}, tensor {spec.name!r}: a bool of value "
                f"{words.view(np.uint8).max()}, the limit is 1; fetch the block again"
            )
        tensors[spec.name] = words.astype(spec.dtype, copy=False).reshape(spec.shape)
    return tensors


def raw_parts(block: Block, tensors: Tensors) -> Iterator[memoryview]:
    """Yield the raw little-endian bytes of each tensor, in the block's order."""
    for spec in block.tensors:
        yield _little(flat_array(block, spec, tensors)).view(np.uint8).data


def block_hash(block: Block, tensors: Tensors) -> str:
    """Address of a block: SHA-256, hex, of its tensors' names, dtypes, shapes and content.

    Without the first three, two layers that begin alike would share one file and one name.
    """
    head = "".join(f"{s.name} {s.dtype} {','.join(map(str, s.shape))}\n" for s in block.tensors)
    return content_hash(chain([head.encode()], raw_parts(block, tensors)))


def flat_array(block: Block, spec: TensorSpec, tensors: Tensors) -> Array:
    """One tensor as a vector; ProtocolMisuse unless name, shape and dtype are the spec's."""
    array = tensors.get(spec.name)
    if array is None:
        raise ProtocolMisuse(f"block {block.name!r}: tensor {spec.name!r} is missing")
    if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
        raise ProtocolMisuse(
            f"block {block.name!r}, tensor {spec.name!r}: got {array.dtype} {array.shape}, "
            f"the model says {spec.dtype} {spec.shape}"
        )
    return array.reshape(-1)


def chunks(elements: int) -> Iterator[slice]:
    """Slices of a vector that are small enough to stay in the cache."""
    for start in range(0, elements, CHUNK_ELEMENTS):
        yield slice(start, min(start + CHUNK_ELEMENTS, elements))


def integer_limit(spec: TensorSpec) -> int:
    """Largest change of an element of an integer tensor that any two of its values can have."""
    return _INTEGER_SPANS[spec.dtype]


def _known(codec: str) -> str:
    if codec not in CODECS:
        raise ProtocolMisuse(f"no codec {codec!r}; there are {', '.join(CODECS)}")
    return codec


def _change_groups(codec: str, block: Block) -> list[tuple[int, int]]:
    """(bytes per word, words) of the exponents, the floats and the integers of a change."""
    floats = [spec.elements for spec in block.tensors if spec.is_float]
    integers = sum(spec.elements for spec in block.tensors if not spec.is_float)
    scales = len(floats) if codec == "int8" else 0
    return [(1, scales), (_WORDS[_known(codec)].itemsize, sum(floats)), (8, integers)]


def _block_groups(block: Block) -> list[tuple[int, int]]:
    """(bytes per word, words) of each dtype of a whole block."""
    counts = dict.fromkeys(DTYPE_BYTES, 0)
    for spec in block.tensors:
        counts[spec.dtype] += spec.elements
    return [(DTYPE_BYTES[dtype], count) for dtype, count in counts.items()]


def _cut(body: NDArray[np.uint8], groups: Iterable[tuple[int, int]]) -> list[NDArray[np.uint8]]:
    """Views of the body's groups, each of shape [bytes per word, words]."""
    views, start = [], 0
    for width, count in groups:
        views.append(body[start : start + width * count].reshape(width, count))
        start += width * count
    return views


def _put(planes: NDArray[np.uint8], at: int, words: Array) -> None:
    width = planes.shape[0]
    planes[:, at : at + words.size] = words.view(np.uint8).reshape(words.size, width).T


def _take(planes: NDArray[np.uint8], at: int, count: int, dtype: np.dtype[Any]) -> Array:
    words = np.empty(count, dtype)
    content = words.view(np.uint8)
    for place, plane in enumerate(planes):  # four times as fast as one transposed copy
        content[place :: dtype.itemsize] = plane[at : at + count]
    return words


def _little(words: Array) -> Array:
    return words.astype(words.dtype.newbyteorder("<"), copy=False)


def _float_changes(
    block: Block, spec: TensorSpec, old: Array, now: Array
) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Yield the change in float64, chunk by chunk, finite and within the limit."""
    for part in chunks(spec.elements):
        with np.errstate(invalid="ignore", over="ignore"):
            change = np.subtract(now[part], old[part], dtype=np.float64)
        if not np.max(np.abs(change)) <= CHANGE_LIMIT:
            change[now[part] == old[part]] = 0.0  # an attention mask may hold -inf, unchanged
            bad = ~(np.abs(change) <= CHANGE_LIMIT)
            if bad.any():
                index = int(bad.argmax())
                _refuse_value(block, spec, part.start + index, change[index], CHANGE_LIMIT)
        yield part, change


def _integer_change(block: Block, spec: TensorSpec, old: Array, now: Array) -> NDArray[np.int64]:
    limit = integer_limit(spec)
    rough = np.subtract(now, old, dtype=np.float64)
    change = np.subtract(now, old, dtype=np.int64)
    # The int64 difference may have wrapped round to something small; the rough one cannot.
    bad = (np.abs(rough) > 2.0 * limit) | (np.abs(change) > limit)
    if bad.any():
        index = int(bad.argmax())
        _refuse_value(block, spec, index, rough[index], limit)
    return change.astype(_INTEGER_WORD, copy=False)


def _step_exponent(block: Block, spec: TensorSpec, old: Array, now: Array) -> int:
    """Exponent of int8's step: about an eighth of the rms, more where the peak needs it."""
    squares = peak = 0.0
    for _, change in _float_changes(block, spec, old, now):
        squares += float(np.sum(change * change))
        peak = max(peak, float(np.max(np.abs(change))))
    exponent = GRID_EXPONENT
    if squares > 0.0:
        rms = math.sqrt(squares / spec.elements)
        exponent = max(exponent, round(math.log2(rms / _STEPS_PER_RMS)))
    while math.ldexp(_INT8_PEAK, exponent) < peak:
        exponent += 1
    return exponent


def _rounded(
    codec: str, change: NDArray[np.float64], exponent: int, rng: np.random.Generator
) -> Array:
    """Words of one chunk. Rounding to the grid here costs nothing later and zeroes noise bits."""
    if codec == "fp16":
        return change.astype(_WORDS[codec])
    scaled = change * math.ldexp(1.0, -exponent)
    if codec == "fp32":
        return (np.rint(scaled) * math.ldexp(1.0, exponent)).astype(_WORDS[codec])
    scaled += rng.random(scaled.size, dtype=np.float32)
    return np.floor(scaled).astype(_WORDS[codec])


def _read_exponents(codec: str, block: Block, scales: NDArray[np.uint8]) -> list[int]:
    """Exponent of each tensor, in the block's order."""
    sent = iter(scales.reshape(-1).view(np.int8).tolist())
    exponents = []
    for spec in block.tensors:
        exponent = _EXPONENTS.get(codec, 0) if spec.is_float else 0
        if spec.is_float and codec == "int8":
            exponent = next(sent)
            if not GRID_EXPONENT <= exponent <= LIMIT_EXPONENT:
                raise WrongUpdate(
                    f"block {block.name!r}, tensor {spec.name!r}: exponent {exponent}, "
                    f"the limits are {GRID_EXPONENT} and {LIMIT_EXPONENT}; the update is dropped"
                )
        exponents.append(exponent)
    return exponents


def _decoded(
    codec: str,
    block: Block,
    floats: NDArray[np.uint8],
    integers: NDArray[np.uint8],
    exponents: list[int],
) -> Iterator[tuple[TensorSpec, Array, int]]:
    at_float = at_integer = 0
    for spec, exponent in zip(block.tensors, exponents, strict=True):
        if spec.is_float:
            words = _take(floats, at_float, spec.elements, _WORDS[codec])
            at_float += spec.elements
            q = _float_integers(codec, block, spec, words, exponent)
        else:
            q = _take(integers, at_integer, spec.elements, _INTEGER_WORD)
            at_integer += spec.elements
            _refuse_beyond(block, spec, q, integer_limit(spec), 1)
        yield spec, q.reshape(spec.shape), exponent


def _float_integers(
    codec: str, block: Block, spec: TensorSpec, words: Array, exponent: int
) -> Array:
    """The integers q of one float tensor, checked."""
    if codec == "int8":
        limit = min(_INT8_PEAK, math.ldexp(1.0, LIMIT_EXPONENT - exponent))
        _refuse_beyond(block, spec, words, limit, math.ldexp(1.0, exponent))
        return words
    unsigned, mask, limit_bits = _LIMIT_BITS[codec]
    q = np.empty(words.size, np.int64)
    for part in chunks(words.size):
        bits = words[part].view(unsigned) & mask
        if bits.max() > limit_bits:
            index = part.start + int((bits > limit_bits).argmax())
            _refuse_value(block, spec, index, words[index], CHANGE_LIMIT)
        q[part] = np.rint(words[part].astype(np.float64) * math.ldexp(1.0, -exponent))
    return q


def _refuse_beyond(block: Block, spec: TensorSpec, q: Array, limit: float, unit: float) -> None:
    """WrongUpdate when an integer lies outside +-limit; both ends, for -min overflows."""
    if not q.size or (q.max() <= limit and q.min() >= -limit):
        return
    index = int(((q > limit) | (q < -limit)).argmax())
    _refuse_value(block, spec, index, int(q[index]) * unit, limit * unit)


def _refuse_value(
    block: Block, spec: TensorSpec, index: int, value: float, limit: float
) -> NoReturn:
    raise WrongUpdate(
        f"block {block.name!r}, tensor {spec.name!r}, element {index}: a change of {value:g}, "
        f"the limit is +-{limit:g}; training diverged, lower the learning rate"
    )


def _compress(body: NDArray[np.uint8]) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(body.data)


def _decompress(payload: Buffer, size_bytes: int, where: str, error: type[PeerError]) -> Buffer:
    """The ``size_bytes`` of a body, or ``error``; allocates no other buffer than that one."""
    if len(payload) == size_bytes:
        return payload
    if len(payload) > size_bytes:
        raise error(
            f"{where}: payload of {len(payload)} bytes, the limit is {size_bytes}; it is dropped"
        )
    try:
        frame = zstandard.get_frame_parameters(payload)
        if frame.content_size != size_bytes or frame.window_size > MAX_WINDOW_BYTES:
            raise error(
                f"{where}: the zstd frame names {frame.content_size} bytes and a window of "
                f"{frame.window_size}, the block has {size_bytes} and the window's limit is "
                f"{MAX_WINDOW_BYTES}; it is dropped"
            )
        # With its size named, a frame is decompressed into one buffer of that size or fails.
        decoder = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        return decoder.decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as reason:
        raise error(
            f"{where}: payload of {len(payload)} bytes is not one whole zstd frame of "
            f"{size_bytes} bytes ({reason}); it is dropped"
        ) from reason


def _read_raw(block: Block, body: NDArray[np.uint8]) -> Iterator[tuple[TensorSpec, Array]]:
    start = 0
    for spec in block.tensors:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        yield spec, body[start : start + spec.size_bytes].copy().view(dtype)
        start += spec.size_bytes


def _read_planes(block: Block, body: NDArray[np.uint8]) -> Iterator[tuple[TensorSpec, Array]]:
    planes = dict(zip(DTYPE_BYTES, _cut(body, _block_groups(block)), strict=True))
    at = dict.fromkeys(DTYPE_BYTES, 0)
    for spec in block.tensors:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        yield spec, _take(planes[spec.dtype], at[spec.dtype], spec.elements, dtype)
        at[spec.dtype] += spec.elements

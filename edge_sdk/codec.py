"""Tensors to bytes and back: the change of one block on the way up, a whole block on the way down.

Theory of operation
-------------------
Up: a CHANGE is new minus base, element by element. Whatever the codec, it decodes to integers q and
a factor, change = q * factor in units of 2**-30 for floats and of 1 for integers, exactly. The
server therefore only adds integers, and every order of arrival gives the same bytes. A float may
change by at most 128, which is 2**37 units, and an integer by at most 2**37, so 2**26 - 1 samples
always fit into an int64 sum (`merge.py`).

========  ==========================================  ======================================
codec     a float element travels as                  relative distortion
========  ==========================================  ======================================
lossless  float32, rounded to the unit of 2**-30      0: the sum is that of the changes
fp16      float16, rounded to nearest                 1e-7
balanced  4 bits of dithered quantiser, about 1.4     0.23, unbiased
tiny      2 bits of dithered quantiser, about 0.55    3, unbiased: many devices average it out
========  ==========================================  ======================================

Distortion is the mean square error over the mean square of a tensor's change; `quantise.py` is the
quantiser, `cost.py` has the figures the planner uses. With the last two some tensors are sent as
with lossless: buffers, for noise on a running variance may make it negative, and tensors of at most
8 elements. Integer tensors are int64 differences with every codec.

Body of lossless and fp16: [float words] [int64 words], each group over all tensors of the block in
its order, in byte planes. The payload is the body as one zstd frame, or the body itself where that
is no longer; its length tells which. Body of balanced and tiny:

    [seed, 8] [step of each float tensor, 1] [exact floats, 4] [int64 words, 8] [codes] [escapes, 4]

always as one frame. Exact floats and escapes (elements too large for a code, in their order) are
float32 words; how many escapes there are follows from the frame's size and must match the codes.

Down: exact words per dtype in planes, and the raw little-endian content, the bytes that are hashed,
as the form of last resort; or, to who holds a base version, how far each element has moved from it
(`encode_block_delta`): in whole steps where the tensor was published so (`grid.py`), else the
difference of the bit patterns, small numbers where weights have moved little. Its body:

    [step of each float32 and float64 tensor, 1; 0: bit patterns] [words per dtype, in planes]

Hostile bytes: every length, shape and dtype comes from the block, none from the payload, and
everything that can be wrong is found before the first integer is handed out (see also `frames.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from edge_sdk import grid, quantise
from edge_sdk.blocks import DTYPE_BYTES, Block, TensorSpec, content_hash
from edge_sdk.cost import CODEC_FIGURES
from edge_sdk.errors import DamagedBlock, ProtocolMisuse, WrongUpdate
from edge_sdk.frames import (
    Array,
    Buffer,
    Planes,
    compress,
    compress_symbols,
    cut,
    decompress,
    frame_limit,
    little,
    put,
    take,
)

CODECS = tuple(CODEC_FIGURES)
GRID_EXPONENT = -30
LIMIT_EXPONENT = 7
CHANGE_LIMIT = 2.0**LIMIT_EXPONENT
INTEGER_LIMIT = 1 << (LIMIT_EXPONENT - GRID_EXPONENT)
CHUNK_ELEMENTS = 1 << 14  # float64 scratch of 128 KiB: stays in the second-level cache
# A tensor this small is sent exactly by every codec: it costs little and its rms says little.
SMALL_ELEMENTS = 8

Tensors = Mapping[str, Array]

_WORDS: dict[str, np.dtype[Any]] = {"lossless": np.dtype("<f4"), "fp16": np.dtype("<f2")}
_FORMS = {"balanced": quantise.BALANCED, "tiny": quantise.TINY}
_EXACT = _WORDS["lossless"]
_INTEGER = np.dtype("<i8")
# The tensors whose version may be whole steps away from another.
_STEPPED = ("float32", "float64")
# The bits of 128.0: NaN, infinity and everything larger compare above them.
_LIMIT_BITS = {4: ("<u4", 0x43000000), 2: ("<u2", 0x5800)}
_INTEGER_SPANS = {"bool": 1, "uint8": 255, "int32": (1 << 32) - 1, "int64": INTEGER_LIMIT}


class Part(NamedTuple):
    """A piece of a decoded change: q * factor, in the unit of the tensor, for elements ``where``.

    where: a slice of the block's elements in their order, or the places of single ones.
    """

    where: slice | NDArray[np.intp]
    q: Array
    factor: int


class _Piece(NamedTuple):
    """A tensor, where its elements start in the block, and where in the group it travels in."""

    spec: TensorSpec
    start: int
    at: int


class _Layout:
    """How the change of a block travels with a codec."""

    def __init__(self, codec: str, block: Block) -> None:
        if codec not in CODECS:
            raise ProtocolMisuse(f"no codec {codec!r}; there are {', '.join(CODECS)}")
        self.codec, self.block, self.form = codec, block, _FORMS.get(codec)
        self.word = _WORDS.get(codec, _EXACT)
        self.coded: list[_Piece] = []
        self.words: list[_Piece] = []
        self.integers: list[_Piece] = []
        self.elements = self.word_count = self.integer_count = self.code_bytes = 0
        for spec in block.tensors:
            self._place(spec)
            self.elements += spec.elements

    def _place(self, spec: TensorSpec) -> None:
        if not spec.is_float:
            self.integers.append(_Piece(spec, self.elements, self.integer_count))
            self.integer_count += spec.elements
        elif self.form and quantises(self.codec, spec):
            self.coded.append(_Piece(spec, self.elements, self.code_bytes))
            self.code_bytes += self.form.code_bytes(spec.elements)
        else:
            self.words.append(_Piece(spec, self.elements, self.word_count))
            self.word_count += spec.elements

    @property
    def groups(self) -> list[tuple[int, int]]:
        """(bytes per word, words) of codes, seed, steps, floats and integers."""
        steps = len(self.coded)
        seed = quantise.SEED_BYTES if self.form else 0
        return [(1, self.code_bytes), (1, seed), (1, steps), (self.word.itemsize, self.word_count),
                (_INTEGER.itemsize, self.integer_count)]  # fmt: skip

    @property
    def sizes(self) -> range:
        """How long the body can be."""
        fixed = sum(width * count for width, count in self.groups)
        return range(fixed, fixed + _EXACT.itemsize * self.max_escapes + 1, _EXACT.itemsize)

    @property
    def max_escapes(self) -> int:
        """How many elements may be too large for a code."""
        if self.form is None:
            return 0
        return sum(self.form.max_escapes(piece.spec.elements) for piece in self.coded)


def quantises(codec: str, spec: TensorSpec) -> bool:
    """Whether the change of a tensor travels in one or two bits per element with a codec."""
    trained = spec.is_float and spec.kind == "parameter"
    return codec in _FORMS and trained and spec.elements > SMALL_ELEMENTS


def max_change_bytes(codec: str, block: Block) -> int:
    """Longest payload ``encode_change`` can make and ``decode_change`` accepts, bytes."""
    layout = _Layout(codec, block)
    return frame_limit(layout.sizes[-1]) if layout.form else layout.sizes[-1]


def encode_change(
    codec: str, block: Block, base: Tensors, new: Tensors, rng: np.random.Generator
) -> bytes:
    """Payload for the change from ``base`` to ``new``; WrongUpdate if not finite or too large."""
    layout = _Layout(codec, block)
    body = np.empty(layout.sizes[0], np.uint8)
    codes, seed, steps, words, integers = cut(body, layout.groups)
    for spec, _, at in layout.integers:
        old, now = flat_array(block, spec, base), flat_array(block, spec, new)
        put(integers, at, _integer_change(block, spec, old, now))
    for spec, _, at in layout.words:
        old, now = flat_array(block, spec, base), flat_array(block, spec, new)
        for part in chunks(spec.elements):
            change, _ = _difference(block, spec, old, now, part, np.float64)
            put(words, at + part.start, _rounded(change, layout.word))
    if layout.form is None:
        packed = compress(body)
        return packed if len(packed) < body.size else body.tobytes()
    seed[0] = np.frombuffer(rng.bytes(quantise.SEED_BYTES), np.uint8)
    escapes = _quantised(layout, base, new, seed.tobytes(), steps[0], codes[0])
    return compress_symbols([body, escapes], body.size + escapes.size)


def decode_change(codec: str, block: Block, payload: Buffer) -> Iterator[Part]:
    """The change, part by part; WrongUpdate, whatever the bytes, before this returns."""
    layout = _Layout(codec, block)
    where, sizes = f"block {block.name!r}", layout.sizes
    content = decompress(payload, sizes, where, WrongUpdate, raw=layout.form is None)
    body = np.frombuffer(content, np.uint8)
    codes, seed, steps, words, integers = cut(body[: sizes[0]], layout.groups)
    escapes = body[sizes[0] :].reshape(_EXACT.itemsize, -1)
    _check_words(layout, words)
    _check_integers(layout, integers)
    if layout.form:
        _check_codes(layout, layout.form, steps[0], codes[0], escapes)
    return chain(
        _decoded_integers(layout, integers),
        _decoded_words(layout, words),
        _decoded_codes(layout, seed.tobytes(), steps[0], codes[0], escapes),
    )


def encode_block(block: Block, tensors: Tensors) -> bytes:
    """Lossless payload of a whole block; its raw content where compression does not pay."""
    body = _in_planes(block, (_content(block, spec, tensors) for spec in block.tensors))
    packed = compress(body)
    return packed if len(packed) < body.size else b"".join(raw_parts(block, tensors))


def decode_block(block: Block, payload: Buffer) -> dict[str, Array]:
    """Tensors of a block, writable; ``payload`` is from ``encode_block`` or the raw content.

    Raises DamagedBlock. The caller compares ``block_hash`` with the hash it asked for.
    """
    content = _unpacked(block, payload, raw=True)
    read = _read_raw if len(payload) == block.size_bytes else _read_planes
    return {spec.name: _tensor(block, spec, words) for spec, words in read(block, content)}


def encode_block_delta(block: Block, base: Tensors, new: Tensors) -> bytes:
    """Lossless payload of a block for who holds ``base``, shorter where little has changed."""
    codes: list[int] = []
    body = _in_planes(block, _moves(block, base, new, codes), head_bytes=_steps(block))
    body[: len(codes)] = codes
    return compress(body)


def decode_block_delta(block: Block, base: Tensors, payload: Buffer) -> dict[str, Array]:
    """Tensors of a block, writable, of which ``payload`` is the difference to ``base``.

    Raises DamagedBlock. The caller compares ``block_hash`` with the hash it asked for: over another
    base the difference decodes to another block.
    """
    head_bytes = _steps(block)
    body = _unpacked(block, payload, raw=False, head_bytes=head_bytes)
    codes, tensors = iter(body[:head_bytes].tolist()), {}
    for spec, words in _read_planes(block, body[head_bytes:]):
        code = next(codes) if spec.dtype in _STEPPED else 0
        _move(words, _content(block, spec, base), code)
        tensors[spec.name] = _tensor(block, spec, words)
    return tensors


def raw_parts(block: Block, tensors: Tensors) -> Iterator[memoryview]:
    """Yield the raw little-endian bytes of each tensor, in the block's order."""
    for spec in block.tensors:
        yield _content(block, spec, tensors).view(np.uint8).data


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


def _difference(
    block: Block,
    spec: TensorSpec,
    old: Array,
    now: Array,
    part: slice,
    dtype: type[np.floating[Any]],
) -> tuple[Array, float]:
    """A part's change, finite and within the limit, and its sum of squares."""
    with np.errstate(invalid="ignore", over="ignore"):
        change = np.subtract(now[part], old[part], dtype=dtype)
        squares = float(np.einsum("i,i->", change, change))
    if squares <= CHANGE_LIMIT**2:
        return change, squares
    if not np.max(np.abs(change)) <= CHANGE_LIMIT:
        change[now[part] == old[part]] = 0.0  # an attention mask may hold -inf, unchanged
        bad = ~(np.abs(change) <= CHANGE_LIMIT)
        if bad.any():
            index = int(bad.argmax())
            _refuse_value(block, spec, part.start + index, change[index], CHANGE_LIMIT)
        squares = float(np.einsum("i,i->", change, change))
    return change, squares


def _integer_change(block: Block, spec: TensorSpec, old: Array, now: Array) -> NDArray[np.int64]:
    limit = integer_limit(spec)
    rough = np.subtract(now, old, dtype=np.float64)
    change = np.subtract(now, old, dtype=np.int64)
    # The int64 difference may have wrapped round to something small; the rough one cannot.
    bad = (np.abs(rough) > 2.0 * limit) | (np.abs(change) > limit)
    if bad.any():
        index = int(bad.argmax())
        _refuse_value(block, spec, index, rough[index], limit)
    return change.astype(_INTEGER, copy=False)


def _rounded(change: Array, word: np.dtype[Any]) -> Array:
    """Words of one chunk. Rounding to the grid here costs nothing later and zeroes noise bits."""
    if word != _EXACT:
        return change.astype(word)
    return (np.rint(change * 2.0**-GRID_EXPONENT) * 2.0**GRID_EXPONENT).astype(word)


def _quantised(
    layout: _Layout, base: Tensors, new: Tensors, seed: bytes, steps: Planes, codes: Planes
) -> Planes:
    """Fill steps and codes; the escaped elements as byte planes."""
    form, block, raw = layout.form, layout.block, quantise.generator(seed)
    if form is None:
        raise ProtocolMisuse(f"codec {layout.codec!r} does not quantise")
    outliers: list[Array] = []
    for number, (spec, _, at) in enumerate(layout.coded):
        old, now = flat_array(block, spec, base), flat_array(block, spec, new)
        parts = list(quantise.runs(spec.elements))
        squares = sum(_single(block, spec, old, now, part)[1] for part in parts)
        packed = codes[at : at + form.code_bytes(spec.elements)].view("<u8")
        steps[number] = quantise.step_code(form, math.sqrt(squares / spec.elements))
        if steps[number] == quantise.UNCHANGED:
            packed[:] = 0
            continue
        for part in parts:
            change, _ = _single(block, spec, old, now, part)
            words = packed[form.groups(part.start) : form.groups(part.stop)]
            dither = quantise.draw(form, words.size, raw)
            words[:], places = quantise.quantise(form, change, int(steps[number]), dither)
            outliers.append(_rounded(change[places].astype(np.float64), _EXACT))
    found = np.concatenate(outliers) if outliers else np.zeros(0, _EXACT)
    if found.size > layout.max_escapes:
        raise WrongUpdate(
            f"block {block.name!r}: {found.size} changes are too large for codec "
            f"{layout.codec!r}, the limit is {layout.max_escapes}; training diverged, lower the "
            "learning rate"
        )
    return np.ascontiguousarray(found.view(np.uint8).reshape(-1, _EXACT.itemsize).T)


def _single(
    block: Block, spec: TensorSpec, old: Array, now: Array, part: slice
) -> tuple[NDArray[np.float32], float]:
    """A run's change in float32, which is fine enough to be quantised, and its sum of squares."""
    wide = np.float64 if spec.dtype == "float64" else np.float32
    change, squares = _difference(block, spec, old, now, part, wide)
    return change.astype(np.float32, copy=False), squares


def _check_words(layout: _Layout, planes: Planes) -> None:
    """WrongUpdate where a float is not finite or over the limit."""
    unsigned, limit_bits = _LIMIT_BITS[layout.word.itemsize]
    # Nearly always the highest byte alone says that no word is too large.
    if not planes.size or (planes[-1] & 0x7F).max() < limit_bits >> 8 * (layout.word.itemsize - 1):
        return
    for spec, _, at in layout.words:
        words = take(planes, at, spec.elements, layout.word)
        bad = (words.view(unsigned) << 1) > 2 * limit_bits
        if bad.any():
            index = int(bad.argmax())
            _refuse_value(layout.block, spec, index, words[index], CHANGE_LIMIT)


def _check_integers(layout: _Layout, planes: Planes) -> None:
    for spec, _, at in layout.integers:
        q, limit = take(planes, at, spec.elements, _INTEGER), integer_limit(spec)
        # Both ends: the absolute value of the lowest integer overflows.
        if q.size and not (q.max() <= limit and q.min() >= -limit):
            index = int(((q > limit) | (q < -limit)).argmax())
            _refuse_value(layout.block, spec, index, int(q[index]), limit)


def _check_codes(
    layout: _Layout, form: quantise.Form, steps: Planes, codes: Planes, escapes: Planes
) -> None:
    """WrongUpdate unless steps are within the limits, escapes are finite and as many as marked."""
    where = f"block {layout.block.name!r}"
    for (spec, _, _), code in zip(layout.coded, steps.tolist(), strict=True):
        if code > form.last_step_code:
            raise WrongUpdate(
                f"{where}, tensor {spec.name!r}: step number {code}, the limit is "
                f"{form.last_step_code}; the update is dropped"
            )
    marked, sent = quantise.escaped(form, codes.view("<u8")), escapes.shape[1]
    if marked != sent:
        raise WrongUpdate(
            f"{where}: {marked} codes say that an element is sent apart and {sent} are; the "
            "update is dropped"
        )
    words = take(escapes, 0, sent, _EXACT)
    bad = ~(np.abs(words) <= CHANGE_LIMIT)
    if bad.any():
        raise WrongUpdate(
            f"{where}: an element sent apart changed by {words[bad.argmax()]:g}, the limit is "
            f"+-{CHANGE_LIMIT:g}; the update is dropped"
        )


def _decoded_integers(layout: _Layout, planes: Planes) -> Iterator[Part]:
    for spec, start, at in layout.integers:
        q = take(planes, at, spec.elements, _INTEGER)
        yield Part(slice(start, start + spec.elements), q, 1)


def _decoded_words(layout: _Layout, planes: Planes) -> Iterator[Part]:
    for spec, start, at in layout.words:
        for part in chunks(spec.elements):
            words = take(planes, at + part.start, part.stop - part.start, layout.word)
            yield Part(slice(start + part.start, start + part.stop), _units(words), 1)


def _decoded_codes(
    layout: _Layout, seed: bytes, steps: Planes, codes: Planes, escapes: Planes
) -> Iterator[Part]:
    form, raw, used = layout.form, quantise.generator(seed), 0
    for (spec, start, at), step in zip(layout.coded, steps.tolist(), strict=True):
        if form is None or step == quantise.UNCHANGED:
            continue
        packed = codes[at : at + form.code_bytes(spec.elements)].view("<u8")
        m, e = quantise.step_parts(step)
        factor = m << (e - quantise.FRACTION_BITS - GRID_EXPONENT)
        for part in quantise.runs(spec.elements):
            words = packed[form.groups(part.start) : form.groups(part.stop)]
            dither = quantise.draw(form, words.size, raw)
            q, places = quantise.dequantise(form, words, dither, escapes=escapes.size > 0)
            count = part.stop - part.start
            yield Part(slice(start + part.start, start + part.stop), q[:count], factor)
            if places.size:
                exact = _units(take(escapes, used, places.size, _EXACT))
                used += places.size
                inside = places < count  # a hostile sender may mark the padding
                yield Part(places[inside] + (start + part.start), exact[inside], 1)


def _units(words: Array) -> NDArray[np.int64]:
    """Float changes in units of 2**-30."""
    return np.rint(words.astype(np.float64) * 2.0**-GRID_EXPONENT).astype(np.int64)


def _refuse_value(
    block: Block, spec: TensorSpec, index: int, value: float, limit: float
) -> NoReturn:
    raise WrongUpdate(
        f"block {block.name!r}, tensor {spec.name!r}, element {index}: a change of {value:g}, "
        f"the limit is +-{limit:g}; training diverged, lower the learning rate"
    )


def _content(block: Block, spec: TensorSpec, tensors: Tensors) -> Array:
    return little(flat_array(block, spec, tensors))


def _patterns(words: Array) -> np.dtype[Any]:
    """The unsigned integers of the same width."""
    return np.dtype(f"<u{words.dtype.itemsize}")


def _steps(block: Block) -> int:
    """How many tensors have a step in a difference."""
    return sum(spec.dtype in _STEPPED for spec in block.tensors)


def _moves(block: Block, base: Tensors, new: Tensors, codes: list[int]) -> Iterator[Array]:
    """How far each tensor has moved: twice the distance, and 1 more if downwards."""
    for spec in block.tensors:
        old, now = _content(block, spec, base), _content(block, spec, new)
        bits = _patterns(now)
        found = grid.steps_between(old, now) if spec.dtype in _STEPPED else None
        if spec.dtype in _STEPPED:
            codes.append(found.code if found else 0)
        if found:
            move = found.counts.astype(f"<i{bits.itemsize}", copy=False).view(bits)
        else:
            move = now.view(bits) - old.view(bits)
        downwards = move >> (8 * bits.itemsize - 1)
        move <<= 1
        move ^= ~downwards + bits.type(1)
        yield move


def _move(words: Array, old: Array, code: int) -> None:
    """Put what lies so far from ``old`` in the place of how far it is."""
    bits = _patterns(words)
    for run in quantise.runs(words.size):
        # The lowest bit is the sign: 0, -1, 1, -2 ... back from 0, 1, 2, 3.
        move = words[run].view(bits)
        move = (move >> 1) ^ (~(move & 1) + bits.type(1))
        if code:
            words[run] = grid.moved(old[run], move.view(f"<i{bits.itemsize}"), code)
        else:
            words[run].view(bits)[:] = move + old[run].view(bits)


def _in_planes(block: Block, contents: Iterable[Array], head_bytes: int = 0) -> Planes:
    """The words of all tensors, in planes by dtype, after so many bytes of something else."""
    body = np.empty(head_bytes + block.size_bytes, np.uint8)
    planes = dict(zip(DTYPE_BYTES, cut(body[head_bytes:], _block_groups(block)), strict=True))
    at = dict.fromkeys(DTYPE_BYTES, 0)
    for spec, words in zip(block.tensors, contents, strict=True):
        put(planes[spec.dtype], at[spec.dtype], words)
        at[spec.dtype] += spec.elements
    return body


def _unpacked(block: Block, payload: Buffer, *, raw: bool, head_bytes: int = 0) -> Planes:
    size_bytes, where = head_bytes + block.size_bytes, f"block {block.name!r}"
    sizes = range(size_bytes, size_bytes + 1)
    return np.frombuffer(decompress(payload, sizes, where, DamagedBlock, raw=raw), np.uint8)


def _tensor(block: Block, spec: TensorSpec, words: Array) -> Array:
    if spec.dtype == "bool" and words.size and words.view(np.uint8).max() > 1:
        raise DamagedBlock(
            f"block {block.name!r}, tensor {spec.name!r}: a bool of value "
            f"{words.view(np.uint8).max()}, the limit is 1; fetch the block again"
        )
    return words.astype(spec.dtype, copy=False).reshape(spec.shape)


def _block_groups(block: Block) -> list[tuple[int, int]]:
    """(bytes per word, words) of each dtype of a whole block."""
    counts = dict.fromkeys(DTYPE_BYTES, 0)
    for spec in block.tensors:
        counts[spec.dtype] += spec.elements
    return [(DTYPE_BYTES[dtype], count) for dtype, count in counts.items()]


def _read_raw(block: Block, body: Planes) -> Iterator[tuple[TensorSpec, Array]]:
    start = 0
    for spec in block.tensors:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        yield spec, body[start : start + spec.size_bytes].copy().view(dtype)
        start += spec.size_bytes


def _read_planes(block: Block, body: Planes) -> Iterator[tuple[TensorSpec, Array]]:
    planes = dict(zip(DTYPE_BYTES, cut(body, _block_groups(block)), strict=True))
    at = dict.fromkeys(DTYPE_BYTES, 0)
    for spec in block.tensors:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        yield spec, take(planes[spec.dtype], at[spec.dtype], spec.elements, dtype)
        at[spec.dtype] += spec.elements

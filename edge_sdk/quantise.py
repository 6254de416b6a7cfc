"""Changes to one or two bits per element: a uniform quantiser with subtractive dither.

Theory of operation
-------------------
A tensor's change is divided by a step near its rms, and its elements are rounded to whole steps.
Rounding alone is biased where the step is large; so both sides know a random number u per element,
uniform in half a step around 0: the sender rounds x + u, the receiver subtracts u. The error is
then uniform in half a step, whatever x is, independent of it and of mean 0: the mean over devices
goes to the true mean, and no error feedback has to be stored. The relative distortion is

    D = (step / rms)^2 / 12        0.23 at 1.65 rms, 3 at 6 rms

Everything is an integer. u = k / 256 steps, k a random odd number from -127 to 127, and the step is
m * 2^e with m in 8..15, so that it follows the rms within 6 %. The receiver adds up

    (256 q - k) * m * 2^(e - 8)     where q = floor((2 round(128 x / step) + k + 128) / 256)

What costs bits is q. Given k it has less entropy than on its own: where x is small it is -1 or 0
with a negative k, 0 or 1 with a positive one, and nearly always 0 with a k near 0. zstd's Huffman
coder knows only bytes, so the bytes are made to say it. ``lanes`` elements, 8 apart, share a byte,
and the place in the byte is the class of k: of 2 lanes one is negative and the other positive, of 4
lanes each has a quarter of the range. Which has which is random (r: lane l has class l xor r). So
a table of bytes is a table given k; and neighbours, which change about alike in
size and direction, share an entry.

=========  ====  =====  ======  ===================================
form       bits  lanes  levels  step
=========  ====  =====  ======  ===================================
BALANCED   4     2      -7..7   1.65 rms
TINY       2     4      -1..1   6 rms
=========  ====  =====  ======  ===================================

The highest code is an ESCAPE: the element is sent apart, exactly. By Chebyshev's inequality these
are few, which bounds a payload's length.

All work is on 64-bit words of 8 one-byte elements, in runs of 65,536 elements, which stay in the
cache. A run draws the words of k from SFC64, whose raw bits are the same in every release of numpy;
r is the class of the first lane's k, which the other lanes' highest bits are made to follow. A
tensor starts a new run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RUN_ELEMENTS = 1 << 16
SEED_BYTES = 8
# A step is m * 2**e; one byte says which, and 0 that the whole tensor did not change.
UNCHANGED = 0
MIN_EXPONENT = -22
# The unit of a decoded value is m * 2**(e - FRACTION_BITS): at least 2**-30.
FRACTION_BITS = 8

Words = NDArray[np.uint64]

_WORD = np.dtype("<u8")
_CLIP = 16_000.0  # doubled, and k and 128 added, it is still an int16
_NOWHERE = np.zeros(0, np.intp)
_ONES = 0x0101010101010101
_LOWEST = {2: 0x55, 4: 0x11}  # the lowest bit of each code of a byte


@dataclass(frozen=True)
class Form:
    """How levels are packed.

    swaps:    the exchanges of lanes that r's bits order, as (shift, mask) within a byte.
    max_step: no level times it is a change over 128.
    """

    bits: int
    step_per_rms: float
    max_step: int
    swaps: tuple[tuple[int, int], ...]

    @property
    def last_step_code(self) -> int:
        """The byte for the largest step."""
        return 8 * (self.max_step.bit_length() - 4 - MIN_EXPONENT) + 1

    @property
    def lanes(self) -> int:
        """Elements in a byte."""
        return 8 // self.bits

    @property
    def halvings(self) -> tuple[int, ...]:
        """Shifts after which the lowest bit of a code says whether all of its bits are set."""
        return tuple(self.bits >> place for place in range(1, self.bits.bit_length()))

    @property
    def peak(self) -> int:
        """Largest level."""
        return (1 << (self.bits - 1)) - 1

    @property
    def escape(self) -> int:
        """The code of an element that is sent apart."""
        return (1 << self.bits) - 1

    @property
    def distortion(self) -> float:
        """Mean square error over the mean square of the change."""
        return self.step_per_rms**2 / 12

    def groups(self, elements: int) -> int:
        """Words of packed codes for so many elements."""
        return -(-elements // (8 * self.lanes))

    def max_escapes(self, elements: int) -> int:
        """Twice as many elements as can be larger than every level, the step being what it is."""
        return elements // 16

    def code_bytes(self, elements: int) -> int:
        """Bytes of packed codes for so many elements."""
        return 8 * self.groups(elements)


BALANCED = Form(bits=4, step_per_rms=1.65, max_step=16, swaps=((4, 0x0F),))
TINY = Form(bits=2, step_per_rms=6.0, max_step=64, swaps=((2, 0x33), (4, 0x0F)))


def step_code(form: Form, rms: float) -> int:
    """The byte for the step that suits a tensor of this rms."""
    if rms == 0.0:
        return UNCHANGED
    fraction, exponent = math.frexp(min(form.step_per_rms * rms, form.max_step))
    code = 8 * (exponent - 4 - MIN_EXPONENT) + round(16 * fraction) - 7
    return max(code, UNCHANGED + 1)


def step_parts(code: int) -> tuple[int, int]:
    """(m, e) of the step m * 2**e that a byte means."""
    return 8 + (code - 1) % 8, MIN_EXPONENT + (code - 1) // 8


def generator(seed: bytes) -> np.random.SFC64:
    """Where both sides draw the dither of a block from."""
    return np.random.SFC64(int.from_bytes(seed, "little"))


def runs(elements: int) -> Iterator[slice]:
    """A tensor's runs, as slices of its elements."""
    for start in range(0, elements, RUN_ELEMENTS):
        yield slice(start, min(start + RUN_ELEMENTS, elements))


class Dither(NamedTuple):
    """The random numbers of one run: k of each element, and the r of each byte."""

    k: NDArray[np.int8]
    r: Words


def draw(form: Form, groups: int, raw: np.random.SFC64) -> Dither:
    """The dither of the next run, of ``groups`` packed words."""
    top = 8 - len(form.swaps)
    k = raw.random_raw(groups * form.lanes).astype(_WORD, copy=False)
    k |= _all(1)
    by_lane = k.reshape(groups, form.lanes)
    classes = by_lane[:, 0] & _all(0xFF << top & 0xFF)
    for lane in range(1, form.lanes):
        by_lane[:, lane] &= _all(0xFF >> len(form.swaps))
        by_lane[:, lane] |= classes ^ _all(lane << top)
    classes >>= np.uint64(top)
    return Dither(k.view(np.int8), classes)


def quantise(
    form: Form, change: NDArray[np.float32], code: int, dither: Dither
) -> tuple[Words, NDArray[np.intp]]:
    """Packed codes of one run, and the places of those elements that must be sent apart."""
    m, e = step_parts(code)
    scaled = np.empty(dither.k.size, np.float32)
    scaled[change.size :] = 0.0
    fine = scaled[: change.size]
    np.multiply(change, np.float32(math.ldexp(1.0, 7 - e) / m), out=fine)
    if not float(np.einsum("i,i->", fine, fine)) < _CLIP**2:
        np.clip(fine, -_CLIP, _CLIP, out=fine)
    q = np.rint(scaled, out=scaled).astype(np.int16)
    q <<= 1
    q += dither.k
    q += 128
    q >>= 8
    q += form.peak
    # As an unsigned byte everything beyond the levels, on either side, is larger than any code.
    codes = q.astype(np.uint8)
    places = np.flatnonzero(codes > 2 * form.peak)
    codes[places] = form.escape
    return _pack(form, codes, dither.r), places


def dequantise(
    form: Form, packed: Words, dither: Dither, *, escapes: bool
) -> tuple[NDArray[np.int16], NDArray[np.intp]]:
    """256 q - k of each element of one run, and the places of escapes, where it is 0.

    Both include the padding of the run; escapes are looked for only when told to.
    """
    codes = _unpack(form, packed, dither.r)
    value = codes.astype(np.int16)
    value -= form.peak
    value <<= 8
    value -= dither.k
    places = np.flatnonzero(codes == form.escape) if escapes else _NOWHERE
    value[places] = 0
    return value, places


def escaped(form: Form, packed: Words) -> int:
    """How many codes are escapes, padding included."""
    count = 0
    for part in runs(packed.size):
        marks = packed[part].copy()
        for shift in form.halvings:
            marks &= marks >> np.uint64(shift)
        marks &= _all(_LOWEST[form.bits])
        if marks.any():
            count += int(np.unpackbits(marks[marks != 0].view(np.uint8)).sum())
    return count


def _pack(form: Form, codes: NDArray[np.uint8], r: Words) -> Words:
    by_lane = codes.view(_WORD).reshape(r.size, form.lanes)
    packed = by_lane[:, 0].copy()
    for lane in range(1, form.lanes):
        packed |= by_lane[:, lane] << np.uint64(form.bits * lane)
    return _swap(form, packed, r)


def _unpack(form: Form, packed: Words, r: Words) -> NDArray[np.uint8]:
    packed = _swap(form, packed.copy(), r)
    by_lane = np.empty((r.size, form.lanes), _WORD)
    for lane in range(form.lanes):
        np.right_shift(packed, np.uint64(form.bits * lane), out=by_lane[:, lane])
    by_lane &= _all(form.escape)
    return by_lane.reshape(-1).view(np.uint8)


def _swap(form: Form, packed: Words, r: Words) -> Words:
    """Exchange, in each byte, the lanes that r's bits say; its own inverse."""
    for bit, (shift, mask) in enumerate(form.swaps):
        moved = packed >> np.uint64(shift)
        moved ^= packed
        ordered = r if form.lanes == 2 else r >> np.uint64(bit) & _all(1)
        moved &= ordered * np.uint64(mask)
        packed ^= moved
        moved <<= np.uint64(shift)
        packed ^= moved
    return packed


def _all(byte: int) -> np.uint64:
    """A word of eight such bytes."""
    word: np.uint64 = np.uint64(byte * _ONES)
    return word

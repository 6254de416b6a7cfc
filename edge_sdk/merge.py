"""Exact, order-independent, mergeable sums of partial updates.

num += weight * change and den += weight, per block, in integers: float changes in units of 2**-30,
integer tensors in units of 1. Integer addition has no order, so any sequence of devices and any
number of workers give the same bytes. Publishing divides once, in float64:

    new = base + num / den   where den > 0,   base bit for bit where nobody trained

With lossless and fp16 that is the mean, exactly. Where the codec quantises a tensor, the mean has
noise of its own; there num / den is rounded to whole steps of near a 32nd of its rms (`grid.py`),
noise of at most 1/6000 of its power, so that a device that has the base can be told the new version
in about 7 bits per parameter.

However a change was encoded, it decodes to q * factor of at most 2**37 units: floats and escapes
are checked against 128, the highest level times the largest step of its codec is at most 120, and
integers are checked against 2**37. The samples of a sum stay below 2**26, so a numerator, and a
weight times a factor, stays below 2**63. A block is trained and sent as a whole, hence one
denominator for all its tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edge_sdk import grid
from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.codec import (
    GRID_EXPONENT,
    INTEGER_LIMIT,
    Tensors,
    chunks,
    decode_change,
    flat_array,
    quantises,
)
from edge_sdk.errors import ProtocolMisuse, StateError, WrongUpdate
from edge_sdk.frames import Array, Buffer

MAX_SAMPLES = (1 << 26) - 1
_HEADER = struct.Struct("<qq")
_STORED = np.dtype("<i8")
# What makes elements of the next version of their base, their numerators and the samples.
_Mean = Callable[[Array, NDArray[np.int64], int], Array]


class BlockSum:
    """Sum of the changes of one block over the devices that trained it.

    samples: the denominator, sum of the weights. devices: how many changes were added.
    """

    __slots__ = ("_numerators", "block", "devices", "samples")

    def __init__(
        self, block: Block, numerators: NDArray[np.int64], samples: int, devices: int
    ) -> None:
        self.block = block
        self.samples = samples
        self.devices = devices
        self._numerators = numerators

    @classmethod
    def zero(cls, block: Block) -> BlockSum:
        """The sum of nobody."""
        return cls(block, np.zeros(_elements(block), np.int64), 0, 0)

    def numerators(self) -> dict[str, NDArray[np.int64]]:
        """Numerator of each tensor, in units of 2**-30 for floats and 1 for integers; read-only."""
        views = {}
        for spec, part in _parts(self.block):
            view = self._numerators[part].reshape(spec.shape)
            view.flags.writeable = False
            views[spec.name] = view
        return views

    def fold(self, codec: str, payload: Buffer, weight: int) -> None:
        """Add one device's encoded change of the block, all of it or, with WrongUpdate, nothing.

        Works part by part: beside the payload's own content nothing of its size is made.
        """
        samples = self._samples_with(weight)
        scratch = np.empty(0, np.int64)
        for where, q, factor in decode_change(codec, self.block, payload):
            scratch = scratch if q.size <= scratch.size else np.empty(q.size, np.int64)
            addend = scratch[: q.size]
            np.multiply(q, np.int64(factor * weight), out=addend, dtype=np.int64)
            self._numerators[where] += addend
        self.samples = samples
        self.devices += 1

    def merge(self, other: BlockSum) -> None:
        """Add another worker's sum of the same block; WrongUpdate over the limit of samples."""
        if other.block != self.block:
            raise ProtocolMisuse(
                f"sums of block {self.block.name!r} and of block {other.block.name!r} do not add up"
            )
        if other.devices:
            samples = self._samples_with(other.samples)
            self._numerators += other._numerators
            self.samples = samples
            self.devices += other.devices

    def to_bytes(self) -> bytes:
        """samples, devices and all numerators as little-endian int64."""
        numerators = self._numerators.astype(_STORED, copy=False)
        return _HEADER.pack(self.samples, self.devices) + numerators.tobytes()

    @classmethod
    def from_bytes(cls, block: Block, blob: bytes) -> BlockSum:
        """The sum that ``to_bytes`` wrote; StateError if the blob cannot be one of this block."""
        size_bytes = _HEADER.size + _STORED.itemsize * _elements(block)
        if len(blob) != size_bytes:
            raise StateError(
                f"stored sum of block {block.name!r} has {len(blob)} bytes, expected {size_bytes}; "
                "restore the ledger from a backup"
            )
        samples, devices = _HEADER.unpack_from(blob)
        if not (0 <= devices <= samples <= MAX_SAMPLES and (samples == 0) == (devices == 0)):
            raise StateError(
                f"stored sum of block {block.name!r} claims {samples} samples of {devices} "
                f"devices, the limit is {MAX_SAMPLES}; restore the ledger from a backup"
            )
        numerators = np.frombuffer(blob, _STORED, offset=_HEADER.size).astype(np.int64)
        limit = samples * INTEGER_LIMIT
        if numerators.size and not -limit <= numerators.min() <= numerators.max() <= limit:
            raise StateError(
                f"stored sum of block {block.name!r} holds numerators from {numerators.min()} to "
                f"{numerators.max()}, the limit is +-{limit}; restore the ledger from a backup"
            )
        return cls(block, numerators, samples, devices)

    def publish(self, base: Tensors, codec: str = "lossless") -> dict[str, Array]:
        """The next version of the block; ``base``'s own arrays where nobody trained it.

        codec: of the changes that were added; with those that quantise, in whole steps.
        """
        if self.samples == 0:
            return {spec.name: base[spec.name] for spec in self.block.tensors}
        new = {}
        for spec, part in _parts(self.block):
            old, numerators = flat_array(self.block, spec, base), self._numerators[part]
            mean: _Mean = _float_mean if spec.is_float else _integer_mean
            if quantises(codec, spec) and spec.dtype != "float16":
                mean = _stepped_mean(numerators, self.samples)
            published = np.empty_like(old)
            for piece in chunks(spec.elements):
                published[piece] = mean(old[piece], numerators[piece], self.samples)
            new[spec.name] = published.reshape(spec.shape)
        return new

    def _samples_with(self, weight: int) -> int:
        total = self.samples + weight
        if weight < 1 or total > MAX_SAMPLES:
            raise WrongUpdate(
                f"block {self.block.name!r}: a weight of {weight} samples on top of "
                f"{self.samples}, the limits are 1 and {MAX_SAMPLES} in all; the update is dropped"
            )
        return total


def _elements(block: Block) -> int:
    return sum(spec.elements for spec in block.tensors)


def _parts(block: Block) -> list[tuple[TensorSpec, slice]]:
    """Each tensor with its place in the vector of numerators."""
    parts, start = [], 0
    for spec in block.tensors:
        parts.append((spec, slice(start, start + spec.elements)))
        start += spec.elements
    return parts


def _float_mean(old: Array, numerators: NDArray[np.int64], samples: int) -> Array:
    mean = numerators * math.ldexp(1.0, GRID_EXPONENT) / samples + old
    if old.dtype != np.float16:
        return mean
    largest = float(np.finfo(old.dtype).max)
    return np.clip(mean, -largest, largest)


def _stepped_mean(numerators: NDArray[np.int64], samples: int) -> _Mean:
    """What publishes a tensor in whole steps of its mean change; exactly, where none fits."""
    means = (numerators[part] * (math.ldexp(1.0, GRID_EXPONENT) / samples)
             for part in chunks(numerators.size))  # fmt: skip
    code = grid.step_code(sum(float(np.dot(mean, mean)) for mean in means), numerators.size)
    if code is None:
        return _float_mean
    steps = math.ldexp(1.0, GRID_EXPONENT) / grid.step_of(code)

    def mean(old: Array, numerators: NDArray[np.int64], samples: int) -> Array:
        return grid.moved(old, np.rint(numerators * steps / samples), code)

    return mean


def _integer_mean(old: Array, numerators: NDArray[np.int64], samples: int) -> Array:
    mean = np.rint(numerators / samples).astype(np.int64)
    if old.dtype == np.bool_:
        return np.clip(old + mean, 0, 1)
    wide, limits = old.astype(np.int64), np.iinfo(old.dtype)
    room = np.iinfo(np.int64)
    # Only a hostile update leads outside; the first clip keeps the addition itself from wrapping.
    mean = np.clip(mean, room.min - np.minimum(wide, 0), room.max - np.maximum(wide, 0))
    inside: Array = np.clip(wide + mean, limits.min, limits.max)
    return inside

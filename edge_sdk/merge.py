"""Exact, order-independent, mergeable sums of partial updates.

num += weight * change and den += weight, per block, in integers: float changes in units of 2**-30,
integer tensors in units of 1. Integer addition has no order, so any sequence of devices and any
number of workers give the same bytes. Publishing divides once, in float64:

    new = base + num / den   where den > 0,   base bit for bit where nobody trained

One change is at most 2**37 units and the samples of a sum stay below 2**26, so a numerator stays
below 2**63. A block is trained and sent as a whole, hence one denominator for all its tensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.codec import (
    GRID_EXPONENT,
    INTEGER_LIMIT,
    LIMIT_EXPONENT,
    Array,
    Tensors,
    chunks,
    flat_array,
)
from edge_sdk.errors import ProtocolMisuse, StateError, WrongUpdate

MAX_SAMPLES = (1 << 26) - 1
_HEADER = struct.Struct("<qq")
_STORED = np.dtype("<i8")

Change = tuple[TensorSpec, Array, int]


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

    def add(self, changes: Iterable[Change], weight: int) -> None:
        """Fold one device's change of the whole block, all of it or, with WrongUpdate, nothing."""
        samples = self._samples_with(weight)
        folds = []
        for number, (spec, q, exponent) in enumerate(changes):
            if number >= len(self.block.tensors) or spec != self.block.tensors[number]:
                raise WrongUpdate(
                    f"block {self.block.name!r}: tensor {spec.name!r} at place {number} is not "
                    "the model's; the update is dropped"
                )
            folds.append((q.reshape(-1), weight << _shift(self.block, spec, q, exponent)))
        if len(folds) != len(self.block.tensors):
            raise WrongUpdate(
                f"block {self.block.name!r}: an update of {len(folds)} tensors, the block has "
                f"{len(self.block.tensors)}; the update is dropped"
            )
        for (_, part), (flat, factor) in zip(_parts(self.block), folds, strict=True):
            _fold(self._numerators[part], flat, factor)
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

    def publish(self, base: Tensors) -> dict[str, Array]:
        """The next version of the block; ``base``'s own arrays where nobody trained it."""
        if self.samples == 0:
            return {spec.name: base[spec.name] for spec in self.block.tensors}
        new = {}
        for spec, part in _parts(self.block):
            old, numerators = flat_array(self.block, spec, base), self._numerators[part]
            mean = _float_mean if spec.is_float else _integer_mean
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


def _shift(block: Block, spec: TensorSpec, q: Array, exponent: int) -> int:
    """Bits from q's unit up to the numerator's, once q is known to be within the limits."""
    lowest, highest = (GRID_EXPONENT, LIMIT_EXPONENT) if spec.is_float else (0, 0)
    where = f"block {block.name!r}, tensor {spec.name!r}"
    if q.shape != spec.shape or q.dtype.kind != "i" or not lowest <= exponent <= highest:
        raise WrongUpdate(
            f"{where}: got {q.dtype} {q.shape} with exponent {exponent}, expected integers "
            f"{spec.shape} with {lowest} to {highest}; the update is dropped"
        )
    shift = exponent - lowest
    limit = INTEGER_LIMIT >> shift
    # int8 on a fine step cannot reach the limit, which saves a pass over the commonest updates.
    if np.iinfo(q.dtype).max >= limit and q.size and not (-limit <= q.min() and q.max() <= limit):
        raise WrongUpdate(
            f"{where}: changes from {q.min()} to {q.max()} in units of 2**{exponent}, "
            f"the limit is +-{limit}; the update is dropped"
        )
    return shift


def _fold(numerators: NDArray[np.int64], q: Array, factor: int) -> None:
    for part in chunks(numerators.size):
        numerators[part] += np.multiply(q[part], np.int64(factor), dtype=np.int64)


def _float_mean(old: Array, numerators: NDArray[np.int64], samples: int) -> Array:
    mean = numerators * math.ldexp(1.0, GRID_EXPONENT) / samples + old
    if old.dtype != np.float16:
        return mean
    largest = float(np.finfo(old.dtype).max)
    return np.clip(mean, -largest, largest)


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

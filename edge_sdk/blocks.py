"""A model described as chains of blocks: names, shapes, dtypes, roles and hashes. No torch.

A block is the smallest unit a device trains and exchanges. Its content is the raw little-endian
bytes of its tensors in the order listed, and its address is the SHA-256 of that content, so the
same weights have the same name on every device, in every version.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_sdk.errors import TaskError

DTYPE_BYTES = {
    "float32": 4,
    "float16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "uint8": 1,
    "bool": 1,
}
FLOAT_DTYPES = frozenset({"float32", "float16", "float64"})
TRUNK = "trunk"
MAX_BLOCKS = 512
# Every name stands twice in an offer, and the offer of the largest model has to be one message.
MAX_NAMES_BYTES = 28_000
MAX_TENSOR_ELEMENTS = 1 << 31

MAX_NAME_BYTES = 128
NAME = r"^[A-Za-z0-9_.\-]+\Z"
Name = Annotated[str, Meta(min_length=1, max_length=MAX_NAME_BYTES, pattern=NAME)]
Dimension = Annotated[int, Meta(ge=0, le=MAX_TENSOR_ELEMENTS)]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor of the ``state_dict``: a parameter, or a buffer that is merged but not trained."""

    name: Name
    shape: Annotated[tuple[Dimension, ...], Meta(max_length=8)]
    dtype: Literal["float32", "float16", "float64", "int64", "int32", "uint8", "bool"]
    kind: Literal["parameter", "buffer"] = "parameter"

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Raw size in bytes."""
        return self.elements * DTYPE_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether changes to it live on the fixed-point grid instead of the integers."""
        return self.dtype in FLOAT_DTYPES


class Block(msgspec.Struct, frozen=True, kw_only=True):
    """A named, ordered group of a model's tensors, the unit of training and exchange."""

    name: Name
    tensors: tuple[TensorSpec, ...]
    chain: str = "main"

    @property
    def params(self) -> int:
        """Number of trainable parameters."""
        return sum(t.elements for t in self.tensors if t.kind == "parameter")

    @property
    def size_bytes(self) -> int:
        """Raw size of the content, bytes."""
        return sum(t.size_bytes for t in self.tensors)


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All blocks of a model, ordered from the input to the output.

    Blocks of several chains are interleaved so that a block stands after everything it reads;
    the last block is the head. ``digest`` names the architecture, not the weights.
    """

    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.blocks) <= MAX_BLOCKS:
            raise TaskError(
                f"a model needs 1 to {MAX_BLOCKS} blocks, this one has {len(self.blocks)}"
            )
        _check_names("block", self.names)
        _check_names("tensor", [t.name for block in self.blocks for t in block.tensors])
        names_bytes = sum(len(name) for name in self.names)
        if names_bytes > MAX_NAMES_BYTES:
            raise TaskError(
                f"the names of all blocks take {names_bytes} bytes, the limit is "
                f"{MAX_NAMES_BYTES}: name the blocks in the task, shorter"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Block names from the input to the output."""
        return tuple(block.name for block in self.blocks)

    @property
    def params(self) -> int:
        """Number of trainable parameters of the whole model."""
        return sum(block.params for block in self.blocks)

    @property
    def size_bytes(self) -> int:
        """Raw size of the whole model, bytes."""
        return sum(block.size_bytes for block in self.blocks)

    def block(self, name: str) -> Block:
        """The block called ``name``; TaskError when there is none."""
        for block in self.blocks:
            if block.name == name:
                return block
        raise TaskError(f"no block {name!r} in this model; it has {', '.join(self.names)}")

    def digest(self) -> str:
        """SHA-256 over names, shapes and dtypes, hex."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()


def content_hash(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256, hex, of a block's raw tensor bytes given in the block's order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _check_names(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if len(name) > MAX_NAME_BYTES or re.match(NAME, name) is None:
            raise TaskError(
                f"{what} name {name[:200]!r} must be 1 to {MAX_NAME_BYTES} of the characters "
                "A-Z, a-z, 0-9, '_', '.' and '-'"
            )
        if name in seen:
            raise TaskError(f"{what} {name!r} is listed twice: blocks must not overlap")
        seen.add(name)


def levels(spec: ModelSpec) -> tuple[tuple[str, ...], ...]:
    """Blocks by depth, from the input to the output; the head is the last level.

    Blocks of parallel chains with the same distance from the end of their chain share a level; a
    model of one chain has one block a level.
    """
    chains: dict[str, list[str]] = {}
    for block in spec.blocks:
        chains.setdefault(block.chain, []).append(block.name)
    trunk = chains.pop(TRUNK, [])
    deepest = max((len(names) for names in chains.values()), default=0)
    rows = [
        tuple(names[-distance] for names in chains.values() if distance <= len(names))
        for distance in range(deepest, 0, -1)
    ]
    return tuple(rows) + tuple((name,) for name in trunk)

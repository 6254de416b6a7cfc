"""Blocks, tensors and hostile frames for the tests of what becomes bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import zstandard
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.frames import Buffer

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


def frame(body: Buffer) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(body))


def rle_frame(claimed_bytes: int, blocks: int) -> bytes:
    """A zstd frame that names ``claimed_bytes`` and holds ``blocks`` runs of 128 KiB each."""
    run = ((131072 << 3) | 0b010).to_bytes(3, "little") + b"\0"
    last = ((131072 << 3) | 0b011).to_bytes(3, "little") + b"\0"
    header = b"\x28\xb5\x2f\xfd\xa0" + claimed_bytes.to_bytes(4, "little")
    return header + run * (blocks - 1) + last


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

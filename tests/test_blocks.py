"""A model as chains of blocks: sizes, digests, levels, and models that cannot be."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.blocks import (
    DTYPE_BYTES,
    MAX_BLOCKS,
    TRUNK,
    Block,
    ModelSpec,
    TensorSpec,
    content_hash,
    levels,
)
from edge_sdk.errors import TaskError


def block(name: str, chain: str = "main", /, **changes: object) -> Block:
    tensor = TensorSpec(name=f"{name}.weight", shape=(2, 3), dtype="float32")
    return Block(name=name, chain=chain, tensors=(msgspec.structs.replace(tensor, **changes),))


def model(*places: tuple[str, str]) -> ModelSpec:
    return ModelSpec(blocks=tuple(block(name, chain) for name, chain in places))


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_sizes_of_a_tensor(dtype: str) -> None:
    tensor = TensorSpec(name="t", shape=(3, 5), dtype=dtype)  # type: ignore[arg-type]
    assert tensor.elements == 15
    assert tensor.size_bytes == 15 * DTYPE_BYTES[dtype]
    assert tensor.is_float == dtype.startswith("float")


def test_a_tensor_without_axes_has_one_element_and_an_empty_one_none() -> None:
    assert TensorSpec(name="t", shape=(), dtype="int64").size_bytes == 8
    assert TensorSpec(name="t", shape=(4, 0), dtype="int64").elements == 0


def test_buffers_have_bytes_but_are_no_parameters() -> None:
    weight = TensorSpec(name="w", shape=(10,), dtype="float32")
    mean = TensorSpec(name="mean", shape=(5,), dtype="float32", kind="buffer")
    steps = TensorSpec(name="steps", shape=(), dtype="int64", kind="buffer")
    spec = ModelSpec(blocks=(Block(name="a", tensors=(weight, mean, steps)), block("b")))
    assert (spec.block("a").params, spec.block("a").size_bytes) == (10, 68)
    assert (spec.params, spec.size_bytes) == (16, 92)


def test_a_block_is_found_by_its_name() -> None:
    spec = model(("a", "main"), ("b", "main"))
    assert spec.names == ("a", "b")
    assert spec.block("b") is spec.blocks[1]
    with pytest.raises(TaskError, match=r"no block 'c' in this model; it has a, b"):
        spec.block("c")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((), "a model needs 1 to 512 blocks, this one has 0"),
        (tuple(block(f"b{n}") for n in range(MAX_BLOCKS + 1)), "this one has 513"),
        ((block("a"), block("a", name="other")), "block 'a' is listed twice"),
        ((block("a"), block("b", name="a.weight")), "tensor 'a.weight' is listed twice"),
        ((block("my block"),), "block name 'my block' must be 1 to 128 of the characters"),
        ((block(""),), "block name '' must be 1 to 128"),
        ((block("a\n"),), r"block name 'a\\n' must be 1 to 128"),
        ((block("a" * 129),), "must be 1 to 128"),
        ((block("a", name="größe"),), "tensor name 'größe' must be 1 to 128"),
    ],
)
def test_impossible_models_are_refused(blocks: tuple[Block, ...], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        ModelSpec(blocks=blocks)


def test_the_digest_names_the_architecture() -> None:
    spec = model(("a", "main"), ("b", "main"))
    assert spec.digest() == model(("a", "main"), ("b", "main")).digest()
    assert msgspec.convert(msgspec.to_builtins(spec), ModelSpec).digest() == spec.digest()
    others = [
        model(("b", "main"), ("a", "main")),
        model(("a", "left"), ("b", "main")),
        ModelSpec(blocks=(block("a"), block("b", shape=(3, 2)))),
        ModelSpec(blocks=(block("a"), block("b", dtype="float16"))),
        ModelSpec(blocks=(block("a"), block("b", kind="buffer"))),
        ModelSpec(blocks=(block("a"), block("b", name="b.bias"))),
    ]
    assert len({spec.digest(), *(other.digest() for other in others)}) == 7


@given(content=st.binary(max_size=200), cuts=st.lists(st.integers(0, 200), max_size=5))
def test_the_hash_of_a_content_does_not_depend_on_its_parts(
    content: bytes, cuts: list[int]
) -> None:
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    parts = [memoryview(content)[a:b] for a, b in pairwise(edges)]
    assert content_hash(parts) == hashlib.sha256(content).hexdigest()


def test_levels_of_one_chain_are_its_blocks() -> None:
    spec = model(("embed", "main"), ("body", "main"), ("head", "main"))
    assert levels(spec) == (("embed",), ("body",), ("head",))


def test_levels_of_several_chains_are_counted_from_their_ends() -> None:
    spec = model(
        *(("a0", "a"), ("a1", "a"), ("a2", "a")),
        *(("b0", "b"), ("b1", "b")),
        *(("join", TRUNK), ("head", TRUNK)),
    )
    assert levels(spec) == (("a0",), ("a1", "b0"), ("a2", "b1"), ("join",), ("head",))


def test_levels_of_a_trunk_alone() -> None:
    assert levels(model(("a", TRUNK), ("b", TRUNK))) == (("a",), ("b",))


@given(
    st.lists(st.sampled_from(["a", "b", "c", TRUNK]), min_size=1, max_size=20).map(
        lambda chains: model(*((f"n{place}", chain) for place, chain in enumerate(chains)))
    )
)
def test_levels_hold_every_block_once_and_keep_each_chain_in_order(spec: ModelSpec) -> None:
    rows = levels(spec)
    flat = [name for row in rows for name in row]
    assert sorted(flat) == sorted(spec.names)
    for chain in {b.chain for b in spec.blocks}:
        members = [b.name for b in spec.blocks if b.chain == chain]
        assert [name for name in flat if name in members] == members
        assert all(sum(name in members for name in row) <= 1 for row in rows)

"""Versions on disk: addressed by content, checked on every load, never torn."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk import codec
from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.errors import DamagedBlock, MalformedMessage, Refused, StateError
from edge_sdk.wire import MAX_PIECE_BYTES, BlockEntry
from reference_server.versions import Manifest, VersionStore, model_sha256

BLOCK = Block(
    name="stem",
    tensors=(
        TensorSpec(name="stem.weight", shape=(16, 8), dtype="float32"),
        TensorSpec(name="stem.half", shape=(3,), dtype="float16"),
        TensorSpec(name="stem.count", shape=(), dtype="int64", kind="buffer"),
        TensorSpec(name="stem.mask", shape=(5,), dtype="bool", kind="buffer"),
    ),
)
HEAD = Block(name="head", tensors=(TensorSpec(name="head.bias", shape=(4,), dtype="float32"),))


def stem(seed: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    return {
        "stem.weight": rng.normal(size=(16, 8)).astype(np.float32),
        "stem.half": rng.normal(size=3).astype(np.float16),
        "stem.count": np.array(7, np.int64),
        "stem.mask": np.array([True, False, True, True, False]),
    }


def head(value: float = 0.5) -> dict[str, np.ndarray[Any, Any]]:
    return {"head.bias": np.full(4, value, np.float32)}


def manifest(blocks: tuple[BlockEntry, ...], version: int = 1, parent: str = "") -> Manifest:
    return Manifest(
        job="job", version=version, round=version, parent_sha=parent, created_s=1.5, blocks=blocks
    )


@pytest.fixture
def store(tmp_path: Path) -> VersionStore:
    return VersionStore(tmp_path / "model")


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_block_comes_back_bit_for_bit(store: VersionStore) -> None:
    entry = store.put_block(BLOCK, stem())
    assert entry.sha256 == codec.block_hash(BLOCK, stem())
    assert entry.raw_bytes == BLOCK.size_bytes
    loaded = store.load_block(BLOCK, entry.sha256)
    for name, array in stem().items():
        assert loaded[name].dtype == array.dtype
        assert loaded[name].shape == array.shape
        assert loaded[name].tobytes() == array.tobytes()


def test_pieces_make_up_what_a_device_decodes(store: VersionStore) -> None:
    entry = store.put_block(BLOCK, stem())
    starts = range(0, entry.size_bytes, 100)
    payload = b"".join(store.read_piece(entry.sha256, start, 100) for start in starts)
    assert len(payload) == entry.size_bytes
    decoded = codec.decode_block(BLOCK, payload)
    assert codec.block_hash(BLOCK, decoded) == entry.sha256


def test_equal_weights_are_one_file_written_once(store: VersionStore) -> None:
    first = store.put_block(BLOCK, stem())
    os.utime(store.block_path(first.sha256), ns=(1, 1))
    os.utime(store.wire_path(first.sha256), ns=(1, 1))
    assert store.put_block(BLOCK, stem()) == first
    assert store.block_path(first.sha256).stat().st_mtime_ns == 1
    assert store.wire_path(first.sha256).stat().st_mtime_ns == 1
    assert store.put_block(BLOCK, stem(2)) != first


@pytest.mark.parametrize("suffix", ["safetensors", "wire"])
def test_putting_a_block_again_repairs_a_damaged_file(store: VersionStore, suffix: str) -> None:
    entry = store.put_block(BLOCK, stem())
    path = store.block_path(entry.sha256).with_suffix(f".{suffix}")
    intact = path.read_bytes()
    flip(path, -1)
    store.put_block(BLOCK, stem())
    assert path.read_bytes() == intact


@pytest.mark.parametrize("at", [0, 4, 12, 60, -1])
def test_a_flipped_bit_is_never_loaded(store: VersionStore, at: int) -> None:
    entry = store.put_block(BLOCK, stem())
    flip(store.block_path(entry.sha256), at)
    with pytest.raises(DamagedBlock, match=r"block 'stem'"):
        store.load_block(BLOCK, entry.sha256)


def test_a_truncated_or_missing_block_is_named(store: VersionStore) -> None:
    entry = store.put_block(BLOCK, stem())
    path = store.block_path(entry.sha256)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedBlock, match="cannot be read"):
        store.load_block(BLOCK, entry.sha256)
    path.write_bytes(b"")
    with pytest.raises(DamagedBlock, match="cannot be read"):
        store.load_block(BLOCK, entry.sha256)
    path.unlink()
    with pytest.raises(DamagedBlock, match="is missing"):
        store.load_block(BLOCK, entry.sha256)


def test_the_file_of_another_block_is_refused_by_its_tensors(store: VersionStore) -> None:
    entry, other = store.put_block(BLOCK, stem()), store.put_block(HEAD, head())
    store.block_path(entry.sha256).write_bytes(store.block_path(other.sha256).read_bytes())
    with pytest.raises(DamagedBlock, match=r"does not have the model's tensors: head.bias, stem\."):
        store.load_block(BLOCK, entry.sha256)


def test_a_device_can_ask_for_nothing_but_pieces_of_blocks(store: VersionStore) -> None:
    entry = store.put_block(BLOCK, stem())
    with pytest.raises(Refused, match="ask for the hashes of the latest offer"):
        store.read_piece("0" * 64, 0, 100)
    with pytest.raises(MalformedMessage, match="is not a SHA-256"):
        store.read_piece("../../../../etc/passwd", 0, 100)
    for offset, length in ((-1, 10), (entry.size_bytes, 10), (0, 0), (0, MAX_PIECE_BYTES + 1)):
        with pytest.raises(MalformedMessage, match=f"which has {entry.size_bytes} bytes"):
            store.read_piece(entry.sha256, offset, length)


def test_a_manifest_comes_back_and_is_checked(store: VersionStore) -> None:
    one = manifest((store.put_block(BLOCK, stem()), store.put_block(HEAD, head())))
    assert len(store.write_manifest(one)) == 64
    assert store.load_manifest(1) == one
    assert store.load_manifest(1, one.model_sha256) == one
    assert one.block("head").raw_bytes == 16
    with pytest.raises(DamagedBlock, match="version 1 has no block 'tail'"):
        one.block("tail")
    with pytest.raises(DamagedBlock, match="the ledger has 0000"):
        store.load_manifest(1, "0" * 64)
    with pytest.raises(DamagedBlock, match="the manifest of version 2 is missing"):
        store.load_manifest(2)


def test_the_model_hash_depends_on_weights_alone(store: VersionStore) -> None:
    stem_entry, head_entry = store.put_block(BLOCK, stem()), store.put_block(HEAD, head())
    first = manifest((stem_entry, head_entry))
    second = manifest((stem_entry, head_entry), version=9, parent="x")
    assert first.model_sha256 == second.model_sha256 == model_sha256((stem_entry, head_entry))
    assert model_sha256((head_entry, stem_entry)) != first.model_sha256


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xff", b'{"job": "job", "version": "1"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    store = VersionStore(tmp_path)
    (tmp_path / "versions" / "1.json").write_bytes(content)
    with pytest.raises(DamagedBlock, match=r"1\.json: the manifest cannot be read"):
        store.load_manifest(1)


def test_a_manifest_under_another_number_is_refused(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.write_manifest(manifest((), version=1))
    (tmp_path / "versions" / "1.json").rename(tmp_path / "versions" / "2.json")
    with pytest.raises(DamagedBlock, match="it describes version 1, not 2"):
        store.load_manifest(2)


def test_the_latest_version_is_the_highest_number(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    assert store.latest() is None
    for version in (0, 2, 10):
        store.write_manifest(manifest((), version=version))
    (tmp_path / "versions" / "notes.json").write_text("{}")
    (tmp_path / "versions" / ".tmp-1-0-99.json").write_text("{}")
    assert store.versions() == [0, 2, 10]
    assert store.latest() == 10
    (tmp_path / "blocks" / ".tmp-1-1-x").write_text("")
    assert store.sweep() == 2


def test_pruning_keeps_every_block_a_kept_version_needs(store: VersionStore) -> None:
    old, new = store.put_block(BLOCK, stem(1)), store.put_block(BLOCK, stem(2))
    shared = store.put_block(HEAD, head())
    store.write_manifest(manifest((old, shared), version=1))
    store.write_manifest(manifest((new, shared), version=2))
    assert store.prune({2}) == 3
    assert store.versions() == [2]
    assert not store.block_path(old.sha256).exists()
    assert store.load_block(BLOCK, new.sha256)
    assert store.load_block(HEAD, shared.sha256)
    with pytest.raises(DamagedBlock):
        store.prune({7})
    assert store.versions() == [2]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(StateError, match=r"cannot create .*model/blocks: Not a directory"):
        VersionStore(tmp_path / "model")

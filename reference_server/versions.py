"""Versions of the global model on disk: blocks addressed by content, one manifest per version.

A block is kept twice under its hash: as ``.safetensors``, which anything can open, and as
``.wire``, the very bytes devices fetch in pieces. A block that a version did not change is the
same file. Beside one that it did change there may be a ``.delta``, named by both hashes: the
difference to the block it replaced, for devices that hold that one. Manifests are written last, so
what a manifest names is on the disk before it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from edge_sdk import codec
from edge_sdk.blocks import Block
from edge_sdk.errors import DamagedBlock, MalformedMessage, Refused
from edge_sdk.store import (
    disk_errors,
    make_directory,
    read_piece,
    sweep_temporary,
    write_atomically,
)
from edge_sdk.wire import MAX_PIECE_BYTES, BlockEntry, Delta, DeviceId, Round

MAX_MANIFEST_BYTES = 1 << 20
# A difference larger than this share of its block is not worth a second file.
MAX_DELTA_SHARE = 0.75

Tensors = Mapping[str, np.ndarray[Any, Any]]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One published version; ``parent_sha`` is its parent's ``model_sha256``, empty for version 0.

    created_s: wall time of publication.
    """

    job: DeviceId
    version: Round
    round: Round
    parent_sha: str
    created_s: float
    blocks: tuple[BlockEntry, ...]

    @property
    def model_sha256(self) -> str:
        """The model's address: equal for equal weights, whenever and wherever they were made."""
        return model_sha256(self.blocks)

    def block(self, name: str) -> BlockEntry:
        """The entry of the block called ``name``; DamagedBlock when the version has none."""
        for entry in self.blocks:
            if entry.name == name:
                return entry
        raise DamagedBlock(f"version {self.version} has no block {name!r}")


def model_sha256(blocks: Sequence[BlockEntry]) -> str:
    """SHA-256, hex, over the names and hashes of a model's blocks in their order."""
    text = "".join(f"{entry.name} {entry.sha256}\n" for entry in blocks)
    return hashlib.sha256(text.encode()).hexdigest()


class VersionStore:
    """All versions of one job under one directory; memory needed: one block."""

    def __init__(self, directory: Path) -> None:
        self._blocks = make_directory(directory / "blocks")
        self._versions = make_directory(directory / "versions")

    def put_block(self, block: Block, tensors: Tensors) -> BlockEntry:
        """Store a block's weights and return its entry; intact files with its hash are reused."""
        sha256 = codec.block_hash(block, tensors)
        if not self._intact(block, sha256):
            # The wire form goes first: where the .safetensors is, both are.
            write_atomically(self.wire_path(sha256), codec.encode_block(block, tensors))
            own = {s.name: np.asarray(tensors[s.name], order="C") for s in block.tensors}
            write_atomically(self.block_path(sha256), safetensors.numpy.save(own))
        return BlockEntry(
            name=block.name,
            sha256=sha256,
            size_bytes=self._size_bytes(self.wire_path(sha256)),
            raw_bytes=block.size_bytes,
        )

    def put_delta(self, block: Block, old: BlockEntry, new: BlockEntry, tensors: Tensors) -> None:
        """Store the difference of a block's weights to a version it replaces, where it is small."""
        payload = codec.encode_block_delta(block, self.load_block(block, old.sha256), tensors)
        if len(payload) <= MAX_DELTA_SHARE * new.size_bytes:
            base = bytes.fromhex(old.sha256)[:8]
            write_atomically(self._delta_path(new.sha256, base), payload)

    def deltas(self, entries: Sequence[BlockEntry]) -> dict[Path, Delta]:
        """The differences that lead to these blocks, one for each at most, with their files."""
        numbers = {entry.sha256: number for number, entry in enumerate(entries)}
        found = {}
        for path in sorted(self._blocks.glob("*.delta")):
            sha256, base, _ = path.name.split(".")
            number = numbers.pop(sha256, None)
            if number is not None:
                with disk_errors("read", path):
                    payload = path.read_bytes()
                found[path] = Delta(
                    block=number,
                    base=bytes.fromhex(base),
                    sha256=hashlib.sha256(payload).hexdigest(),
                    size_bytes=len(payload),
                )
        return found

    def load_block(self, block: Block, sha256: str) -> dict[str, np.ndarray[Any, Any]]:
        """A block's tensors by name; DamagedBlock unless they are all there and have the hash."""
        path = self.block_path(sha256)
        if not path.is_file():
            raise DamagedBlock(f"{path}: block {block.name!r} is missing")
        try:
            with disk_errors("read", path):
                tensors = safetensors.numpy.load(path.read_bytes())
        except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise DamagedBlock(f"{path}: block {block.name!r} cannot be read: {error}") from None
        _check_against(block, tensors, path)
        actual = codec.block_hash(block, tensors)
        if actual != sha256:
            raise DamagedBlock(f"{path}: block {block.name!r} has hash {actual}, not its name's")
        return tensors

    def block_path(self, sha256: str) -> Path:
        """Where a block's ``.safetensors`` file is."""
        return self._blocks / f"{_checked(sha256)}.safetensors"

    def wire_path(self, sha256: str) -> Path:
        """Where a block's travelling form is."""
        return self._blocks / f"{_checked(sha256)}.wire"

    def read_piece(self, sha256: str, offset_bytes: int, length_bytes: int) -> bytes:
        """Bytes of a block's travelling form, fewer than asked only at its end.

        Refused when no such block is here, MalformedMessage when the piece lies outside it.
        """
        path = self.wire_path(sha256)
        if not path.is_file():
            raise Refused(f"no block {sha256} here: ask for the hashes of the latest offer")
        size_bytes = self._size_bytes(path)
        if not (0 <= offset_bytes < size_bytes and 1 <= length_bytes <= MAX_PIECE_BYTES):
            raise MalformedMessage(
                f"piece of {length_bytes} bytes at {offset_bytes} of block {sha256}, which has "
                f"{size_bytes} bytes; a piece has at most {MAX_PIECE_BYTES}"
            )
        return read_piece(path, offset_bytes, length_bytes)

    def write_manifest(self, manifest: Manifest) -> str:
        """Store a manifest durably; returns the SHA-256, hex, of its bytes."""
        data = msgspec.json.encode(manifest)
        write_atomically(self._manifest_path(manifest.version), data)
        return hashlib.sha256(data).hexdigest()

    def load_manifest(self, version: int, model_sha: str | None = None) -> Manifest:
        """The manifest of a version; DamagedBlock when damaged, missing or of another model."""
        path = self._manifest_path(version)
        if not path.is_file():
            raise DamagedBlock(f"{path}: the manifest of version {version} is missing")
        try:
            with disk_errors("read", path), path.open("rb") as file:
                manifest = msgspec.json.decode(file.read(MAX_MANIFEST_BYTES), type=Manifest)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DamagedBlock(f"{path}: the manifest cannot be read: {error}") from None
        if manifest.version != version:
            raise DamagedBlock(f"{path}: it describes version {manifest.version}, not {version}")
        if model_sha is not None and manifest.model_sha256 != model_sha:
            raise DamagedBlock(
                f"{path}: it describes model {manifest.model_sha256}, the ledger has {model_sha}"
            )
        return manifest

    def versions(self) -> list[int]:
        """Numbers of the versions with a manifest, ascending."""
        return sorted(int(p.stem) for p in self._versions.glob("*.json") if p.stem.isdecimal())

    def latest(self) -> int | None:
        """The highest version with a manifest."""
        return max(self.versions(), default=None)

    def sweep(self) -> int:
        """At start: delete what interrupted writes left; returns how many files."""
        return sweep_temporary(self._blocks) + sweep_temporary(self._versions)

    def prune(self, keep: Collection[int]) -> int:
        """Delete all versions but those in ``keep``, and the blocks only they have; files deleted.

        Nothing is deleted when a manifest to keep cannot be read.
        """
        needed = {entry.sha256 for v in keep for entry in self.load_manifest(v).blocks}
        doomed = [self._manifest_path(v) for v in self.versions() if v not in keep]
        doomed += [path for path in sorted(self._blocks.iterdir()) if path.name[:64] not in needed]
        with disk_errors("prune", self._blocks):
            for path in doomed:
                path.unlink(missing_ok=True)
        return len(doomed)

    def _manifest_path(self, version: int) -> Path:
        return self._versions / f"{version:d}.json"

    def _delta_path(self, sha256: str, base: bytes) -> Path:
        return self._blocks / f"{_checked(sha256)}.{base.hex()}.delta"

    def _intact(self, block: Block, sha256: str) -> bool:
        if not (self.block_path(sha256).is_file() and self.wire_path(sha256).is_file()):
            return False
        try:
            self.load_block(block, sha256)
            payload = self.wire_path(sha256).read_bytes()
            return codec.block_hash(block, codec.decode_block(block, payload)) == sha256
        except DamagedBlock:
            return False

    def _size_bytes(self, path: Path) -> int:
        with disk_errors("read", path):
            return path.stat().st_size


def _check_against(block: Block, tensors: Tensors, path: Path) -> None:
    expected = {spec.name: (spec.shape, spec.dtype) for spec in block.tensors}
    actual = {name: (array.shape, str(array.dtype)) for name, array in tensors.items()}
    if actual != expected:
        wrong = sorted(
            name
            for name in expected.keys() | actual.keys()
            if expected.get(name) != actual.get(name)
        )
        raise DamagedBlock(
            f"{path}: block {block.name!r} does not have the model's tensors: "
            f"{', '.join(wrong)[:200]}"
        )


def _checked(sha256: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise MalformedMessage(f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
    return sha256

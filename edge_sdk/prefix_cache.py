"""What frozen blocks computed of each sample, kept in memory or in files that survive a kill.

An entry is a directory named by the hash of all its content depends on, so what is in it can be
absent or damaged but never stale. Its rows lie in one file, samples in order, view after view;
``marks`` is a log of which rows are there and of their checksums. Rows are flushed to the disk
before their marks are appended, and every row read is compared with its checksum: one that does
not have it counts as missing. Files are read with ``pread``, not mapped: pages of a map would count
as the process's memory, and a file cut short would kill it.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_sdk.errors import MIB, ConfigError, ProtocolMisuse
from edge_sdk.store import disk_errors, make_directory, write_atomically

FLUSH_BYTES = 8 * MIB
MAX_HEADER_BYTES = 1 << 20
_MARK = np.dtype([("row", "<u4"), ("crc", "<u4")])
_LENGTH = struct.Struct("<I")

Array = np.ndarray[Any, Any]


class NoRoom(ConfigError):
    """What is to be kept does not fit where it is to be kept."""


class Key(msgspec.Struct, frozen=True, kw_only=True):
    """All that kept rows depend on.

    blocks: the frozen blocks in order, with the hashes of their weights.
    model:  hash of the model's structure.
    data:   hash of the samples.
    views:  augmented views of each sample.
    """

    task: str
    blocks: tuple[tuple[str, str], ...]
    model: str
    data: str
    engine: str
    dtype: str
    views: int

    def digest(self) -> str:
        """SHA-256 over all of it, hex."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def outdates(self, other: Key) -> bool:
        """Whether ``other`` is of the same task with other weights of a block they share."""
        ours = dict(self.blocks)
        return self.task == other.task and any(
            ours.get(name, sha256) != sha256 for name, sha256 in other.blocks
        )


class Column(msgspec.Struct, frozen=True, kw_only=True):
    """One output of a sample; ``kept`` is how it is stored."""

    shape: tuple[int, ...]
    dtype: str
    kept: str

    @property
    def size_bytes(self) -> int:
        """Stored size of one sample."""
        return math.prod(self.shape) * np.dtype(self.kept).itemsize


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How many rows there are, and what one holds."""

    rows: int
    columns: tuple[Column, ...]

    @property
    def row_bytes(self) -> int:
        """Size of a row."""
        return sum(column.size_bytes for column in self.columns)

    @property
    def size_bytes(self) -> int:
        """Size of all rows with their marks."""
        return self.rows * (self.row_bytes + _MARK.itemsize)

    def pack(self, outputs: Sequence[Array]) -> Array:
        """Rows of bytes, one a sample; NoRoom when a number is too large for how it is kept."""
        parts = []
        for column, output in zip(self.columns, outputs, strict=True):
            with np.errstate(over="ignore"):
                kept = np.ascontiguousarray(output, dtype=column.kept)
            if column.kept != column.dtype and np.isinf(kept).any() > np.isinf(output).any():
                raise NoRoom(
                    f"an output of the frozen blocks, {np.abs(output).max():.3g}, is above what "
                    f"{column.kept} holds; keep it as {column.dtype}"
                )
            parts.append(kept.reshape(len(kept), -1).view(np.uint8))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def unpack(self, rows: Array) -> list[Array]:
        """The outputs of these rows, in the dtype they were computed in."""
        outputs, at = [], 0
        for column in self.columns:
            part = np.ascontiguousarray(rows[:, at : at + column.size_bytes])
            kept = part.view(column.kept).reshape(len(rows), *column.shape)
            outputs.append(kept.astype(column.dtype, copy=False))
            at += column.size_bytes
        return outputs


class MemoryRows:
    """Rows kept in memory."""

    def __init__(self, layout: Layout, limit_bytes: int) -> None:
        _check_room(layout, limit_bytes, "memory")
        self.layout = layout
        self._there = np.zeros(layout.rows, bool)
        self._data = np.empty((layout.rows, layout.row_bytes), np.uint8)

    def missing(self, rows: Array) -> Array:
        """Those of ``rows`` that are not there, each once."""
        return np.unique(rows[~self._there[rows]])

    def write(self, rows: Array, outputs: Sequence[Array]) -> None:
        """Keep outputs, one sample a row."""
        self._data[rows] = self.layout.pack(outputs)
        self._there[rows] = True

    def read(self, rows: Array) -> list[Array]:
        """Outputs of rows that are there."""
        return self.layout.unpack(self._data[rows])

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return bool(self._there.all())

    def flush(self) -> None:
        """Nothing in memory survives anything."""

    def close(self) -> None:
        """Free the memory."""
        self._data = np.empty((0, self.layout.row_bytes), np.uint8)
        self._there[:] = False


class DiskRows:
    """Rows kept in an entry's files. One process at a time."""

    def __init__(self, directory: Path, layout: Layout) -> None:
        """Open the files of an entry made for this layout."""
        self.layout = layout
        self._path, self._marks_path = directory / "rows", directory / "marks"
        with disk_errors("open", self._path):
            self._file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            self._marks = os.open(self._marks_path, os.O_RDWR | os.O_CLOEXEC)
        self._there = np.zeros(layout.rows, bool)
        self._crc = np.zeros(layout.rows, np.uint32)
        self._unmarked: list[Array] = []
        self._read_marks()

    def missing(self, rows: Array) -> Array:
        """Those of ``rows`` that are not there, each once."""
        return np.unique(rows[~self._there[rows]])

    @property
    def complete(self) -> bool:
        """Whether every row is there."""
        return bool(self._there.all())

    def present(self, most: int) -> Array:
        """The first rows that are there."""
        return np.flatnonzero(self._there)[:most]

    def write(self, rows: Array, outputs: Sequence[Array]) -> None:
        """Keep outputs, one sample a row."""
        packed = self.layout.pack(outputs)
        with disk_errors("write", self._path):
            for row, data in zip(rows.tolist(), packed, strict=True):
                self._crc[row] = zlib.crc32(data)
                _write_all(self._file, data, row * self.layout.row_bytes)
        self._there[rows] = True
        self._unmarked.append(np.array(rows))
        if sum(map(len, self._unmarked)) * self.layout.row_bytes >= FLUSH_BYTES:
            self.flush()

    def read(self, rows: Array) -> list[Array] | None:
        """Outputs of rows that are there; None when some are damaged, which now are missing."""
        data = np.empty((len(rows), self.layout.row_bytes), np.uint8)
        sound = True
        with disk_errors("read", self._path):
            for row, into in zip(rows.tolist(), data, strict=True):
                got = os.preadv(self._file, [into.data], row * self.layout.row_bytes)
                if got != len(into) or zlib.crc32(into.data) != self._crc[row]:
                    self._there[row] = sound = False
        return self.layout.unpack(data) if sound else None

    def flush(self) -> None:
        """What was written survives a power cut: rows first, then the marks that vouch for them."""
        if not self._unmarked:
            return
        marks = np.empty(sum(map(len, self._unmarked)), _MARK)
        marks["row"] = np.concatenate(self._unmarked)
        marks["crc"] = self._crc[marks["row"]]
        body = _LENGTH.pack(len(marks)) + marks.tobytes()
        with disk_errors("flush", self._path):
            os.fdatasync(self._file)
            end = os.lseek(self._marks, 0, os.SEEK_END)
            _write_all(self._marks, body + _LENGTH.pack(zlib.crc32(body)), end)
            os.fdatasync(self._marks)
        self._unmarked = []

    def close(self) -> None:
        """Close the files; what was not flushed is computed again."""
        if self._file >= 0:
            os.close(self._file)
            os.close(self._marks)
            self._file = -1

    def _read_marks(self) -> None:
        """Take the log up to its first torn or impossible record, and cut the rest off."""
        with disk_errors("read", self._marks_path):
            log = self._marks_path.read_bytes()
            at = 0
            while (record := _record(log, at)) is not None:
                marks, end = record
                if len(marks) and int(marks["row"].max()) >= self.layout.rows:
                    break
                self._there[marks["row"]] = True
                self._crc[marks["row"]] = marks["crc"]
                at = end
            os.ftruncate(self._marks, at)


def _record(log: bytes, at: int) -> tuple[Array, int] | None:
    """The marks of the record at ``at`` and where the next begins; None when it is not whole."""
    if at + _LENGTH.size > len(log):
        return None
    count = _LENGTH.unpack_from(log, at)[0]
    end = at + _LENGTH.size + count * _MARK.itemsize
    if end + _LENGTH.size > len(log):
        return None
    if zlib.crc32(memoryview(log)[at:end]) != _LENGTH.unpack_from(log, end)[0]:
        return None
    marks = np.frombuffer(log, _MARK, count, at + _LENGTH.size)
    return marks, end + _LENGTH.size


def _write_all(file: int, data: bytes | Array, offset: int) -> None:
    view = memoryview(data if isinstance(data, bytes) else data.data)
    view = view.cast("B") if len(data) else memoryview(b"")
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


class _Header(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry is of; written last, so an entry without it was never finished."""

    format: int = 1
    key: Key
    layout: Layout


class PrefixCache:
    """The entries in a directory. One process at a time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def open(self, key: Key, layout: Layout, limit_bytes: int) -> DiskRows:
        """The rows kept under ``key``, as many as there are.

        Entries with outdated weights are deleted, then others, longest unused first, until all
        entries take at most ``limit_bytes``. NoRoom when this one alone takes more.
        """
        make_directory(self._directory)
        _check_room(layout, limit_bytes, str(self._directory))
        home = self._directory / key.digest()
        with disk_errors("clean", self._directory):
            for path in self._directory.iterdir():
                header = _read_header(path)
                if header is None or key.outdates(header.key):
                    _delete(path)
            if not self._fits(home, key, layout):
                _delete(home)
                self._evict(limit_bytes - layout.size_bytes)
                self._create(home, key, layout)
            os.utime(home / "header.json")
        return DiskRows(home, layout)

    def clear(self, key: Key) -> None:
        """Forget what is kept under ``key``."""
        with disk_errors("delete", self._directory):
            _delete(self._directory / key.digest())

    def used_bytes(self) -> int:
        """What all entries take, counting files that are not full yet as full."""
        with disk_errors("read", self._directory):
            return sum(_size(path) for path in self._directory.glob("*"))

    def _fits(self, home: Path, key: Key, layout: Layout) -> bool:
        header = _read_header(home)
        if header is None or header.key != key or header.layout != layout:
            return False
        rows = home / "rows"
        whole = rows.is_file() and rows.stat().st_size == layout.rows * layout.row_bytes
        return whole and (home / "marks").is_file()

    def _evict(self, allowed_bytes: int) -> None:
        entries = [path for path in self._directory.iterdir() if path.is_dir()]
        entries.sort(key=lambda path: ((path / "header.json").stat().st_mtime_ns, path))
        used_bytes = self.used_bytes()
        for path in entries:
            if used_bytes > allowed_bytes:
                used_bytes -= _size(path)
                _delete(path)

    def _create(self, home: Path, key: Key, layout: Layout) -> None:
        make_directory(home)
        with (home / "rows").open("wb") as file:
            file.truncate(layout.rows * layout.row_bytes)
        (home / "marks").write_bytes(b"")
        header = msgspec.json.encode(_Header(key=key, layout=layout))
        write_atomically(home / "header.json", header)


def _check_room(layout: Layout, limit_bytes: int, where: str) -> None:
    if layout.row_bytes == 0 or layout.rows >= 1 << 32:
        raise ProtocolMisuse(f"{layout.rows} rows of {layout.row_bytes} bytes cannot be kept")
    if layout.size_bytes > limit_bytes:
        raise NoRoom(
            f"what the frozen blocks compute of {layout.rows} samples takes "
            f"{layout.size_bytes / MIB:.1f} MiB, {limit_bytes / MIB:.1f} MiB are allowed in {where}"
        )


def _read_header(home: Path) -> _Header | None:
    try:
        with (home / "header.json").open("rb") as file:
            return msgspec.json.decode(file.read(MAX_HEADER_BYTES), type=_Header)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*"))


def _delete(path: Path) -> None:
    """The header goes first: an entry that lost anything else counts as never finished."""
    if path.is_dir() and not path.is_symlink():
        (path / "header.json").unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

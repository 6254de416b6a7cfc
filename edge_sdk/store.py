"""Files that survive a power cut: atomic writes, the device's identity, block cache and spool.

Every write goes to a temporary file in the same directory, is flushed to the disk, renamed over
the target, and the directory is flushed too: after a crash a file has its old content or its new
one. Nothing here knows tensors; contents are bytes named by a SHA-256.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import random
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Annotated

import msgspec
from msgspec import Meta

from edge_sdk.errors import DamagedBlock, ProtocolMisuse, StateError
from edge_sdk.wire import DEVICE_ID, MAX_TRANSFER_BYTES, DeviceId, Round, Sha256

TEMPORARY_PREFIX = ".tmp-"
MAX_HEADER_BYTES = 4096
MAX_DAMAGED_FILES = 16
READ_CHUNK_BYTES = 1 << 20

Data = bytes | bytearray | memoryview

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
_counter = itertools.count()


def write_atomically(path: Path, data: Data, mode: int = 0o600, *, durable: bool = True) -> None:
    """Put ``data`` at ``path``, or leave what was there; StateError on any disk error.

    durable: what is there when this returns survives a power cut. Without it a power cut may leave
    a torn file, for content whose reader notices and can get it again.
    """
    temporary = _temporary(path)
    with disk_errors("write", path):
        try:
            with os.fdopen(
                os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb"
            ) as file:
                file.write(data)
                if durable:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            flush_directory(path.parent)


def _temporary(path: Path) -> Path:
    return path.parent / f"{TEMPORARY_PREFIX}{os.getpid()}-{next(_counter)}-{path.name}"


def _write_new(path: Path, chunks: Iterable[Data]) -> dict[str, str | int]:
    """Write a new file, durably but for its name; the size and SHA-256 of its content."""
    digest, size_bytes = hashlib.sha256(), 0
    with (
        disk_errors("write", path),
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
    ):
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": digest.hexdigest(), "size_bytes": size_bytes}


def flush_directory(directory: Path) -> None:
    """Make renames and deletions in ``directory`` survive a power cut."""
    with disk_errors("flush", directory):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def make_directory(directory: Path) -> Path:
    """Create ``directory``, readable by its owner only, and return it."""
    with disk_errors("create", directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def sweep_temporary(directory: Path) -> int:
    """Delete what interrupted writes left in ``directory``; returns how many files."""
    with disk_errors("sweep", directory):
        leftovers = list(directory.glob(f"{TEMPORARY_PREFIX}*"))
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
    return len(leftovers)


def read_piece(path: Path, offset_bytes: int, length_bytes: int) -> bytes:
    """At most ``length_bytes`` of ``path`` from ``offset_bytes``; less only at its end."""
    if offset_bytes < 0 or length_bytes < 0:
        raise ProtocolMisuse(f"{path}: piece at {offset_bytes} of {length_bytes} bytes")
    with disk_errors("read", path):
        handle = os.open(path, os.O_RDONLY)
        try:
            return os.pread(handle, length_bytes, offset_bytes)
        finally:
            os.close(handle)


def check_sha256(sha256: str) -> str:
    """``sha256`` itself when it may be a file name; ProtocolMisuse otherwise."""
    if not _SHA256.match(sha256):
        raise ProtocolMisuse(f"{sha256[:80]!r} is not a SHA-256 in lower-case hex")
    return sha256


class DirectoryLock:
    """Sole use of a state directory while this process lives; a kill -9 frees it too."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lock"
        with disk_errors("lock", self._path):
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(self._handle, 0)
                os.pwrite(self._handle, str(os.getpid()).encode(), 0)
            except BlockingIOError:
                holder = os.pread(self._handle, 32, 0).decode(errors="replace") or "unknown"
                os.close(self._handle)
                raise StateError(
                    f"{directory} is in use by process {holder}: "
                    "stop that process, or choose another state directory"
                ) from None
            except OSError:
                os.close(self._handle)
                raise

    def release(self) -> None:
        """Let another process use the directory; may be called twice."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


@dataclass(frozen=True)
class Identity:
    """Who this device is, for ever: the id in its state directory."""

    device: str

    @classmethod
    def load_or_create(
        cls, directory: Path, *, stem: str, rng: random.Random, device: str | None = None
    ) -> Identity:
        """The stored id, else ``device``, else ``stem`` with a random suffix; stored at once.

        StateError when the stored id is malformed, or is another one than ``device``.
        """
        path = make_directory(directory) / "device-id"
        if not path.exists():
            created = device if device is not None else f"{_plain(stem)}-{rng.getrandbits(32):08x}"
            _check_device(created, "the device id asked for")
            write_atomically(path, created.encode() + b"\n")
        with disk_errors("read", path):
            stored = path.read_bytes()[:200].decode(errors="replace").strip()
        _check_device(stored, f"the device id in {path}")
        if device is not None and device != stored:
            raise StateError(
                f"{directory} belongs to device {stored!r}, not to {device!r}: "
                "choose another state directory, or leave the id out"
            )
        return cls(stored)


class BlockCache:
    """Blocks a device holds, as ``<sha256>.block`` files in the form they travelled in.

    A file's name is the hash of the decoded tensors, so only who decodes it can tell that it is
    damaged; that reader calls ``drop`` and the block is fetched again. A block may also be here as
    ``<sha256>.<base>.delta``, its difference to another one that is here; ``base`` is the start of
    that one's hash. Its first reader makes a block of the two and puts that.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = make_directory(directory)

    def sweep(self) -> int:
        """At start, before anybody puts: delete what interrupted writes left."""
        return sweep_temporary(self._directory)

    def path(self, sha256: str) -> Path:
        """Where the block with this hash is, or would be."""
        return self._directory / f"{check_sha256(sha256)}.block"

    def has(self, sha256: str) -> bool:
        """Whether the block is here, or its difference and what that is to."""
        return self.path(sha256).is_file() or self.delta(sha256) is not None

    def delta(self, sha256: str) -> tuple[Path, str] | None:
        """Of a block that is here as a difference, that file and the hash of its base."""
        if self.path(sha256).is_file():
            return None
        for path in sorted(self._directory.glob(f"{sha256}.*.delta")):
            base = self.starting_with(path.name.split(".")[1])
            if base:
                return path, base
        return None

    def delta_path(self, sha256: str, base: bytes) -> Path:
        """Where the difference of a block to another one is, or would be."""
        return self._directory / f"{check_sha256(sha256)}.{base.hex()}.delta"

    def starting_with(self, digits: str) -> str:
        """The hash that starts so of a whole block that is here; empty: there is none."""
        return next((path.stem for path in self._directory.glob(f"{digits}*.block")), "")

    def stem(self, sha256: str) -> Path:
        """Name, without an ending, of the files of a block that is being fetched."""
        return self._directory / check_sha256(sha256)

    def put(self, sha256: str, payload: Data) -> Path:
        """Store a block; not durably, for the server still has it and flash wears out.

        If it was here as a difference, that and its base have done their work.
        """
        delta = self.delta(sha256)
        write_atomically(self.path(sha256), payload, durable=False)
        if delta is not None:
            with disk_errors("delete", delta[0]):
                delta[0].unlink(missing_ok=True)
                self.path(delta[1]).unlink(missing_ok=True)
        return self.path(sha256)

    def read(self, sha256: str) -> bytes:
        """A block's travelling form; DamagedBlock when it is not here."""
        path = self.path(sha256)
        if not path.is_file():
            raise DamagedBlock(f"{path}: the block is missing; it has to be fetched again")
        with disk_errors("read", path):
            return path.read_bytes()

    def drop(self, sha256: str) -> None:
        """Forget a block: what is here of it did not have its hash."""
        with disk_errors("delete", self.path(sha256)):
            for path in (self.path(sha256), *self._directory.glob(f"{sha256}.*.delta")):
                path.unlink(missing_ok=True)

    def evict(self, keep: Collection[str], limit_bytes: int = 0) -> int:
        """Delete blocks outside ``keep``, oldest first, until at most ``limit_bytes`` are used.

        Returns the bytes freed. Blocks in ``keep`` stay even above the limit, as does what a
        difference in it needs.
        """
        stems = set(keep)
        for path, base in filter(None, map(self.delta, keep)):
            stems |= {path.stem, base}
        with disk_errors("evict from", self._directory):
            paths = chain(self._directory.glob("*.block"), self._directory.glob("*.delta"))
            files = [(path, path.stat()) for path in paths]
            used_bytes = sum(stat.st_size for _, stat in files)
            freed_bytes = 0
            for path, stat in sorted(files, key=lambda item: (item[1].st_mtime_ns, item[0])):
                if path.stem not in stems and used_bytes - freed_bytes > limit_bytes:
                    path.unlink(missing_ok=True)
                    freed_bytes += stat.st_size
        return freed_bytes


class Newest:
    """The highest version of a job that this device has taken up, for ever: it never goes back."""

    def __init__(self, directory: Path, job: str) -> None:
        """StateError when the file is there and cannot be read."""
        self.path = make_directory(directory) / f"newest-version.{job}"
        self.version = -1
        if self.path.is_file():
            with disk_errors("read", self.path):
                text = self.path.read_bytes()[:32].strip()
            if not text.isdigit():
                raise StateError(
                    f"{self.path} holds {text!r}, not a version: delete it if no server of job "
                    f"{job!r} could offer this device an older model than it had"
                )
            self.version = int(text)

    def raise_to(self, version: int) -> bool:
        """Whether a version is not older than the highest; if it is higher, it is that now."""
        if version > self.version:
            write_atomically(self.path, f"{version}\n".encode())
            self.version = version
        return version == self.version


class SpoolEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One update on disk that has no receipt yet; ``created_s`` is wall time."""

    job: DeviceId
    round: Round
    ticket: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_TRANSFER_BYTES)]
    created_s: float


class Spool:
    """Updates without a receipt, one per job and round; the header names the body's hash.

    The body is written first, so an entry exists exactly when its header does, and replacing the
    header replaces the entry. One process puts entries, one reads and removes them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = make_directory(directory)
        self._damaged = directory / "damaged"
        self._reports: list[str] = []

    def put(
        self,
        job: str,
        round_number: int,
        ticket: bytes,
        body: Data | Iterable[Data],
        created_s: float,
    ) -> SpoolEntry:
        """Keep an update, whole or in chunks, until its receipt; durable when this returns."""
        chunks = (body,) if isinstance(body, (bytes, bytearray, memoryview)) else body
        temporary = _temporary(self._directory / "update")
        try:
            fields = {
                "job": job,
                "round": round_number,
                "ticket": ticket.hex(),
                "created_s": created_s,
                **_write_new(temporary, chunks),
            }
            entry = msgspec.convert(fields, SpoolEntry)
            with disk_errors("write", self._body(entry)):
                os.replace(temporary, self._body(entry))
        except msgspec.ValidationError as error:
            raise ProtocolMisuse(f"spool entry of round {round_number}: {error}") from None
        finally:
            with suppress(OSError):
                temporary.unlink()
        flush_directory(self._directory)
        write_atomically(self._header(entry), msgspec.json.encode(entry))
        return entry

    @contextmanager
    def scratch(self) -> Iterator[IO[bytes]]:
        """A file for what is in the making; gone afterwards, whatever happens."""
        with (
            disk_errors("write", self._directory),
            tempfile.TemporaryFile(dir=self._directory, prefix=TEMPORARY_PREFIX) as file,
        ):
            yield file

    def entries(self) -> list[SpoolEntry]:
        """Every intact entry, oldest first, each body read and hashed.

        What is damaged or foreign is moved to ``damaged/`` and reported, never returned.
        """
        with disk_errors("read", self._directory):
            headers = sorted(self._directory.glob("*.json"))
            found = [entry for path in headers if (entry := self._checked(path)) is not None]
            known = {self._body(e).name for e in found} | {self._header(e).name for e in found}
            for path in sorted(self._directory.iterdir()):
                if path.suffix not in (".json", ".body") and _is_foreign(path, known):
                    self._set_aside(path, "it is no file of the spool")
        return sorted(found, key=lambda entry: (entry.created_s, entry.job, entry.round))

    def read_piece(self, entry: SpoolEntry, offset_bytes: int, length_bytes: int) -> bytes:
        """Bytes of an entry's body; less than asked only at its end."""
        return read_piece(self._body(entry), offset_bytes, length_bytes)

    def remove(self, entry: SpoolEntry) -> None:
        """Forget an update that has its receipt; the header goes first. May be called twice."""
        with disk_errors("delete", self._header(entry)):
            if self._read_header(self._header(entry)) == entry:
                self._header(entry).unlink(missing_ok=True)
            self._body(entry).unlink(missing_ok=True)
        flush_directory(self._directory)

    def sweep(self) -> int:
        """At start, before anybody puts: delete temporary files and bodies without a header."""
        swept = sweep_temporary(self._directory)
        named = {self._body(entry).name for entry in self.entries()}
        with disk_errors("sweep", self._directory):
            orphans = [path for path in self._directory.glob("*.body") if path.name not in named]
            for path in orphans:
                path.unlink(missing_ok=True)
        return swept + len(orphans)

    def take_reports(self) -> list[str]:
        """What was set aside since the last call, one sentence each."""
        reports, self._reports = self._reports, []
        return reports

    def _header(self, entry: SpoolEntry) -> Path:
        return self._directory / f"{entry.job}.{entry.round}.json"

    def _body(self, entry: SpoolEntry) -> Path:
        # The hash makes a second put for a round a second file, so that the header switches.
        return self._directory / f"{entry.job}.{entry.round}.{entry.sha256[:16]}.body"

    def _checked(self, path: Path) -> SpoolEntry | None:
        entry = self._read_header(path)
        if entry is None or self._header(entry) != path:
            self._set_aside(path, "its header cannot be read")
            return None
        body = self._body(entry)
        if not body.is_file():
            self._set_aside(path, f"its body {body.name} is missing")
            return None
        if body.stat().st_size != entry.size_bytes or _file_sha256(body) != entry.sha256:
            self._set_aside(path, "its body does not have its hash")
            self._set_aside(body, "it does not have the hash it is named by")
            return None
        return entry

    def _read_header(self, path: Path) -> SpoolEntry | None:
        try:
            with path.open("rb") as file:
                return msgspec.json.decode(file.read(MAX_HEADER_BYTES + 1), type=SpoolEntry)
        except (FileNotFoundError, IsADirectoryError, msgspec.MsgspecError, UnicodeDecodeError):
            return None

    def _set_aside(self, path: Path, why: str) -> None:
        target = make_directory(self._damaged) / path.name
        os.replace(path, target)
        old = sorted(self._damaged.iterdir(), key=lambda item: item.lstat().st_ctime_ns)
        for surplus in old[:-MAX_DAMAGED_FILES]:
            with suppress(OSError):
                surplus.unlink()
        self._reports.append(f"{path} was moved to {self._damaged} and is not sent: {why}")


def _is_foreign(path: Path, known: Collection[str]) -> bool:
    return path.name not in known and path.name != "damaged" and not path.name.startswith(".")


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _plain(stem: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", stem.lower()).strip("-")[:48] or "device"


def _check_device(device: str, what: str) -> None:
    if not re.match(DEVICE_ID, device):
        raise StateError(
            f"{what} is {device!r}; it must be 1 to 64 of the characters a-z, 0-9 and '-'. "
            "Correct it, or delete the file to get a new one"
        )


@contextmanager
def disk_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an error of the file system under ``path`` into a StateError with the next step."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            step = "free some space there, or choose a state directory on another disk"
        elif error.errno in _READ_ONLY:
            step = "make it writable for this user, or choose another state directory"
        else:
            step = "check the disk, or choose another state directory"
        reason = error.strerror or str(error)
        raise StateError(f"cannot {action} {path}: {reason}; {step}") from error

"""The protocol: every topic, message, field, limit and version number, spelled only here.

Theory of operation. One job lives under ``edge/v1/<job>``. A device speaks on ``u/<device>`` and
listens on ``d/<device>``; the pieces of its updates go to ``x/<device>``, apart, so that no control
message queues behind them. The server keeps a small retained ``head`` that says which incarnation
of it is alive, so that devices greet again after it died; ``p/<device>`` is the device's retained
presence, with a last will. Nothing is known from an MQTT acknowledgement: a device repeats Hello
until Welcome, Open until Want or Receipt, Want until the pieces arrived.

A frame is five bytes (magic, wire major, wire minor, type) and a body. Control messages have a
msgpack map as body, at most MAX_CONTROL_BYTES, no extension types, no duplicate keys, every field
checked against its type and range. Unknown fields are skipped, so a peer of a newer minor version
is understood; another major version is refused by name. Weights never pass through msgpack: a
piece is a fixed header and raw bytes.

Transfers are driven by the receiver, both ways: it names the content by SHA-256 and the ranges of
pieces it wants next, the sender sends exactly these. Resuming, flow control and repair are the
same message; a Want without ranges says: known, but wait until you are asked.

Blocks of a version lie retained under ``m/<slot>/<block>/<piece>``, where the broker keeps retained
messages well, so that the server sends each block once whatever the number of devices. A block has
two slots: a new version goes into the one that the version before it does not use, and offers name
it only after it is there. What a device still lacks after that it asks for like everything else.
An offer may also name differences: the content with that hash, over the version of the block that
it names, is the block. Who does not hold that version, or knows no differences, fetches the block.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Annotated, Any, ClassVar, Literal, TypeVar

import msgpack
import msgspec
from msgspec import Meta

from edge_sdk.blocks import MAX_BLOCKS, Name
from edge_sdk.errors import ConfigError, MalformedMessage

WIRE_MAJOR = 1
WIRE_MINOR = 1
MAGIC = b"ed"

# 60 KiB of data, its header and the topic stay under 64 KiB, which every broker known accepts.
DEFAULT_PIECE_BYTES = 60 * 1024
# Where a broker says that it takes more; larger ones gain nothing and make everybody wait.
MAX_PIECE_BYTES = 256 * 1024
MAX_CONTROL_BYTES = 120_000
MAX_UPDATE_HEADER_BYTES = 64 * 1024
MAX_TRANSFER_BYTES = 1 << 34
MAX_RANGES = 256
SCRATCH_CHUNK_BYTES = 1 << 20

_HEAD = struct.Struct("!2sBBB")
_PIECE = struct.Struct("!8sIII")
_UPDATE = struct.Struct("!2sBI")
_UPDATE_MAGIC = b"eu"
PIECE_OVERHEAD_BYTES = _HEAD.size + _PIECE.size

DEVICE_ID = r"^[a-z0-9-]{1,64}\Z"
DeviceId = Annotated[str, Meta(pattern=DEVICE_ID)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Ticket = Annotated[bytes, Meta(min_length=16, max_length=16)]
Count = Annotated[int, Meta(ge=0, le=(1 << 53))]
Round = Annotated[int, Meta(ge=0, le=(1 << 31))]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Text = Annotated[str, Meta(max_length=2000)]
Label = Annotated[str, Meta(max_length=64)]
Range = tuple[Count, Count]

Verdict = Literal["accepted", "late", "stale", "rejected"]
Presence_ = Literal["ready", "training", "sleeping", "lost"]


class BlockEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One block of a version: its address and what fetching and holding it costs."""

    name: Name
    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=0, le=MAX_TRANSFER_BYTES)]
    raw_bytes: Annotated[int, Meta(ge=0, le=MAX_TRANSFER_BYTES)]


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """A block as the difference to another version of it, for who holds that one.

    block: its number in the offer. base: the first bytes of the other version's hash.
    """

    block: Annotated[int, Meta(ge=0, le=MAX_BLOCKS - 1)]
    base: Annotated[bytes, Meta(min_length=8, max_length=8)]
    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_TRANSFER_BYTES)]


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """How a device trains: the same for everyone in a round, whatever blocks it trains."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Annotated[float, Meta(gt=0.0, le=1e3)] = 0.05
    momentum: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.9
    weight_decay: Annotated[float, Meta(ge=0.0, le=10.0)] = 0.0
    batch_size: Annotated[int, Meta(ge=1, le=65536)] = 32
    local_epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    seed: Annotated[int, Meta(ge=0, le=(1 << 62))] = 0


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Device: I am here. Repeated until Welcome; starts every connection and server incarnation."""

    TYPE: ClassVar[int] = 1
    session: Count
    sdk: Label
    profile: Label
    memory_bytes: Count
    flops_per_s: Annotated[float, Meta(gt=0.0, le=1e18)]
    spec_digest: Sha256
    num_examples: Count


class Welcome(msgspec.Struct, frozen=True, kw_only=True):
    """Server: you are known; ``boot`` is my incarnation."""

    TYPE: ClassVar[int] = 2
    boot: Label
    session: Count


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """Server: take part in this round, starting from these blocks, within this time.

    slots: of each block, where its pieces lie retained; -1, or none: they have to be asked for.
    """

    TYPE: ClassVar[int] = 3
    round: Round
    ticket: Ticket
    version: Round
    base_sha: Sha256
    blocks: Annotated[tuple[BlockEntry, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    strategy: Label
    open_blocks: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=MAX_BLOCKS)]
    codec: Label
    deadline_s: Annotated[float, Meta(gt=0.0, le=1e7)]
    training: Training
    piece_bytes: Annotated[int, Meta(ge=256, le=MAX_PIECE_BYTES)] = DEFAULT_PIECE_BYTES
    slots: Annotated[
        tuple[Annotated[int, Meta(ge=-1, le=1)], ...], Meta(max_length=MAX_BLOCKS)
    ] = ()
    deltas: Annotated[tuple[Delta, ...], Meta(max_length=MAX_BLOCKS)] = ()


class Decline(msgspec.Struct, frozen=True, kw_only=True):
    """Device: I sit this round out, and why."""

    TYPE: ClassVar[int] = 4
    round: Round
    reason: Text


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """Receiver: send me these pieces (first, stop) of the content with this hash; none: wait."""

    TYPE: ClassVar[int] = 5
    sha256: Sha256
    piece_bytes: Annotated[int, Meta(ge=256, le=MAX_PIECE_BYTES)]
    ranges: Annotated[tuple[Range, ...], Meta(max_length=MAX_RANGES)]


class Open(msgspec.Struct, frozen=True, kw_only=True):
    """Device: an update of this size and hash lies in my spool. Repeated until Want or Receipt.

    piece_bytes: the largest piece that my link to the broker takes.
    """

    TYPE: ClassVar[int] = 6
    round: Round
    ticket: Ticket
    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=1, le=MAX_TRANSFER_BYTES)]
    piece_bytes: Annotated[int, Meta(ge=256, le=MAX_PIECE_BYTES)] = DEFAULT_PIECE_BYTES


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """Server: the terminal verdict on an update. Only this lets a device forget it."""

    TYPE: ClassVar[int] = 7
    round: Round
    sha256: Sha256
    verdict: Verdict
    reason: Text = ""


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Device: what a round cost on my socket and my processes, after its receipt."""

    TYPE: ClassVar[int] = 8
    round: Round
    up_bytes: Count
    down_bytes: Count
    cpu_s: Seconds
    agent_rss_bytes: Count
    trainer_peak_bytes: Count


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Server: what you sent cannot be used; the reason is for a person to read."""

    TYPE: ClassVar[int] = 9
    reason: Text


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """Server, retained: which incarnation is alive and where the job stands.

    layout: names what lies in which slot; it is said after all of it is there.
    """

    TYPE: ClassVar[int] = 10
    boot: Label
    version: Round
    state: Literal["running", "done"]
    layout: Label = ""


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """Device, retained (and as last will): what it is doing."""

    TYPE: ClassVar[int] = 11
    state: Presence_
    session: Count


class Piece(msgspec.Struct, frozen=True):
    """Piece ``index`` of ``total`` of the content whose SHA-256 starts with these 8 bytes.

    crc: CRC-32 of the data, which it had on arrival.
    """

    transfer: bytes
    index: int
    total: int
    data: bytes | memoryview
    crc: int


Message = (
    Hello | Welcome | Offer | Decline | Want | Open | Receipt | Tally | Refusal | Head | Presence
)
MESSAGES: tuple[type[Any], ...] = (
    Hello,
    Welcome,
    Offer,
    Decline,
    Want,
    Open,
    Receipt,
    Tally,
    Refusal,
    Head,
    Presence,
)
_BY_TYPE = {cls.TYPE: cls for cls in MESSAGES}
_PIECE_TYPE = 32


class UpdateMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """What training cost on the device, measured there."""

    loss: Annotated[float, Meta(ge=-1e12, le=1e12)]
    steps: Count
    train_s: Seconds
    train_cpu_s: Seconds
    plan_s: Seconds
    plan_peak_bytes: Count
    measured_peak_bytes: Count
    budget_bytes: Count
    plan_up_bytes: Count
    flops: Count


class UpdateHeader(msgspec.Struct, frozen=True, kw_only=True):
    """First part of an update; the encoded changes of its blocks follow in this order."""

    round: Round
    ticket: Ticket
    base_sha: Sha256
    codec: Label
    num_examples: Annotated[int, Meta(ge=1, le=(1 << 26))]
    blocks: Annotated[
        tuple[tuple[Name, Annotated[int, Meta(ge=0, le=MAX_TRANSFER_BYTES)]], ...],
        Meta(min_length=1, max_length=MAX_BLOCKS),
    ]
    metrics: UpdateMetrics


T = TypeVar("T")


class Topics:
    """The topics of one job; ConfigError when a name cannot be part of a topic."""

    def __init__(self, job: str) -> None:
        self.root = f"edge/v{WIRE_MAJOR}/{_topic_name('job', job)}"
        self.head = f"{self.root}/head"
        self.echo = f"{self.root}/echo"
        self.all_up = f"{self.root}/u/+"
        self.all_data = f"{self.root}/x/+"
        self.all_presence = f"{self.root}/p/+"

    def up(self, device: str) -> str:
        """Where ``device`` speaks."""
        return f"{self.root}/u/{_topic_name('device', device)}"

    def data(self, device: str) -> str:
        """Where ``device`` sends the pieces of its updates."""
        return f"{self.root}/x/{_topic_name('device', device)}"

    def retained(self, slot: int, block: int, piece: int | Literal["+"]) -> str:
        """Where a piece of the block with this number lies; "+" is the filter for all of them."""
        return f"{self.root}/m/{slot}/{block}/{piece}"

    def down(self, device: str) -> str:
        """Where ``device`` listens."""
        return f"{self.root}/d/{_topic_name('device', device)}"

    def presence(self, device: str) -> str:
        """Where ``device`` says what it is doing."""
        return f"{self.root}/p/{_topic_name('device', device)}"

    def device_of(self, topic: str) -> str:
        """The device an arrived message comes from: its topic says so, never its payload."""
        parts = topic.removeprefix(self.root + "/").split("/")
        if not topic.startswith(self.root + "/") or len(parts) != 2 or not _valid_name(parts[1]):
            raise MalformedMessage(f"topic {topic!r} names no device of {self.root}")
        return parts[1]


def encode(message: Message) -> bytes:
    """A control message as one MQTT payload."""
    body: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    return _HEAD.pack(MAGIC, WIRE_MAJOR, WIRE_MINOR, message.TYPE) + body


def encode_piece(sha256: str, index: int, total: int, data: bytes) -> bytes:
    """One piece of the content named by ``sha256`` as one MQTT payload."""
    head = _HEAD.pack(MAGIC, WIRE_MAJOR, WIRE_MINOR, _PIECE_TYPE)
    place = _PIECE.pack(bytes.fromhex(sha256)[:8], index, total, zlib.crc32(data))
    return head + place + data


def decode(payload: bytes) -> Message | Piece:
    """The message in an MQTT payload; MalformedMessage says what is wrong, where and the limit."""
    if len(payload) < _HEAD.size:
        raise MalformedMessage(f"message of {len(payload)} bytes, the head alone is {_HEAD.size}")
    magic, major, _minor, kind = _HEAD.unpack_from(payload)
    if magic != MAGIC:
        raise MalformedMessage(
            f"message starts with {magic!r}, expected {MAGIC!r}: not this protocol"
        )
    if major != WIRE_MAJOR:
        raise MalformedMessage(
            f"wire version {major}, this side speaks {WIRE_MAJOR}: upgrade the older side"
        )
    if kind == _PIECE_TYPE:
        return _decode_piece(payload)
    if kind not in _BY_TYPE:
        raise MalformedMessage(f"message type {kind} is unknown; known are {sorted(_BY_TYPE)}")
    if len(payload) > MAX_CONTROL_BYTES:
        raise MalformedMessage(
            f"control message of {len(payload)} bytes, limit {MAX_CONTROL_BYTES}"
        )
    cls = _BY_TYPE[kind]
    message: Message = _convert(payload[_HEAD.size :], cls, cls.__name__)
    return message


@dataclass(frozen=True, slots=True)
class Update:
    """An update that is encoded while it is written, so that one block of it is in memory.

    payloads: (block, encoded change), made when asked for.
    header:   called when all were, with (block, size in bytes) of each.
    """

    payloads: Iterable[tuple[str, bytes]]
    header: Callable[[tuple[tuple[str, int], ...]], UpdateHeader]

    def to_bytes(self) -> bytes:
        """The whole of it at once."""
        payloads = list(self.payloads)
        header = self.header(tuple((name, len(payload)) for name, payload in payloads))
        return encode_update(header, [payload for _, payload in payloads])

    def chunks(self, scratch: IO[bytes]) -> Iterator[bytes]:
        """The same bytes in chunks; ``scratch`` holds the changes until the header is known."""
        sizes = []
        for name, payload in self.payloads:
            scratch.write(payload)
            sizes.append((name, len(payload)))
        yield _update_head(self.header(tuple(sizes)))
        scratch.seek(0)
        while chunk := scratch.read(SCRATCH_CHUNK_BYTES):
            yield chunk


def encode_update(header: UpdateHeader, payloads: list[bytes]) -> bytes:
    """An update: fixed prefix, msgpack header, then the blocks' encoded changes."""
    return _update_head(header) + b"".join(payloads)


def _update_head(header: UpdateHeader) -> bytes:
    head: bytes = msgpack.packb(msgspec.to_builtins(header, builtin_types=(bytes,)))
    return _UPDATE.pack(_UPDATE_MAGIC, WIRE_MAJOR, len(head)) + head


def decode_update(body: memoryview) -> tuple[UpdateHeader, list[tuple[str, memoryview]]]:
    """Header and encoded blocks of an update, without copying; MalformedMessage if it is none."""
    if len(body) < _UPDATE.size:
        raise MalformedMessage(f"update of {len(body)} bytes, the head alone is {_UPDATE.size}")
    magic, major, head_bytes = _UPDATE.unpack_from(body)
    if magic != _UPDATE_MAGIC or major != WIRE_MAJOR:
        raise MalformedMessage(f"update starts with {magic!r} version {major}, not with an update")
    if head_bytes > MAX_UPDATE_HEADER_BYTES:
        raise MalformedMessage(
            f"update header of {head_bytes} bytes, limit {MAX_UPDATE_HEADER_BYTES}"
        )
    start = _UPDATE.size + head_bytes
    header = _convert(bytes(body[_UPDATE.size : start]), UpdateHeader, "UpdateHeader")
    announced = start + sum(size for _, size in header.blocks)
    if announced != len(body):
        raise MalformedMessage(f"update announces {announced} bytes and has {len(body)}")
    return header, _cut(body, start, header.blocks)


def _cut(
    body: memoryview, start: int, sizes: tuple[tuple[str, int], ...]
) -> list[tuple[str, memoryview]]:
    parts = []
    for name, size in sizes:
        parts.append((name, body[start : start + size]))
        start += size
    return parts


def _decode_piece(payload: bytes) -> Piece:
    limit = MAX_PIECE_BYTES + PIECE_OVERHEAD_BYTES
    if not PIECE_OVERHEAD_BYTES < len(payload) <= limit:
        raise MalformedMessage(
            f"piece message of {len(payload)} bytes, allowed {PIECE_OVERHEAD_BYTES + 1} to {limit}"
        )
    transfer, index, total, crc = _PIECE.unpack_from(payload, _HEAD.size)
    data = memoryview(payload)[PIECE_OVERHEAD_BYTES:]
    if zlib.crc32(data) != crc:
        raise MalformedMessage(f"piece {index} of {transfer.hex()}: its CRC-32 does not match")
    return Piece(transfer, index, total, data, crc)


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("duplicate key")
    return table


def _no_extension(code: int, _data: bytes) -> Any:
    raise ValueError(f"extension type {code} is not allowed")


def _convert(body: bytes, cls: type[T], where: str) -> T:
    try:
        fields = msgpack.unpackb(
            body,
            object_pairs_hook=_unique,
            ext_hook=_no_extension,
            max_str_len=len(body),
            max_bin_len=len(body),
            max_array_len=MAX_BLOCKS,
            max_map_len=64,
            # Timestamps are an extension that never reaches the hook; no other has length 0.
            max_ext_len=0,
        )
        return msgspec.convert(fields, cls, strict=True)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        # msgspec.ValidationError is a ValueError and names the path of the field.
        raise MalformedMessage(f"{where}: {str(error) or type(error).__name__}") from None


def _valid_name(name: str) -> bool:
    return re.match(DEVICE_ID, name) is not None


def _topic_name(what: str, name: str) -> str:
    if not _valid_name(name):
        raise ConfigError(
            f"{what} name {name!r} must be 1 to 64 of the characters a-z, 0-9 and '-'"
        )
    return name

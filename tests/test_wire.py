"""The protocol: what is encoded comes back, stored bytes decode for ever, hostile ones fail."""

from __future__ import annotations

import io
import json
import math
import struct
import time
import tracemalloc
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import inspect as kinds

from edge_sdk import wire
from edge_sdk.blocks import MAX_BLOCKS, MAX_NAMES_BYTES, Block, ModelSpec, TensorSpec
from edge_sdk.errors import ConfigError, MalformedMessage, TaskError
from edge_sdk.wire import (
    MAX_CONTROL_BYTES,
    MAX_PIECE_BYTES,
    MAX_UPDATE_HEADER_BYTES,
    MESSAGES,
    PIECE_OVERHEAD_BYTES,
    BlockEntry,
    Offer,
    Piece,
    Presence,
    Tally,
    Topics,
    Training,
    UpdateHeader,
    UpdateMetrics,
    Want,
    decode,
    decode_update,
    encode,
    encode_piece,
    encode_update,
)

# Bytes of every version of the protocol there has been; the newest is GOLDEN.
STORED = {
    path.stem: json.loads(path.read_text())
    for path in sorted((Path(__file__).parent / "golden").glob("wire-*.json"))
}
GOLDEN = STORED[f"wire-{wire.WIRE_MAJOR}.{wire.WIRE_MINOR}"]
CONTROL = sorted(name for name in GOLDEN if name not in ("Piece", "Update"))
SHA = "5f" * 32
TICKET = bytes(range(16))
BODY_BYTES = 5

text = st.text(st.characters(codec="utf-8"), max_size=20)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Every value a field's declared type allows."""
    if isinstance(kind, kinds.IntType):
        return st.integers(kind.ge, kind.le)
    if isinstance(kind, kinds.FloatType):
        low = kind.ge if kind.gt is None else math.nextafter(kind.gt, math.inf)
        high = kind.le if kind.lt is None else math.nextafter(kind.lt, -math.inf)
        return st.floats(low, high)
    if isinstance(kind, kinds.StrType):
        return text if kind.pattern is None else st.from_regex(kind.pattern, fullmatch=True)
    if isinstance(kind, kinds.BytesType):
        return st.binary(min_size=kind.min_length or 0, max_size=kind.max_length)
    if isinstance(kind, kinds.LiteralType):
        return st.sampled_from(kind.values)
    if isinstance(kind, kinds.VarTupleType):
        size = st.lists(values_of(kind.item_type), min_size=kind.min_length or 0, max_size=4)
        return size.map(tuple)
    if isinstance(kind, kinds.TupleType):
        return st.tuples(*(values_of(item) for item in kind.item_types))
    assert isinstance(kind, kinds.StructType), kind
    return st.builds(kind.cls, **{field.name: values_of(field.type) for field in kind.fields})


def any_of(cls: type) -> st.SearchStrategy[Any]:
    return values_of(kinds.type_info(cls))


def frame(cls: Any, fields: object, minor: int = wire.WIRE_MINOR) -> bytes:
    """A control message whose body is whatever the peer likes."""
    return struct.pack("!2sBBB", b"ed", 1, minor, cls.TYPE) + msgpack.packb(fields)


def raw_body(cls: Any, body: bytes) -> bytes:
    return struct.pack("!2sBBB", b"ed", 1, 0, cls.TYPE) + body


def fields_of(name: str) -> dict[str, Any]:
    return dict(msgpack.unpackb(bytes.fromhex(GOLDEN[name]["hex"])[BODY_BYTES:]))


def update_with(**changes: Any) -> UpdateHeader:
    header, _ = decode_update(memoryview(bytes.fromhex(GOLDEN["Update"]["hex"])))
    return msgspec.structs.replace(header, **changes)


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_every_message_comes_back_as_it_was(cls: type) -> None:
    @settings(max_examples=30, deadline=None)
    @given(message=any_of(cls))
    def comes_back(message: Any) -> None:
        assert decode(encode(message)) == message

    comes_back()


@given(data=st.binary(min_size=1, max_size=300), index=st.integers(0, 2**32 - 1))
def test_pieces_come_back_as_they_were(data: bytes, index: int) -> None:
    payload = encode_piece(SHA, index, 2**32 - 1, data)
    assert len(payload) == PIECE_OVERHEAD_BYTES + len(data)
    assert decode(payload) == Piece(
        bytes.fromhex(SHA)[:8], index, 2**32 - 1, data, zlib.crc32(data)
    )


@settings(max_examples=40, deadline=None)
@given(header=any_of(UpdateHeader), sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_updates_come_back_as_they_were(header: UpdateHeader, sizes: list[int]) -> None:
    payloads = [bytes([place]) * size for place, size in enumerate(sizes)]
    blocks = tuple((f"b{place}", size) for place, size in enumerate(sizes))
    sent = msgspec.structs.replace(header, blocks=blocks)
    body = encode_update(sent, payloads)
    received, parts = decode_update(memoryview(body))
    assert received == sent
    assert [(name, bytes(part)) for name, part in parts] == [
        (name, payload) for (name, _), payload in zip(blocks, payloads, strict=True)
    ]
    assert all(part.obj is body for _, part in parts), "an update is cut without copying it"


@settings(max_examples=30, deadline=None)
@given(header=any_of(UpdateHeader), sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_an_update_written_in_chunks_is_the_same(header: UpdateHeader, sizes: list[int]) -> None:
    payloads = [(f"b{place}", bytes([place]) * size) for place, size in enumerate(sizes)]

    def finish(blocks: tuple[tuple[str, int], ...]) -> UpdateHeader:
        return msgspec.structs.replace(header, blocks=blocks)

    whole = wire.Update(payloads, finish).to_bytes()
    assert b"".join(wire.Update(iter(payloads), finish).chunks(io.BytesIO())) == whole
    assert [name for name, _ in decode_update(memoryview(whole))[1]] == [n for n, _ in payloads]


# --- stored bytes of every version ---------------------------------------------------------------


def test_every_message_type_has_stored_bytes() -> None:
    assert set(CONTROL) == {cls.__name__ for cls in MESSAGES}


@pytest.mark.parametrize("stored", STORED.values(), ids=list(STORED))
def test_stored_control_messages_still_decode(stored: dict[str, Any]) -> None:
    for name in CONTROL:
        message = decode(bytes.fromhex(stored[name]["hex"]))
        assert type(message).__name__ == name
        fields = json.loads(msgspec.json.encode(message))
        assert fields.items() >= stored[name]["fields"].items()


@pytest.mark.parametrize("stored", STORED.values(), ids=list(STORED))
def test_a_stored_piece_still_decodes(stored: dict[str, Any]) -> None:
    piece = decode(bytes.fromhex(stored["Piece"]["hex"]))
    assert piece == Piece(bytes.fromhex(SHA)[:8], 2, 7, b"raw bytes", zlib.crc32(b"raw bytes"))


@pytest.mark.parametrize("stored", STORED.values(), ids=list(STORED))
def test_a_stored_update_still_decodes(stored: dict[str, Any]) -> None:
    header, parts = decode_update(memoryview(bytes.fromhex(stored["Update"]["hex"])))
    fields = json.loads(msgspec.json.encode(header))
    assert fields.items() >= stored["Update"]["fields"].items()
    assert [(name, bytes(part)) for name, part in parts] == [("body.1", b"abc"), ("head", b"de")]


@pytest.mark.parametrize("name", CONTROL)
def test_unknown_fields_of_a_newer_minor_are_skipped(name: str) -> None:
    cls: Any = getattr(wire, name)
    known = decode(bytes.fromhex(GOLDEN[name]["hex"]))
    newer = {**fields_of(name), "later": {"a": [1, None]}, "also": b"x"}
    assert decode(frame(cls, newer, minor=9)) == known


def test_fields_with_a_default_may_be_missing() -> None:
    fields = fields_of("Receipt")
    del fields["reason"]
    receipt = decode(frame(wire.Receipt, fields))
    assert isinstance(receipt, wire.Receipt)
    assert receipt.reason == ""


# --- hostile bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CONTROL, "Piece"])
def test_every_truncation_of_a_message_is_refused(name: str) -> None:
    whole = bytes.fromhex(GOLDEN[name]["hex"])
    for length in range(len(whole)):
        with pytest.raises(MalformedMessage):
            decode(whole[:length])
    with pytest.raises(MalformedMessage, match=r"extra data|CRC-32"):
        decode(whole + b"\0")


def test_every_truncation_of_an_update_is_refused() -> None:
    whole = bytes.fromhex(GOLDEN["Update"]["hex"])
    for length in range(len(whole)):
        with pytest.raises(MalformedMessage):
            decode_update(memoryview(whole)[:length])
    with pytest.raises(MalformedMessage, match=f"announces {len(whole)} bytes and has"):
        decode_update(memoryview(whole + b"\0"))


@settings(max_examples=300, deadline=None)
@given(payload=st.binary(max_size=80), kind=st.sampled_from([1, 3, 5, 7, 11, 32]))
def test_random_bytes_are_a_message_or_malformed(payload: bytes, kind: int) -> None:
    for attempt in (payload, b"ed\x01\x00" + bytes([kind]) + payload):
        with suppress(MalformedMessage):
            decode(attempt)
    with suppress(MalformedMessage):
        decode_update(memoryview(b"eu\x01" + payload))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from([*CONTROL, "Piece"]))
def test_a_changed_byte_is_a_message_or_malformed(data: st.DataObject, name: str) -> None:
    whole = bytearray.fromhex(GOLDEN[name]["hex"])
    whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with suppress(MalformedMessage):
        decode(bytes(whole))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "message of 0 bytes, the head alone is 5"),
        (b"xx\x01\x00\x01\x80", "starts with b'xx', expected b'ed': not this protocol"),
        (b"ed\x02\x00\x01\x80", "wire version 2, this side speaks 1: upgrade the older side"),
        (b"ed\x00\x00\x01\x80", "wire version 0, this side speaks 1"),
        (b"ed\x01\x00\x63\x80", "message type 99 is unknown; known are"),
        (b"ed\x01\x00\x01\xc1", "Hello: FormatError"),
        (b"ed\x01\x00\x01\x80", "Hello: Object missing required field `session`"),
        (b"ed\x01\x00\x01\x90", "Hello: Expected `object`, got `array`"),
    ],
)
def test_what_is_no_message_is_named(payload: bytes, message: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode(payload)
    assert message in str(caught.value)


@pytest.mark.parametrize("value", [msgpack.Timestamp(1, 0), msgpack.ExtType(5, b"abc")])
@pytest.mark.parametrize("field", ["state", "unknown"])
def test_extension_types_are_refused_everywhere(value: object, field: str) -> None:
    with pytest.raises(MalformedMessage, match=r"Presence: .*ext"):
        decode(frame(Presence, {**fields_of("Presence"), field: value}))


def test_duplicate_keys_are_refused() -> None:
    twice = b"\x83\xa5state\xa5ready\xa7session\x03\xa7session\x04"
    with pytest.raises(MalformedMessage, match="Presence: duplicate key"):
        decode(raw_body(Presence, twice))
    nested = b"\x83\xa5state\xa5ready\xa7session\x03\xa1x\x82\xa1a\x01\xa1a\x02"
    with pytest.raises(MalformedMessage, match="Presence: duplicate key"):
        decode(raw_body(Presence, nested))


def test_keys_that_are_no_text_are_refused() -> None:
    with pytest.raises(MalformedMessage, match="not allowed for map key"):
        decode(frame(Presence, {**fields_of("Presence"), 7: 1}))
    with pytest.raises(MalformedMessage, match="Expected `str` - at `key`"):
        decode(frame(Presence, {**fields_of("Presence"), b"session": 1}))


@pytest.mark.parametrize("opener", [b"\x91", b"\x81\xa1a"], ids=["arrays", "maps"])
def test_deep_nesting_is_refused(opener: bytes) -> None:
    deep = b"\x83\xa5state\xa5ready\xa7session\x03\xa1x" + opener * 20_000 + b"\x01"
    with pytest.raises(MalformedMessage, match=r"Presence: (StackError|RecursionError|maximum)"):
        decode(raw_body(Presence, deep))


def test_oversize_is_refused_before_it_is_parsed() -> None:
    huge = raw_body(Presence, b"\xc1" * MAX_CONTROL_BYTES)
    with pytest.raises(MalformedMessage, match=f"of {len(huge)} bytes, limit {MAX_CONTROL_BYTES}"):
        decode(huge)
    with pytest.raises(MalformedMessage, match="Expected `str` of length <= 2000"):
        decode(frame(wire.Refusal, {"reason": "x" * 2001}))
    with pytest.raises(MalformedMessage, match="max_array_len"):
        decode(frame(Want, {**fields_of("Want"), "ranges": [[0, 1]] * (MAX_BLOCKS + 1)}))
    with pytest.raises(MalformedMessage, match="of length <= 256"):
        decode(frame(Want, {**fields_of("Want"), "ranges": [[0, 1]] * 257}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 1e10, True, "1", None])
def test_numbers_that_are_none_are_refused(value: object) -> None:
    with pytest.raises(MalformedMessage, match=r"Tally: .* - at `\$.cpu_s`"):
        decode(frame(Tally, {**fields_of("Tally"), "cpu_s": value}))
    offer = fields_of("Offer")
    with pytest.raises(MalformedMessage, match=r"at `\$.training.momentum`"):
        decode(frame(Offer, {**offer, "training": {**offer["training"], "momentum": value}}))


@pytest.mark.parametrize("value", [-1, 2**53 + 1, 2**64 - 1, 1.0, True, "3", b"3"])
def test_counts_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(MalformedMessage, match=r"at `\$.up_bytes`"):
        decode(frame(Tally, {**fields_of("Tally"), "up_bytes": value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ticket", b"short"),
        ("base_sha", SHA.upper()),
        ("base_sha", SHA + "\n"),
        ("blocks", []),
        ("open_blocks", ["../etc"]),
        ("open_blocks", ["a b"]),
        ("deadline_s", 0.0),
        ("deadline_s", math.nan),
        ("piece_bytes", 255),
        ("piece_bytes", MAX_PIECE_BYTES + 1),
        ("strategy", "x" * 65),
        ("training", {"optimizer": "lion"}),
        ("training", {"learning_rate": math.nan}),
        ("training", {"batch_size": 0}),
    ],
)
def test_an_impossible_offer_is_refused(field: str, value: object) -> None:
    with pytest.raises(MalformedMessage, match=rf"Offer: .*at `\$.{field}"):
        decode(frame(Offer, {**fields_of("Offer"), field: value}))


BOMBS = {
    "announced array": b"\xdd\xff\xff\xff\xff",
    "announced map": b"\xdf\xff\xff\xff\xff",
    "announced text": b"\xdb\xff\xff\xff\xff",
    "announced bytes": b"\xc6\xff\xff\xff\xff",
    "announced extension": b"\xc9\xff\xff\xff\xff\x05",
    "arrays of the longest length in one another": b"\xdc\x02\x00" * 1000,
    "maps of the longest length in one another": b"\xde\x00\x40\xa1a" * 1000,
    "empty maps": (b"\xdc\x01\xff" + b"\x80" * 511) * 230,
    "empty arrays": b"\xdc\x00\xe6" + (b"\xdc\x01\xff" + b"\x90" * 511) * 230,
    "small maps": b"\xdc\x00\x40" + (b"\xdc\x01\x80" + b"\x81\xa1a\x80" * 384) * 64,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_msgpack_bombs_stay_small_and_quick(bomb: bytes) -> None:
    body = b"\x83\xa5state\xa5ready\xa7session\x03\xa1x" + bomb
    payload = raw_body(Presence, body[: MAX_CONTROL_BYTES - BODY_BYTES])
    header = struct.pack("!2sBI", b"eu", 1, MAX_UPDATE_HEADER_BYTES)
    update = (header + body)[: 7 + MAX_UPDATE_HEADER_BYTES].ljust(
        7 + MAX_UPDATE_HEADER_BYTES, b"\0"
    )
    tracemalloc.start()
    started_s = time.monotonic()
    try:
        for attack in (lambda: decode(payload), lambda: decode_update(memoryview(update))):
            with suppress(MalformedMessage):
                attack()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A small container is at worst some hundred times its bytes, of at most 120 kB.
    assert peak_bytes < 24 << 20
    assert time.monotonic() - started_s < 2.0


# --- pieces and updates that lie ----------------------------------------------------------------


def test_a_piece_with_a_wrong_checksum_is_refused() -> None:
    payload = bytearray(encode_piece(SHA, 3, 9, b"content"))
    payload[-1] ^= 1
    with pytest.raises(MalformedMessage, match="piece 3 of 5f5f5f5f5f5f5f5f: its CRC-32 does not"):
        decode(bytes(payload))


def test_a_piece_without_data_or_with_too_much_is_refused() -> None:
    allowed = f"allowed {PIECE_OVERHEAD_BYTES + 1} to {MAX_PIECE_BYTES + PIECE_OVERHEAD_BYTES}"
    for data in (b"", bytes(MAX_PIECE_BYTES + 1)):
        with pytest.raises(MalformedMessage, match=allowed):
            decode(encode_piece(SHA, 0, 1, data))
    longest = decode(encode_piece(SHA, 0, 1, bytes(MAX_PIECE_BYTES)))
    assert isinstance(longest, Piece)
    assert zlib.crc32(longest.data) == zlib.crc32(bytes(MAX_PIECE_BYTES))


@pytest.mark.parametrize("sizes", [(3, 3), (2, 2), (5, 1), (0, 0), (1 << 34, 1 << 34)])
def test_an_update_that_lies_about_lengths_is_refused(sizes: tuple[int, int]) -> None:
    body = encode_update(update_with(blocks=tuple(zip("ab", sizes, strict=True))), [b"abc", b"d"])
    if sum(sizes) == 4:
        assert decode_update(memoryview(body))
        return
    with pytest.raises(MalformedMessage, match=r"update announces \d+ bytes and has"):
        decode_update(memoryview(body))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"num_examples": 0}, "num_examples"),
        ({"num_examples": (1 << 26) + 1}, "num_examples"),
        ({"blocks": (("a", -1),)}, "blocks"),
        ({"blocks": (("a", (1 << 34) + 1),)}, "blocks"),
        ({"blocks": ()}, "blocks"),
        ({"blocks": (("../a", 1),)}, "blocks"),
        ({"ticket": b"x" * 15}, "ticket"),
        ({"base_sha": "f" * 63}, "base_sha"),
    ],
)
def test_an_impossible_update_header_is_refused(changes: dict[str, Any], place: str) -> None:
    body = encode_update(update_with(**changes), [])
    with pytest.raises(MalformedMessage, match=rf"UpdateHeader: .*at `\$.{place}"):
        decode_update(memoryview(body))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1e13])
def test_a_loss_that_is_no_number_is_refused(loss: float) -> None:
    metrics = msgspec.structs.replace(update_with().metrics, loss=loss)
    body = encode_update(update_with(metrics=metrics, blocks=(("a", 0),)), [])
    with pytest.raises(MalformedMessage, match=r"at `\$.metrics.loss`"):
        decode_update(memoryview(body))


def test_an_update_header_over_the_limit_is_not_read() -> None:
    body = struct.pack("!2sBI", b"eu", 1, MAX_UPDATE_HEADER_BYTES + 1) + bytes(100)
    with pytest.raises(MalformedMessage, match="update header of 65537 bytes, limit 65536"):
        decode_update(memoryview(body))
    for start in (b"ed\x01", b"eu\x02"):
        with pytest.raises(MalformedMessage, match="not with an update"):
            decode_update(memoryview(start + bytes(10)))


# --- limits agree with one another ---------------------------------------------------------------


def test_the_largest_model_fits_into_its_messages() -> None:
    share = MAX_NAMES_BYTES // MAX_BLOCKS
    names = tuple(f"{place:03d}".ljust(share, "x") for place in range(MAX_BLOCKS))
    size = 1 << 33
    entries = tuple(BlockEntry(name=n, sha256=SHA, size_bytes=size, raw_bytes=size) for n in names)
    offer = decode(bytes.fromhex(GOLDEN["Offer"]["hex"]))
    assert isinstance(offer, Offer)
    largest = msgspec.structs.replace(
        offer, blocks=entries, open_blocks=names, strategy="x" * 64, codec="x" * 64
    )
    assert decode(encode(largest)) == largest
    header = update_with(blocks=tuple((name, 0) for name in names))
    assert decode_update(memoryview(encode_update(header, [])))[0] == header


def test_a_model_whose_names_fit_into_no_message_is_refused() -> None:
    blocks = tuple(
        Block(
            name=f"{place}".ljust(128, "x"),
            tensors=(TensorSpec(name=f"t{place}", shape=(1,), dtype="float32"),),
        )
        for place in range(MAX_BLOCKS)
    )
    with pytest.raises(TaskError, match=f"names of all blocks .* limit is {MAX_NAMES_BYTES}"):
        ModelSpec(blocks=blocks)


# --- topics --------------------------------------------------------------------------------------


def test_topics_of_a_job() -> None:
    topics = Topics("digits-1")
    assert topics.head == "edge/v1/digits-1/head"
    assert topics.all_up == "edge/v1/digits-1/u/+"
    assert topics.all_presence == "edge/v1/digits-1/p/+"
    for topic in (topics.up("pi-4"), topics.down("pi-4"), topics.presence("pi-4")):
        assert topics.device_of(topic) == "pi-4"
        assert topic.count("/") <= 7


@pytest.mark.parametrize("name", ["", "A", "a b", "a/b", "+", "#", "a\n", "ü", "x" * 65])
def test_names_that_cannot_be_part_of_a_topic_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"job name .* must be 1 to 64 of the characters"):
        Topics(name)
    with pytest.raises(ConfigError, match="device name"):
        Topics("job").up(name)
    with pytest.raises(MalformedMessage, match="names no device of edge/v1/job"):
        Topics("job").device_of(f"edge/v1/job/u/{name}")


@pytest.mark.parametrize(
    "topic", ["", "edge/v1/job", "edge/v1/job/head", "edge/v1/other/u/a", "edge/v1/job/u/a/b"]
)
def test_topics_of_no_device_are_refused(topic: str) -> None:
    with pytest.raises(MalformedMessage, match="names no device"):
        Topics("job").device_of(topic)


def test_training_and_metrics_default_to_what_the_wire_says() -> None:
    assert msgspec.convert({}, Training) == Training()
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({}, UpdateMetrics)

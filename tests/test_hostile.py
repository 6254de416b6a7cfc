"""Devices that lie, to a real server: each gets the right answer or none, and harms nobody.

One client speaks for all of them, in one round that an honest device takes part in. Whatever comes
after the last hostile word is answered, so what was not answered before that never will be.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk.blocks import Block, ModelSpec
from edge_sdk.codec import encode_change, max_change_bytes
from edge_sdk.model import BlockModel
from edge_sdk.task import load_task
from edge_sdk.wire import (
    MAGIC,
    MAX_TRANSFER_BYTES,
    WIRE_MAJOR,
    Decline,
    Head,
    Hello,
    Message,
    Offer,
    Open,
    Piece,
    Receipt,
    Refusal,
    Tally,
    Topics,
    UpdateHeader,
    UpdateMetrics,
    Want,
    Welcome,
    encode,
    encode_piece,
    encode_update,
)
from reference_server.broker import choose
from tests.simulation import FAST, START_S, Running, Watcher, command, write_task

JOB, ROUND, SAMPLES = "siege", 1, 5
ZERO_SHA = "0" * 64
pytestmark = pytest.mark.timeout(180)

METRICS = UpdateMetrics(
    loss=1.0, steps=1, train_s=1.0, train_cpu_s=1.0, plan_s=1.0, plan_peak_bytes=1,
    measured_peak_bytes=1, budget_bytes=2, plan_up_bytes=1, flops=1,
)  # fmt: skip
TALLY = Tally(
    round=ROUND, up_bytes=1, down_bytes=1, cpu_s=0.1, agent_rss_bytes=1, trainer_peak_bytes=1
)  # fmt: skip


def evil_float(block: Block, value: float) -> bytes:
    """A lossless payload with this value everywhere, in byte planes as the codec lays them out."""
    count = max_change_bytes("lossless", block) // 4
    return b"".join(bytes([byte]) * count for byte in struct.pack("<f", value))


class Field:
    """A server, its round, and a client that speaks for any device."""

    def __init__(self, spec: ModelSpec, home: Path, url: str, server: Running) -> None:
        self.spec, self.home, self.server = spec, home, server
        self.watcher = Watcher(url, JOB, "d")
        self.topics = Topics(JOB)
        self.offers: dict[str, Offer] = {}
        self.verdicts: dict[str, str] = {}

    def say(self, device: str, *payloads: Message | bytes) -> None:
        """Publish on a device's topic."""
        for payload in payloads:
            data = payload if isinstance(payload, bytes) else encode(payload)
            assert self.watcher.link.publish(self.topics.up(device), data)

    def listen(self) -> tuple[str, Any]:
        """The next thing the server says, to whomever; offers and verdicts are kept."""
        device, message = self.watcher.wait_for(lambda *_: True)
        if isinstance(message, Offer):
            self.offers[device] = message
        elif isinstance(message, Receipt) and message.round == ROUND:
            self.verdicts[device] = message.verdict
        return device, message

    def hear(self, device: str) -> Any:
        """The next message to a device that is no offer."""
        while True:
            name, message = self.listen()
            if name == device and not isinstance(message, Offer) and not waits(message):
                return message

    def answers(self, device: str, *payloads: Message | bytes) -> list[Any]:
        """All that is said to a device in answer to these."""
        self.say(device, *payloads, self.hello())
        heard = [self.hear(device)]
        while not isinstance(heard[-1], Welcome):
            heard.append(self.hear(device))
        return heard[:-1]

    def hello(self, digest: str | None = None) -> Hello:
        return Hello(
            session=1, sdk="x", profile="x", memory_bytes=1, flops_per_s=1.0,
            spec_digest=digest or self.spec.digest(), num_examples=SAMPLES,
        )  # fmt: skip

    def join(self, device: str) -> Offer:
        """The round's offer to a device."""
        while device not in self.offers:
            self.listen()
        return self.offers[device]

    def payload(self, block: Block) -> bytes:
        """A change that changes nothing."""
        still = {s.name: np.zeros(s.shape, s.dtype) for s in block.tensors}
        return encode_change("lossless", block, still, still, np.random.default_rng(0))

    def header(self, device: str, parts: list[tuple[str, bytes]]) -> UpdateHeader:
        offer = self.join(device)
        return UpdateHeader(
            round=offer.round, ticket=offer.ticket, base_sha=offer.base_sha, codec=offer.codec,
            num_examples=SAMPLES, metrics=METRICS,
            blocks=tuple((name, len(payload)) for name, payload in parts),
        )  # fmt: skip

    def update(self, device: str, **changes: Any) -> bytes:
        """A good update of the last block, with these fields of its header changed."""
        block = self.spec.blocks[-1]
        payload = self.payload(block)
        header = msgspec.structs.replace(self.header(device, [(block.name, payload)]), **changes)
        return encode_update(header, [payload])

    def update_of(self, device: str, parts: list[tuple[str, bytes]]) -> bytes:
        """An update of these blocks with these payloads."""
        return encode_update(self.header(device, parts), [payload for _, payload in parts])

    def last(self, payload: bytes | None = None) -> tuple[str, bytes]:
        """The last block with a payload, a good one if left out."""
        block = self.spec.blocks[-1]
        return block.name, self.payload(block) if payload is None else payload

    def lasting(self, value: float) -> tuple[str, bytes]:
        """The last block with a payload that has this change everywhere."""
        return self.last(evil_float(self.spec.blocks[-1], value))

    def open(self, device: str, body: bytes, **changes: Any) -> Open:
        """The announcement of an update, with these fields changed."""
        offer = self.join(device)
        sha256 = hashlib.sha256(body).hexdigest()
        good = Open(round=ROUND, ticket=offer.ticket, sha256=sha256, size_bytes=len(body))
        return msgspec.structs.replace(good, **changes)

    def send(self, device: str, body: bytes) -> Receipt:
        """Send an update as a device does, to its receipt."""
        announced = self.open(device, body)
        self.say(device, announced)
        want = self.hear(device)
        assert isinstance(want, Want), want
        self.say(device, *pieces(want, body))
        receipt = self.hear(device)
        assert isinstance(receipt, Receipt), receipt
        self.say(device, TALLY)
        assert (receipt.round, receipt.sha256) == (ROUND, announced.sha256)
        return receipt


def waits(message: Any) -> bool:
    """Whether it only says that nothing is to be sent now."""
    return isinstance(message, Want) and not message.ranges


def pieces(want: Want, body: bytes) -> list[bytes]:
    """What was wanted."""
    size_bytes = want.piece_bytes
    cut = [body[start : start + size_bytes] for start in range(0, len(body), size_bytes)]
    return [
        encode_piece(want.sha256, index, len(cut), cut[index])
        for first, stop in want.ranges
        for index in range(first, stop)
    ]


# Each spoils an update of its own device; the reason must name what is wrong.
WRONG: dict[str, tuple[Callable[[Field, str], bytes], str]] = {
    "noise": (lambda f, d: b"\x05" * 500, "update starts with"),
    "truncated": (lambda f, d: f.update(d)[:-7], "announces"),
    "of-another-round": (lambda f, d: f.update(d, round=2), "round or ticket"),
    "ticket-of-another": (lambda f, d: f.update(d, ticket=b"x" * 16), "round or ticket"),
    "another-codec": (lambda f, d: f.update(d, codec="tiny"), "codec 'tiny', the offer asked"),
    "too-heavy": (lambda f, d: f.update(d, num_examples=1 << 26), "a weight of 67108864 samples"),
    "unknown-block": (
        lambda f, d: f.update_of(d, [("nope", b"x")]),
        "block 'nope' is not open in this round",
    ),
    "block-twice": (
        lambda f, d: f.update_of(d, [f.last(), f.last()]),
        "an update names a block twice: ['4', '4']",
    ),
    "another-shape": (
        lambda f, d: f.update_of(d, [f.last(f.payload(f.spec.blocks[0]))]),
        "the zstd frame names",
    ),
    "too-long": (lambda f, d: f.update_of(d, [f.last(b"x" * 20_000)]), "the limit is"),
    "too-short": (lambda f, d: f.update_of(d, [f.last(b"x")]), "not one whole zstd frame"),
    "not-a-number": (lambda f, d: f.update_of(d, [f.lasting(np.nan)]), "a change of nan"),
    "infinite": (lambda f, d: f.update_of(d, [f.lasting(np.inf)]), "a change of inf"),
    # What its first block added to the sums goes with it.
    "half-good": (
        lambda f, d: f.update_of(
            d, [(f.spec.names[0], f.payload(f.spec.blocks[0])), f.lasting(1e6)]
        ),
        "a change of 1e+06, the limit is +-128",
    ),
}
OTHERS = ("forger", "fat", "late", "stale", "fumbler", "liar", "twin", "glutton", "babbler")


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    """A running round with all the hostile devices, and an honest one that trains."""
    home = tmp_path_factory.mktemp("siege")
    task = write_task(home, width=32, epochs=40)
    broker = choose("auto", home / "broker")
    broker.start()
    evil = [*WRONG, *OTHERS]
    server = command(
        "reference_server", "run", "--task", task, "--job", JOB, "--broker", broker.url,
        "--devices", len(evil) + 1, "--codec", "lossless", "--rounds", 1, "--deadline-s", 120,
        "--state", home / "server", "--json", home / "report.json",
    )  # fmt: skip
    honest = command(
        "edge_sdk", "run", "--task", task, "--broker", broker.url, "--job", JOB, "--device",
        "honest", "--profile", FAST, "--state", home / "honest", "--threads", 1, "--keep-trying",
    )  # fmt: skip
    spec = BlockModel(load_task(task)).spec
    try:
        with (
            Running(server, home / "server.txt") as running,
            Running(honest, home / "honest.txt") as device,
        ):
            subject = Field(spec, home, broker.url, running)
            with subject.watcher:
                subject.watcher.wait_for(lambda _, message: isinstance(message, Head))
                for name in evil:
                    assert subject.answers(name) == []
                yield subject
                assert device.finish(START_S) == 0, device.log.read_text()
    finally:
        broker.stop()


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_update_is_rejected(field: Field, kind: str) -> None:
    make, reason = WRONG[kind]
    receipt = field.send(kind, make(field, kind))
    assert receipt.verdict == "rejected"
    assert reason in receipt.reason
    again = field.answers(kind, field.open(kind, field.update(kind)))
    assert [(r.verdict, r.reason) for r in again] == [("rejected", receipt.reason)]


def test_an_update_on_another_base_is_stale(field: Field) -> None:
    receipt = field.send("stale", field.update("stale", base_sha=ZERO_SHA))
    assert receipt.verdict == "stale"
    assert "trained on 000000000000, the round's base is" in receipt.reason


def test_a_forged_ticket_is_rejected(field: Field) -> None:
    theirs = field.join("twin").ticket
    (receipt,) = field.answers("forger", field.open("forger", b"x", ticket=theirs))
    assert (receipt.verdict, receipt.reason) == (
        "rejected",
        "the ticket was not issued to forger for round 1",
    )


def test_more_than_the_plan_allows_is_rejected(field: Field) -> None:
    announced = field.open("fat", b"x", size_bytes=MAX_TRANSFER_BYTES)
    (receipt,) = field.answers("fat", announced)
    assert receipt.verdict == "rejected"
    assert f"an update of {MAX_TRANSFER_BYTES} bytes, the plan allows" in receipt.reason


def test_another_round_is_late_and_costs_nothing(field: Field) -> None:
    body = field.update("late")
    for number in (0, 7, 1 << 31):
        (receipt,) = field.answers("late", field.open("late", body, round=number))
        assert (receipt.round, receipt.verdict) == (number, "late")
        assert receipt.reason.startswith(f"round {number} is closed; the open round is 1")
    assert field.send("late", body).verdict == "accepted"


def test_pieces_that_fit_nowhere_change_nothing(field: Field) -> None:
    body = field.update("fumbler")
    announced = field.open("fumbler", body)
    (want,) = field.answers("fumbler", announced)
    (good,) = pieces(want, body)
    spoilt = good[:-1] + bytes([good[-1] ^ 1])
    (refusal,) = field.answers(
        "fumbler",
        encode_piece(ZERO_SHA, 0, 1, body),
        encode_piece(want.sha256, 1, 2, body),
        encode_piece(want.sha256, (1 << 32) - 1, 1, body),
        encode_piece(want.sha256, 0, 1, body[:-1]),
        encode_piece(want.sha256, 0, 1, body + b"x"),
        spoilt,
    )
    assert "its CRC-32 does not match" in refusal.reason
    field.say("fumbler", good)
    assert field.hear("fumbler").verdict == "accepted"
    field.say("fumbler", TALLY)


def test_content_without_its_hash_is_not_judged(field: Field) -> None:
    body = field.update("liar")
    other = field.update("liar", num_examples=SAMPLES + 1)
    assert len(other) == len(body)
    (want,) = field.answers("liar", field.open("liar", body))
    field.say("liar", *pieces(want, other))
    assert field.hear("liar") == want, "all of it is asked for again"
    assert field.send("liar", body).verdict == "accepted"


def test_a_repeated_update_counts_once(field: Field) -> None:
    body = field.update("twin")
    first = field.send("twin", body)
    assert first.verdict == "accepted"
    assert field.answers("twin", field.open("twin", body)) == [first]
    assert field.answers("twin", encode_piece(first.sha256, 0, 1, body)) == []
    other = field.update("twin", num_examples=SAMPLES + 1)
    (receipt,) = field.answers("twin", field.open("twin", other))
    assert (receipt.verdict, receipt.sha256) == ("accepted", hashlib.sha256(other).hexdigest())


def test_wants_are_served_within_bounds(field: Field) -> None:
    block = field.join("glutton").blocks[0]
    far = (1 << 53) - 1

    def wanted(sha256: str, *ranges: tuple[int, int]) -> list[Any]:
        return field.answers("glutton", Want(sha256=sha256, piece_bytes=256, ranges=ranges))

    assert wanted(ZERO_SHA, (0, 1)) == []
    assert wanted(block.sha256, (far, far + 1), (far - 1, 0)) == []
    last = -(-block.size_bytes // 256) - 1
    (piece,) = wanted(block.sha256, (last, far))
    assert isinstance(piece, Piece)
    assert (piece.index, len(piece.data)) == (last, block.size_bytes - 256 * last)
    # The same pieces over and over are sent once.
    assert len(wanted(block.sha256, *[(0, far)] * 256)) == last + 1


def test_what_is_no_message_is_refused(field: Field) -> None:
    good = encode(field.hello())
    alien = MAGIC + bytes([WIRE_MAJOR + 1]) + good[3:]
    (refusal,) = field.answers("babbler", alien)
    assert refusal == Refusal(reason="wire version 2, this side speaks 1: upgrade the older side")
    cuts = [good[:end] for end in range(len(good))]
    refusals = field.answers("babbler", *cuts, b"\xff" * 100, good[:4] + b"\x63", b"\0" * 200_000)
    assert len(refusals) == len(cuts) + 3
    assert all(isinstance(refusal, Refusal) for refusal in refusals)
    # What only a server says, or says nothing that could be answered.
    absurd = msgspec.structs.replace(TALLY, up_bytes=1 << 50, agent_rss_bytes=1 << 50, cpu_s=1e9)
    nonsense = (
        Welcome(boot="x", session=1),
        Refusal(reason="x"),
        absurd,
        Decline(round=9, reason=""),
    )
    assert field.answers("babbler", *nonsense) == []


def test_topics_that_name_no_device_are_dropped(field: Field) -> None:
    for name in ("Bad_Name", "x" * 65, " "):
        field.watcher.link.publish(f"{field.topics.root}/u/{name}", encode(field.hello()))
        field.watcher.link.publish(f"{field.topics.root}/p/{name}", b"\xff")
    field.watcher.link.publish(field.topics.presence("babbler"), b"\xff" * 9, retain=True)
    field.watcher.link.publish(field.topics.presence("babbler"), encode(field.hello()))
    assert field.answers("babbler") == []


def test_another_model_is_refused(field: Field) -> None:
    (refusal,) = field.answers("stranger", field.hello(ZERO_SHA))
    assert "stranger: its task builds model 000000000000, this job trains" in refusal.reason


def test_at_last_the_round_ends_and_only_good_updates_are_in_it(field: Field) -> None:
    while "honest" not in field.verdicts:
        field.listen()
    silent = {*WRONG, *OTHERS, "stranger"} - field.verdicts.keys()
    for name in silent:
        field.say(name, Decline(round=ROUND, reason="enough"))
    assert field.server.finish(START_S) == 0, field.server.log.read_text()
    report = json.loads((field.home / "report.json").read_text())
    (entry,) = report["rounds"]
    accepted = {row["id"]: row for row in entry["devices"] if row["verdict"] == "accepted"}
    assert accepted.keys() == {d for d, verdict in field.verdicts.items() if verdict == "accepted"}
    samples = {name: row["num_examples"] for name, row in accepted.items()}
    first, last = field.spec.names[0], field.spec.names[-1]
    assert entry["coverage"][first] == {"devices": 1, "samples": samples["honest"]}
    assert entry["coverage"][last] == {"devices": len(samples), "samples": sum(samples.values())}
    totals = report["totals"]
    assert totals["updates_counted"] == len(accepted)
    assert totals["updates_lost"] == totals["updates_double"] == 0
    assert totals["peak_rss_agent_bytes"] < 1 << 40
    assert totals["messages_dropped"] > 0

"""A server that lies, to a real device: the device declines, asks again or ignores, and lives.

The tests share one device and are independent of each other: each offers it the next round.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_sdk.blocks import Block
from edge_sdk.codec import block_hash, encode_block
from edge_sdk.model import BlockModel
from edge_sdk.outbox import MAX_PIECES_PER_WANT
from edge_sdk.task import load_task
from edge_sdk.wire import (
    MAGIC,
    MAX_TRANSFER_BYTES,
    WIRE_MAJOR,
    BlockEntry,
    Decline,
    Head,
    Hello,
    Message,
    Offer,
    Open,
    Piece,
    Presence,
    Receipt,
    Tally,
    Topics,
    Want,
    Welcome,
    encode,
    encode_piece,
)
from reference_server.broker import choose
from tests.simulation import FAST, START_S, Running, Watcher, command, write_task

JOB, DEVICE = "trap", "honest"
ZERO_SHA = "0" * 64
PIECE_BYTES = 4096
pytestmark = pytest.mark.timeout(180)


class FakeServer:
    """Says what it likes to one device, and reads what that answers."""

    def __init__(self, task: Path, home: Path, url: str) -> None:
        self.home, self.topics = home, Topics(JOB)
        self.watcher = Watcher(url, JOB, "u")
        model = BlockModel(load_task(task))
        self.spec, self.round, self.newest = model.spec, 0, 0
        self.contents: dict[str, bytes] = {}
        self.entries = tuple(self._entry(model, name) for name in model.spec.names)
        self.training = load_task(task).training

    def _entry(self, model: BlockModel, name: str) -> BlockEntry:
        return self.add(model.spec.block(name), model.read(name))

    def add(self, block: Block, arrays: Mapping[str, Any]) -> BlockEntry:
        """Have a block to serve, whole."""
        sha256, content = block_hash(block, arrays), encode_block(block, arrays)
        self.contents[sha256] = content
        return BlockEntry(
            name=block.name, sha256=sha256, size_bytes=len(content), raw_bytes=block.size_bytes
        )

    def say(self, *payloads: Message | bytes) -> None:
        """Publish to the device."""
        for payload in payloads:
            data = payload if isinstance(payload, bytes) else encode(payload)
            assert self.watcher.link.publish(self.topics.down(DEVICE), data)

    def head(self, state: str) -> None:
        """Publish, retained, where the job stands."""
        message = msgspec.convert({"boot": "fake", "version": 0, "state": state}, Head)
        self.watcher.link.publish(self.topics.head, encode(message), retain=True)

    def hear(self, kind: type | tuple[type, ...]) -> Any:
        """The device's next message of a kind; its greetings are answered meanwhile."""

        def wanted(device: str, message: Any) -> bool:
            if isinstance(message, Hello):
                self.say(Welcome(boot="fake", session=message.session))
            return device == DEVICE and isinstance(message, kind)

        return self.watcher.wait_for(wanted)[1]

    def offer(self, **changes: Any) -> Offer:
        """A good offer of the next round, with these fields changed."""
        self.round += 1
        good = Offer(
            round=self.round, ticket=secrets.token_bytes(16), version=self.newest,
            base_sha=ZERO_SHA,
            blocks=self.entries, strategy="last_blocks", open_blocks=self.spec.names,
            codec="balanced", deadline_s=600.0, training=self.training, piece_bytes=PIECE_BYTES,
        )  # fmt: skip
        return msgspec.structs.replace(good, **changes)

    def serve(self, want: Want, contents: dict[str, bytes]) -> None:
        """Send what the device wants of these contents."""
        content = contents[want.sha256]
        total = -(-len(content) // want.piece_bytes)
        for first, stop in want.ranges:
            for index in range(first, stop):
                start = index * want.piece_bytes
                data = content[start : start + want.piece_bytes]
                self.say(encode_piece(want.sha256, index, total, data))

    def declines(self, offer: Offer) -> str:
        """Why the device sits a round out, without having asked for a single block."""
        self.say(offer)
        answer = self.hear((Decline, Want))
        assert isinstance(answer, Decline), answer
        assert answer.round == offer.round
        return answer.reason

    def trains(self, offer: Offer) -> Open:
        """Serve blocks until the device announces its update."""
        self.say(offer)
        return self.until_open()

    def until_open(self) -> Open:
        """Serve blocks until the device announces an update."""
        while True:
            message = self.hear((Open, Want))
            if isinstance(message, Open):
                return message
            self.serve(message, self.contents)

    def accept(self, opened: Open) -> None:
        """Let the device forget its update."""
        self.say(Receipt(round=opened.round, sha256=opened.sha256, verdict="accepted"))
        assert self.hear(Tally).round == opened.round
        assert self.spooled() == []

    def spooled(self) -> list[Path]:
        """The device's updates without a receipt."""
        return list((self.home / "device" / "spool").glob("*.json"))

    def forget_blocks(self) -> None:
        """Empty the device's cache."""
        for path in (self.home / "device" / "blocks").glob("*.block"):
            path.unlink()


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    """A fake server that a real device has greeted; at the end the device leaves in good order."""
    home = tmp_path_factory.mktemp("trap")
    task = write_task(home, width=32)
    broker = choose("auto", home / "broker")
    broker.start()
    device = command(
        "edge_sdk", "run", "--task", task, "--broker", broker.url, "--job", JOB, "--device",
        DEVICE, "--profile", FAST, "--state", home / "device", "--threads", 1,
    )  # fmt: skip
    subject = FakeServer(task, home, broker.url)
    try:
        with subject.watcher, Running(device, home / "device.txt") as running:
            subject.head("running")
            subject.hear(Hello)
            yield subject
            subject.head("done")
            assert running.finish(START_S) == 0, running.log.read_text()
            assert "Traceback" not in running.log.read_text()
    finally:
        broker.stop()


def test_what_is_no_message_is_ignored(fake: FakeServer) -> None:
    good = encode(fake.offer())
    alien = MAGIC + bytes([WIRE_MAJOR + 1]) + good[3:]
    fake.say(*[good[:end] for end in range(0, len(good), 7)], alien, b"\xff" * 100, good + b"\0")
    hello = Hello(
        session=1, sdk="x", profile="x", memory_bytes=1, flops_per_s=1.0, spec_digest=ZERO_SHA,
        num_examples=1,
    )  # fmt: skip
    fake.say(hello, Presence(state="lost", session=1), Head(boot="x", version=1, state="done"))
    fake.watcher.link.publish(fake.topics.head, b"\xff" * 20)
    fake.watcher.link.publish(fake.topics.head, encode(hello))
    assert "'x' is unknown" in fake.declines(fake.offer(strategy="x"))


def test_what_belongs_to_nothing_is_ignored(fake: FakeServer) -> None:
    far = (1 << 53) - 1
    fake.say(
        Receipt(round=99, sha256=ZERO_SHA, verdict="accepted"),
        Want(sha256=ZERO_SHA, piece_bytes=256, ranges=((0, far),)),
        Welcome(boot="fake", session=99),
        encode_piece(ZERO_SHA, 0, 1, b"x"),
    )
    assert "'x' is unknown" in fake.declines(fake.offer(strategy="x"))


def test_terms_it_does_not_know_are_declined(fake: FakeServer) -> None:
    fake.forget_blocks()
    assert "strategy 'magic' is unknown" in fake.declines(fake.offer(strategy="magic"))
    assert "codec 'int3'" in fake.declines(fake.offer(codec="int3"))
    assert "no block" in fake.declines(fake.offer(open_blocks=("nope",)))


def test_blocks_of_another_model_are_declined(fake: FakeServer) -> None:
    fake.forget_blocks()
    first, *rest = fake.entries
    for blocks in (
        tuple(rest),
        (*fake.entries, first),
        (msgspec.structs.replace(first, name="other"), *rest),
        (msgspec.structs.replace(first, size_bytes=MAX_TRANSFER_BYTES), *rest),
        (msgspec.structs.replace(first, size_bytes=first.raw_bytes + 1), *rest),
        (msgspec.structs.replace(first, size_bytes=0), *rest),
    ):
        assert "this device's task file" in fake.declines(fake.offer(blocks=blocks))


def test_content_without_its_hash_is_fetched_again(fake: FakeServer) -> None:
    fake.forget_blocks()
    first = fake.entries[0]
    lies = {entry.sha256: b"\xff" * entry.size_bytes for entry in fake.entries}
    offer = fake.offer()
    fake.say(offer)
    asked: list[str] = []
    while asked.count(first.sha256) < 2:
        want = fake.hear(Want)
        if want.ranges[0][0] == 0:
            asked.append(want.sha256)
        if asked.count(first.sha256) < 2:
            fake.serve(want, lies)
    fake.serve(want, fake.contents)
    opened = fake.until_open()
    assert opened.round == offer.round
    fake.accept(opened)


def test_pieces_that_fit_nowhere_change_nothing(fake: FakeServer) -> None:
    fake.forget_blocks()
    fake.say(fake.offer())
    want = fake.hear(Want)
    content = fake.contents[want.sha256]
    good = encode_piece(want.sha256, 0, 1, content[:PIECE_BYTES])
    fake.say(
        good[:-1] + bytes([good[-1] ^ 1]),
        encode_piece(want.sha256, 1 << 31, 1, content[:PIECE_BYTES]),
        encode_piece(want.sha256, 0, 1, content[:7]),
        encode_piece(ZERO_SHA, 0, 1, content[:PIECE_BYTES]),
    )
    fake.serve(want, fake.contents)
    fake.accept(fake.until_open())


def test_only_its_own_receipt_ends_an_upload(fake: FakeServer) -> None:
    offer = fake.offer()
    opened = fake.trains(offer)
    fake.say(
        Receipt(round=opened.round, sha256=ZERO_SHA, verdict="accepted"),
        Receipt(round=opened.round + 1, sha256=opened.sha256, verdict="accepted"),
        Receipt(round=0, sha256=opened.sha256, verdict="rejected", reason="x"),
        msgspec.structs.replace(offer, round=0),
        offer,
    )
    assert fake.hear(Open) == opened
    far = (1 << 53) - 1
    fake.say(
        Want(sha256=ZERO_SHA, piece_bytes=256, ranges=((0, 1),)),
        Want(sha256=opened.sha256, piece_bytes=256, ranges=((far, far), (far, 0))),
        Want(sha256=opened.sha256, piece_bytes=256, ranges=((0, far),) * 256),
    )
    count = min(MAX_PIECES_PER_WANT, -(-opened.size_bytes // 256))
    assert [fake.hear(Piece).index for _ in range(count)] == list(range(count))
    fake.say(Receipt(round=opened.round, sha256=opened.sha256, verdict="accepted"))
    assert isinstance(fake.hear((Piece, Tally)), Tally), "more than it sends at once"
    assert fake.spooled() == []


def test_an_older_model_than_the_one_held_is_declined(fake: FakeServer) -> None:
    newer = fake.offer(version=5)
    fake.accept(fake.trains(newer))
    fake.forget_blocks()
    reason = fake.declines(fake.offer(version=4))
    assert "the offer's model is version 4, this device has taken up version 5" in reason
    fake.newest = 5


def test_old_offers_are_ignored(fake: FakeServer) -> None:
    offer = fake.offer()
    fake.accept(fake.trains(offer))
    fake.say(offer, msgspec.structs.replace(offer, round=0, ticket=b"y" * 16))
    assert "'x' is unknown" in fake.declines(fake.offer(strategy="x"))

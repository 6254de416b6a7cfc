"""Counting: each update of a batch gets its own verdict, and a bad one spoils nobody else's."""

from __future__ import annotations

import hashlib
import queue
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.codec import encode_change
from edge_sdk.errors import StateError
from edge_sdk.merge import BlockSum
from edge_sdk.parts import Incoming
from edge_sdk.strategies import strategy_named
from edge_sdk.wire import Open, Piece, UpdateHeader, UpdateMetrics, encode_update
from reference_server.counting import Arrival, Counted, Counting, CountingFailed, RoundTerms
from reference_server.ledger import Ledger
from tests.ledger_job import BASE, JOB, start

BLOCKS = tuple(
    Block(name=name, tensors=(TensorSpec(name=f"{name}.w", shape=(40,), dtype="float32"),))
    for name in ("body", "head")
)
SPEC = ModelSpec(blocks=BLOCKS)
TERMS = RoundTerms(
    round=1, base_sha=BASE, codec="lossless", open_blocks=SPEC.names, piece_bytes=256
)
METRICS = UpdateMetrics(
    loss=1.0, steps=1, train_s=1.0, train_cpu_s=1.0, plan_s=1.0, plan_peak_bytes=1,
    measured_peak_bytes=1, budget_bytes=2, plan_up_bytes=1, flops=1,
)  # fmt: skip
TICKET = bytes(16)


class Desk:
    """A counting thread on a real ledger with an open round, and what it says."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ledger = Ledger.open(home)
        start(self.ledger)
        self.said: queue.SimpleQueue[Counted | CountingFailed] = queue.SimpleQueue()
        self.counting = Counting(
            JOB, SPEC, strategy_named("full"), self.ledger, self.said.put
        )  # fmt: skip

    def arrival(self, device: str, body: bytes, sha256: str = "", round_number: int = 1) -> Arrival:
        """An update whose pieces are all here."""
        name = sha256 or hashlib.sha256(body).hexdigest()
        incoming = Incoming(self.home / device, name, len(body), 256, Random(0))
        for index in range(incoming.pieces):
            data = body[256 * index : 256 * (index + 1)]
            piece = Piece(bytes.fromhex(name)[:8], index, incoming.pieces, data, zlib.crc32(data))
            assert incoming.take(piece)
        message = Open(round=round_number, ticket=TICKET, sha256=name, size_bytes=len(body))
        return Arrival(device=device, message=message, incoming=incoming, terms=TERMS)

    def count(self, *arrivals: Arrival) -> dict[str, Counted]:
        """What is said of each, counted together."""
        for arrival in arrivals:
            self.counting.put(arrival)
        self.counting.hurry()
        heard = [self.said.get(timeout=20) for _ in arrivals]
        assert all(isinstance(said, Counted) for said in heard), heard
        return {said.arrival.device: said for said in heard if isinstance(said, Counted)}

    def total(self, block: str) -> BlockSum:
        """The stored sum of a block."""
        spec = SPEC.block(block)
        total = BlockSum.zero(spec)
        for partial in self.ledger.partials(JOB, 1, block):
            total.merge(BlockSum.from_bytes(spec, partial.num))
        return total


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.counting.close()
    made.ledger.close()


def body(*names: str, change: float = 0.5, samples: int = 3, **header: object) -> bytes:
    """An update that moves these blocks everywhere by as much."""
    payloads = []
    for name in names or SPEC.names:
        block = SPEC.block(name)
        old = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in block.tensors}
        new = {key: value + np.float32(change) for key, value in old.items()}
        payloads.append(
            encode_change("lossless", block, old, new, np.random.default_rng(0))
        )  # fmt: skip
    sizes = zip(names or SPEC.names, map(len, payloads), strict=True)
    good = UpdateHeader(
        round=1, ticket=TICKET, base_sha=BASE, codec="lossless", num_examples=samples,
        blocks=tuple(sizes), metrics=METRICS,
    )  # fmt: skip
    return encode_update(msgspec.structs.replace(good, **header), payloads)


def spoilt() -> bytes:
    """An update whose second block does not decode: its first one was folded already."""
    whole = bytearray(body())
    whole[-5:] = b"xxxxx"
    return bytes(whole)


def test_updates_are_counted_together_and_answered_each(desk: Desk) -> None:
    heard = desk.count(
        desk.arrival("d1", body(samples=2)),
        desk.arrival("d2", body("head", samples=5)),
        desk.arrival("d3", body(base_sha="b" * 64)),
    )
    verdicts = {name: said.answer.verdict for name, said in heard.items() if said.answer}
    assert verdicts == {"d1": "accepted", "d2": "accepted", "d3": "stale"}
    assert (desk.total("body").samples, desk.total("body").devices) == (2, 1)
    assert (desk.total("head").samples, desk.total("head").devices) == (7, 2)
    assert (desk.total("head").numerators()["head.w"] == 7 << 29).all()
    assert all(check.ok for check in desk.ledger.audit(JOB))


def test_a_bad_update_in_a_batch_is_rejected_alone(desk: Desk) -> None:
    heard = desk.count(
        desk.arrival("good", body()),
        desk.arrival("bad", spoilt()),
        desk.arrival("noise", b"\x05" * 700),
        desk.arrival("fine", body()),
    )
    answers = {name: said.answer for name, said in heard.items() if said.answer is not None}
    assert {name: answer.verdict for name, answer in answers.items()} == {
        "good": "accepted", "bad": "rejected", "noise": "rejected", "fine": "accepted",
    }  # fmt: skip
    assert "block 'head'" in answers["bad"].reason
    assert "update starts with" in answers["noise"].reason
    assert (desk.total("body").devices, desk.total("head").devices) == (2, 2)
    assert all(check.ok for check in desk.ledger.audit(JOB))


def test_content_without_its_hash_gets_no_verdict(desk: Desk) -> None:
    said = desk.count(desk.arrival("liar", body(), sha256="11" * 32))["liar"]
    assert said.answer is None
    assert desk.ledger.verdict_of(JOB, 1, "liar") is None


def test_a_repeated_update_keeps_its_first_verdict(desk: Desk) -> None:
    first = desk.count(desk.arrival("d1", body()))["d1"].answer
    again = desk.count(desk.arrival("d1", body(change=1.0)))["d1"].answer
    assert first is not None
    assert again is not None
    assert (again.verdict, again.repeated, again.conflict) == ("accepted", True, True)
    assert desk.total("head").devices == 1


def test_waiting_updates_are_counted_although_nobody_hurries(desk: Desk) -> None:
    desk.counting.put(desk.arrival("alone", body()))
    said = desk.said.get(timeout=20)
    assert isinstance(said, Counted)
    assert said.answer is not None
    assert said.answer.verdict == "accepted"


def test_a_failing_disk_ends_counting_and_is_told(desk: Desk) -> None:
    arrival = desk.arrival("d1", body())
    arrival.incoming.path.unlink()
    desk.counting.put(arrival)
    desk.counting.hurry()
    failed = desk.said.get(timeout=20)
    assert isinstance(failed, CountingFailed)
    assert isinstance(failed.error, StateError)

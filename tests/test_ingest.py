"""What a server does with transfers that nobody should open: refused, bounded, and in nobody's way.

The real parts without a network: messages go straight in, time is a number.
"""

from __future__ import annotations

import hashlib
import queue
import random
import resource
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_sdk.errors import MalformedMessage
from edge_sdk.strategies import strategy_named
from edge_sdk.wire import DEFAULT_PIECE_BYTES, Open, Piece, Receipt, Want, decode, encode_piece
from reference_server.counting import Counted, Counting, RoundTerms
from reference_server.ingest import MAX_ACTIVE, OUTSTANDING_BYTES, Ingest
from reference_server.ledger import Ledger
from reference_server.trust import Tickets
from tests.parcels import CODEC, JOB, ROUND, base_of, model, sums, update

SPEC = model(1, 300_000)
BASE = base_of(SPEC)
DONE_S = 20.0


class Desk:
    """An ingest with an open round, its ledger and its counting thread."""

    def __init__(self, home: Path) -> None:
        self.ledger, self.counted = Ledger.open(home), queue.SimpleQueue[Any]()
        self.ledger.open_job(JOB, SPEC.digest(), {})
        self.ledger.record_base(JOB, BASE)
        self.ledger.plan_round(JOB, base_version=0, base_sha=BASE)
        self.ledger.open_round(JOB, ROUND, 600.0)
        self.judged: set[str] = set()
        self.tickets = Tickets.load_or_create(home)
        self.counting = Counting(JOB, SPEC, strategy_named("full"), self.ledger, self.counted.put)
        self.home = home
        self.ingest = self.restarted()

    def restarted(self) -> Ingest:
        """Another incarnation of the ingest on the same disk."""
        ingest = Ingest(
            JOB, SPEC, self.ledger, self.tickets, self.home / "incoming", self.counting,
            random.Random(1),
        )  # fmt: skip
        ingest.terms = RoundTerms(
            round=ROUND, base_sha=BASE, codec=CODEC, open_blocks=SPEC.names,
            piece_bytes=DEFAULT_PIECE_BYTES,
        )  # fmt: skip
        ingest.judged = self.judged
        self.ingest = ingest
        return ingest

    def body(self, device: str, seed: int = 1) -> bytes:
        return update(SPEC, BASE, self.ticket(device), seed, 1)

    def ticket(self, device: str) -> bytes:
        return self.tickets.issue(JOB, ROUND, device, BASE)

    def announce(self, device: str, body: bytes, now_s: float = 0.0) -> Receipt | Want:
        return self.ingest.open(device, self.open_of(device, body), now_s)

    def open_of(self, device: str, body: bytes) -> Open:
        sha256 = hashlib.sha256(body).hexdigest()
        return Open(round=ROUND, ticket=self.ticket(device), sha256=sha256, size_bytes=len(body))

    def send(self, device: str, want: Want | None, body: bytes, now_s: float = 0.0) -> int:
        """Send what is wanted until nothing more is; how many pieces that took."""
        todo, sent = deque(pieces(want, body) if want is not None else []), 0
        while todo:
            more = self.ingest.piece(device, todo.popleft(), now_s)
            todo += pieces(more, body) if more is not None else []
            sent += 1
        return sent

    def verdict(self, now_s: float = 0.0) -> Receipt | Want:
        """What is said of the next update that was counted."""
        event = self.counted.get(timeout=DONE_S)
        assert isinstance(event, Counted), event
        if event.answer is not None:
            self.judged.add(event.arrival.device)
        return self.ingest.counted(event, now_s)


def pieces(want: Want, body: bytes) -> list[Piece]:
    size = want.piece_bytes
    total = -(-len(body) // size)
    made = [
        decode(encode_piece(want.sha256, i, total, body[i * size : (i + 1) * size]))
        for first, stop in want.ranges
        for i in range(first, stop)
    ]
    return [piece for piece in made if isinstance(piece, Piece)]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.counting.close()
    made.ledger.close()


def piece_of(body: bytes, index: int, data: bytes, total: int = 99) -> Piece:
    made = decode(encode_piece(hashlib.sha256(body).hexdigest(), index, total, data))
    assert isinstance(made, Piece)
    return made


def test_an_update_is_taken_counted_and_answered_for_good(desk: Desk) -> None:
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    assert desk.send("dev", want, body) == -(-len(body) // DEFAULT_PIECE_BYTES)
    receipt = desk.verdict()
    assert isinstance(receipt, Receipt)
    assert receipt.verdict == "accepted"
    assert desk.announce("dev", body) == receipt, "the stored one, however often it is announced"
    assert not list((desk.home / "incoming").iterdir())


def test_pieces_of_another_transfer_count_for_nothing(desk: Desk) -> None:
    body, other = desk.body("dev"), desk.body("dev", seed=2)
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    assert desk.ingest.piece("dev", piece_of(other, 0, other[:DEFAULT_PIECE_BYTES]), 0.0) is None
    assert desk.ingest.piece("stranger", piece_of(body, 0, body[:10]), 0.0) is None
    desk.send("dev", want, body)
    receipt = desk.verdict()
    assert isinstance(receipt, Receipt)
    assert receipt.verdict == "accepted"


@pytest.mark.parametrize(
    ("index", "length", "text"),
    [
        (0, 100, "piece 0 has 100 bytes, its place has 61440"),
        (0, 61441, "piece 0 has 61441 bytes"),
        (5, 61440, "piece 5 of a whole"),
        (1 << 31, 10, "piece 2147483648"),
    ],
)
def test_pieces_that_overlap_or_lie_beyond_the_end(
    desk: Desk, index: int, length: int, text: str
) -> None:
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    with pytest.raises(MalformedMessage, match=text):
        desk.ingest.piece("dev", piece_of(body, index, bytes(length)), 0.0)
    desk.send("dev", want, body)
    receipt = desk.verdict()
    assert isinstance(receipt, Receipt)
    assert receipt.verdict == "accepted"


def test_pieces_twice_change_nothing(desk: Desk) -> None:
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    for piece in pieces(want, body)[:-1] * 2:
        desk.ingest.piece("dev", piece, 0.0)
    desk.send("dev", want, body)
    desk.verdict()
    (part,) = desk.ledger.partials(JOB, ROUND)
    assert (part.devices, part.num) == (1, sums(SPEC, [body])["b0"].to_bytes())


def test_a_whole_without_its_hash_is_asked_for_again(desk: Desk) -> None:
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    desk.send("dev", want, bytes(len(body)))
    again = desk.verdict()
    assert isinstance(again, Want)
    assert again.ranges[0][0] == 0
    desk.send("dev", again, body)
    receipt = desk.verdict()
    assert isinstance(receipt, Receipt)
    assert receipt.verdict == "accepted"


def test_pieces_that_the_broker_kept_for_a_dead_server_are_not_asked_for_again(desk: Desk) -> None:
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    known, kept, *missing = pieces(want, body)
    desk.ingest.piece("dev", known, 0.0)
    desk.restarted()
    assert desk.ingest.piece("dev", kept, 0.0) is None, "nobody has announced it to this one"
    again = desk.announce("dev", body)
    assert isinstance(again, Want)
    assert again.ranges == ((2, 2 + len(missing)),)


def test_an_update_that_arrived_wholly_before_a_restart_needs_no_piece(desk: Desk) -> None:
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    *most, last = pieces(want, body)
    for piece in most:
        desk.ingest.piece("dev", piece, 0.0)
    desk.restarted()
    desk.ingest.piece("dev", last, 0.0)
    answer = desk.announce("dev", body)
    assert isinstance(answer, Want)
    assert answer.ranges == ()
    receipt = desk.verdict()
    assert isinstance(receipt, Receipt)
    assert receipt.verdict == "accepted"


def ready_to_send(desk: Desk, device: str, until_s: float) -> tuple[float, Want]:
    """When a device is asked for its first pieces, at the latest at ``until_s``."""
    now_s = 0.0
    while now_s < until_s:
        for name, want in desk.ingest.due(now_s):
            if name == device:
                return now_s, want
        now_s = max(now_s + 0.01, desk.ingest.next_due_s() or until_s)
    raise AssertionError(f"{device} was never asked")


def test_senders_that_open_and_never_send_go_to_the_end_of_the_queue(desk: Desk) -> None:
    silent = desk.body("silent")
    for number in range(MAX_ACTIVE):
        assert desk.announce(f"silent-{number}", silent, 0.0)
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    assert want.ranges == (), "all places are taken"
    asked_s, want = ready_to_send(desk, "dev", 120.0)
    assert asked_s < 60.0
    desk.send("dev", want, body, asked_s)
    receipt = desk.verdict(asked_s)
    assert isinstance(receipt, Receipt)
    assert receipt.verdict == "accepted"


def test_a_few_silent_senders_cost_the_others_nothing(desk: Desk) -> None:
    silent = desk.body("silent")
    for number in range(8):
        desk.announce(f"silent-{number}", silent)
    body = desk.body("dev")
    want = desk.announce("dev", body)
    assert isinstance(want, Want)
    assert want.ranges == ((0, 5),)


def test_ten_thousand_transfers_at_once(desk: Desk) -> None:
    """Bounded in memory, in time and in what is asked for, and the one who sends is served."""
    body = desk.body("dev")
    asked, before_kib = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = [f"crowd-{number}" for number in range(10_000)]
    first = desk.open_of("dev", body)
    opens = [msgspec.structs.replace(first, ticket=desk.ticket(name)) for name in names]
    opened_s = time.perf_counter()
    for name, message in zip(names, opens, strict=True):
        answer = desk.ingest.open(name, message, 0.0)
        assert isinstance(answer, Want)
        asked += sum(stop - first for first, stop in answer.ranges)
    each_s = (time.perf_counter() - opened_s) / 10_000
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert asked * DEFAULT_PIECE_BYTES <= 8 * OUTSTANDING_BYTES
    assert grown_kib < 50_000
    assert each_s < 0.005
    looked_s = time.perf_counter()
    list(desk.ingest.due(0.0))
    assert time.perf_counter() - looked_s < 0.1
    device = f"crowd-{MAX_ACTIVE - 1}"
    want = next(w for name, w in desk.ingest.due(10.0) if name == device)
    mine = desk.body(device)
    again = desk.announce(device, mine, 10.0)
    assert isinstance(again, Want), want
    desk.send(device, again, mine, 10.0)
    receipt = desk.verdict(10.0)
    assert isinstance(receipt, Receipt)
    assert receipt.verdict == "accepted"

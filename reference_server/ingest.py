"""Updates on their way here: who may send, how much at a time, and where the pieces lie.

Everything is bounded before it is kept: the ticket and the size are checked when a transfer is
opened, pieces go to the disk at once, and what all devices together may have under way is divided
among those that send. Further ones hear that they are known, and are asked when it is their turn.
What is complete goes to ``counting``; its verdict is in the ledger before anybody hears of it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.blocks import ModelSpec
from edge_sdk.codec import max_change_bytes
from edge_sdk.errors import StateError
from edge_sdk.parts import Incoming, stems, sweep_parts
from edge_sdk.store import make_directory
from edge_sdk.wire import MAX_UPDATE_HEADER_BYTES, Open, Piece, Receipt, Verdict, Want
from reference_server.counting import Arrival, Counted, Counting, RoundTerms
from reference_server.ledger import Answer, Ledger, Upload
from reference_server.trust import Tickets

# Bytes asked for and not here yet, all devices together: what the broker and our queue hold, and
# enough to keep a gigabit link busy. One sender's share is at least what keeps it from stop and go,
# so that it is 32 MiB when as many as may be are asked at the same time.
OUTSTANDING_BYTES = 8 << 20
WINDOW_BYTES, LEAST_WINDOW_BYTES = 1 << 20, 128 << 10
MAX_ACTIVE = 256
# On the disk, all devices of a round together; further ones wait until others were counted.
MAX_INCOMING_BYTES = 16 << 30
# Asked so often in vain, about twenty seconds, a sender goes to the end of the queue.
MAX_SILENT_TRIES = 4

log = logging.getLogger("reference_server")


@dataclass(slots=True)
class _Transfer:
    """One device's update of the open round."""

    message: Open
    incoming: Incoming
    counting: bool = False


class Ingest:
    """Receives the updates of one job. All calls come from one thread."""

    def __init__(
        self,
        job: str,
        spec: ModelSpec,
        ledger: Ledger,
        tickets: Tickets,
        directory: Path,
        counting: Counting,
        rng: random.Random,
    ) -> None:
        """``counting`` takes what is complete; the pieces lie in ``directory``."""
        self._job, self._spec, self._ledger, self._tickets = job, spec, ledger, tickets
        self._directory, self._counting, self._rng = make_directory(directory), counting, rng
        self._transfers: dict[str, _Transfer] = {}
        # Devices that are asked for pieces, and those that wait for it, in the order they came.
        self._active: dict[str, None] = {}
        self._waiting: dict[str, None] = {}
        # What an earlier life of ours left: its senders go on before they hear of this one, and the
        # broker may have kept pieces for us. It is a transfer once it has been announced again.
        self._left = {stem.name.partition(".")[0]: stem for stem in stems(self._directory)}
        self._found: dict[str, Incoming] = {}
        self._held_bytes = 0
        self.terms: RoundTerms | None = None
        # Devices with a verdict in that round; about others the ledger need not be asked.
        self.judged: Container[str] = ()

    def open(self, device: str, message: Open, now_s: float) -> Receipt | Want:
        """Answer an announced update: its stored verdict, a refusal, or what to send first."""
        terms = self.terms
        if terms is None or message.round != terms.round or device in self.judged:
            stored = self._ledger.verdict_of(self._job, message.round, device)
            if stored is not None:
                return receipt_of(message, stored)
        fault = self._fault(device, message)
        if fault is not None:
            return self._judge(device, message, *fault)
        try:
            transfer = self._transfer(device, message)
        except StateError as error:  # a full disk, say: announced again, later and later
            log.error("an update of %s cannot be received: %s", device, error)
            return _wait(message)
        if transfer is None or transfer.counting:
            return _wait(message)
        transfer.incoming.forget_asked()  # who opens anew may have lost all that was asked for
        if transfer.incoming.complete:  # all of it came in an earlier life of ours
            return self._completed(device, transfer)
        self._enqueue(device)
        return (self._ask(device, now_s) if device in self._active else None) or _wait(message)

    def piece(self, device: str, piece: Piece, now_s: float) -> Want | None:
        """Place a piece, and say what to send next; MalformedMessage when it fits nowhere."""
        transfer = self._transfers.get(device)
        incoming = self._found_of(device) if transfer is None else transfer.incoming
        if incoming is None or (transfer is not None and transfer.counting):
            return None
        try:
            incoming.take(piece)
        except StateError as error:  # a full disk, say: asked for again, later and later
            log.error("a piece of %s is not kept: %s", device, error)
            return None
        if transfer is None:
            return None
        if incoming.complete:
            return self._completed(device, transfer)
        return self._ask(device, now_s) if device in self._active else None

    def counted(self, counted: Counted, now_s: float) -> Receipt | Want:
        """What to tell a device whose update was counted, or has to be sent again."""
        arrival = counted.arrival
        arrival.incoming.discard()
        transfer = self._transfers.get(arrival.device)
        if transfer is not None and transfer.incoming is arrival.incoming:
            self._drop(arrival.device)
        if counted.answer is None:
            return self.open(arrival.device, arrival.message, now_s)
        return receipt_of(arrival.message, counted.answer)

    def due(self, now_s: float) -> Iterator[tuple[str, Want]]:
        """Yield whom to ask for what now: those whose pieces are overdue, and whose turn it is."""
        for device in [d for d in self._active if now_s >= self._incoming(d).deadline_s]:
            if self._incoming(device).silent_tries >= MAX_SILENT_TRIES and self._waiting:
                del self._active[device]
                self._waiting[device] = None
            elif want := self._ask(device, now_s):
                yield device, want
        while self._waiting and len(self._active) < MAX_ACTIVE:
            device = next(iter(self._waiting))
            del self._waiting[device]
            self._active[device] = None
            self._incoming(device).forget_asked()
            if want := self._ask(device, now_s):
                yield device, want

    def next_due_s(self) -> float | None:
        """When to look again."""
        return min((self._incoming(device).deadline_s for device in self._active), default=None)

    def forget(self) -> None:
        """A round ended: drop what is still on its way; its devices ask again and hear 'late'."""
        counting = [t.incoming.stem for t in self._transfers.values() if t.counting]
        for device in list(self._transfers):
            self._drop(device)
        self._left.clear()
        self._found.clear()
        sweep_parts(self._directory, keep=counting)

    def _incoming(self, device: str) -> Incoming:
        return self._transfers[device].incoming

    def _transfer(self, device: str, message: Open) -> _Transfer | None:
        """The transfer an Open is about, in place of an earlier one; None: no room on the disk."""
        assert self.terms is not None
        piece_bytes = min(message.piece_bytes, self.terms.piece_bytes)
        known = self._transfers.get(device)
        if known is not None:
            same = (known.message.sha256, known.incoming.piece_bytes) == (
                message.sha256,
                piece_bytes,
            )
            if known.counting or same:
                return known
            self._drop(device)
        if self._held_bytes + message.size_bytes > MAX_INCOMING_BYTES:
            return None
        incoming = self._found_of(device)
        self._found.pop(device, None)
        asked = (message.sha256, message.size_bytes, piece_bytes)
        if incoming is None or asked != (
            incoming.sha256, incoming.size_bytes, incoming.piece_bytes
        ):  # fmt: skip
            stem = self._directory / f"{device}.{message.round}"
            incoming = Incoming(stem, *asked, self._rng)
        self._transfers[device] = _Transfer(message, incoming)
        self._held_bytes += message.size_bytes
        return self._transfers[device]

    def _found_of(self, device: str) -> Incoming | None:
        """What an earlier life left of a device's update, if its announcement is still to come."""
        stem = self._left.pop(device, None)
        if stem is not None and (found := Incoming.found(stem, self._rng)) is not None:
            self._found[device] = found
        return self._found.get(device)

    def _drop(self, device: str) -> None:
        self._held_bytes -= self._transfers.pop(device).message.size_bytes
        self._active.pop(device, None)
        self._waiting.pop(device, None)

    def _enqueue(self, device: str) -> None:
        if device in self._active or device in self._waiting:
            return
        if len(self._active) < MAX_ACTIVE:
            self._active[device] = None
        else:
            self._waiting[device] = None

    def _ask(self, device: str, now_s: float) -> Want | None:
        incoming = self._incoming(device)
        share_bytes = OUTSTANDING_BYTES // len(self._active)
        window_bytes = max(LEAST_WINDOW_BYTES, min(WINDOW_BYTES, share_bytes))
        ranges = incoming.want(now_s, max(1, window_bytes // incoming.piece_bytes))
        if not ranges:
            return None
        return Want(sha256=incoming.sha256, piece_bytes=incoming.piece_bytes, ranges=ranges)

    def _completed(self, device: str, transfer: _Transfer) -> Want:
        """Nothing is missing: the device may wait for its verdict."""
        assert self.terms is not None
        self._active.pop(device, None)
        transfer.counting = True
        self._counting.put(
            Arrival(
                device=device,
                message=transfer.message,
                incoming=transfer.incoming,
                terms=self.terms,
            )
        )
        if not self._active:
            self._counting.hurry()
        return _wait(transfer.message)

    def _fault(self, device: str, message: Open) -> tuple[Verdict, str] | None:
        terms = self.terms
        if terms is None or message.round != terms.round:
            number = "none" if terms is None else str(terms.round)
            return "late", f"round {message.round} is closed; the open round is {number}"
        if not self._tickets.check(message.ticket, self._job, terms.round, device, terms.base_sha):
            return "rejected", f"the ticket was not issued to {device} for round {terms.round}"
        limit = self._limit_bytes(terms)
        if message.size_bytes > limit:
            return "rejected", f"an update of {message.size_bytes} bytes, the plan allows {limit}"
        return None

    def _limit_bytes(self, terms: RoundTerms) -> int:
        blocks = [self._spec.block(name) for name in terms.open_blocks]
        return MAX_UPDATE_HEADER_BYTES + sum(max_change_bytes(terms.codec, b) for b in blocks)

    def _judge(self, device: str, message: Open, verdict: Verdict, reason: str) -> Receipt:
        upload = Upload(
            round=message.round, device=device, base_sha="", digest=message.sha256, samples=0
        )
        answer = self._ledger.record_verdict(self._job, upload, verdict, reason)
        return receipt_of(message, answer)


def receipt_of(message: Open, answer: Answer) -> Receipt:
    """The receipt for an announced update."""
    return Receipt(
        round=message.round,
        sha256=message.sha256,
        verdict=answer.verdict,
        reason=answer.reason[:2000],
    )


def _wait(message: Open) -> Want:
    """Known, but nothing is to be sent now."""
    return Want(sha256=message.sha256, piece_bytes=message.piece_bytes, ranges=())

"""One update from its first piece to its receipt: check, decode, fold, commit, answer.

Everything is bounded before it is parsed: the ticket and the size are checked when the transfer is
opened, names, codec and lengths against the offer before a byte is decompressed. The verdict is
in the ledger, in the transaction that folded the update, before anybody hears of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from edge_sdk.blocks import ModelSpec
from edge_sdk.codec import max_change_bytes
from edge_sdk.errors import PeerError, WrongUpdate
from edge_sdk.merge import BlockSum
from edge_sdk.pieces import Incoming
from edge_sdk.strategies import Strategy
from edge_sdk.wire import (
    MAX_UPDATE_HEADER_BYTES,
    Open,
    Piece,
    Receipt,
    UpdateHeader,
    Verdict,
    Want,
    decode_update,
)
from reference_server.ledger import Answer, Ledger, Upload
from reference_server.trust import Tickets

WINDOW_PIECES = 16
# Updates under way, all devices together; further ones wait for credit, nothing is lost by that.
MAX_INCOMING_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class RoundTerms:
    """What an update of the open round must match."""

    round: int
    base_sha: str
    codec: str
    open_blocks: tuple[str, ...]
    piece_bytes: int


class Ingest:
    """Assembles and counts the updates of one job."""

    def __init__(
        self,
        job: str,
        spec: ModelSpec,
        strategy: Strategy,
        ledger: Ledger,
        tickets: Tickets,
        rng: random.Random,
    ) -> None:
        self._job, self._spec, self._strategy = job, spec, strategy
        self._ledger, self._tickets, self._rng = ledger, tickets, rng
        self._incoming: dict[str, tuple[Open, Incoming]] = {}
        self.terms: RoundTerms | None = None

    def open(self, device: str, message: Open, now_s: float) -> Receipt | Want | None:
        """Answer an announced update: its stored verdict, a refusal, or what to send first."""
        stored = self._ledger.verdict_of(self._job, message.round, device)
        if stored is not None:
            return _receipt(message, stored)
        fault = self._fault(device, message)
        if fault is not None:
            return self._judge(device, message, *fault)
        known = self._incoming.get(device)
        if known is None or known[0].sha256 != message.sha256:
            if self._held_bytes(device) + message.size_bytes > MAX_INCOMING_BYTES:
                return None
            assert self.terms is not None
            incoming = Incoming(
                message.sha256, message.size_bytes, self.terms.piece_bytes, WINDOW_PIECES, self._rng
            )
            self._incoming[device] = (message, incoming)
        return self.ask(device, now_s)

    def piece(self, device: str, piece: Piece, now_s: float) -> Receipt | Want | None:
        """Place a piece; the receipt when it was the last one.

        PeerError when it fits nowhere, or when all pieces together do not have the announced hash:
        then nothing is judged, the device opens the transfer again.
        """
        if device not in self._incoming:
            return None
        message, incoming = self._incoming[device]
        incoming.take(piece.transfer, piece.index, piece.data)
        if not incoming.complete:
            return self.ask(device, now_s)
        del self._incoming[device]
        incoming.verify()
        return self._count(device, message, incoming)

    def ask(self, device: str, now_s: float) -> Want | None:
        """What to ask a device for now, if anything."""
        _, incoming = self._incoming[device]
        ranges = incoming.want(now_s)
        if not ranges:
            return None
        return Want(sha256=incoming.sha256, piece_bytes=incoming.piece_bytes, ranges=ranges)

    def due(self, now_s: float) -> list[str]:
        """Devices whose pieces are overdue."""
        return [d for d, (_, incoming) in self._incoming.items() if now_s >= incoming.deadline_s]

    def next_due_s(self) -> float | None:
        """When to look again."""
        return min((i.deadline_s for _, i in self._incoming.values()), default=None)

    def forget(self) -> None:
        """A round ended: drop what is still on its way; its devices ask again and hear 'late'."""
        self._incoming.clear()

    def _held_bytes(self, besides: str) -> int:
        return sum(len(i.content) for d, (_, i) in self._incoming.items() if d != besides)

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
        return _receipt(message, answer)

    def _count(self, device: str, message: Open, incoming: Incoming) -> Receipt:
        try:
            return _receipt(message, self._counted(device, message, incoming))
        except PeerError as error:
            return self._judge(device, message, "rejected", str(error)[:1900])

    def _counted(self, device: str, message: Open, incoming: Incoming) -> Answer:
        terms = self.terms
        assert terms is not None
        header, parts = decode_update(memoryview(incoming.content))
        if (header.round, header.ticket) != (message.round, message.ticket):
            raise WrongUpdate("the update's round or ticket is not the one it was announced with")
        upload = Upload(
            round=header.round,
            device=device,
            base_sha=header.base_sha,
            digest=message.sha256,
            samples=header.num_examples,
            size_bytes=message.size_bytes,
            metrics={
                **msgspec.to_builtins(header.metrics),
                "blocks": [name for name, _ in header.blocks],
            },
        )
        return self._ledger.count_update(self._job, upload, self._fold(header, parts, terms))

    def _fold(
        self, header: UpdateHeader, parts: list[tuple[str, memoryview]], terms: RoundTerms
    ) -> Callable[[Callable[[str], bytes | None], Callable[[str, bytes, int, int], None]], None]:
        def fold(
            load: Callable[[str], bytes | None], save: Callable[[str, bytes, int, int], None]
        ) -> None:
            sums = _LedgerSums(self._spec, load, save)
            half = self._strategy.server_round(self._spec, terms.open_blocks, terms.codec, sums)
            half.check(header)
            half.receive(header, parts)

        return fold


class _LedgerSums:
    """The sums of a round inside one ledger transaction, as a strategy sees them."""

    def __init__(
        self,
        spec: ModelSpec,
        load: Callable[[str], bytes | None],
        save: Callable[[str, bytes, int, int], None],
    ) -> None:
        self._spec, self._load, self._save = spec, load, save

    def load(self, block: str) -> BlockSum:
        """The stored sum, or zero."""
        blob = self._load(block)
        spec = self._spec.block(block)
        return BlockSum.zero(spec) if blob is None else BlockSum.from_bytes(spec, blob)

    def save(self, block: str, total: BlockSum) -> None:
        """Store the sum."""
        self._save(block, total.to_bytes(), total.samples, total.devices)


def _receipt(message: Open, answer: Answer) -> Receipt:
    return Receipt(
        round=message.round,
        sha256=message.sha256,
        verdict=answer.verdict,
        reason=answer.reason[:2000],
    )

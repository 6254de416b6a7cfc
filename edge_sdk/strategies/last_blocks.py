"""Constraint-aware fine-tuning of the last blocks (CAFF; Pfeiffer, Ahmed, Khalili, Henkel,
arXiv 2411.07826), and full training, the case in which everyone trains everything (FedAvg).

Each device trains the last t blocks it can afford plus the head; the server takes, block by block,
the mean over the devices that trained it, weighted by their samples. What nobody trained stays.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from edge_sdk.blocks import ModelSpec, levels
from edge_sdk.errors import WrongUpdate
from edge_sdk.plan import Plan
from edge_sdk.wire import Offer, Receipt, Update, UpdateHeader, UpdateMetrics

# Agent and planner use only the candidates below, and stay without numpy: a quarter of a second and
# 12 MiB on every device. So what computes is imported where it computes.
if TYPE_CHECKING:
    import numpy as np

    from edge_sdk.merge import BlockSum

Arrays = Mapping[str, "np.ndarray[Any, Any]"]
DeviceRound = Generator[Update, Receipt, None]


class LocalModel(Protocol):
    """The device's model as a strategy sees it."""

    def train(self, plan: Plan) -> int:
        """Train the plan's blocks; the number of samples used."""

    def metrics(self) -> UpdateMetrics:
        """What the round has cost so far, encoding included."""

    def base(self, block: str) -> Arrays:
        """A block as the offer's version has it."""

    def read(self, block: str) -> Arrays:
        """A block as it is now."""


class Sums(Protocol):
    """Where the server keeps the round's partial sums."""

    def load(self, block: str) -> BlockSum:
        """The sum so far; zero if nobody trained the block yet."""

    def save(self, block: str, total: BlockSum) -> None:
        """Replace the sum."""


def last_blocks(spec: ModelSpec, open_blocks: Sequence[str]) -> list[tuple[str, ...]]:
    """Candidates, most trained blocks first: the last t levels and the head, down to the head."""
    rows = [tuple(name for name in row if name in open_blocks) for row in levels(spec)]
    suffixes = [tuple(n for row in rows[start:] for n in row) for start in range(len(rows))]
    return [blocks for blocks in dict.fromkeys(suffixes) if blocks]


def everything(spec: ModelSpec, open_blocks: Sequence[str]) -> list[tuple[str, ...]]:
    """The one candidate of full training; none when no block of the model is open."""
    blocks = tuple(name for name in spec.names if name in open_blocks)
    return [blocks] if blocks else []


def device_round(
    offer: Offer, spec: ModelSpec, plan: Plan, local: LocalModel, rng: np.random.Generator
) -> DeviceRound:
    """Device half: train, then yield the one update; its reply is the server's receipt."""
    from edge_sdk.codec import encode_change

    num_examples = local.train(plan)
    payloads = (
        (name, encode_change(plan.codec, spec.block(name), local.base(name), local.read(name), rng))
        for name in plan.blocks
    )

    def header(blocks: tuple[tuple[str, int], ...]) -> UpdateHeader:
        return UpdateHeader(
            round=offer.round,
            ticket=offer.ticket,
            base_sha=offer.base_sha,
            codec=plan.codec,
            num_examples=num_examples,
            blocks=blocks,
            metrics=local.metrics(),
        )

    yield Update(payloads, header)


class ServerRound:
    """Server half: adds each update to the sums of its blocks, closes with the weighted means."""

    def __init__(self, spec: ModelSpec, open_blocks: Sequence[str], codec: str, sums: Sums) -> None:
        self._spec, self._open, self._codec, self._sums = spec, open_blocks, codec, sums

    def check(self, header: UpdateHeader) -> None:
        """Refuse, before anything is decoded, an update that is not what was offered."""
        names = [name for name, _ in header.blocks]
        for name in names:
            if name not in self._open:
                raise WrongUpdate(f"block {name!r} is not open in this round: {list(self._open)}")
        if len(set(names)) != len(names):
            raise WrongUpdate(f"an update names a block twice: {names}")
        if header.codec != self._codec:
            raise WrongUpdate(f"codec {header.codec!r}, the offer asked for {self._codec!r}")

    def receive(self, header: UpdateHeader, parts: Sequence[tuple[str, memoryview]]) -> None:
        """Fold one checked update; WrongUpdate leaves the block it fails in as it was."""
        for name, payload in parts:
            total = self._sums.load(name)
            total.fold(header.codec, payload, header.num_examples)
            self._sums.save(name, total)

    def close(
        self, base: Callable[[str], Arrays]
    ) -> Iterator[tuple[str, dict[str, np.ndarray[Any, Any]]]]:
        """New weights of the blocks somebody trained, one block at a time."""
        for name in self._spec.names:
            total = self._sums.load(name)
            if total.samples:
                yield name, total.publish(base(name), self._codec)

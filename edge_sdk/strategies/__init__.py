"""The strategies: one file each, device half and server half together, joined only by messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import ConfigError
from edge_sdk.strategies import last_blocks
from edge_sdk.wire import Receipt, decode_update


@dataclass(frozen=True, slots=True)
class Strategy:
    """The halves of one strategy, and the plans it allows, the most wanted first."""

    candidates: Callable[[ModelSpec, Sequence[str]], list[tuple[str, ...]]]
    device_round: Callable[..., last_blocks.DeviceRound]
    server_round: Callable[..., last_blocks.ServerRound]


STRATEGIES = {
    "full": Strategy(last_blocks.everything, last_blocks.device_round, last_blocks.ServerRound),
    "last_blocks": Strategy(
        last_blocks.last_blocks, last_blocks.device_round, last_blocks.ServerRound
    ),
}


def strategy_named(name: str) -> Strategy:
    """The strategy called ``name``; ConfigError lists the known ones."""
    if name not in STRATEGIES:
        raise ConfigError(f"strategy {name!r} is unknown; known are {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def lockstep(
    devices: Iterable[last_blocks.DeviceRound], server: last_blocks.ServerRound
) -> list[Receipt]:
    """Drive both halves of a round in one process, every message through its wire form."""
    receipts = []
    for device in devices:
        body = next(device).to_bytes()
        header, parts = decode_update(memoryview(body))
        server.check(header)
        server.receive(header, parts)
        receipts.append(Receipt(round=header.round, sha256="0" * 64, verdict="accepted"))
        device.close()
    return receipts

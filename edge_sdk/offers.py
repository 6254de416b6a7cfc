"""What a device believes of an offer, and the plan it makes for it before it fetches anything."""

from __future__ import annotations

from edge_sdk.blocks import ModelSpec
from edge_sdk.cost import CostTable, bits_per_param
from edge_sdk.errors import TaskError
from edge_sdk.pieces import piece_count
from edge_sdk.plan import Limits, Plan, choose
from edge_sdk.strategies import strategy_named
from edge_sdk.wire import Offer


def plan_for(offer: Offer, table: CostTable, limits: Limits, num_examples: int) -> Plan:
    """The plan for an offer; EdgeError says why the device has to sit it out."""
    check_blocks(offer, table.spec)
    return choose(
        table,
        strategy_named(offer.strategy).candidates(table.spec, offer.open_blocks),
        offer.training,
        limits,
        num_examples=num_examples,
        codec=offer.codec,
        bits_per_param=bits_per_param(offer.codec),
    )


def check_blocks(offer: Offer, spec: ModelSpec) -> None:
    """TaskError or MalformedMessage unless an offer's blocks are those of the device's model.

    A block, or its difference to another version, never travels in more bytes than it has, so the
    offer's sizes need not be believed.
    """
    if tuple(entry.name for entry in offer.blocks) != spec.names:
        raise TaskError("the offer's blocks are not those of this device's task file")
    for entry, block in zip(offer.blocks, spec.blocks, strict=True):
        if not min(1, block.size_bytes) <= entry.size_bytes <= block.size_bytes:
            raise TaskError(
                f"the offer gives block {entry.name!r} {entry.size_bytes} bytes, it has "
                f"{block.size_bytes} in this device's task file"
            )
        piece_count(entry.size_bytes, offer.piece_bytes)
    for delta in offer.deltas:
        limit = offer.blocks[delta.block].size_bytes if delta.block < len(offer.blocks) else 0
        if delta.size_bytes > limit:
            raise TaskError(
                f"the offer gives a difference to block number {delta.block} {delta.size_bytes} "
                f"bytes, the limit is the block's own {limit}"
            )

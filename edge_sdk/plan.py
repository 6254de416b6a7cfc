"""Which blocks a device trains, at which micro-batch, within its budgets; and why not more.

The strategy names the candidates in the order of preference; the first that fits memory and time
is taken, at the largest micro-batch that fits. Deterministic, and monotone: a larger budget never
leads to an earlier candidate being skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from edge_sdk.cost import CostTable, Estimate, estimate
from edge_sdk.errors import MIB, NothingFits
from edge_sdk.wire import Training

# The share of a deadline a plan may fill: predictions of time are good to about a third.
DEADLINE_SHARE = 0.75


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a device may spend on one round.

    memory_bytes:  peak resident memory of the training process; ``bound_by`` names its source.
    floor_bytes:   what that process holds before the model exists.
    fetch_bytes:   blocks still to be downloaded.
    """

    memory_bytes: int
    bound_by: str
    floor_bytes: int
    flops_per_s: float
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    deadline_s: float
    fetch_bytes: int = 0


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A better plan that was not taken, and the limit in its way."""

    blocks: tuple[str, ...]
    reason: str


class FrozenPrefix(msgspec.Struct, frozen=True, kw_only=True):
    """How the frozen blocks below the lowest trained one are run.

    blocks: the frozen blocks that feed no gradient, from the input upwards; may be empty.
    engine: what computes their output: torch without autograd, or ONNX Runtime in float32 or int8.
    cache:  whether each sample's output is kept after the first time, and where.
    dtype:  how a kept output is stored.
    """

    blocks: tuple[str, ...] = ()
    engine: Literal["torch", "onnx", "onnx_int8"] = "torch"
    cache: Literal["none", "memory", "disk"] = "none"
    dtype: Literal["float32", "float16"] = "float32"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a device will do in a round, with what that is predicted to cost.

    steps:            optimiser steps; None: all steps of the local epochs.
    checkpoint:       activations inside a block are dropped and computed again in backward.
    step_in_backward: a parameter is updated, and its gradient dropped, as soon as that is complete;
                      only with ``micro_batch == batch_size``.
    """

    blocks: tuple[str, ...]
    batch_size: int
    micro_batch: int
    codec: str
    steps: int | None = None
    checkpoint: bool = False
    step_in_backward: bool = False
    prefix: FrozenPrefix = FrozenPrefix()
    peak_bytes: int
    budget_bytes: int
    train_s: float
    round_s: float
    upload_bytes: int
    flops: int
    left_out: tuple[LeftOut, ...] = ()


def choose(
    table: CostTable,
    candidates: Sequence[tuple[str, ...]],
    training: Training,
    limits: Limits,
    *,
    num_examples: int,
    codec: str,
    bits_per_param: float,
) -> Plan:
    """The first candidate within the limits; NothingFits when there is none."""
    left_out: list[LeftOut] = []
    for blocks in candidates:
        tried = [
            (micro, _estimate(table, blocks, training, limits, micro, num_examples, bits_per_param))
            for micro in _micro_batches(training.batch_size)
        ]
        fitting = [(m, e) for m, e in tried if e.peak_bytes <= limits.memory_bytes]
        micro, cost = fitting[0] if fitting else tried[-1]
        obstacle = _obstacle(cost, limits)
        if obstacle is None:
            return Plan(
                blocks=blocks,
                batch_size=training.batch_size,
                micro_batch=micro,
                codec=codec,
                peak_bytes=cost.peak_bytes,
                budget_bytes=limits.memory_bytes,
                train_s=cost.train_s,
                round_s=_round_s(cost, limits),
                upload_bytes=cost.upload_bytes,
                flops=cost.flops,
                left_out=tuple(left_out),
            )
        left_out.append(LeftOut(blocks=blocks, reason=obstacle))
    raise NothingFits(_nothing(left_out))


def _estimate(
    table: CostTable,
    blocks: tuple[str, ...],
    training: Training,
    limits: Limits,
    micro_batch: int,
    num_examples: int,
    bits_per_param: float,
) -> Estimate:
    return estimate(
        table,
        blocks,
        training,
        micro_batch=micro_batch,
        num_examples=num_examples,
        floor_bytes=limits.floor_bytes,
        flops_per_s=limits.flops_per_s,
        bits_per_param=bits_per_param,
    )


def _micro_batches(batch_size: int) -> list[int]:
    """Halvings of the batch, largest first: gradient accumulation costs no extra operations."""
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _round_s(cost: Estimate, limits: Limits) -> float:
    moving = (
        cost.upload_bytes / limits.uplink_bytes_per_s
        + limits.fetch_bytes / limits.downlink_bytes_per_s
    )
    return cost.train_s + moving


def _obstacle(cost: Estimate, limits: Limits) -> str | None:
    if cost.peak_bytes > limits.memory_bytes:
        return (
            f"needs {cost.peak_bytes / MIB:.0f} MiB at the smallest micro-batch, "
            f"{limits.memory_bytes / MIB:.0f} MiB allowed by {limits.bound_by}"
        )
    needed_s, allowed_s = _round_s(cost, limits), limits.deadline_s * DEADLINE_SHARE
    if needed_s > allowed_s:
        return f"takes {needed_s:.2f} s, {allowed_s:.2f} s of the round's deadline are usable"
    return None


def _nothing(left_out: Sequence[LeftOut]) -> str:
    if not left_out:
        return "the offer opens no block to this device: sit this round out"
    cheapest = left_out[-1]
    return (
        f"cheapest plan ({', '.join(cheapest.blocks)}) {cheapest.reason}. Lower the batch size, "
        "raise the deadline, or raise the device's budget if it has room."
    )

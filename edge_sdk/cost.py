"""What training given blocks costs: peak bytes, floating-point operations, seconds, upload bytes.

Peak memory is the runtime floor, all weights, gradients and optimiser state of what is trained,
activations kept from the lowest trained block upwards, and working space. Backward stops at the
lowest trained block; a frozen block above it still passes a gradient through (CAFF accounting,
arXiv 2411.07826; the input-gradient term is why low trainable layers are dear).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import ConfigError
from edge_sdk.wire import Training

Bytes = Annotated[int, Meta(ge=0, le=(1 << 53))]

# Thread stacks, kernels' workspace and library code first touched by a training step: measured as
# nearly constant whatever the model, so it is added rather than modelled.
STEP_OVERHEAD_BYTES = 32 << 20
# Temporaries alive at once around the largest operation: its output, its gradient, one copy.
LIVE_TRANSIENTS = 3
# Encoding a change holds the base, its travelling form, the quantised values and the result.
ENCODE_BYTES_PER_ELEMENT = 14
# Bits one float element costs on the wire, by codec: measured on Gaussian, Laplace and Student-t
# changes of 1e-4 to 1e-2 rms, rounded up.
BITS_PER_PARAM = {"fp32": 23.0, "fp16": 14.0, "int8": 5.2}
OPTIMIZER_STATES = {"sgd": 1, "adam": 2, "adamw": 2}


def bits_per_param(codec: str) -> float:
    """Planning figure: bits one float element costs with ``codec``; ConfigError if unknown."""
    if codec not in BITS_PER_PARAM:
        raise ConfigError(f"codec {codec!r} is unknown; known are {', '.join(BITS_PER_PARAM)}")
    return BITS_PER_PARAM[codec]


class BlockCost(msgspec.Struct, frozen=True, kw_only=True):
    """One block's share of a training step; activations are what autograd keeps for backward."""

    name: str
    params: Bytes
    size_bytes: Bytes
    elements: Bytes
    activation_bytes_per_sample: Bytes
    transient_bytes_per_sample: Bytes
    flops_forward_per_sample: Bytes


class CostTable(msgspec.Struct, frozen=True, kw_only=True):
    """Costs of all blocks of a task's model, in the model's order; enough to plan without torch."""

    task: str
    spec: ModelSpec
    blocks: tuple[BlockCost, ...]

    def __post_init__(self) -> None:
        if tuple(b.name for b in self.blocks) != self.spec.names:
            raise ConfigError("cost table: its blocks are not those of its model; make it anew")


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The predicted cost of one local round."""

    peak_bytes: int
    flops: int
    train_s: float
    upload_bytes: int


def estimate(
    table: CostTable,
    trained: Collection[str],
    training: Training,
    *,
    micro_batch: int,
    num_examples: int,
    floor_bytes: int,
    flops_per_s: float,
    bits_per_param: float,
) -> Estimate:
    """Predict one local round that trains ``trained`` over ``num_examples`` samples."""
    flops = _flops_per_sample(table, trained) * num_examples * training.local_epochs
    elements = sum(b.elements for b in table.blocks if b.name in trained)
    return Estimate(
        peak_bytes=floor_bytes + _above_floor_bytes(table, trained, training, micro_batch),
        flops=flops,
        train_s=flops / flops_per_s,
        upload_bytes=round(elements * bits_per_param / 8),
    )


def _above_floor_bytes(
    table: CostTable, trained: Collection[str], training: Training, micro_batch: int
) -> int:
    weights = sum(b.size_bytes for b in table.blocks)
    gradients = sum(4 * b.params for b in table.blocks if b.name in trained)
    states = OPTIMIZER_STATES[training.optimizer]
    if training.optimizer == "sgd" and training.momentum == 0.0:
        states = 0
    lowest = min(i for i, b in enumerate(table.blocks) if b.name in trained)
    kept = sum(b.activation_bytes_per_sample for b in table.blocks[lowest:])
    transient = max(b.transient_bytes_per_sample for b in table.blocks)
    step = micro_batch * (kept + LIVE_TRANSIENTS * transient)
    encode = ENCODE_BYTES_PER_ELEMENT * max(b.elements for b in table.blocks if b.name in trained)
    return weights + gradients * (1 + states) + max(step, encode) + STEP_OVERHEAD_BYTES


def _flops_per_sample(table: CostTable, trained: Collection[str]) -> int:
    lowest = min(i for i, b in enumerate(table.blocks) if b.name in trained)
    total = 0
    for place, block in enumerate(table.blocks):
        forward = block.flops_forward_per_sample
        passes = 3 if block.name in trained else 2 if place > lowest else 1
        total += passes * forward
    return total

"""Models and updates of a chosen size, with random weights, for tests of how they travel."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.codec import block_hash, encode_change
from edge_sdk.merge import BlockSum
from edge_sdk.store import Spool, SpoolEntry
from edge_sdk.wire import BlockEntry, UpdateHeader, UpdateMetrics, decode_update, encode_update
from reference_server.trust import Tickets
from reference_server.versions import model_sha256

JOB, ROUND, CODEC = "parcels", 1, "lossless"
# What a random float32 change takes once compressed: its exponents are not random.
BYTES_PER_ELEMENT = 3.5

METRICS = UpdateMetrics(
    loss=1.0, steps=1, train_s=1.0, train_cpu_s=1.0, plan_s=1.0, plan_peak_bytes=1,
    measured_peak_bytes=1, budget_bytes=2, plan_up_bytes=1, flops=1,
)  # fmt: skip


def model(blocks: int, size_bytes: int) -> ModelSpec:
    """A model of equal blocks that travels in about this many bytes."""
    elements = int(size_bytes / blocks / BYTES_PER_ELEMENT)
    weight = TensorSpec(name="weight", shape=(elements,), dtype="float32")
    named = [(f"b{n}", TensorSpec(name=f"b{n}.w", shape=weight.shape, dtype=weight.dtype))
             for n in range(blocks)]  # fmt: skip
    return ModelSpec(blocks=tuple(Block(name=name, tensors=(spec,)) for name, spec in named))


def weights(block: Block, seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """Random tensors of a block."""
    rng, unit = np.random.default_rng(seed), np.float32(scale)
    return {s.name: unit * rng.standard_normal(s.shape, np.float32) for s in block.tensors}


def update(spec: ModelSpec, base_sha: str, ticket: bytes, seed: int, last: int) -> bytes:
    """An update of the last so many blocks, of random changes."""
    parts = []
    for number, block in enumerate(spec.blocks[-last:]):
        still = {s.name: np.zeros(s.shape, np.float32) for s in block.tensors}
        moved = weights(block, seed * 1000 + number)
        rng = np.random.default_rng(seed)
        parts.append((block.name, encode_change(CODEC, block, still, moved, rng)))
    header = UpdateHeader(
        round=ROUND, ticket=ticket, base_sha=base_sha, codec=CODEC, num_examples=1,
        metrics=METRICS, blocks=tuple((name, len(payload)) for name, payload in parts),
    )  # fmt: skip
    return encode_update(header, [payload for _, payload in parts])


def fill_spool(
    directory: Path,
    spec: ModelSpec,
    server_dir: Path,
    device: str,
    base_sha: str,
    *,
    seed: int = 1,
    last: int = 0,
) -> SpoolEntry:
    """Put a device's update into its spool, with the ticket that the server there would give.

    ``last``: of how many blocks; 0: all.
    """
    ticket = Tickets.load_or_create(server_dir).issue(JOB, ROUND, device, base_sha)
    body = update(spec, base_sha, ticket, seed, last or len(spec.blocks))
    return Spool(directory).put(JOB, ROUND, ticket, body, float(seed))


def sums(spec: ModelSpec, bodies: list[bytes]) -> dict[str, BlockSum]:
    """What counting each of these updates once comes to."""
    totals = {block.name: BlockSum.zero(block) for block in spec.blocks}
    for body in bodies:
        header, parts = decode_update(memoryview(body))
        for name, payload in parts:
            totals[name].fold(CODEC, payload, header.num_examples)
    return totals


def base_of(spec: ModelSpec) -> str:
    """Hash of the model that a plain server begins with."""
    named = [(b, block_hash(b, weights(b, number))) for number, b in enumerate(spec.blocks)]
    return model_sha256([
        BlockEntry(name=b.name, sha256=sha256, size_bytes=1, raw_bytes=1) for b, sha256 in named
    ])  # fmt: skip


def spooled(home: Path, spec: ModelSpec, device: str = "dev", **what: int) -> SpoolEntry:
    """An update in the device's spool, for the server in the same home."""
    return fill_spool(home / device / "spool", spec, home / "server", device, base_of(spec), **what)

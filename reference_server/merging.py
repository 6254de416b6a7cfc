"""How versions come to be: the first from the task, the next from the sums of a closed round.

With one block in memory at a time. The next version is a function of what is on the disk: a killed
server repeats it and gets the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import ProtocolMisuse
from edge_sdk.merge import BlockSum
from edge_sdk.strategies.last_blocks import ServerRound
from reference_server.evaluate import Evaluator
from reference_server.ledger import Ledger, RoundRow
from reference_server.versions import Manifest, VersionStore

Coverage = dict[str, dict[str, int]]


def first_version(
    job: str,
    evaluator: Evaluator,
    ledger: Ledger,
    versions: VersionStore,
    say: Callable[[dict[str, Any]], None],
) -> Manifest:
    """The latest version; when there is none yet, pre-train, and enter version 0."""
    latest = ledger.latest_version(job)
    if latest is not None:
        return versions.load_manifest(latest.version, latest.sha)
    steps = 0

    def progress() -> None:
        nonlocal steps
        steps += 1
        say({"event": "pretrain", "step": steps})

    samples, loss = evaluator.pretrain(progress)
    entries = tuple(versions.put_block(b, evaluator.weights(b.name)) for b in evaluator.spec.blocks)
    manifest = Manifest(
        job=job, version=0, round=0, parent_sha="", created_s=time.time(), blocks=entries
    )
    versions.write_manifest(manifest)
    ledger.record_base(job, manifest.model_sha256)
    measured = evaluator.measure(versions, manifest)
    accuracy = None if measured is None else measured[1]
    say({"event": "base", "samples": samples, "steps": steps, "loss": loss, "accuracy": accuracy})
    return manifest


def merge_round(
    row: RoundRow,
    base: Manifest,
    server_round: Callable[..., ServerRound],
    codec: str,
    spec: ModelSpec,
    ledger: Ledger,
    versions: VersionStore,
) -> tuple[Manifest, Coverage]:
    """Write the version a closed round becomes; its manifest, and who trained each block.

    What nobody trained keeps its entry, and so its bytes; what changed is also there as the
    difference to what it was. ``codec`` is the job's.
    """
    sums = _RoundSums(spec, ledger, base.job, row.round)
    entries = {entry.name: entry for entry in base.blocks}
    half = server_round(spec, spec.names, codec, sums)
    for name, arrays in half.close(
        lambda block: versions.load_block(spec.block(block), base.block(block).sha256)
    ):
        old, block = base.block(name), spec.block(name)
        entries[name] = versions.put_block(block, arrays)
        versions.put_delta(block, old, entries[name], arrays)
    manifest = Manifest(
        job=base.job,
        version=base.version + 1,
        round=row.round,
        parent_sha=row.base_sha,
        created_s=time.time(),
        blocks=tuple(entries[name] for name in spec.names),
    )
    versions.write_manifest(manifest)
    return manifest, sums.coverage


class _RoundSums:
    """The sums of a closed round, all worker slots together, as a strategy sees them."""

    def __init__(self, spec: ModelSpec, ledger: Ledger, job: str, number: int) -> None:
        self._spec, self._ledger, self._job, self._number = spec, ledger, job, number
        self.coverage: Coverage = {name: {"devices": 0, "samples": 0} for name in spec.names}

    def load(self, block: str) -> BlockSum:
        """The sum of one block; zero when nobody trained it."""
        spec = self._spec.block(block)
        total = BlockSum.zero(spec)
        for partial in self._ledger.partials(self._job, self._number, block):
            total.merge(BlockSum.from_bytes(spec, partial.num))
        self.coverage[block] = {"devices": total.devices, "samples": total.samples}
        return total

    def save(self, block: str, total: BlockSum) -> None:
        """Never: a closed round counts nothing."""
        raise ProtocolMisuse(f"round {self._number} is closed, {block!r} was to be added to")

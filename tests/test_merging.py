"""A closed round becomes a version: exact means, untouched blocks as they were, always the same."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.codec import encode_change
from edge_sdk.errors import DamagedBlock, ProtocolMisuse, StateError
from edge_sdk.merge import BlockSum
from edge_sdk.strategies import strategy_named
from edge_sdk.strategies.last_blocks import ServerRound
from reference_server.ledger import Ledger, LoadSum, RoundRow, SaveSum, Upload
from reference_server.merging import Coverage, merge_round
from reference_server.versions import Manifest, VersionStore
from tests.ledger_job import count_one

JOB = "job"
FULL = strategy_named("full").server_round
NAMES = ("stem", "body", "head")
SPEC = ModelSpec(
    blocks=tuple(
        Block(name=name, tensors=(TensorSpec(name=f"{name}.w", shape=(5,), dtype="float32"),))
        for name in NAMES
    )
)

Weights = dict[str, NDArray[np.float32]]


def weights(name: str, value: float) -> Weights:
    return {f"{name}.w": np.linspace(-1, 1, 5, dtype=np.float32) + np.float32(value)}


class Round:
    """One open round of a real ledger on a real version store."""

    def __init__(self, home: Path) -> None:
        self.home, self.versions = home, VersionStore(home)
        self.ledger, self.other = Ledger.open(home), Ledger.open(home, slot=1, exclusive=False)
        entries = tuple(self.versions.put_block(b, weights(b.name, 0.0)) for b in SPEC.blocks)
        self.base = Manifest(
            job=JOB, version=0, round=0, parent_sha="", created_s=1.0, blocks=entries
        )
        self.versions.write_manifest(self.base)
        self.ledger.open_job(JOB, SPEC.digest(), {})
        self.ledger.record_base(JOB, self.base.model_sha256)
        self.ledger.plan_round(JOB, base_version=0, base_sha=self.base.model_sha256)
        self.row: RoundRow = self.ledger.open_round(JOB, 1, 60.0)

    def count(self, device: str, samples: int, trained: Mapping[str, float], slot: int = 0) -> None:
        """One device has moved these blocks by so much; the worker in that slot counts it."""

        def fold(load: LoadSum, save: SaveSum) -> None:
            for name, value in trained.items():
                block = SPEC.block(name)
                payload = encode_change(
                    "lossless", block, weights(name, 0.0), weights(name, value),
                    np.random.default_rng(0),
                )  # fmt: skip
                known = load(name)
                total = BlockSum.zero(block) if known is None else BlockSum.from_bytes(block, known)
                total.fold("lossless", payload, samples)
                save(name, total.to_bytes(), total.samples, total.devices)

        upload = Upload(
            round=1, device=device, base_sha=self.base.model_sha256, digest=device,
            samples=samples, size_bytes=1, metrics={},
        )  # fmt: skip
        ledger = self.other if slot else self.ledger
        assert count_one(ledger, upload, fold).verdict == "accepted"

    def merge(self) -> tuple[Manifest, Coverage]:
        return merge_round(self.row, self.base, FULL, "lossless", SPEC, self.ledger, self.versions)

    def merged(self, manifest: Manifest, name: str) -> NDArray[np.float32]:
        return self.versions.load_block(SPEC.block(name), manifest.block(name).sha256)[f"{name}.w"]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Round]:
    made = Round(tmp_path)
    yield made
    made.other.close()
    made.ledger.close()


def test_each_block_is_the_mean_over_those_who_trained_it(opened: Round) -> None:
    opened.count("a", 10, {"body": 1.0, "head": 1.0})
    opened.count("b", 30, {"head": 2.0}, slot=1)
    opened.count("c", 20, {"head": -0.5})
    opened.row = opened.ledger.close_round(JOB, 1)
    manifest, coverage = opened.merge()
    assert coverage == {
        "stem": {"devices": 0, "samples": 0},
        "body": {"devices": 1, "samples": 10},
        "head": {"devices": 3, "samples": 60},
    }
    mean = (10 * 1.0 + 30 * 2.0 + 20 * -0.5) / 60
    assert np.allclose(opened.merged(manifest, "head"), weights("head", mean)["head.w"], atol=1e-6)
    assert np.array_equal(opened.merged(manifest, "body"), weights("body", 1.0)["body.w"])
    assert manifest.block("stem") == opened.base.block("stem"), "what nobody trained is the same"
    assert (manifest.version, manifest.round) == (1, 1)
    assert manifest.parent_sha == opened.base.model_sha256 != manifest.model_sha256
    assert opened.versions.load_manifest(1, manifest.model_sha256) == manifest


def test_a_killed_server_that_merges_again_gets_the_same_version(opened: Round) -> None:
    opened.count("a", 7, {"head": 0.3})
    opened.row = opened.ledger.close_round(JOB, 1)
    first, coverage = opened.merge()
    files = {path: path.read_bytes() for path in (opened.home / "blocks").iterdir()}
    again, coverage_again = opened.merge()
    assert (again.model_sha256, again.blocks) == (first.model_sha256, first.blocks)
    assert coverage_again == coverage
    assert {path: path.read_bytes() for path in (opened.home / "blocks").iterdir()} == files


def test_nobody_trained_anything(opened: Round) -> None:
    opened.row = opened.ledger.close_round(JOB, 1)
    manifest, _ = opened.merge()
    assert manifest.model_sha256 == opened.base.model_sha256


def test_a_damaged_base_is_not_merged_into(opened: Round) -> None:
    opened.count("a", 7, {"head": 0.3})
    opened.row = opened.ledger.close_round(JOB, 1)
    opened.versions.block_path(opened.base.block("head").sha256).write_bytes(b"?")
    with pytest.raises(DamagedBlock, match="block 'head' cannot be read"):
        opened.merge()
    assert opened.versions.latest() == 0


def test_damaged_sums_are_not_merged(opened: Round) -> None:
    opened.count("a", 7, {"head": 0.3})
    opened.row = opened.ledger.close_round(JOB, 1)
    path = opened.home / "ledger.sqlite"

    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE partial SET num = zeroblob(length(num))")
        db.commit()
    with pytest.raises(StateError, match="head"):
        opened.merge()
    assert opened.versions.latest() == 0


def test_a_strategy_cannot_add_to_a_closed_round(opened: Round) -> None:
    class Adding(ServerRound):
        def close(self, base: object) -> Iterator[tuple[str, dict[str, NDArray[np.float32]]]]:
            self._sums.save("head", BlockSum.zero(SPEC.block("head")))
            yield from ()

    opened.row = opened.ledger.close_round(JOB, 1)
    with pytest.raises(ProtocolMisuse, match="round 1 is closed, 'head' was to be added to"):
        merge_round(
            opened.row, opened.base, Adding, "lossless", SPEC, opened.ledger, opened.versions
        )

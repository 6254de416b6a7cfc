"""Differences on their way down: offered where they pay, used where the base is, else blocks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.brokers import broker_profile
from edge_sdk.codec import block_hash, decode_block, encode_block_delta, encode_change
from edge_sdk.errors import MalformedMessage
from edge_sdk.merge import BlockSum
from edge_sdk.store import BlockCache
from edge_sdk.wire import (
    MAX_CONTROL_BYTES,
    BlockEntry,
    Delta,
    Offer,
    Open,
    Training,
    Want,
    encode,
)
from reference_server.downlink import MAX_DELTAS_OVER_BLOCK, Downlink, Inbox
from reference_server.versions import Manifest, VersionStore
from tests.brokers import OpenBroker
from tests.relay import eventually
from tests.simulation import Simulation, Watcher, write_task
from tests.test_hostile_server import FakeServer, fake  # noqa: F401  (a fixture)

JOB, DEVICE = "job", "board"
BLOCK = Block(name="b", tensors=(TensorSpec(name="w", shape=(100, 200), dtype="float32"),))
SHAS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(4)]

Tensors = dict[str, np.ndarray[Any, Any]]


def next_version(block: Block, base: Tensors, seed: int = 0) -> Tensors:
    """What a round of one device with the codec ``balanced`` makes of a block."""
    rng, total = np.random.default_rng(seed), BlockSum.zero(block)
    new = {n: (a + 1e-3 * rng.standard_normal(a.shape)).astype(a.dtype) for n, a in base.items()}
    total.fold("balanced", encode_change("balanced", block, base, new, rng), 10)
    return total.publish(base, "balanced")


# --- a device's cache ----------------------------------------------------------------------------


def test_the_cache_has_a_block_that_it_can_make(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path)
    old, new, other, _ = SHAS
    base = bytes.fromhex(old)[:8]
    cache.delta_path(new, base).write_bytes(b"difference")
    assert not cache.has(new), "what it is to is not here"
    cache.put(old, b"base")
    assert cache.has(new)
    assert cache.delta(new) == (cache.delta_path(new, base), old)
    cache.put(other, b"another")
    assert cache.evict({new}) == len(b"another")
    assert cache.has(new)
    cache.put(new, b"whole")
    assert [path.name for path in tmp_path.iterdir()] == [f"{new}.block"]


def test_the_cache_drops_and_evicts_differences(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path)
    old, new, other, _ = SHAS
    base = bytes.fromhex(old)[:8]
    cache.put(old, b"base")
    for sha256 in (new, other):
        cache.delta_path(sha256, base).write_bytes(b"difference")
    cache.drop(new)
    assert [cache.has(sha256) for sha256 in (old, new, other)] == [True, False, True]
    assert cache.evict({old}) == len(b"difference")
    assert [path.name for path in tmp_path.iterdir()] == [f"{old}.block"]


# --- the server's files --------------------------------------------------------------------------


def two_versions(store: VersionStore) -> tuple[BlockEntry, BlockEntry]:
    base = {"w": (0.05 * np.random.default_rng(0).standard_normal((100, 200))).astype(np.float32)}
    new = next_version(BLOCK, base)
    entries = store.put_block(BLOCK, base), store.put_block(BLOCK, new)
    store.put_delta(BLOCK, *entries, new)
    return entries


def manifest(version: int, *blocks: BlockEntry) -> Manifest:
    return Manifest(
        job=JOB, version=version, round=version, parent_sha="", created_s=1.0, blocks=blocks
    )


def test_the_server_keeps_small_differences_with_their_blocks(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    old, new = two_versions(store)
    ((path, delta),) = store.deltas([new]).items()
    assert (delta.block, delta.base) == (0, bytes.fromhex(old.sha256)[:8])
    assert delta.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert delta.size_bytes == path.stat().st_size <= new.size_bytes / 3
    assert store.deltas([old]) == {}
    for version, entry in enumerate((old, new)):
        store.write_manifest(manifest(version, entry))
    store.prune({1})
    assert store.deltas([new]) == {path: delta}
    store.write_manifest(manifest(2, old))
    store.prune({2})
    assert store.deltas([new]) == {}


def test_the_server_keeps_no_difference_that_saves_little(tmp_path: Path) -> None:
    store, rng = VersionStore(tmp_path), np.random.default_rng(0)
    drawn = [{"w": rng.standard_normal((100, 200)).astype(np.float32)} for _ in range(2)]
    old, new = (store.put_block(BLOCK, tensors) for tensors in drawn)
    store.put_delta(BLOCK, old, new, drawn[1])
    assert store.deltas([new]) == {}


# --- the server's offers -------------------------------------------------------------------------


def an_offer(*blocks: BlockEntry, names: Sequence[str] = ("b",)) -> Offer:
    return Offer(
        round=1, ticket=bytes(16), version=1, base_sha=SHAS[0], blocks=blocks,
        strategy="last_blocks", open_blocks=tuple(names), codec="balanced", deadline_s=9.0,
        training=Training(),
    )  # fmt: skip


@contextmanager
def downlink(url: str, home: Path, profile: str) -> Iterator[tuple[Downlink, Watcher, BlockEntry]]:
    """A server's downlink with a version of one block in place, and what it says to devices."""
    store = VersionStore(home)
    _, new = two_versions(store)
    inbox = Inbox()
    limits = broker_profile(profile)
    subject = Downlink(url, JOB, inbox, store, home, limits, random.Random(0), "boot")
    with Watcher(url, JOB, "d") as watcher:
        subject.start()
        try:
            eventually(lambda: subject.connected, 20.0)
            subject.reconnected()
            subject.place(manifest(1, new))
            yield subject, watcher, new
        finally:
            subject.close()


def heard(watcher: Watcher, kind: type) -> Any:
    return watcher.wait_for(lambda _, message: isinstance(message, kind))[1]


def test_differences_are_offered_to_so_many_and_no_more(
    mosquitto: OpenBroker, tmp_path: Path
) -> None:
    with downlink(mosquitto.url, tmp_path, "mosquitto") as (subject, watcher, new):
        (delta,) = VersionStore(tmp_path).deltas([new]).values()
        most = MAX_DELTAS_OVER_BLOCK * new.size_bytes // delta.size_bytes
        for devices, offered in ((1, (delta,)), (most, (delta,)), (most + 1, ())):
            subject.offer(DEVICE, devices, an_offer(new))
            assert heard(watcher, Offer).deltas == offered


def test_without_slots_differences_are_always_offered(
    mosquitto: OpenBroker, tmp_path: Path
) -> None:
    with downlink(mosquitto.url, tmp_path, "amqtt") as (subject, watcher, new):
        subject.offer(DEVICE, 10_000, an_offer(new))
        (delta,) = heard(watcher, Offer).deltas
        subject.serve(DEVICE, Want(sha256=delta.sha256, piece_bytes=256, ranges=((0, 1),)))
        subject.tend()
        piece = watcher.wait_for(lambda _, said: not isinstance(said, Offer))[1]
        (path,) = VersionStore(tmp_path).deltas([new])
        assert bytes(piece.data) == path.read_bytes()[:256]
        with pytest.raises(MalformedMessage, match="nothing of the latest version"):
            subject.serve(DEVICE, Want(sha256=SHAS[3], piece_bytes=256, ranges=()))


def test_an_offer_too_long_with_differences_goes_without(
    mosquitto: OpenBroker, tmp_path: Path
) -> None:
    with downlink(mosquitto.url, tmp_path, "mosquitto") as (subject, watcher, new):
        blocks: list[BlockEntry] = []
        while len(encode(an_offer(*blocks))) < MAX_CONTROL_BYTES - 400:
            blocks.append(msgspec.structs.replace(new, name=f"{len(blocks)}".ljust(128, "x")))
        names = ["b"]
        while len(encode(an_offer(*blocks, names=names))) < MAX_CONTROL_BYTES - 5:
            names.append(f"{len(names):04d}")
        for opened, count in ((names, 0), (names[:-40], 1)):
            subject.offer(DEVICE, 1, an_offer(*blocks, names=opened))
            assert len(heard(watcher, Offer).deltas) == count


# --- the device ----------------------------------------------------------------------------------


class Later:
    """The fake server's next version, with differences to the one it has."""

    def __init__(self, server: FakeServer) -> None:
        self.server, self.blocks = server, server.spec.blocks
        entries, deltas = [], []
        for number, (block, entry) in enumerate(zip(self.blocks, server.entries, strict=True)):
            base = decode_block(block, server.contents[entry.sha256])
            new = next_version(block, base, server.round)
            entries.append(server.add(block, new))
            payload = encode_block_delta(block, base, new)
            deltas.append(Delta(
                block=number, base=bytes.fromhex(entry.sha256)[:8],
                sha256=hashlib.sha256(payload).hexdigest(), size_bytes=len(payload),
            ))  # fmt: skip
            server.contents[deltas[-1].sha256] = payload
        self.entries, self.deltas = tuple(entries), tuple(deltas)

    def train(self, wrong: Sequence[str] = (), **changes: Any) -> list[str]:
        """Let the device train from it, the ``wrong`` contents spoilt; what it asked for."""
        spoilt = {sha: b"?" * len(self.server.contents[sha]) for sha in wrong}
        offer = self.server.offer(blocks=self.entries, **{"deltas": self.deltas, **changes})
        self.server.say(offer)
        asked: list[str] = []
        while not isinstance(message := self.server.hear((Open, Want)), Open):
            asked += [message.sha256] if message.sha256 not in asked else []
            self.server.serve(message, {**self.server.contents, **spoilt})
        assert message.round == offer.round
        self.server.accept(message)
        self.check_cache()
        return asked

    def check_cache(self) -> None:
        """The device holds the version's blocks, whole, and nothing else."""
        files = sorted((self.server.home / "device" / "blocks").iterdir())
        assert {path.name for path in files} == {f"{e.sha256}.block" for e in self.entries}
        for block, entry in zip(self.blocks, self.entries, strict=True):
            path = self.server.home / "device" / "blocks" / f"{entry.sha256}.block"
            assert block_hash(block, decode_block(block, path.read_bytes())) == entry.sha256


def hold(server: FakeServer) -> None:
    """Have the device hold the fake server's version."""
    server.accept(server.trains(server.offer()))


def shas(things: Sequence[BlockEntry | Delta]) -> list[str]:
    return [thing.sha256 for thing in things]


def test_a_device_that_has_the_base_takes_differences(fake: FakeServer) -> None:  # noqa: F811
    hold(fake)
    later = Later(fake)
    assert later.train() == shas(later.deltas)
    assert sum(d.size_bytes for d in later.deltas) < sum(e.size_bytes for e in later.entries) / 2


def test_a_device_without_the_base_takes_blocks(fake: FakeServer) -> None:  # noqa: F811
    fake.forget_blocks()
    later = Later(fake)
    assert later.train() == shas(later.entries)


def test_a_server_that_knows_no_differences_serves_blocks(fake: FakeServer) -> None:  # noqa: F811
    hold(fake)
    later = Later(fake)
    assert later.train(deltas=()) == shas(later.entries)


def test_a_difference_that_leads_nowhere_is_tried_once(fake: FakeServer) -> None:  # noqa: F811
    hold(fake)
    later = Later(fake)
    asked = later.train(wrong=shas(later.deltas))
    assert asked == shas(later.deltas) + shas(later.entries)


def test_a_difference_to_another_base_is_tried_once(fake: FakeServer) -> None:  # noqa: F811
    hold(fake)
    later = Later(fake)
    first, *rest = later.deltas
    lie = msgspec.structs.replace(first, sha256=rest[0].sha256, size_bytes=rest[0].size_bytes)
    asked = later.train(deltas=(lie, *rest[1:]))
    assert asked[0] == lie.sha256
    assert set(shas(later.entries[:2])) < set(asked)


def test_differences_larger_than_blocks_are_declined(fake: FakeServer) -> None:  # noqa: F811
    first = Later(fake).deltas[0]
    limit = fake.entries[0].size_bytes
    for wrong in (
        msgspec.structs.replace(first, size_bytes=limit + 1),
        msgspec.structs.replace(first, block=len(fake.entries)),
    ):
        assert "a difference to block number" in fake.declines(fake.offer(deltas=(wrong,)))


# --- a whole run ---------------------------------------------------------------------------------


@pytest.mark.timeout(240)
@pytest.mark.parametrize(("codec", "saves"), [("balanced", True), ("fp16", False)])
def test_devices_receive_less_than_half_after_the_first_round(
    tmp_path: Path, codec: str, saves: bool
) -> None:
    task = write_task(tmp_path, width=512)
    with Simulation(task, tmp_path / "run", "--rounds", 3, "--codec", codec) as run:
        report = run.report()
    first, *later = ([row["down_bytes"] for row in e["devices"]] for e in report["rounds"])
    assert len(later) == 2
    for received in later:
        assert (max(received) < 0.5 * min(first)) == saves
        assert {row["verdict"] for entry in report["rounds"] for row in entry["devices"]} == {
            "accepted"
        }
    assert report["totals"]["messages_dropped"] == 0

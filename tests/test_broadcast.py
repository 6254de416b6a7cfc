"""Blocks in a broker's slots: sent once, again only when lost, never mixed, nothing left behind."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.blocks import ModelSpec
from edge_sdk.codec import block_hash, decode_block
from edge_sdk.link import Arrived, LinkEvent
from edge_sdk.mqtt import Link
from edge_sdk.wire import DEFAULT_PIECE_BYTES, Piece, Topics, decode
from tests.brokers import OpenBroker
from tests.parcels import JOB, model
from tests.plain_device import PlainDevice, connected
from tests.plain_server import PlainServer, serving
from tests.relay import Relay, eventually

DONE_S = 30.0
MODEL_BYTES = 480_000
# Head, offers and acknowledgements, but no block.
TALK_BYTES = 20_000
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def retainer(tmp_path: Path) -> Iterator[OpenBroker]:
    """A mosquitto of a test's own, which it may kill."""
    broker = OpenBroker("mosquitto", tmp_path / "broker")
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def spec() -> ModelSpec:
    return model(3, MODEL_BYTES)


def model_bytes(server: PlainServer) -> int:
    return sum(entry.size_bytes for entry in server.manifest.blocks)


def sent_bytes(server: PlainServer) -> int:
    return int(server.ask(lambda: server.down.sent_bytes))


def ready(server: PlainServer) -> bool:
    return bool(server.ask(lambda: server.down.ready))


def retained(url: str, topic_filter: str) -> dict[str, bytes]:
    """What a broker hands to somebody who subscribes now; one's own word comes after all of it."""
    inbox: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    link = Link(url, "reader", inbox)
    link.subscribe(topic_filter)
    link.subscribe("reader/echo")
    link.start()
    found: dict[str, bytes] = {}
    try:
        eventually(lambda: link.publish("reader/echo", b"!"), DONE_S)
        while True:
            event = inbox.get(timeout=DONE_S)
            if isinstance(event, Arrived):
                if event.topic == "reader/echo":
                    return found
                found[event.topic] = event.payload
    finally:
        link.close()


def has_model(device: PlainDevice, server: PlainServer, spec: ModelSpec) -> bool:
    """Every block of the server's version is in the device's cache, and is what its hash says."""
    for block, entry in zip(spec.blocks, server.manifest.blocks, strict=True):
        tensors = decode_block(block, device.cache.read(entry.sha256))
        assert block_hash(block, tensors) == entry.sha256
    return True


def test_each_block_goes_out_once_for_all(
    retainer: OpenBroker, tmp_path: Path, spec: ModelSpec
) -> None:
    with serving(retainer, tmp_path, spec) as server:
        for name in ("one", "two", "three"):
            with connected(retainer.url, tmp_path, name, fetches=True) as device:
                assert device.run(device.has_blocks, DONE_S)
                assert has_model(device, server, spec)
                assert device.link.received_bytes < model_bytes(server) + TALK_BYTES
        assert sent_bytes(server) < model_bytes(server) + TALK_BYTES


def test_a_server_that_comes_back_sends_nothing_the_broker_has(
    retainer: OpenBroker, tmp_path: Path, spec: ModelSpec
) -> None:
    with serving(retainer, tmp_path, spec):
        pass
    with serving(retainer, tmp_path, spec) as server:
        assert sent_bytes(server) < TALK_BYTES
        with connected(retainer.url, tmp_path, fetches=True) as device:
            assert device.run(device.has_blocks, DONE_S)
            assert has_model(device, server, spec)
        assert sent_bytes(server) < TALK_BYTES


def test_a_broker_that_lost_all_is_given_all_again(
    retainer: OpenBroker, tmp_path: Path, spec: ModelSpec
) -> None:
    with serving(retainer, tmp_path, spec) as server:
        once_bytes = sent_bytes(server)
        retainer.kill()
        eventually(lambda: not ready(server), DONE_S)
        retainer.ensure_running()
        eventually(lambda: ready(server), DONE_S)
        assert sent_bytes(server) > 1.9 * once_bytes
        with connected(retainer.url, tmp_path, fetches=True) as device:
            assert device.run(device.has_blocks, DONE_S)
        assert sent_bytes(server) < 2 * once_bytes + TALK_BYTES


def test_a_shorter_block_leaves_no_tail(
    retainer: OpenBroker, tmp_path: Path, spec: ModelSpec
) -> None:
    topics, last = Topics(JOB), len(spec.blocks) - 1
    with serving(retainer, tmp_path, spec) as server:
        pieces = -(-server.manifest.blocks[last].size_bytes // DEFAULT_PIECE_BYTES)
        first_slot = server.ask(server.down.slots)[last]
        assert len(retained(retainer.url, topics.retained(first_slot, last, "+"))) == pieces > 1
        server.ask(lambda: server.publish(1))
        server.ask(lambda: server.publish(1, scale=0.0))
        assert server.ask(server.down.slots)[last] == first_slot
        eventually(lambda: ready(server), DONE_S)
        left = retained(retainer.url, topics.retained(first_slot, last, "+"))
        assert len(left) == 1
        (piece,) = (decode(payload) for payload in left.values())
        assert isinstance(piece, Piece)
        assert piece.transfer.hex() == server.manifest.blocks[last].sha256[:16]


def test_a_tail_is_deleted_although_the_broker_was_away(
    retainer: OpenBroker, tmp_path: Path, spec: ModelSpec
) -> None:
    topics, last = Topics(JOB), len(spec.blocks) - 1
    with (
        Relay(retainer.port) as relay,
        serving(retainer, tmp_path, spec, relay.url) as server,
    ):
        slot = server.ask(server.down.slots)[last]
        server.ask(lambda: server.publish(1))
        eventually(lambda: ready(server), DONE_S)
        relay.refuse()
        eventually(lambda: not ready(server), DONE_S)
        server.ask(lambda: server.publish(1, scale=0.0))
        relay.accept()
        eventually(lambda: ready(server), DONE_S)
        assert server.ask(server.down.slots)[last] == slot
        assert len(retained(retainer.url, topics.retained(slot, last, "+"))) == 1


def test_a_version_that_changes_in_mid_fetch_is_not_mixed(
    retainer: OpenBroker, tmp_path: Path, spec: ModelSpec
) -> None:
    with (
        serving(retainer, tmp_path, spec) as server,
        Relay(retainer.port, rate_bytes_per_s=400_000) as relay,
        connected(relay.url, tmp_path, fetches=True) as device,
    ):
        half_bytes = model_bytes(server) // 2
        assert device.run(lambda: device.link.received_bytes > half_bytes, DONE_S)
        assert not device.has_blocks()
        server.ask(lambda: server.publish(2))
        assert device.run(lambda: device.version == 1 and device.has_blocks(), DONE_S)
        assert has_model(device, server, spec)


def test_a_fetch_goes_on_after_the_device_was_killed(retainer: OpenBroker, tmp_path: Path) -> None:
    """What is on the disk already does not come again."""
    spec = model(1, MODEL_BYTES)
    with (
        serving(retainer, tmp_path, spec) as server,
        Relay(retainer.port, rate_bytes_per_s=400_000) as relay,
    ):
        half_bytes = model_bytes(server) // 2
        with connected(relay.url, tmp_path, fetches=True) as device:
            assert device.run(lambda: device.link.received_bytes > half_bytes, DONE_S)
        with connected(relay.url, tmp_path, fetches=True) as device:
            assert device.run(device.has_blocks, DONE_S)
            assert has_model(device, server, spec)
            assert device.link.received_bytes < half_bytes + DEFAULT_PIECE_BYTES + TALK_BYTES


def test_where_the_broker_retains_badly_devices_ask(tmp_path: Path, spec: ModelSpec) -> None:
    broker = OpenBroker("amqtt", tmp_path / "broker")
    broker.start()
    try:
        with serving(broker, tmp_path, spec) as server:
            assert set(server.ask(server.down.slots)) == {-1}
            devices = [PlainDevice(broker.url, name, tmp_path / name) for name in ("one", "two")]
            for device in devices:
                device.fetches = True
                device.start()
            others = threading.Thread(target=devices[1].run, args=(devices[1].has_blocks, DONE_S))
            others.start()
            assert devices[0].run(devices[0].has_blocks, DONE_S)
            others.join()
            for device in devices:
                assert has_model(device, server, spec)
                assert device.link.received_bytes < model_bytes(server) + TALK_BYTES
                device.close()
            assert not retained(broker.url, f"{Topics(JOB).root}/m/#")
    finally:
        broker.stop()

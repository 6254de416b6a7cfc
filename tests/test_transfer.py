"""Updates up and blocks down, over real brokers: what is lost is sent again, and nothing else is.

The device is ``tests.plain_device``, the server ``tests.plain_server``: everything that moves bytes
is real, only training is left out. An update of eight pieces takes about two seconds on the slow
line of a relay, so that something can happen in the middle of it.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import StateError
from reference_server.broker import Kind
from tests import plain_device, plain_server
from tests.brokers import OpenBroker
from tests.limited_broker import (
    AWS_IOT_CORE,
    AZURE_EVENT_GRID,
    EMQX_SERVERLESS,
    LimitedBroker,
    Limits,
)
from tests.parcels import JOB, ROUND, base_of, fill_spool, model, spooled, sums
from tests.plain_device import connected, read_notes
from tests.plain_server import PlainServer, serving
from tests.relay import Relay, eventually

DONE_S = 30.0
UPDATE_BYTES = 480_000
SLOW_BYTES_PER_S = 250_000
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def open_broker(broker_kind: Kind, tmp_path: Path) -> Iterator[OpenBroker]:
    """A broker of either kind, which a test may kill."""
    broker = OpenBroker(broker_kind, tmp_path / "broker")
    broker.start()
    yield broker
    broker.stop()


def counted_once(server: PlainServer, spec: ModelSpec, *bodies: bytes) -> None:
    """The sums are those of each of these updates once."""
    expected = sums(spec, list(bodies))
    stored = server.ask(lambda: list(server.ledger.partials(JOB, ROUND)))
    assert {part.block: part.num for part in stored} == {
        name: total.to_bytes() for name, total in expected.items()
    }


def body_of(home: Path, device: str = "dev") -> bytes:
    return next((home / device / "spool").glob("*.body")).read_bytes()


# -- kills --------------------------------------------------------------------------------------


def start(command: list[str], home: Path) -> subprocess.Popen[bytes]:
    with (home / "receipts.txt").open("ab") as out, (home / "log.txt").open("ab") as log:
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=log)


def pieces_sent(home: Path) -> int:
    return read_notes(home / "dev" / "notes").pieces


@pytest.mark.parametrize("victim", ["device", "server", "broker"])
def test_an_upload_goes_on_after_a_kill(
    open_broker: OpenBroker, tmp_path: Path, victim: str
) -> None:
    spec = model(1, UPDATE_BYTES)
    entry, body = spooled(tmp_path, spec), body_of(tmp_path)
    least = -(-entry.size_bytes // 61440)
    with Relay(open_broker.port, rate_bytes_per_s=SLOW_BYTES_PER_S, delay_s=0.01) as relay:
        sending = plain_device.command(relay.url, "dev", tmp_path / "dev")
        receiving = plain_server.command(
            open_broker.url, tmp_path / "server", 1, UPDATE_BYTES, open_broker.kind
        )
        children = {"device": (sending, tmp_path / "dev"), "server": (receiving, tmp_path)}
        alive = {name: start(*child) for name, child in children.items()}
        try:
            eventually(lambda: pieces_sent(tmp_path) >= least // 2, DONE_S)
            if victim == "broker":
                open_broker.kill()
                open_broker.ensure_running()
            else:
                alive[victim].kill()
                alive[victim].communicate()
                alive[victim] = start(*children[victim])
            assert alive["device"].wait(DONE_S) == 0
        finally:
            for process in alive.values():
                process.kill()
                process.communicate()
    assert (tmp_path / "dev/receipts.txt").read_text() == f"accepted {entry.sha256} \n"
    assert not list((tmp_path / "dev/spool").glob("*.body")), "the spool was emptied"
    with serving(open_broker, tmp_path, spec) as server:
        counted_once(server, spec, body)
    # amqtt keeps nothing for a server that is away: what was under way then goes again.
    spared = open_broker.kind == "mosquitto" or victim != "server"
    assert pieces_sent(tmp_path) <= least + (5 if spared else least)


def test_undisturbed_every_piece_is_sent_once(open_broker: OpenBroker, tmp_path: Path) -> None:
    spec = model(2, UPDATE_BYTES)
    entry, body = spooled(tmp_path, spec), body_of(tmp_path)
    with (
        serving(open_broker, tmp_path, spec) as server,
        Relay(open_broker.port, delay_s=0.05) as relay,
        connected(relay.url, tmp_path) as device,
    ):
        assert device.run(lambda: device.receipts, DONE_S)
        assert device.outbox.handed_pieces == -(-entry.size_bytes // 61440)
        counted_once(server, spec, body)


def test_an_offer_said_again_does_not_disturb_a_fetch(
    mosquitto: OpenBroker, tmp_path: Path
) -> None:
    spec = model(1, UPDATE_BYTES)
    with (
        serving(mosquitto, tmp_path, spec) as server,
        Relay(mosquitto.port, rate_bytes_per_s=SLOW_BYTES_PER_S) as relay,
        connected(relay.url, tmp_path, fetches=True) as device,
    ):
        size_bytes = sum(entry.size_bytes for entry in server.manifest.blocks)
        assert device.run(lambda: device.link.received_bytes > size_bytes // 2, DONE_S)
        server.ask(lambda: server.down.say("dev", server.offer("dev")))
        assert device.run(device.has_blocks, DONE_S)
        assert device.link.received_bytes < size_bytes + 5000


# -- limits of brokers --------------------------------------------------------------------------


LIMITED = {
    "aws-iot-core": AWS_IOT_CORE,
    "emqx-serverless": EMQX_SERVERLESS,
    "azure-event-grid": AZURE_EVENT_GRID,
}
LIMITED_BYTES = 1_200_000


@pytest.mark.parametrize("profile", LIMITED)
def test_up_and_down_within_a_cloud_brokers_limits(
    mosquitto: OpenBroker, tmp_path: Path, profile: str
) -> None:
    spec = model(2, LIMITED_BYTES)
    spooled(tmp_path, spec)
    with (
        LimitedBroker(mosquitto.port, LIMITED[profile]) as cloud,
        serving(mosquitto, tmp_path, spec, cloud.url, profile),
        connected(cloud.url, tmp_path, fetches=True, profile=profile) as device,
    ):
        assert device.run(lambda: device.receipts and device.has_blocks(), DONE_S)
        assert device.receipts[0].verdict == "accepted"
        assert cloud.publishes > LIMITED_BYTES / 61440
        assert not cloud.violations


@pytest.mark.parametrize(
    ("profile", "broken"), [("aws-iot-core", "bytes_per_s"), ("emqx-serverless", "publishes_per_s")]
)
def test_without_its_profile_a_cloud_broker_is_asked_too_much(
    mosquitto: OpenBroker, tmp_path: Path, profile: str, broken: str
) -> None:
    spec = model(2, LIMITED_BYTES)
    spooled(tmp_path, spec)
    with (
        LimitedBroker(mosquitto.port, LIMITED[profile]) as cloud,
        serving(mosquitto, tmp_path, spec, profile=profile),
        connected(cloud.url, tmp_path) as device,
    ):
        assert device.run(lambda: cloud.violations[broken], DONE_S)


def test_smaller_packets_from_now_on(mosquitto: OpenBroker, tmp_path: Path) -> None:
    """Both ways, in the middle of it, and what is here already is not sent again."""
    spec = model(1, UPDATE_BYTES)
    entry = spooled(tmp_path, spec)
    small_bytes = 20_000
    with (
        LimitedBroker(mosquitto.port, Limits(packet_bytes=1 << 20)) as cloud,
        serving(mosquitto, tmp_path, spec, cloud.url) as server,
        Relay(cloud.port, rate_bytes_per_s=SLOW_BYTES_PER_S) as relay,
        connected(relay.url, tmp_path, fetches=True) as device,
    ):
        half_bytes = entry.size_bytes // 2
        assert device.run(lambda: read_notes(tmp_path / "dev/notes").piece_bytes > half_bytes, 10)
        cloud.limits.packet_bytes = small_bytes
        cloud.drop_connections()
        assert device.run(lambda: device.receipts and device.has_blocks(), DONE_S)
        assert device.receipts[0].verdict == "accepted"
        assert not cloud.violations
        assert server.ask(lambda: server.down.piece_bytes) < small_bytes
    sent_bytes = read_notes(tmp_path / "dev/notes").piece_bytes
    assert sent_bytes < entry.size_bytes + half_bytes


# -- full disks ---------------------------------------------------------------------------------


@pytest.fixture
def disk_bytes() -> int:
    return 256 * 1024


def test_a_full_disk_at_the_server_is_waited_out(
    mosquitto: OpenBroker, tmp_path: Path, small_disk: Path, disk_bytes: int
) -> None:
    """Meanwhile others are served."""
    spec = model(1, disk_bytes // 2)
    spooled(tmp_path, spec)
    (tmp_path / "server").mkdir(exist_ok=True)
    (tmp_path / "server/incoming").symlink_to(small_disk)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(disk_bytes - 16384))
    with (
        serving(mosquitto, tmp_path, spec) as server,
        connected(mosquitto.url, tmp_path) as sender,
        connected(mosquitto.url, tmp_path, "other", fetches=True) as other,
    ):
        assert sender.run(lambda: sender.outbox.handed_pieces, DONE_S)
        assert other.run(other.has_blocks, DONE_S)
        assert not sender.receipts
        filler.unlink()
        assert sender.run(lambda: sender.receipts, DONE_S)
        assert server.verdicts == {"dev": "accepted"}


def test_a_full_disk_at_the_device_is_told_there(
    mosquitto: OpenBroker, tmp_path: Path, small_disk: Path
) -> None:
    spec = model(1, UPDATE_BYTES)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/blocks").symlink_to(small_disk)
    with (
        serving(mosquitto, tmp_path, spec),
        connected(mosquitto.url, tmp_path, fetches=True) as device,
        pytest.raises(StateError, match="No space left on device; free some space there"),
    ):
        device.run(device.has_blocks, DONE_S)


# -- one identity twice -------------------------------------------------------------------------


def test_a_second_device_with_the_same_id_harms_only_that_id(
    mosquitto: OpenBroker, tmp_path: Path
) -> None:
    spec = model(1, UPDATE_BYTES)
    for home in ("one", "two"):
        fill_spool(tmp_path / home / "twin/spool", spec, tmp_path / "server", "twin", base_of(spec))
    spooled(tmp_path, spec, "other")
    with (
        serving(mosquitto, tmp_path, spec) as server,
        Relay(mosquitto.port, rate_bytes_per_s=SLOW_BYTES_PER_S) as relay,
        connected(relay.url, tmp_path / "one", "twin") as one,
        connected(relay.url, tmp_path / "two", "twin") as two,
        connected(mosquitto.url, tmp_path, "other") as other,
    ):
        threads = [
            threading.Thread(target=twin.run, args=(lambda: False, 3.0)) for twin in (one, two)
        ]
        for thread in threads:
            thread.start()
        assert other.run(lambda: other.receipts, DONE_S)
        for thread in threads:
            thread.join()
        assert server.verdicts["other"] == "accepted"
        assert one.reconnections + two.reconnections > 2, "they threw each other out"
        stored = server.ask(lambda: list(server.ledger.partials(JOB, ROUND)))
        assert stored[0].devices <= 2

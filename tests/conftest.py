"""Fixtures with real brokers: a mocked one proves nothing about a broker."""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edge_sdk.link import LinkEvent
from reference_server.broker import BrokerProcess, Kind, choose, find_mosquitto
from tests.brokers import OpenBroker
from tests.tunnel import tunnel_reason


def need(missing: str | None) -> None:
    """Skip the test where something is missing, with the words why; fail in CI."""
    if missing is None:
        return
    if "CI" in os.environ:
        pytest.fail(f"{missing} (a skipped test proves nothing in CI)")
    pytest.skip(missing)


@pytest.fixture(params=["mosquitto", "amqtt"])
def broker_kind(request: pytest.FixtureRequest) -> Kind:
    """Every test that uses it runs against both brokers."""
    kind: Kind = request.param
    if kind == "mosquitto" and find_mosquitto() is None:
        need("mosquitto is not installed: apt install mosquitto")
    return kind


@pytest.fixture
def broker(broker_kind: str, tmp_path: Path) -> Iterator[BrokerProcess]:
    """A running broker of that kind on a free loopback port."""
    process = choose("embedded" if broker_kind == "amqtt" else broker_kind, tmp_path / "broker")
    assert isinstance(process, BrokerProcess)
    process.start()
    yield process
    process.stop()


@pytest.fixture(scope="session")
def needs_tunnel() -> None:
    """Only where ``tests.tunnel`` can make its devices; the skip says why it cannot."""
    need(tunnel_reason())


@pytest.fixture(scope="module")
def mosquitto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenBroker]:
    """One mosquitto with the server's own settings for all tests of a file."""
    if find_mosquitto() is None:
        need("mosquitto is not installed: apt install mosquitto")
    broker = OpenBroker("mosquitto", tmp_path_factory.mktemp("mosquitto"))
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def inbox() -> queue.SimpleQueue[LinkEvent]:
    """Where a link under test reports."""
    return queue.SimpleQueue()


@pytest.fixture
def no_broker() -> Iterator[str]:
    """The address of something that answers, but not in MQTT."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with suppress(OSError):
            while True:
                with listener.accept()[0] as connection:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


@pytest.fixture
def disk_bytes() -> int:
    """Size of ``small_disk``; a module may say otherwise."""
    return 64 * 1024


@pytest.fixture
def small_disk(tmp_path: Path, disk_bytes: int) -> Iterator[Path]:
    """A file system of its own with little room."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={disk_bytes}", "tmpfs", str(mount)],
        capture_output=True,
    )
    if done.returncode != 0:
        pytest.skip("only root can mount a small disk")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)

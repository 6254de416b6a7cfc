"""The broker we start: its life as a child process, its limits and its messages."""

from __future__ import annotations

import os
import queue
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from edge_sdk.errors import BrokerSetupError, ConfigError
from edge_sdk.link import Arrived, LinkEvent, LinkUp
from edge_sdk.mqtt import Link, connect_once
from reference_server import broker as broker_module
from reference_server.broker import BrokerProcess, ExternalBroker, choose, find_mosquitto
from tests.relay import eventually

OPTION = {"mosquitto": "mosquitto", "amqtt": "embedded"}


def answers(port: int) -> bool:
    """Whether anybody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_runs_and_says_what_it_is(broker: BrokerProcess, broker_kind: str) -> None:
    assert broker.kind == broker_kind
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", broker.version)
    assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
    assert broker.port in broker_module.PORTS_OF_CHOICE
    assert broker.poll() is None
    assert broker.describe().startswith(f"{broker_kind} {broker.version} on 127.0.0.1:")
    assert ("apt install mosquitto" in broker.describe()) == (broker_kind == "amqtt")
    connect_once(broker.url)


def test_a_dead_broker_comes_back_on_its_port(broker: BrokerProcess) -> None:
    port, first_pid = broker.port, broker.pid
    assert broker.ensure_running() is False
    assert first_pid is not None
    os.kill(first_pid, signal.SIGKILL)
    eventually(lambda: broker.poll() is not None)
    assert broker.ensure_running() is True
    assert (broker.port, broker.poll()) == (port, None)
    assert broker.pid != first_pid
    connect_once(broker.url)


def test_stopping_frees_the_port_and_may_be_repeated(broker: BrokerProcess) -> None:
    broker.stop()
    assert not answers(broker.port)
    assert (broker.pid, broker.poll()) == (None, None)
    broker.stop()


def test_a_port_in_use_is_named(broker_kind: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        subject = choose(OPTION[broker_kind], tmp_path, port)
        with pytest.raises(
            BrokerSetupError,
            match=rf"127.0.0.1:{port} cannot be used.*in use.*--broker mqtt://127.0.0.1:{port}",
        ):
            subject.start()
        assert subject.pid is None


def test_the_broker_dies_with_its_parent(broker_kind: str, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from reference_server.broker import choose;"
        "broker = choose(sys.argv[1], pathlib.Path(sys.argv[2])); broker.start();"
        "print(broker.port, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, OPTION[broker_kind], str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        assert answers(port)
        parent.kill()
    eventually(lambda: not answers(port))


def test_ctrl_c_in_the_terminal_is_not_for_the_broker(broker: BrokerProcess) -> None:
    assert broker.pid is not None
    assert os.getpgid(broker.pid) != os.getpgid(0)


def test_a_slow_reader_loses_nothing(broker: BrokerProcess) -> None:
    """Mosquitto's defaults acknowledge and then drop what waits beyond a thousand messages."""
    count, read_on = 2500, threading.Event()
    arrived: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
    reader = Link(broker.url, "reader", arrived)
    reader.subscribe("t/x")
    deliver = reader._deliver

    def slow(topic: str, payload: bytes) -> None:
        read_on.wait(20)
        deliver(topic, payload)

    reader._shared.deliver = slow
    writer = Link(broker.url, "writer", events)
    for link, inbox in ((reader, arrived), (writer, events)):
        link.start()
        assert isinstance(inbox.get(timeout=5), LinkUp)
    for number in range(count):
        assert writer.publish("t/x", struct.pack("!I", number))
    assert writer.wait_below(0, 20)
    read_on.set()
    got = [arrived.get(timeout=10) for _ in range(count)]
    assert got == [Arrived("t/x", struct.pack("!I", number)) for number in range(count)]
    reader.close()
    writer.close()


def test_the_embedded_broker_stays_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(BrokerSetupError, match=r"0\.0\.0\.0: the embedded broker .*mosquitto"):
        choose("embedded", tmp_path, bind="0.0.0.0")


@pytest.mark.parametrize("broker_kind", ["mosquitto"], indirect=True)
def test_a_reachable_mosquitto_needs_accounts(broker_kind: str, tmp_path: Path) -> None:
    subject = choose(broker_kind, tmp_path, bind="0.0.0.0")
    with pytest.raises(BrokerSetupError, match=r"broker\.passwd does not exist; run: mosquitto_p"):
        subject.start()


@pytest.mark.parametrize("broker_kind", ["mosquitto"], indirect=True)
def test_what_a_failing_broker_said_is_shown(broker_kind: str, tmp_path: Path) -> None:
    (tmp_path / "broker.passwd").write_text("ann:no-hash-at-all\n")
    (tmp_path / "broker.acl").write_text("nonsense\n")
    subject = choose(broker_kind, tmp_path, bind="0.0.0.0")
    with pytest.raises(BrokerSetupError, match=r"mosquitto \S+ ended with code \d+ on .*--broker"):
        subject.start()
    assert subject.pid is None


def test_mosquitto_is_found_where_users_have_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/usr/sbin/mosquitto").exists():
        pytest.skip("no mosquitto in /usr/sbin here")
    monkeypatch.setenv("PATH", "/nowhere")
    assert shutil.which("mosquitto") is None
    assert find_mosquitto() == "/usr/sbin/mosquitto"


def test_auto_takes_mosquitto_and_else_the_embedded_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if find_mosquitto():
        assert choose("auto", tmp_path).kind == "mosquitto"
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(broker_module, "MOSQUITTO_PLACES", ())
    assert choose("auto", tmp_path).kind == "amqtt"
    with pytest.raises(BrokerSetupError, match=r"apt install mosquitto .*--broker embedded"):
        choose("mosquitto", tmp_path)


def test_a_broker_elsewhere_is_left_alone(tmp_path: Path) -> None:
    subject = choose("mqtts://ann:secret@broker.example.org", tmp_path)
    assert isinstance(subject, ExternalBroker)
    subject.start()
    assert (subject.ensure_running(), subject.poll(), subject.pid) == (False, None, None)
    subject.stop()
    assert subject.describe() == "broker at broker.example.org:8883, not started here"


@pytest.mark.parametrize("name", ["rabbit", "mqtt://", "http://host"])
def test_an_unknown_broker_is_a_setup_mistake(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="broker"):
        choose(name, tmp_path)


@pytest.mark.parametrize("broker_kind", ["amqtt"], indirect=True)
def test_the_embedded_broker_refuses_mqtt_5_at_once(broker: BrokerProcess) -> None:
    with socket.create_connection(("127.0.0.1", broker.port), timeout=2) as client:
        client.sendall(b"\x10\x10\x00\x04MQTT\x05\x02\x00\x0a\x00\x00\x03abc")
        assert client.recv(16) == b"\x20\x02\x00\x01"
        assert client.recv(16) == b""

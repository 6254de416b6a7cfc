"""kill -9 of every process there is: the run ends by itself, with the very model it would have had.

Everybody answers in every round, so an update lost, counted twice or trained otherwise would show
in the hash of the model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from edge_sdk.wire import Receipt
from reference_server.broker import choose
from tests.relay import Relay, eventually
from tests.simulation import (
    BOARDS,
    FAST,
    SLOW,
    START_S,
    Simulation,
    Watcher,
    kill,
    says,
    write_task,
)

ROUNDS = 2
# An update has four pieces: this many bytes are sent after its first one and before its last.
MID_UPLOAD_BYTES = 100_000


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A round of some seconds on the slower device."""
    return write_task(tmp_path_factory.mktemp("task"), width=256, epochs=60)


@pytest.fixture(scope="module")
def undisturbed(task: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the model must be."""
    with simulated(task, tmp_path_factory.mktemp("undisturbed")) as run:
        return str(run.report()["model_sha256"])


def simulated(task: Path, directory: Path, *options: str) -> Simulation:
    return Simulation(task, directory, "--rounds", str(ROUNDS), "--seed", "5", *options)


def assert_nothing_happened(report: dict[str, Any], undisturbed: str) -> None:
    totals = report["totals"]
    assert [entry["round"] for entry in report["rounds"]] == list(range(1, ROUNDS + 1))
    assert totals["updates_counted"] == totals["updates_made"] == ROUNDS * len(BOARDS)
    assert totals["updates_lost"] == totals["updates_double"] == 0
    assert report["model_sha256"] == undisturbed


@pytest.mark.timeout(240)
def test_an_agent_killed_while_it_trains(task: Path, tmp_path: Path, undisturbed: str) -> None:
    with simulated(task, tmp_path) as run:
        run.trains(SLOW, 1)
        assert run.spooled(SLOW) == []
        kill(run.one("edge_sdk", SLOW))
        run.trains(SLOW, 1, times=2)
        assert_nothing_happened(run.report(), undisturbed)
        assert f"{SLOW} died (exit code -9), starting it again" in run.log.read_text()


@pytest.mark.timeout(240)
def test_trainers_killed_while_they_train(task: Path, tmp_path: Path, undisturbed: str) -> None:
    with simulated(task, tmp_path) as run:
        run.trains(SLOW, 1)
        assert run.spooled(SLOW) == []
        nursery, *trainers = run.family("reference_server.fleet_sim")
        assert {trainer.ppid() for trainer in trainers} == {nursery.pid}
        for trainer in trainers:
            kill(trainer)
        run.trains(SLOW, 1, times=2)
        assert_nothing_happened(run.report(), undisturbed)
        assert says(run.device_log(SLOW), "the trainer died") == 1
        assert says(run.device_log(SLOW), "connected, MQTT") == 1


@pytest.mark.timeout(240)
def test_an_agent_killed_in_the_middle_of_its_upload(
    task: Path, tmp_path: Path, undisturbed: str
) -> None:
    broker = choose("auto", tmp_path / "broker")
    broker.start()
    try:
        with (
            Relay(int(broker.url.rpartition(":")[2])) as relay,
            simulated(task, tmp_path, "--broker", relay.url) as run,
        ):
            eventually(lambda: says(run.device_log(FAST), "connected, MQTT") == 1, START_S)
            agent = run.one("edge_sdk", FAST)
            relay.stall_after_up_bytes(MID_UPLOAD_BYTES, client_port(agent, relay.port))
            assert relay.wait_until(lambda r: r.stalled, START_S)
            assert len(run.spooled(FAST)) == 1
            kill(agent)
            relay.cut()
            relay.flow()
            assert_nothing_happened(run.report(), undisturbed)
            assert says(run.device_log(FAST), "round 1: trains ") == 2, "it was not trained anew"
    finally:
        broker.stop()


def client_port(process: psutil.Process, server_port: int) -> int:
    """The local port of a process's connection to a port."""
    ports = [c.laddr.port for c in process.net_connections("tcp4") if c.raddr[1:] == (server_port,)]
    assert len(ports) == 1
    return int(ports[0])


@pytest.mark.timeout(240)
def test_the_server_killed_between_two_receipts_of_a_round(
    task: Path, tmp_path: Path, undisturbed: str
) -> None:
    broker = choose("auto", tmp_path / "broker")
    broker.start()
    try:
        with (
            Watcher(broker.url, "demo") as watcher,
            simulated(task, tmp_path, "--broker", broker.url) as run,
        ):
            receipts = [watcher.wait_for(lambda _, message: isinstance(message, Receipt))]
            kill(run.one("reference_server", "run"))
            assert_nothing_happened(run.report(), undisturbed)
            for _ in range(ROUNDS * len(BOARDS) - 1):
                receipts.append(watcher.wait_for(lambda _, message: isinstance(message, Receipt)))
        assert [(d, r.round, r.verdict) for d, r in receipts[:2]] == [
            (FAST, 1, "accepted"),
            (SLOW, 1, "accepted"),
        ]
        screen = run.log.read_text()
        assert "the server died (exit code -9), starting it again" in screen
        assert "round 1 resumed" in screen
    finally:
        broker.stop()


@pytest.mark.timeout(240)
def test_the_broker_killed_while_devices_train(
    broker_kind: str, task: Path, tmp_path: Path, undisturbed: str
) -> None:
    kind = "embedded" if broker_kind == "amqtt" else broker_kind
    with simulated(task, tmp_path, "--broker", kind) as run:
        run.trains(SLOW, 1)
        assert run.spooled(SLOW) == []
        if kind == "embedded":
            kill(run.one("reference_server.broker"))
        else:
            kill(run.one("-c", str(run.state / "broker" / "mosquitto.conf")))
        report = run.report()
        assert report["broker"]["kind"] == broker_kind
        assert_nothing_happened(report, undisturbed)
        assert "the broker died and was started again" in run.log.read_text()

"""The first run a user makes, and the same with devices started by hand."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edge_sdk.infer import OnnxModel
from reference_server.broker import find_mosquitto
from tests.simulation import (
    BOARDS,
    ROUND_S,
    Running,
    Simulation,
    command,
    free_port,
    write_task,
)

ROUNDS, DEVICES = 8, 4
# Greetings, receipts, acknowledgements and pings of one device in one round.
SMALL_TALK_BYTES = 6000

TOP = (
    "schema", "strategy", "task", "seed", "wall_s", "first_round_s", "broker", "model", "rounds",
    "totals", "model_sha256", "files",
)  # fmt: skip
ROUND = ("round", "accuracy", "loss", "wall_s", "coverage", "devices")
DEVICE = (
    "id", "profile", "blocks", "plan_peak_bytes", "measured_peak_bytes", "budget_bytes", "up_bytes",
    "down_bytes", "up_payload_bytes", "train_s", "flops", "num_examples", "verdict",
)  # fmt: skip
TOTALS = (
    "up_bytes", "down_bytes", "flops", "peak_rss_agent_bytes", "peak_rss_trainer_bytes",
    "peak_rss_server_bytes", "cpu_s_device", "cpu_s_server", "updates_made", "updates_counted",
    "updates_lost", "updates_double",
)  # fmt: skip

Report = dict[str, Any]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """The report and the screen of one demo, run as the README says."""
    home = tmp_path_factory.mktemp("demo")
    run = command("reference_server", "demo", "--rounds", ROUNDS, "--state", home / "s")
    with Running([*run, "--json", str(home / "report.json")], home / "screen.txt") as process:
        assert process.finish(280) == 0, process.log.read_text()
    return json.loads((home / "report.json").read_text()), process.log.read_text()


def rows(report: Report) -> list[Report]:
    return [row for entry in report["rounds"] for row in entry["devices"]]


@pytest.mark.timeout(300)
def test_the_report_has_every_key(demo: tuple[Report, str]) -> None:
    report, _ = demo
    assert report.keys() >= set(TOP)
    assert (report["schema"], report["strategy"], report["seed"]) == (1, "last_blocks", 0)
    assert report["broker"]["kind"] == ("mosquitto" if find_mosquitto() else "amqtt")
    assert re.match(r"\d+\.\d+", report["broker"]["version"])
    assert report["model"].keys() == {"params", "bytes_fp32", "blocks"}
    blocks = report["model"]["blocks"]
    assert report["model"]["params"] == sum(block["params"] for block in blocks)
    assert report["model"]["bytes_fp32"] == 4 * report["model"]["params"]
    assert report["totals"].keys() >= set(TOTALS)
    assert [entry["round"] for entry in report["rounds"]] == list(range(1, ROUNDS + 1))
    for entry in report["rounds"]:
        assert entry.keys() >= set(ROUND)
        assert len(entry["devices"]) == DEVICES
        assert entry["coverage"].keys() == {block["name"] for block in blocks}
    for row in rows(report):
        assert row.keys() >= set(DEVICE)
        assert None not in row.values(), row
    assert 0 < report["first_round_s"] < report["wall_s"]


@pytest.mark.timeout(300)
def test_unequal_devices_train_what_they_can_afford(demo: tuple[Report, str]) -> None:
    report, _ = demo
    for row in rows(report):
        assert 0 < row["measured_peak_bytes"] < row["budget_bytes"]
        assert row["plan_peak_bytes"] <= row["budget_bytes"]
    assert len({tuple(row["blocks"]) for row in rows(report)}) >= 3
    for entry in report["rounds"]:
        for name, covered in entry["coverage"].items():
            trained = [row for row in entry["devices"] if name in row["blocks"]]
            assert covered["devices"] == len(trained)
            assert covered["samples"] == sum(row["num_examples"] for row in trained)


@pytest.mark.timeout(300)
def test_every_byte_is_accounted_for(demo: tuple[Report, str]) -> None:
    report, _ = demo
    totals = report["totals"]
    for row in rows(report):
        overhead_bytes = row["up_bytes"] - row["up_payload_bytes"]
        assert 0 < overhead_bytes <= 0.05 * row["up_payload_bytes"] + SMALL_TALK_BYTES
    for key in ("up_bytes", "down_bytes", "flops"):
        assert totals[key] == sum(row[key] for row in rows(report))
    everything_bytes = report["model"]["params"] * 4 * DEVICES * ROUNDS
    assert totals["up_bytes"] <= everything_bytes / 6


@pytest.mark.timeout(300)
def test_every_update_counts_once_and_the_model_learns(demo: tuple[Report, str]) -> None:
    report, _ = demo
    totals = report["totals"]
    assert {row["verdict"] for row in rows(report)} == {"accepted"}
    assert totals["updates_made"] == totals["updates_counted"] == DEVICES * ROUNDS
    assert totals["updates_lost"] == totals["updates_double"] == totals["messages_dropped"] == 0
    assert report["rounds"][-1]["accuracy"] >= 0.93


@pytest.mark.timeout(300)
def test_the_model_is_there_and_runs(demo: tuple[Report, str]) -> None:
    report, _ = demo
    tensors = safetensors.numpy.load_file(report["files"]["safetensors"])
    assert sum(tensor.size for tensor in tensors.values()) == report["model"]["params"]
    model = OnnxModel(Path(report["files"]["onnx"]))
    (name,) = model.inputs
    (scores,) = model.run({name: np.zeros((3, 1, 8, 8), np.float32)})
    assert scores.shape == (3, 10)
    assert np.isfinite(scores).all()


@pytest.mark.timeout(300)
def test_without_a_terminal_the_screen_is_plain_text(demo: tuple[Report, str]) -> None:
    report, screen = demo
    assert "\x1b" not in screen
    assert "\r" not in screen
    lines = screen.splitlines()
    assert sum(line.startswith("round ") for line in lines) == ROUNDS
    assert sum(" trains " in line for line in lines) == ROUNDS * DEVICES
    for path in report["files"].values():
        assert any(path in line for line in lines)
    assert lines[-1].startswith("next: ")


@pytest.mark.timeout(240)
def test_devices_started_by_hand_make_the_simulated_model(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    with Simulation(task, tmp_path / "simulated", "--rounds", "2", "--seed", "3") as run:
        simulated = run.report()
    report = by_hand(task, tmp_path / "by-hand")
    assert report["model_sha256"] == simulated["model_sha256"]
    assert report["totals"]["updates_counted"] == simulated["totals"]["updates_counted"] == 4
    assert report["totals"]["updates_lost"] == report["totals"]["updates_double"] == 0


def by_hand(task: Path, home: Path) -> Report:
    """The README's way to real devices, on one machine: a server, then a command per device."""
    home.mkdir()
    port = free_port()
    server = command(
        "reference_server", "run", "--task", task, "--job", "tiny", "--devices", len(BOARDS),
        "--port", port, "--codec", "lossless", "--rounds", 2, "--seed", 3,
        "--state", home / "server", "--json", home / "report.json",
    )  # fmt: skip
    with ExitStack() as stack:
        running = stack.enter_context(Running(server, home / "server.txt"))
        devices = []
        for part, board in enumerate(BOARDS):
            device = command(
                "edge_sdk", "run", "--task", task, "--broker", f"mqtt://127.0.0.1:{port}",
                "--job", "tiny", "--device", board, "--profile", board, "--state", home / board,
                "--part", part, "--parts", len(BOARDS), "--threads", 1, "--keep-trying", "--json",
            )  # fmt: skip
            devices.append(stack.enter_context(Running(device, home / f"{board}.txt")))
        assert running.finish(ROUND_S) == 0, running.log.read_text()
        for process in devices:
            assert process.finish(ROUND_S) == 0, process.log.read_text()
    report: Report = json.loads((home / "report.json").read_text())
    return report

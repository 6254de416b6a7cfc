"""The report of a run: its documented keys, what it adds up, and a server that was killed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.errors import StateError
from edge_sdk.wire import Tally
from reference_server.report import ROW_KEYS, SCHEMA, RunReport

SPEC = ModelSpec(
    blocks=tuple(
        Block(
            name=name,
            tensors=(TensorSpec(name=f"{name}.w", shape=(params,), dtype="float32"),),
        )
        for name, params in (("body", 30), ("head", 12))
    )
)
FACTS = {"strategy": "last_blocks", "task": "toy", "seed": 3}
COVERAGE = {"head": {"devices": 2, "samples": 70}}


def report_at(folder: Path) -> RunReport:
    return RunReport(folder / "report.json", FACTS, SPEC)


def tally(number: int, **changes: Any) -> Tally:
    usual = Tally(
        round=number,
        up_bytes=1000,
        down_bytes=200,
        cpu_s=0.5,
        agent_rss_bytes=30,
        trainer_peak_bytes=200,
    )
    return msgspec.structs.replace(usual, **changes)


def row(device: str, **changes: Any) -> dict[str, Any]:
    measured = dict.fromkeys(ROW_KEYS, 1)
    usual = {"id": device, "profile": "pi", "blocks": ["head"], **measured, "flops": 10**9}
    return {
        **usual,
        "up_payload_bytes": 900,
        "num_examples": 35,
        "verdict": "accepted",
        **changes,
    }


def close(
    report: RunReport, number: int, *rows: dict[str, Any], measured: Any = (0.5, 0.9)
) -> dict[str, Any]:
    return report.closed(
        number, measured=measured, wall_s=2.0, coverage=COVERAGE, devices=list(rows), declined={}
    )


def finished(report: RunReport) -> dict[str, Any]:
    return report.finish(
        model_sha256="ab" * 32,
        files={"safetensors": "model.safetensors"},
        totals={"peak_rss_server_bytes": 7, "cpu_s_server": 1.5, "updates_double": 0},
        wall_s=9.0,
    )


def test_a_run_has_the_documented_keys(tmp_path: Path) -> None:
    report = report_at(tmp_path)
    report.opened(0, "pi-1")
    report.tally("pi-1", tally(0))
    entry = close(report, 0, row("pi-1"))
    document = finished(report)
    assert set(document) == {
        *("schema", "strategy", "task", "seed", "wall_s", "first_round_s", "broker", "model"),
        *("rounds", "totals", "model_sha256", "files"),
    }
    assert (document["schema"], document["task"], document["wall_s"]) == (SCHEMA, "toy", 9.0)
    assert document["model"] == {
        "params": 42,
        "bytes_fp32": 168,
        "blocks": [{"name": "body", "params": 30}, {"name": "head", "params": 12}],
    }
    assert document["rounds"] == [entry]
    assert set(entry) == {"round", "accuracy", "loss", "wall_s", "coverage", "devices", "declined"}
    assert (entry["accuracy"], entry["loss"], entry["coverage"]) == (0.9, 0.5, COVERAGE)
    assert set(entry["devices"][0]) >= {
        *("id", "profile", "blocks", "plan_peak_bytes", "measured_peak_bytes", "budget_bytes"),
        *("up_bytes", "down_bytes", "up_payload_bytes", "train_s", "flops", "num_examples"),
        "verdict",
    }
    assert set(document["totals"]) == {
        *("up_bytes", "down_bytes", "flops", "peak_rss_agent_bytes", "peak_rss_trainer_bytes"),
        *("peak_rss_server_bytes", "cpu_s_device", "cpu_s_server", "updates_made"),
        *("updates_counted", "updates_lost", "updates_double"),
    }


def test_totals_add_up_over_rounds_and_devices(tmp_path: Path) -> None:
    report = report_at(tmp_path)
    for number in (0, 1):
        for device in ("pi-1", "pi-2"):
            report.opened(number, device)
            report.tally(device, tally(number, up_bytes=1000 + number, agent_rss_bytes=30 + number))
        close(report, number, row("pi-1"), row("pi-2"))
    totals = finished(report)["totals"]
    assert totals["up_bytes"] == 2 * 1000 + 2 * 1001
    assert totals["down_bytes"] == 4 * 200
    assert totals["flops"] == 4 * 10**9
    assert totals["cpu_s_device"] == 2.0
    assert totals["peak_rss_agent_bytes"] == 31
    assert totals["peak_rss_trainer_bytes"] == 200
    assert (totals["updates_made"], totals["updates_counted"], totals["updates_lost"]) == (4, 4, 0)


def test_only_accepted_updates_count_and_those_without_a_verdict_are_lost(tmp_path: Path) -> None:
    report = report_at(tmp_path)
    for device in ("pi-1", "pi-2", "pi-3"):
        report.opened(0, device)
        report.opened(0, device)  # devices repeat themselves
    close(report, 0, row("pi-1"), row("pi-2", verdict="rejected"))
    totals = finished(report)["totals"]
    assert (totals["updates_made"], totals["updates_counted"], totals["updates_lost"]) == (3, 1, 1)


def test_a_verdict_counts_although_the_announcement_was_before_a_restart(tmp_path: Path) -> None:
    report = report_at(tmp_path)
    close(report, 0, row("pi-1"))
    totals = finished(report)["totals"]
    assert (totals["updates_made"], totals["updates_counted"], totals["updates_lost"]) == (1, 1, 0)


def test_a_tally_may_come_before_or_after_the_round_is_closed(tmp_path: Path) -> None:
    report = report_at(tmp_path)
    assert report.missing_tallies() == 0
    report.tally("pi-1", tally(4))
    entry = close(report, 4, row("pi-1"), row("pi-2"), row("pi-3", verdict="late"))
    costs = {r["id"]: (r["up_bytes"], r["down_bytes"], r["cpu_s"]) for r in entry["devices"]}
    assert costs == {
        "pi-1": (1000, 200, 0.5),
        "pi-2": (None, None, None),
        "pi-3": (None, None, None),
    }
    assert report.missing_tallies() == 1
    report.tally("pi-2", tally(4, up_bytes=77))
    assert entry["devices"][1]["up_bytes"] == 77
    assert report.missing_tallies() == 0
    report.tally("pi-2", tally(4, up_bytes=78))
    assert finished(report)["totals"]["up_bytes"] == 1000 + 78


@pytest.mark.parametrize(
    ("measured", "loss", "accuracy"),
    [(None, None, None), ((0.25, math.nan), 0.25, None), ((0.25, 0.5), 0.25, 0.5)],
)
def test_what_was_not_measured_is_null(
    tmp_path: Path, measured: Any, loss: float | None, accuracy: float | None
) -> None:
    entry = close(report_at(tmp_path), 0, row("pi-1"), measured=measured)
    assert (entry["loss"], entry["accuracy"]) == (loss, accuracy)
    assert b"NaN" not in msgspec.json.encode(entry)


def test_a_killed_server_goes_on_with_the_same_report(tmp_path: Path) -> None:
    report = report_at(tmp_path)
    report.opened(0, "pi-1")
    report.opened(1, "pi-2")
    report.tally("pi-1", tally(0))
    close(report, 0, row("pi-1"))
    report.save()
    again = report_at(tmp_path)
    assert again.missing_tallies() == 0
    close(again, 1, row("pi-1"), row("pi-2"))
    # A round that is closed once more, because the kill came before the save, is the same round.
    close(again, 1, row("pi-1"), row("pi-2"))
    again.tally("pi-2", tally(1, up_bytes=5))
    document = finished(again)
    assert [entry["round"] for entry in document["rounds"]] == [0, 1]
    assert document["totals"]["up_bytes"] == 1000 + 5
    assert document["totals"]["updates_made"] == 3
    assert document["totals"]["updates_counted"] == 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"7", b'{"data": {}}', b'{"data": {"rounds": 3}}', b"\xff\xfe"]
)
def test_a_report_that_cannot_be_read_says_what_to_do(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(
        StateError, match=r"report\.json: cannot be read as a run's report: .*; del"
    ):
        report_at(tmp_path)

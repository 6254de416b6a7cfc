"""What a person reads of a run where there is no terminal: plain lines."""

from __future__ import annotations

import re
from typing import Any

import pytest

from reference_server.screen import (
    Screen,
    human_bytes,
    printable,
    round_line,
    short_names,
    summary,
)

MIB = 1 << 20
ROW = {
    "id": "d1", "blocks": ["embed", "blocks.4", "blocks.5", "head"], "verdict": "accepted",
    "measured_peak_bytes": 200 * MIB, "plan_peak_bytes": 210 * MIB, "budget_bytes": 255 * MIB,
    "up_bytes": 12_345, "down_bytes": 2_345_678,
}  # fmt: skip
PUBLISHED = {
    "event": "published", "round": 3, "version": 3, "accuracy": 0.91234, "loss": 0.5,
    "wall_s": 1.26, "devices": [ROW],
}  # fmt: skip


def report(**changes: Any) -> dict[str, Any]:
    totals = {
        "up_bytes": 1_000_000, "updates_made": 8, "updates_counted": 7, "updates_lost": 1,
        "updates_double": 0,
    }  # fmt: skip
    return {
        "rounds": [{"accuracy": accuracy, "devices": [ROW] * 4} for accuracy in (0.5, 0.9)],
        "totals": totals, "model": {"bytes_fp32": 5_000_000}, "wall_s": 12.34,
        "files": {"safetensors": "/m/model.safetensors"}, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("event", "lines"),
    [
        ({"event": "waiting", "needed": 1}, ["waiting for 1 device"]),
        ({"event": "waiting", "needed": 4}, ["waiting for 4 devices"]),
        (
            {"event": "device", "device": "d1", "profile": "zero"},
            ["d1 joined (profile zero)"],
        ),
        ({"event": "presence", "device": "d1", "state": "training"}, []),
        ({"event": "presence", "device": "d1", "state": "lost"}, ["d1 is lost; its round goes on"]),
        ({"event": "update", "device": "d1", "verdict": "accepted", "reason": ""}, []),
        (
            {"event": "update", "device": "d1", "verdict": "late", "reason": "round 2 is closed"},
            ["d1: update late: round 2 is closed"],
        ),
        (
            {"event": "decline", "device": "d1", "reason": "nothing fits"},
            ["d1 sits this round out: nothing fits"],
        ),
        ({"event": "abandoned", "round": 2, "reason": "why"}, ["round 2 abandoned: why"]),
        ({"event": "resumed", "round": 2}, ["round 2 resumed"]),
        ({"event": "not_exported", "reason": "no"}, ["no ONNX file: no"]),
        ({"event": "pretrain", "step": 7}, []),
        (
            {"event": "base", "samples": 360, "steps": 24, "accuracy": 0.8, "loss": 0.1},
            [
                "pre-trained on 360 public samples, which no device and no test set holds "
                "(24 steps, held-out accuracy 0.800)"
            ],
        ),
        ({"event": "base", "samples": 0, "steps": 0, "accuracy": None, "loss": 0.0}, []),
        (
            PUBLISHED,
            [
                "round 3 of 10  accuracy 0.912  loss 0.500  1.3 s",
                "  d1                       trains embed blocks.4-5 head peak 200 (210) MiB of 255"
                "  up 12.3 kB  down 2.35 MB",
            ],
        ),
        (
            {**PUBLISHED, "accuracy": None, "loss": None, "devices": []},
            ["round 3 of 10  1.3 s"],
        ),
        ({"event": "invented by a later version"}, []),
    ],
)
def test_every_event_has_its_line(
    capsys: pytest.CaptureFixture[str], event: dict[str, Any], lines: list[str]
) -> None:
    with Screen(10) as screen:
        screen.show(event)
    assert capsys.readouterr().out.splitlines() == lines


def test_a_device_joins_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen(10) as screen:
        for _ in range(2):
            screen.show({"event": "device", "device": "d1", "profile": "zero"})
    assert capsys.readouterr().out == "d1 joined (profile zero)\n"


def test_long_lines_are_not_broken_and_brackets_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = "[red]" + 30 * "long " + "[/red]"
    Screen(1).line(text)
    assert capsys.readouterr().out == text + "\n"


def test_a_hostile_reason_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "\x1b]0;owned\x07\x1b[2J\r\nround 9 of 9  accuracy 1.000\x9b31m"
    Screen(1).show({"event": "decline", "device": "d1", "reason": reason})
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"d1 sits this round out: \ufffd\]0;owned\ufffd\ufffd\[2J.*\ufffd31m", line)
    assert line.isprintable()
    assert printable("naïve ∑ 测试") == "naïve ∑ 测试"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        ([], ""),
        (["head"], "head"),
        (["b.0", "b.1", "b.2"], "b.0-2"),
        (["b.0", "b.2", "b.3", "head"], "b.0 b.2-3 head"),
        (["a.1", "b.2", "b.3", "c.4"], "a.1 b.2-3 c.4"),
        (["0", "1", "2"], "0-2"),
        (["0", "2", "4"], "0 2 4"),
        (["b.9", "b.10", "b.11"], "b.9-11"),
        (["eye-2", "eye-3"], "eye-2 eye-3"),
        (["x-1.0", "x-1.1"], "x-1.0-1"),
        (["eye-1", "2"], "eye-1 2"),
        (["head", "0"], "head 0"),
    ],
)
def test_runs_of_blocks_are_written_short(names: list[str], short: str) -> None:
    assert short_names(names) == short


@pytest.mark.parametrize(
    ("count", "text"), [(None, "?"), (0, "0.0 kB"), (999_949, "999.9 kB"), (1_000_000, "1.00 MB")]
)
def test_bytes_as_a_person_reads_them(count: int | None, text: str) -> None:
    assert human_bytes(count) == text


def test_the_summary_says_result_saving_and_files() -> None:
    assert summary(report()) == [
        "done: 2 rounds in 12.3 s, held-out accuracy 0.900",
        "sent 1.00 MB up; all weights as float32 would have been 40.00 MB, 40 times as much",
        "updates: 8 made, 7 counted, 1 lost, 0 double",
        "model (safetensors): /m/model.safetensors",
    ]


def test_a_summary_claims_no_saving_that_was_none() -> None:
    lines = summary(report(model={"bytes_fp32": 100_000}))
    assert lines[1].endswith("would have been 800.0 kB, 0.8 times as much")
    totals = {**report()["totals"], "up_bytes": 0}
    assert not any("times" in line for line in summary(report(totals=totals)))
    assert summary(report(rounds=[]))[0] == "done: 0 rounds in 12.3 s"


def test_a_round_in_one_line() -> None:
    row = {
        "round": 12, "phase": "ABANDONED", "version": None, "verdicts": {"rejected": 2, "late": 1},
        "samples": 1, "update_bytes": 2_000_000,
    }  # fmt: skip
    assert round_line(row) == (
        "round 12   abandoned  no version  1 late, 2 rejected, 1 sample, 2.00 MB"
    )
    assert "  no update, 1 sample, " in round_line({**row, "verdicts": {}})

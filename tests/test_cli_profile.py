"""``edge-sdk profile`` as people and scripts meet it, and what it compares."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import msgspec
import pytest

from edge_sdk.profile import (
    FIGURES,
    DeviceProfile,
    load_profile,
    parse_profile,
    profile_toml,
)
from edge_sdk.screen import Compared, compare, compare_lines
from reference_server.broker import BrokerProcess

ROOT = Path(__file__).resolve().parent.parent
BOARD = "raspberry-pi-4b-2gb"
# Runs main in a process that fails when a heavy package was imported.
LIGHT = """
import sys
from edge_sdk.cli import main
code = main()
assert not {"torch", "numpy", "onnxruntime"} & set(sys.modules)
sys.exit(code)
"""

Edge = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    """Run `edge-sdk profile` to its end, with an empty home and nothing heavy allowed."""

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", LIGHT, "profile", *(str(arg) for arg in args)],
            capture_output=True, text=True, timeout=50, cwd=tmp_path, env=surroundings(tmp_path),
        )  # fmt: skip

    return run


def surroundings(home: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), **more}


def test_as_json_with_time_spread_and_condition(edge: Edge) -> None:
    done = edge("--quick", "--name", "my-board", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["profile"]["name"] == "my-board"
    assert 0 < answer["took_s"] < answer["limit_s"] + 1 == 3
    assert all(spread >= 0 for spread in answer["spreads"].values())
    rates = {key for key in answer["profile"] if key.endswith("_per_s")}
    assert rates <= set(answer["spreads"]) | set(answer["not_measured"])
    assert answer["memory"]["total_bytes"] == answer["profile"]["memory_total_bytes"]
    assert answer["condition"]["unknown"].items() <= answer["not_measured"].items()
    assert "compared" not in answer


def test_as_text_it_is_toml_with_sources(edge: Edge, tmp_path: Path) -> None:
    done = edge("--quick", "--save", tmp_path / "mine.toml")
    assert done.returncode == 0, done.stderr
    printed, saved = parse_profile(done.stdout, "stdout"), load_profile(tmp_path / "mine.toml")
    assert printed.memory_bytes == saved.memory_bytes
    assert saved.sources["cores"].startswith("measured: ")
    assert saved.measured_with.startswith("edge_sdk ")
    lines = {line.split(" ")[0]: line for line in done.stdout.splitlines()}
    assert re.search(r" # .*; measured: .*spread \d+%$", lines["storage_write_bytes_per_s"])
    assert re.search(r" # .*; assumed: cautious value", lines["uplink_bytes_per_s"])
    assert "# rates is not measured: left out by --quick" in done.stdout
    assert re.search(r"^# took \d\.\d s$", done.stdout, re.MULTILINE)


def test_in_full_it_loads_nothing_heavy_here_and_keeps_to_its_time(edge: Edge) -> None:
    start_s = time.monotonic()
    done = edge("--seconds", "3", "--json")
    assert time.monotonic() - start_s < 10, "with the start of Python on a shared machine"
    answer = json.loads(done.stdout)
    assert answer["limit_s"] == 3
    assert answer["took_s"] < 4
    threads = [key for key in answer["profile"]["rates"] if key.startswith("numpy_matmul_threads_")]
    assert threads or "flops_per_s" in answer["not_measured"]


def test_a_broker_is_measured_when_given(edge: Edge, broker: BrokerProcess) -> None:
    answer = json.loads(edge("--quick", "--broker", broker.url, "--json").stdout)
    assert answer["profile"]["uplink_bytes_per_s"] > 1e5
    assert answer["spreads"]["downlink_bytes_per_s"] >= 0
    assert "uplink_bytes_per_s" not in answer["not_measured"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--broker", "http://x"], "names no broker; write mqtt://HOST:PORT"),
        (["--compare", "raspberry-pi-4b-3gb"], "no such profile. Did you mean raspberry-pi-4b-"),
        (["--compare", "broken.toml"], "broken.toml: not TOML"),
        (["--name", "My Board"], "name is 'My Board', it must be 1 to 64 characters"),
    ],
)
def test_what_is_wrong_is_said(
    edge: Edge, tmp_path: Path, words: list[str], complaint: str
) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    done = edge("--quick", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert complaint in done.stderr


# Measured against a file


def profile(**changes: object) -> DeviceProfile:
    return msgspec.structs.replace(load_profile(BOARD), **changes)


def rows_of(measured: DeviceProfile, file: DeviceProfile) -> dict[str, Compared]:
    return {row.figure: row for row in compare(measured, file)}


def test_a_ratio_per_figure_and_what_is_far_off() -> None:
    file = profile(rates={"conv_flops_per_s": 4e9})
    measured = profile(
        flops_per_s=file.flops_per_s * 1.31,
        memory_bandwidth_bytes_per_s=file.memory_bandwidth_bytes_per_s * 1.29,
        storage_write_bytes_per_s=file.storage_write_bytes_per_s / 1.31,
        rates={"conv_flops_per_s": 8e9, "matmul_flops_per_s": 9e9},
        overhead={"conv_bytes": 7 << 20},
        sources=dict.fromkeys((*FIGURES, "rates", "overhead"), "measured: here")
        | {"uplink_bytes_per_s": "assumed: cautious value"},
    )
    rows = rows_of(measured, file)
    assert list(rows)[: len(FIGURES)] == list(FIGURES)
    off = {figure for figure, row in rows.items() if row.off}
    assert off == {"flops_per_s", "storage_write_bytes_per_s", "rates.conv_flops_per_s"}
    assert rows["rates.conv_flops_per_s"].ratio == 2.0
    assert rows["cores"] == Compared("cores", 4, 4, 1.0, False)
    assert rows["uplink_bytes_per_s"].measured is rows["uplink_bytes_per_s"].ratio is None
    assert rows["overhead.conv_bytes"] == Compared(
        "overhead.conv_bytes", 7 << 20, None, None, False
    )


def test_a_figure_of_nothing_in_the_file_has_no_ratio() -> None:
    measured = profile(sources={"storage_bytes": "measured: here"})
    row = rows_of(measured, profile(storage_bytes=0))["storage_bytes"]
    assert (row.file, row.ratio, row.off) == (0, None, False)


def test_the_table_has_units_people_read() -> None:
    measured = profile(sources={"cores": "measured: x", "memory_bytes": "measured: x"})
    header, *lines = compare_lines(compare(measured, load_profile("generic-x86")), "generic-x86")
    assert header.split() == ["figure", "measured", "generic-x86", "ratio"]
    shown = {line.split()[0]: line for line in lines}
    words = " ".join(shown["memory_bytes"].split())
    assert words == "memory_bytes 1,536 MiB 6,000 MiB 0.26 off"
    assert shown["cores"].split() == ["cores", "4", "4", "1.00"]
    assert "not measured" in shown["flops_per_s"]


def test_compare_prints_the_table_or_json(edge: Edge, tmp_path: Path) -> None:
    done = edge("--quick", "--compare", BOARD, "--save", tmp_path / "mine.toml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("figure")
    assert f" {BOARD} " in done.stdout.splitlines()[0]
    mine = load_profile(tmp_path / "mine.toml")
    answer = json.loads(edge("--quick", "--compare", tmp_path / "mine.toml", "--json").stdout)
    assert answer["compared"]["file"] == mine.name
    figures = {row["figure"]: row for row in answer["compared"]["figures"]}
    assert figures["cores"]["ratio"] == 1.0
    assert set(figures["cores"]) == {"figure", "measured", "file", "ratio", "off"}


def test_what_is_far_off_is_in_colour_on_a_terminal(tmp_path: Path) -> None:
    odd = msgspec.structs.replace(load_profile("container-512mb"), cores=4096)
    (tmp_path / "odd.toml").write_text(profile_toml(odd))
    words = [sys.executable, "-m", "edge_sdk", "profile", "--quick", "--compare", "odd.toml"]

    def shown(**more: str) -> str:
        environment = surroundings(tmp_path, TERM="xterm", **more)
        if not more:
            environment.pop("NO_COLOR", None)
        ours, theirs = pty.openpty()
        with closing(os.fdopen(ours, "rb", buffering=0)) as screen:
            child = subprocess.Popen(
                words, stdout=theirs, stderr=subprocess.DEVNULL, env=environment, cwd=tmp_path
            )
            os.close(theirs)
            text = b""
            with suppress(OSError):  # Linux says so when the last writer is gone
                while part := screen.read(4096):
                    text += part
            assert child.wait() == 0
        return text.decode()

    assert "\x1b[33mcores " in shown()
    assert "\x1b" not in shown(NO_COLOR="1")

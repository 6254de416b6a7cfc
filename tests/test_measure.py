"""Rates measured on this machine, and what is made of measuring processes that fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import MIB, ProfileError
from edge_sdk.figures import MAX_TABLE_KEYS
from edge_sdk.measure import (
    Calibration,
    Rate,
    calibrate,
    child_lines,
    exit_reason,
    machine_rates,
    measure_compute,
    measure_memory_bandwidth,
    measure_storage,
    parse_calibration,
    rate,
    run_child,
)

ROOT = Path(__file__).parent.parent


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_rates_are_positive_and_repeat() -> None:
    for found in (measure_compute(0.1), measure_memory_bandwidth(0.05)):
        assert found.per_s > 1e7
        assert found.samples >= 3
        assert found.spread >= 0


def test_the_spread_is_that_of_the_middle_half() -> None:
    assert rate([4.0]) == Rate(4.0, 0.0, 1)
    assert rate([1.0, 2.0, 3.0, 4.0, 5.0]) == Rate(3.0, 2 / 3, 5)


def test_measuring_loads_no_numpy_here() -> None:
    code = (
        "import sys; from edge_sdk.measure import measure_compute; measure_compute(0.01);"
        "sys.exit(' '.join({'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.stderr.strip() == b""


def test_the_child_command_writes_one_line_per_rate() -> None:
    command = [sys.executable, "-m", "edge_sdk.measure", "--compute", "0.05", "--bandwidth", "0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    keys = [json.loads(line)[0] for line in done.stdout.splitlines()]
    assert keys == ["memory_bandwidth_bytes_per_s", "flops_per_s"]


def test_a_measurement_that_is_cut_off_says_so() -> None:
    found, reason = machine_rates({"flops_per_s": 30.0}, 0.3)
    assert found == {}
    assert reason == "not done within 0.3 s"


def test_a_process_that_dies_says_how_and_keeps_what_it_wrote() -> None:
    code = "import os; print('[\"x\"]', flush=True); os.kill(os.getpid(), 4)"
    output, reason = run_child(["-c", code], 10.0, {})
    assert output == b'["x"]\n'
    assert "was killed: Illegal instruction" in reason


@pytest.mark.parametrize(
    ("code", "stderr", "said"),
    [
        (-4, b"", "was killed: Illegal instruction"),
        (1, b"Traceback\nImportError: No module named 'numpy'\n", "No module named 'numpy'"),
        (3, b"", "ended with 3: no message"),
    ],
)
def test_the_reason_of_a_failed_child_is_kept(code: int, stderr: bytes, said: str) -> None:
    assert said in exit_reason(code, stderr)


def test_lines_of_others_and_cut_lines_are_left_out() -> None:
    output = b'hello\n["flops_per_s", 2.0, 0.5, 3]\n{}\n7\n[]\n["a", NaN, 0.1, 1]\n'
    output += b'["a", 1, "b", 2]\n[1, 2, 3, 4]\n["cut", 1.'
    assert list(child_lines(output)) == [["flops_per_s", 2.0, 0.5, 3]]


def test_storage_is_measured_both_ways_and_leaves_no_file(tmp_path: Path) -> None:
    found = measure_storage(tmp_path, 5.0, max_bytes=3 * MIB)
    assert set(found) == {"storage_write_bytes_per_s", "storage_read_bytes_per_s"}
    for each in found.values():
        assert each.per_s > 1e4
        assert each.samples == 3
    assert list(tmp_path.iterdir()) == []


def test_storage_without_a_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere: storage cannot be measured: .*state dir"):
        measure_storage(tmp_path / "nowhere", 0.1)


def test_what_torch_measured_becomes_tables() -> None:
    output = lines(
        ["floor", "torch_floor_bytes", 174931968.0, 0.0, 1],
        ["rates", "matmul_flops_per_s", 1.5e11, 0.1, 263],
        ["rates", "matmul_operator_s", 0.0, 0.1, 263],
        ["overhead", "matmul_bytes", 99708928.4, 0.0, 1],
    )
    assert parse_calibration(output) == Calibration(
        {"matmul_flops_per_s": Rate(1.5e11, 0.1, 263), "matmul_operator_s": Rate(0.0, 0.1, 263)},
        {"matmul_bytes": 99708928},
        174931968,
    )


@pytest.mark.parametrize(
    "row",
    [
        ["rates", "matmul_flops_per_s", -1.0, 0.1, 1],
        ["rates", "matmul_flops_per_s", 1e300, 0.1, 1],
        ["rates", "matmul_bytes", 5, 0.1, 1],
        ["rates", "MATMUL flops_per_s", 5, 0.1, 1],
        ["overhead", "matmul_flops_per_s", 5, 0.1, 1],
        ["overhead", "matmul_bytes", -5, 0.1, 1],
        ["overhead", "matmul_bytes", 2.0**41, 0.1, 1],
        ["floor", "torch_floor_bytes", 0, 0.0, 1],
        ["floor", "torch_floor_bytes", 1e300, 0.0, 1],
        ["floor", "floor", 5, 0.0, 1],
        ["rates", "matmul_flops_per_s", 5.0, 0.1],
    ],
)
def test_figures_no_profile_may_hold_are_left_out(row: list[object]) -> None:
    assert parse_calibration(lines(row)) == Calibration()


def test_no_more_figures_than_a_profile_holds() -> None:
    rows = [["rates", f"kind_{n}_s", 1.0, 0.0, 1] for n in range(100)]
    rows += [["overhead", f"kind_{n}_bytes", 1, 0.0, 1] for n in range(100)]
    found = parse_calibration(lines(*rows))
    assert len(found.overhead) == MAX_TABLE_KEYS
    assert 0 < len(found.rates) < MAX_TABLE_KEYS


def test_calibration_that_is_cut_off_says_so() -> None:
    found, reason = calibrate(1.0, 1, 0.2)
    assert found == Calibration()
    assert reason == "not done within 0.2 s"

"""What kinds of work cost here: the fit, and the lines of the child process that measures."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.calibrate import CASES, fit
from edge_sdk.cost import price_list
from edge_sdk.figures import acceptable
from edge_sdk.measure import parse_calibration

ROOT = Path(__file__).resolve().parent.parent
PRICES = {"operator_s": 5e-6, "matmul_flops_per_s": 1e-10, "matmul_bytes_per_s": 2e-10}


def rows_of(prices: dict[str, float]) -> tuple[list[dict[str, float]], list[float]]:
    """Work of many sizes, and what it takes at these prices."""
    rows = [
        {"operator_s": n, "matmul_flops_per_s": flops, "matmul_bytes_per_s": moved}
        for n, flops, moved in itertools.product((2, 40), (1e4, 1e7, 1e9), (1e4, 1e6, 1e8))
    ]
    return rows, [sum(row[key] * prices[key] for key in row) for row in rows]


def test_known_rates_are_found_again() -> None:
    rows, seconds = rows_of(PRICES)
    assert fit(rows, seconds) == pytest.approx(PRICES, rel=0.02)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-7.0, -4.0), min_size=3, max_size=3))
def test_predictions_of_a_fit_are_right_whatever_the_rates(powers: list[float]) -> None:
    scales = (1.0, 1e-4, 1e-4)
    prices = {k: 10**p * s for k, p, s in zip(PRICES, powers, scales, strict=True)}
    rows, seconds = rows_of(prices)
    found = fit(rows, seconds)
    for row, expected in zip(rows, seconds, strict=True):
        assert sum(row[key] * found[key] for key in row) == pytest.approx(expected, rel=0.05)


def test_noise_moves_rates_a_little() -> None:
    rows, seconds = rows_of(PRICES)
    noisy = [s * (1.1 if n % 2 else 0.9) for n, s in enumerate(seconds)]
    assert fit(rows, noisy) == pytest.approx(PRICES, rel=0.3)


def test_no_price_is_negative() -> None:
    rows = [{"operator_s": 10.0, "norm_bytes_per_s": 1e6}, {"operator_s": 10.0}]
    found = fit(rows, [1e-3, 2e-3])  # more work in less time: the operator explains it
    assert found["norm_bytes_per_s"] == 0
    assert 1e-4 < found["operator_s"] < 2e-4


@pytest.fixture(scope="module")
def output() -> bytes:
    """Of a very short calibration."""
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk.calibrate", "--seconds", "0.1", "--threads", "1"],
        cwd=ROOT,
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout


def test_every_line_is_a_table_a_key_and_three_numbers(output: bytes) -> None:
    lines = [json.loads(line) for line in output.splitlines()]
    assert {line[0] for line in lines} == {"floor", "rates", "overhead"}
    for table, key, value, spread, samples in lines:
        assert isinstance(samples, int)
        assert spread >= 0
        assert table == "floor" or acceptable(
            table, key, round(value) if table == "overhead" else value
        )
    assert len({(table, key) for table, key, *_ in lines}) == len(lines)


def test_what_is_measured_is_what_the_cost_model_reads(output: bytes) -> None:
    found = parse_calibration(output)
    known = price_list(1e10, 1e10, {})
    assert found.rates.keys() <= known.keys()
    assert {"operator_s", "matmul_flops_per_s", "convolution_flops_per_s"} <= found.rates.keys()
    assert {key.removesuffix("_bytes") for key in found.overhead} <= {case[0] for case in CASES}
    assert found.floor_bytes is not None
    assert 50 << 20 < found.floor_bytes < 1 << 30
    assert 1e8 < found.rates["matmul_flops_per_s"].per_s < 1e13
    assert 1e-8 < found.rates["operator_s"].per_s < 1e-2

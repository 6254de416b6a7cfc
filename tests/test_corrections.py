"""What a device learns of its own costs, and the file it keeps that in."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.corrections import (
    LEAST_MEMORY_BYTES,
    MAX_ENTRIES,
    MEMORY_BOUNDS,
    SLOWLY,
    TIME_BOUNDS,
    UNCORRECTED,
    Corrections,
    correction_key,
    learnt,
)
from edge_sdk.errors import MIB
from edge_sdk.profile import Correction


def once(before: Correction, memory: float = 1.0, time: float = 1.0) -> Correction:
    """After a round that took so much more than was predicted."""
    return learnt(
        before,
        predicted_bytes=100 * MIB,
        measured_bytes=int(100 * MIB * memory),
        predicted_s=10.0,
        measured_s=10.0 * time,
    )


def test_too_little_predicted_memory_is_believed_at_once() -> None:
    assert once(UNCORRECTED, memory=1.3).memory == pytest.approx(1.3)


def test_too_much_predicted_memory_is_believed_slowly() -> None:
    assert once(UNCORRECTED, memory=0.9).memory == pytest.approx(1 - SLOWLY * 0.1)


def test_a_prediction_that_was_corrected_and_right_stays() -> None:
    known = Correction(memory=1.3, time=2.0, samples=3)
    after = once(known)
    assert after.samples == 4
    assert after.memory == pytest.approx(1.3)
    assert after.time == pytest.approx(2.0)


def test_the_first_time_is_taken_later_ones_are_smoothed() -> None:
    first = once(UNCORRECTED, time=4.0)
    assert first.time == pytest.approx(4.0)
    assert once(first, time=0.25).time == pytest.approx(2.0)


def test_what_is_too_small_to_judge_teaches_nothing() -> None:
    known = Correction(memory=1.1, time=1.2, samples=1)
    after = learnt(
        known,
        predicted_bytes=LEAST_MEMORY_BYTES - 1,
        measured_bytes=100 * MIB,
        predicted_s=0.01,
        measured_s=0.09,
    )
    assert (after.memory, after.time) == (1.1, 1.2)


@given(
    st.integers(-(2**50), 2**50),
    st.integers(0, 2**50),
    st.floats(0, 1e9),
    st.floats(0, 1e9),
    st.integers(1, 4),
)
def test_corrections_stay_within_bounds(
    predicted_bytes: int, measured_bytes: int, predicted_s: float, measured_s: float, rounds: int
) -> None:
    known = UNCORRECTED
    for _ in range(rounds):
        known = learnt(
            known,
            predicted_bytes=predicted_bytes,
            measured_bytes=measured_bytes,
            predicted_s=predicted_s,
            measured_s=measured_s,
        )
    assert MEMORY_BOUNDS[0] <= known.memory <= MEMORY_BOUNDS[1]
    assert TIME_BOUNDS[0] <= known.time <= TIME_BOUNDS[1]


def test_corrections_outlive_the_process(tmp_path: Path) -> None:
    path, key = tmp_path / "corrections.json", correction_key("digits", "ab" * 32, "pi")
    assert Corrections(path).get(key) is None
    Corrections(path).put(key, once(UNCORRECTED, memory=1.5))
    assert Corrections(path).get(key) == once(UNCORRECTED, memory=1.5)
    assert key == "digits/abababababab/pi"
    assert Corrections(path).get(correction_key("digits", "cd" * 32, "pi")) is None


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"corrections": {"a": {"memory": 1.0}}}',
        b'{"corrections": {"a": {"memory": 1e300, "time": 1.0, "samples": 1}}}',
        b'{"corrections": {"a": {"memory": NaN, "time": 1.0, "samples": 1}}}',
        b'{"corrections": {"a": {"memory": -1, "time": 1.0, "samples": 1}}}',
        b'{"corrections": {"a": {"memory": 1.0, "time": 1.0, "samples": "many"}}}',
    ],
)
def test_a_damaged_file_is_reported_and_written_anew(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "corrections.json"
    path.write_bytes(damage)
    with caplog.at_level(logging.WARNING):
        corrections = Corrections(path)
    assert f"{path} is damaged and ignored" in caplog.text
    assert corrections.get("a") is None
    corrections.put("b", UNCORRECTED)
    caplog.clear()
    assert Corrections(path).get("b") == UNCORRECTED
    assert caplog.text == ""


def test_a_file_that_cannot_be_read_or_written_costs_no_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "corrections.json"
    path.mkdir()
    corrections = Corrections(path)
    assert f"{path} is ignored" in caplog.text
    corrections.put("a", UNCORRECTED)
    assert "what this round taught about costs is not kept" in caplog.text
    assert corrections.get("a") == UNCORRECTED


def test_the_file_does_not_grow_without_end(tmp_path: Path) -> None:
    path = tmp_path / "corrections.json"
    corrections = Corrections(path)
    for number in range(MAX_ENTRIES + 5):
        corrections.put(str(number), UNCORRECTED)
    kept = Corrections(path)
    assert kept.get("4") is None
    assert kept.get("5") is not None

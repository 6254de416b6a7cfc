"""Receiver-driven transfers: whatever the channel loses, repeats or reorders, the whole arrives."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.errors import MalformedMessage, ProtocolMisuse
from edge_sdk.pieces import (
    MAX_PIECES,
    Assembly,
    Ranges,
    Window,
    piece_count,
    piece_range,
)


class Asking:
    """A window of a fixed size."""

    def __init__(self, assembly: Assembly, pieces: int, seed: int) -> None:
        self.window = Window(assembly, retry_s=1.0, retry_max_s=8.0, rng=Random(seed))
        self.pieces = pieces

    @property
    def deadline_s(self) -> float:
        return self.window.deadline_s

    def want(self, now_s: float) -> Ranges:
        return self.window.want(now_s, self.pieces)


def window_of(assembly: Assembly, pieces: int, seed: int = 0) -> Asking:
    return Asking(assembly, pieces, seed)


def place(assembly: Assembly, index: int, length: int) -> int | None:
    """Count a piece as arrived, if it is new; where it belongs."""
    offset = assembly.place_of(index, length)
    if offset is not None:
        assembly.mark(index)
    return offset


def indexes(ranges: Ranges) -> list[int]:
    return [index for first, stop in ranges for index in range(first, stop)]


def assembly_with(pieces: int, arrived: set[int]) -> Assembly:
    assembly = Assembly(pieces, 1)
    for index in arrived:
        place(assembly, index, 1)
    return assembly


@given(size=st.integers(0, 500), piece=st.integers(1, 60))
def test_pieces_tile_the_whole(size: int, piece: int) -> None:
    ranges = [piece_range(index, size, piece) for index in range(piece_count(size, piece))]
    assert [at for start, stop in ranges for at in range(start, stop)] == list(range(size))
    assert all(stop - start == piece for start, stop in ranges[:-1])


@pytest.mark.parametrize("size", [-1, MAX_PIECES * 10 + 1, 2**63])
@pytest.mark.parametrize("piece", [-1, 0, 10])
def test_impossible_sizes_are_refused(size: int, piece: int) -> None:
    with pytest.raises(MalformedMessage, match=f"a whole of {size} bytes in pieces of {piece}"):
        Assembly(size, piece)


def test_the_most_pieces_there_can_be() -> None:
    assert Assembly(MAX_PIECES * 10, 10).missing(3, MAX_PIECES - 2) == (
        (MAX_PIECES - 2, MAX_PIECES),
    )


def test_a_piece_finds_its_place_once() -> None:
    assembly = Assembly(25, 10)
    assert place(assembly, 2, 5) == 20
    assert place(assembly, 2, 5) is None
    assert (assembly.received, assembly.complete) == (1, False)
    assert place(assembly, 0, 10) == 0
    assert place(assembly, 1, 10) == 10
    assert (assembly.received, assembly.complete) == (3, True)


@pytest.mark.parametrize(
    ("index", "length", "text"),
    [
        (3, 10, "piece 3 of a whole of 25 bytes in pieces of 10: there are 3"),
        (-1, 10, "piece -1"),
        (2**40, 10, "piece 1099511627776"),
        (0, 9, "piece 0 has 9 bytes, its place has 10"),
        (0, 11, "piece 0 has 11 bytes"),
        (2, 10, "piece 2 has 10 bytes, its place has 5"),
        (2, 0, "piece 2 has 0 bytes"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(index: int, length: int, text: str) -> None:
    assembly = Assembly(25, 10)
    with pytest.raises(MalformedMessage, match=text):
        place(assembly, index, length)
    assert assembly.received == 0


def test_nothing_is_complete_from_the_start() -> None:
    assembly = Assembly(0, 10)
    assert assembly.complete
    assert assembly.missing(5) == ()
    assert window_of(assembly, 4).want(0.0) == ()


@given(
    pieces=st.integers(0, 40),
    arrived=st.sets(st.integers(0, 39)),
    limit=st.integers(0, 50),
    start=st.integers(0, 45),
)
def test_missing_names_the_first_missing_pieces(
    pieces: int, arrived: set[int], limit: int, start: int
) -> None:
    arrived = {index for index in arrived if index < pieces}
    assembly = assembly_with(pieces, arrived)
    lacking = [index for index in range(pieces) if index not in arrived]
    ranges = assembly.missing(limit, start)
    assert indexes(ranges) == [index for index in lacking if index >= start][:limit]
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    assert assembly.missing_before(start) == sum(index < start for index in lacking)


def test_more_is_asked_for_when_half_has_arrived() -> None:
    assembly = Assembly(100, 10)
    window = window_of(assembly, 4)
    assert window.want(0.0) == ((0, 4),)
    assert window.want(0.1) == ()
    place(assembly, 1, 10)
    assert window.want(0.2) == ()
    place(assembly, 0, 10)
    assert window.want(0.3) == ((4, 6),)
    for index in (2, 3, 4, 5):
        place(assembly, index, 10)
    assert window.want(0.4) == ((6, 10),)
    for index in (6, 7, 8, 9):
        place(assembly, index, 10)
    assert window.want(0.5) == ()


def test_what_already_arrived_is_not_asked_for() -> None:
    assembly = assembly_with(10, {0, 1, 4})
    assert window_of(assembly, 5).want(0.0) == ((2, 4), (5, 8))


def test_silence_asks_again_for_what_is_missing() -> None:
    assembly = Assembly(100, 10)
    window = window_of(assembly, 4)
    window.want(0.0)
    for index in (0, 2):
        place(assembly, index, 10)
    assert window.want(0.5) == ((4, 6),)
    deadline_s = window.deadline_s
    assert 1.5 <= deadline_s <= 2.5
    assert window.want(deadline_s - 0.001) == ()
    assert window.want(deadline_s) == ((1, 2), (3, 6))


def test_waits_double_with_silence_up_to_the_cap_and_restart_with_progress() -> None:
    spans: list[list[float]] = []
    for seed in range(300):
        assembly = Assembly(100, 10)
        window, now_s, waits = window_of(assembly, 4, seed), 0.0, []
        for _ in range(6):
            assert window.want(now_s) == ((0, 4),)
            waits.append(window.deadline_s - now_s)
            now_s = window.deadline_s
        place(assembly, 0, 10)
        window.want(now_s)
        spans.append([*waits, window.deadline_s - now_s])
    for column, span_s in zip(zip(*spans, strict=True), [1, 2, 4, 8, 8, 8, 1], strict=True):
        assert 1.0 <= min(column) < 1.0 + 0.1 * span_s
        assert 1.0 + 0.9 * span_s < max(column) <= 1.0 + span_s


def test_a_day_of_silence_does_not_overflow() -> None:
    window = window_of(Assembly(10, 1), 4)
    for _ in range(5000):
        assert window.want(window.deadline_s if math.isfinite(window.deadline_s) else 0.0)
    assert math.isfinite(window.deadline_s)


@pytest.mark.parametrize(("retry_s", "retry_max_s"), [(0.0, 8.0), (9.0, 8.0)])
def test_windows_that_cannot_work_are_our_own_bug(retry_s: float, retry_max_s: float) -> None:
    with pytest.raises(ProtocolMisuse, match=f"retries after {retry_s} to {retry_max_s} s"):
        Window(Assembly(10, 1), retry_s=retry_s, retry_max_s=retry_max_s, rng=Random(0))


def test_what_comes_by_other_means_is_asked_for_only_after_a_silence() -> None:
    assembly = Assembly(100, 10)
    asking = window_of(assembly, 4)
    asking.window.expect_all(0.0)
    for index in range(9):
        assert asking.want(0.1 * index) == ()
        if index != 3:
            place(assembly, index, 10)
    assert asking.want(asking.deadline_s - 0.001) == ()
    assert asking.want(asking.deadline_s) == ((3, 4), (9, 10))


@given(arrived=st.sets(st.integers(0, 39)))
def test_arrived_and_missing_are_complements(arrived: set[int]) -> None:
    assembly = assembly_with(40, arrived)
    assert indexes(assembly.arrived()) == sorted(arrived)
    assert indexes(assembly.missing(40)) == sorted(set(range(40)) - arrived)


@settings(max_examples=150, deadline=None)
@given(
    size=st.integers(1, 400),
    piece=st.integers(1, 40),
    window_pieces=st.integers(1, 12),
    loss=st.sampled_from([0.0, 0.2, 0.7]),
    seed=st.integers(0, 2**32),
)
def test_lost_repeated_and_reordered_pieces_always_assemble(
    size: int, piece: int, window_pieces: int, loss: float, seed: int
) -> None:
    channel = Random(seed)
    whole = channel.randbytes(size)
    received = bytearray(size)
    assembly = Assembly(size, piece)
    window = window_of(assembly, window_pieces, seed)
    under_way: list[int] = []
    now_s = 0.0
    for _ in range(20_000):
        if assembly.complete:
            break
        asked = indexes(window.want(now_s))
        assert len(asked) <= window_pieces
        for index in asked:
            copies = 0 if channel.random() < loss else channel.choice((1, 1, 2))
            under_way += [index] * copies
        if under_way:
            now_s += 0.01
            index = under_way.pop(channel.randrange(len(under_way)))
            start, stop = piece_range(index, size, piece)
            offset = place(assembly, index, stop - start)
            if offset is not None:
                received[offset : offset + stop - start] = whole[start:stop]
        else:
            now_s = max(now_s, window.deadline_s)
        if channel.random() < 0.02:  # the link is lost, and with it what was asked for
            window = window_of(assembly, window_pieces, channel.randrange(2**32))
    assert assembly.complete
    assert received == whole


def test_without_loss_every_piece_is_asked_for_once() -> None:
    assembly = Assembly(1000, 10)
    window = window_of(assembly, 8)
    asked: list[int] = []
    while not assembly.complete:
        wanted = indexes(window.want(len(asked) / 1000))
        asked += wanted
        for index in wanted:
            place(assembly, index, 10)
    assert asked == list(range(100))

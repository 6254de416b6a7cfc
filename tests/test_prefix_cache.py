"""Kept rows on disk: through kills, damage, other weights and too little room."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.errors import MIB, ProtocolMisuse, StateError
from edge_sdk.prefix_cache import Column, DiskRows, Key, Layout, MemoryRows, NoRoom, PrefixCache

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1 << 30
LAYOUT = Layout(
    rows=40,
    columns=(
        Column(shape=(3, 5), dtype="float32", kept="float32"),
        Column(shape=(), dtype="int64", kept="int64"),
        Column(shape=(7,), dtype="bool", kept="bool"),
    ),
)


def key_of(**how: Any) -> Key:
    given = {
        "task": "t", "blocks": (("a", "1"), ("b", "2")), "model": "m", "data": "d",
        "engine": "torch", "dtype": "float32", "views": 1,
    }  # fmt: skip
    return Key(**{**given, **how})


def outputs_of(rows: Any, layout: Layout = LAYOUT) -> list[np.ndarray[Any, Any]]:
    """What is kept of rows: numbers that tell the row."""
    made = []
    for column in layout.columns:
        parts = [np.random.default_rng(int(row)).random(column.shape) * 9 for row in rows]
        made.append(np.array(parts).reshape(len(rows), *column.shape).astype(column.dtype))
    return made


def is_right(rows: DiskRows | MemoryRows, places: np.ndarray[Any, Any]) -> bool:
    found = rows.read(places)
    return found is not None and all(
        a.dtype == b.dtype and np.array_equal(a, b)
        for a, b in zip(found, outputs_of(places), strict=True)
    )


@pytest.fixture
def cache(tmp_path: Path) -> PrefixCache:
    return PrefixCache(tmp_path / "prefix")


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_written_is_read(where: str, cache: PrefixCache) -> None:
    disk = where == "disk"
    rows = cache.open(key_of(), LAYOUT, LIMIT) if disk else MemoryRows(LAYOUT, LIMIT)
    places = np.array([7, 0, 39, 7])
    assert rows.missing(places).tolist() == [0, 7, 39]
    rows.write(places[:3], outputs_of(places[:3]))
    assert rows.missing(np.arange(9)).tolist() == [1, 2, 3, 4, 5, 6, 8]
    assert is_right(rows, places)
    assert not rows.complete
    rest = rows.missing(np.arange(40))
    rows.write(rest, outputs_of(rest))
    assert rows.complete
    assert is_right(rows, np.arange(40)[::-1])
    rows.close()


def test_kept_rows_survive_closing(cache: PrefixCache) -> None:
    rows = cache.open(key_of(), LAYOUT, LIMIT)
    rows.write(np.arange(10), outputs_of(range(10)))
    rows.flush()
    rows.write(np.arange(10, 20), outputs_of(range(10, 20)))
    rows.close()
    again = cache.open(key_of(), LAYOUT, LIMIT)
    assert again.present(40).tolist() == list(range(10)), "what was not flushed is computed again"
    assert is_right(again, np.arange(10))
    again.close()


def test_float16_takes_half_and_refuses_what_it_cannot_hold(cache: PrefixCache) -> None:
    layout = Layout(rows=4, columns=(Column(shape=(8,), dtype="float32", kept="float16"),))
    assert layout.row_bytes == 16
    rows = cache.open(key_of(), layout, LIMIT)
    given = np.linspace(-300, 300, 32, dtype=np.float32).reshape(4, 8)
    rows.write(np.arange(4), [given])
    (found,) = rows.read(np.arange(4)) or [np.empty(0)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, given, rtol=1e-3)
    with pytest.raises(NoRoom, match=r"7e\+04, is above what float16 holds; keep it as float32"):
        rows.write(np.arange(4), [given - 7e4 + 300])
    rows.close()


def test_other_weights_outdate_and_nothing_else_does(cache: PrefixCache, tmp_path: Path) -> None:
    keys = [
        key_of(),
        key_of(blocks=(("a", "1"),)),
        key_of(blocks=(("a", "1"), ("b", "2"), ("c", "3"))),
        key_of(engine="onnx"),
        key_of(task="other", blocks=(("a", "9"),)),
        key_of(data="e"),
    ]
    for key in keys:
        rows = cache.open(key, LAYOUT, LIMIT)
        rows.write(np.arange(3), outputs_of(range(3)))
        rows.flush()
        rows.close()
    cache.open(key_of(blocks=(("a", "1"), ("b", "5"))), LAYOUT, LIMIT).close()
    names = {path.name for path in (tmp_path / "prefix").iterdir()}
    assert {key.digest() in names for key in (keys[0], keys[2], keys[3], keys[5])} == {False}
    assert {key.digest() in names for key in (keys[1], keys[4])} == {True}
    assert len(names) == 3


def test_all_entries_together_stay_within_the_limit(cache: PrefixCache, tmp_path: Path) -> None:
    limit_bytes = 3 * (LAYOUT.size_bytes + 1000)
    keys = [key_of(data=str(number)) for number in range(5)]
    for age, key in enumerate(keys[:3]):
        cache.open(key, LAYOUT, limit_bytes).close()
        os.utime(tmp_path / "prefix" / key.digest() / "header.json", (age, age))
    cache.open(keys[0], LAYOUT, limit_bytes).close()  # used again: now the last to go
    cache.open(keys[3], LAYOUT, limit_bytes).close()
    assert cache.used_bytes() <= limit_bytes
    names = {path.name for path in (tmp_path / "prefix").iterdir()}
    assert names == {keys[n].digest() for n in (0, 2, 3)}


def test_what_alone_is_above_the_limit_is_refused(cache: PrefixCache, tmp_path: Path) -> None:
    large = Layout(rows=1 << 20, columns=(Column(shape=(256,), dtype="float32", kept="float32"),))
    for refused in (
        lambda: cache.open(key_of(), large, 512 * MIB),
        lambda: MemoryRows(large, 512 * MIB),
    ):
        with pytest.raises(NoRoom, match=r"1048576 samples takes 1032\.0 MiB, 512\.0 MiB are all"):
            refused()
    assert list((tmp_path / "prefix").iterdir()) == []
    with pytest.raises(ProtocolMisuse, match="4 rows of 0 bytes"):
        MemoryRows(Layout(rows=4, columns=()), LIMIT)


# --- damage ------------------------------------------------------------------------------------


@pytest.fixture
def filled(cache: PrefixCache, tmp_path: Path) -> Path:
    """The directory of an entry with all rows, in two records."""
    rows = cache.open(key_of(), LAYOUT, LIMIT)
    for places in (np.arange(25), np.arange(25, 40)):
        rows.write(places, outputs_of(places))
        rows.flush()
    rows.close()
    return tmp_path / "prefix" / key_of().digest()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("row", [0, 17, 39])
def test_a_damaged_row_is_missing_until_it_is_written_again(
    row: int, cache: PrefixCache, filled: Path
) -> None:
    flip(filled / "rows", row * LAYOUT.row_bytes + 3)
    rows = cache.open(key_of(), LAYOUT, LIMIT)
    assert rows.complete
    assert rows.read(np.arange(40)) is None
    assert rows.missing(np.arange(40)).tolist() == [row]
    rows.write(np.array([row]), outputs_of([row]))
    assert is_right(rows, np.arange(40))
    rows.flush()
    rows.close()
    again = cache.open(key_of(), LAYOUT, LIMIT)
    assert is_right(again, np.arange(40))
    again.close()


def test_a_torn_log_counts_up_to_the_last_whole_record(cache: PrefixCache, filled: Path) -> None:
    log = (filled / "marks").read_bytes()
    first = 4 + 25 * 8 + 4
    for length in (*range(0, len(log), 7), len(log) - 1):
        (filled / "marks").write_bytes(log[:length])
        rows = cache.open(key_of(), LAYOUT, LIMIT)
        assert len(rows.present(40)) == (25 if length >= first else 0)
        rest = rows.missing(np.arange(40))
        rows.write(rest, outputs_of(rest))
        rows.flush()
        rows.close()
        rows = cache.open(key_of(), LAYOUT, LIMIT)
        assert rows.complete, "a record after the torn one is found"
        assert is_right(rows, np.arange(40))
        rows.close()


@pytest.mark.parametrize("at", [0, 3, 5, 100, 207, 208, 215])
def test_a_damaged_record_ends_the_log(at: int, cache: PrefixCache, filled: Path) -> None:
    flip(filled / "marks", at)
    rows = cache.open(key_of(), LAYOUT, LIMIT)
    assert len(rows.present(40)) == (25 if at >= 208 else 0)
    rows.close()


@pytest.mark.parametrize("name", ["rows", "marks", "header.json"])
@pytest.mark.parametrize("how", ["gone", "short", "empty"])
def test_damaged_files_never_count_as_rows(
    name: str, how: str, cache: PrefixCache, filled: Path
) -> None:
    path = filled / name
    data = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(data[: len(data) // 2] if how == "short" else b"")
    rows = cache.open(key_of(), LAYOUT, LIMIT)
    assert len(rows.present(40)) == 0
    rows.write(np.arange(40), outputs_of(range(40)))
    assert is_right(rows, np.arange(40))
    rows.close()


def test_another_layout_under_the_same_key_starts_anew(cache: PrefixCache, filled: Path) -> None:
    other = Layout(rows=40, columns=LAYOUT.columns[:2])
    rows = cache.open(key_of(), other, LIMIT)
    assert len(rows.present(40)) == 0
    rows.close()


def test_foreign_files_in_the_directory_are_swept(cache: PrefixCache, filled: Path) -> None:
    (filled.parent / "note.txt").write_text("hello")
    (filled.parent / "half").mkdir()
    (filled.parent / "half" / "rows").write_bytes(b"x" * 999)
    cache.open(key_of(), LAYOUT, LIMIT).close()
    assert [path.name for path in filled.parent.iterdir()] == [filled.name]


def test_a_directory_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"cannot create .*file/prefix: Not a directory"):
        PrefixCache(tmp_path / "file" / "prefix").open(key_of(), LAYOUT, LIMIT)


WRITER = """
import sys, numpy as np
from pathlib import Path
import edge_sdk.prefix_cache as c
from tests import test_prefix_cache as t
c.FLUSH_BYTES = 4 * t.LAYOUT.row_bytes
rows = c.PrefixCache(Path(sys.argv[1])).open(t.key_of(), t.LAYOUT, t.LIMIT)
print(len(rows.present(40)), flush=True)
while True:
    for first in range(0, 40, 2):
        places = np.arange(first, first + 2)
        rows.write(places, t.outputs_of(places))
        print(first, flush=True)
"""


def test_a_kill_at_any_time_leaves_no_row_that_is_not_whole(
    cache: PrefixCache, tmp_path: Path
) -> None:
    seen = []
    for lines in (1, 3, 8, 15, 21):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / "prefix")],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip
        assert child.stdout is not None
        for _ in range(lines):
            child.stdout.readline()
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        rows = cache.open(key_of(), LAYOUT, LIMIT)
        present = rows.present(40)
        seen.append(len(present))
        assert len(present) == 0 or is_right(rows, present)
        rows.close()
    assert seen == sorted(seen)
    assert seen[-1] > 0

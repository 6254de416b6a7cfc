"""A whole on its way here, on disk: what a kill, a power cut or a hostile piece leaves of it."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Collection
from pathlib import Path
from random import Random

import pytest

from edge_sdk.errors import MalformedMessage, StateError
from edge_sdk.parts import JOURNAL_SUFFIX, PART_SUFFIX, Incoming, sweep_parts
from edge_sdk.pieces import Ranges
from edge_sdk.wire import Piece

PIECE = 256
CONTENT = Random(0).randbytes(10 * PIECE - 7)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def stem(tmp_path: Path) -> Path:
    return tmp_path / "whole.1"


def incoming(stem: Path, sha256: str = SHA256, piece_bytes: int = PIECE) -> Incoming:
    return Incoming(stem, sha256, len(CONTENT), piece_bytes, Random(1))


def give(into: Incoming, index: int, data: bytes, transfer: bytes | None = None) -> bool:
    """Whether a piece was new."""
    name = bytes.fromhex(into.sha256)[:8] if transfer is None else transfer
    return into.take(Piece(name, index, into.pieces, data, zlib.crc32(data)))


def send(into: Incoming, ranges: Ranges, lose: Collection[int] = ()) -> None:
    size = into.piece_bytes
    for first, stop in ranges:
        for index in range(first, stop):
            if index not in lose:
                give(into, index, CONTENT[index * size :][:size])


def test_a_whole_arrives_in_the_windows_it_asks_for(stem: Path) -> None:
    whole, now_s = incoming(stem), 0.0
    while not whole.complete:
        ranges = whole.want(now_s, 4)
        assert sum(stop - first for first, stop in ranges) <= 4
        send(whole, ranges)
        now_s += 0.1
    whole.verify()
    assert whole.path.read_bytes() == CONTENT
    assert whole.want(now_s, 4) == ()
    whole.moved_to(stem.parent / "done")
    assert [path.name for path in stem.parent.iterdir()] == ["done"]


def test_what_was_lost_is_asked_for_again_at_the_deadline(stem: Path) -> None:
    whole = incoming(stem)
    send(whole, whole.want(0.0, 4), lose=(1,))
    for now_s in (0.1, 0.2, 0.3):
        send(whole, whole.want(now_s, 4))
    assert not whole.complete
    assert whole.want(whole.deadline_s, 4) == ((1, 2),)
    assert whole.silent_tries == 1


def test_after_a_lost_link_everything_missing_is_asked_for_at_once(stem: Path) -> None:
    whole = incoming(stem)
    assert whole.want(0.0, 4) == ((0, 4),)
    assert whole.want(0.1, 4) == ()
    whole.forget_asked()
    assert whole.want(0.2, 4) == ((0, 4),)


def test_pieces_of_another_whole_and_duplicates_change_nothing(stem: Path) -> None:
    whole = incoming(stem)
    assert not give(whole, 0, CONTENT[:PIECE], b"another!")
    assert give(whole, 0, CONTENT[:PIECE])
    assert not give(whole, 0, bytes(PIECE))
    assert whole.path.read_bytes()[:PIECE] == CONTENT[:PIECE]
    assert whole.received == 1


@pytest.mark.parametrize(("index", "length"), [(10, 1), (0, PIECE - 1), (9, PIECE), (1 << 31, 1)])
def test_pieces_that_fit_nowhere_are_refused(stem: Path, index: int, length: int) -> None:
    whole = incoming(stem)
    with pytest.raises(MalformedMessage, match=f"piece {index}"):
        give(whole, index, bytes(length))
    assert whole.received == 0


def test_a_whole_without_its_hash_is_refused(stem: Path) -> None:
    whole = incoming(stem, "00" * 32)
    send(whole, ((0, 10),))
    assert whole.complete
    with pytest.raises(MalformedMessage, match="announced was 0000"):
        whole.verify()
    whole.discard()
    whole.discard()
    assert list(stem.parent.iterdir()) == []


def test_a_killed_receiver_goes_on_with_what_it_had(stem: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tests.test_parts import incoming, send\n"
        "send(incoming(Path(sys.argv[1])), ((0, 4), (6, 7)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(stem)], check=False)
    assert done.returncode == -signal.SIGKILL
    whole = incoming(stem)
    assert whole.received == 5
    assert whole.want(0.0, 10) == ((4, 6), (7, 10))
    send(whole, ((4, 6), (7, 10)))
    whole.verify()


def test_only_pieces_that_are_really_there_survive_a_power_cut(stem: Path) -> None:
    whole = incoming(stem)
    send(whole, ((0, 10),))
    # The journal reached the disk, a page of the content did not, and the journal's end is torn.
    handle = os.open(whole.path, os.O_WRONLY)
    os.pwrite(handle, bytes(PIECE), 3 * PIECE)
    os.close(handle)
    journal = stem.with_name(stem.name + JOURNAL_SUFFIX)
    journal.write_bytes(journal.read_bytes()[:-3])
    again = incoming(stem)
    assert again.want(0.0, 10) == ((3, 4), (9, 10))
    send(again, ((3, 4), (9, 10)))
    again.verify()


@pytest.mark.parametrize("harm", ["no part", "no journal", "short journal", "other magic"])
def test_what_cannot_be_continued_begins_anew(stem: Path, harm: str) -> None:
    send(incoming(stem), ((0, 3),))
    part, journal = (stem.with_name(stem.name + end) for end in (PART_SUFFIX, JOURNAL_SUFFIX))
    if harm == "no part":
        part.unlink()
    elif harm == "no journal":
        journal.unlink()
    else:
        text = journal.read_bytes()
        journal.write_bytes(text[:10] if harm == "short journal" else b"x" + text[1:])
    whole = incoming(stem)
    assert whole.received == 0
    send(whole, ((0, 10),))
    whole.verify()


def test_another_content_at_the_same_place_begins_anew(stem: Path) -> None:
    send(incoming(stem), ((0, 3),))
    assert incoming(stem, "11" * 32).received == 0


@pytest.mark.parametrize("piece_bytes", [64, 100, 256, 300, 1000, 5000])
def test_smaller_or_larger_pieces_keep_what_they_cover(stem: Path, piece_bytes: int) -> None:
    send(incoming(stem), ((0, 4), (5, 10)))
    whole = incoming(stem, piece_bytes=piece_bytes)
    missing = whole.want(0.0, 1000)
    starts = {index for first, stop in missing for index in range(first, stop)}
    touching_the_gap = {
        index
        for index in range(whole.pieces)
        if index * piece_bytes < 5 * PIECE and (index + 1) * piece_bytes > 4 * PIECE
    }
    assert starts == touching_the_gap
    again = incoming(stem, piece_bytes=piece_bytes)
    assert again.received == whole.received, "the journal was rewritten"
    send(again, missing)
    again.verify()


def test_a_whole_of_nothing_is_complete(tmp_path: Path) -> None:
    empty = hashlib.sha256(b"").hexdigest()
    whole = Incoming(tmp_path / "x", empty, 0, PIECE, Random(0))
    assert whole.complete
    whole.verify()


def test_a_full_disk_keeps_what_was_there_and_counts_no_more(small_disk: Path) -> None:
    size, piece, sha256 = 256 << 10, 4096, "22" * 32
    whole = Incoming(small_disk / "big", sha256, size, piece, Random(0))

    def fill() -> None:
        for index in range(whole.pieces):
            give(whole, index, bytes(piece))

    with pytest.raises(StateError, match="free some space there"):
        fill()
    arrived = whole.received
    assert 0 < arrived < whole.pieces
    again = Incoming(small_disk / "big", sha256, size, piece, Random(0))
    assert again.received == arrived


def test_sweeping_spares_what_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        send(incoming(tmp_path / name), ((0, 1),))
    sweep_parts(tmp_path, keep=[tmp_path / "b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.journal", "b.part"]

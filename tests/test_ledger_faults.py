"""A ledger survives kill -9, full and damaged disks, and foreign state directories."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.errors import StateError
from reference_server.ledger import Answer, Ledger
from tests.ledger_job import (
    BASE,
    JOB,
    NEXT,
    SPEC,
    adding,
    count,
    count_one,
    healthy,
    start,
    sums,
    upload,
)

ROOT = Path(__file__).parents[1]
SPOILERS = {
    "I2": "UPDATE partial SET devices = 2 WHERE block = 'one'",
    "I5": "UPDATE upload SET digest = '' WHERE device = 'd1'",
    "I6": "UPDATE version SET parent = 'x' WHERE v = 1",
    "I7": "UPDATE upload SET verdict = 'accepted' WHERE device = 'late'",
    "balance": "UPDATE version SET devices = 3 WHERE v = 1",
}


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with an open round, closed again."""
    with Ledger.open(tmp_path / "state") as opened:
        start(opened)
    return tmp_path / "state"


@pytest.fixture
def disk_bytes() -> int:
    return 1 << 20


def test_a_state_directory_of_another_job_is_refused_by_both_names(state: Path) -> None:
    with Ledger.open(state) as ledger, pytest.raises(StateError) as caught:
        ledger.open_job("cameras", SPEC, {})
    assert "belongs to job 'job', not to 'cameras'" in str(caught.value)


def test_a_second_server_is_refused_and_an_audit_is_not(state: Path) -> None:
    with Ledger.open(state):
        with pytest.raises(StateError, match=f"is in use by process {os.getpid()}"):
            Ledger.open(state)
        with Ledger.open(state, exclusive=False) as reader:
            assert healthy(reader)
    Ledger.open(state).close()


def test_the_files_are_private_and_the_disk_is_waited_for(state: Path) -> None:
    (state / "ledger.sqlite").chmod(0o644)
    with Ledger.open(state) as ledger:
        count(ledger, "d1")
        modes = {path.name: path.stat().st_mode & 0o777 for path in state.iterdir()}
        with ledger._db.write() as db:
            pragmas = ("journal_mode", "synchronous", "foreign_keys", "trusted_schema")
            values = [db.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas]
    assert set(modes) == {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "lock"}
    assert set(modes.values()) == {0o600}
    assert values == ["wal", 2, 1, 0]  # synchronous 2 is FULL


@pytest.mark.parametrize("content", [b"not a database at all", b"x", b"SQLite format 3\0" * 400])
def test_a_garbage_file_is_refused(state: Path, content: bytes) -> None:
    for path in state.glob("ledger.sqlite*"):
        path.unlink()
    (state / "ledger.sqlite").write_bytes(content)
    with pytest.raises(StateError, match=r"ledger\.sqlite"):
        Ledger.open(state)
    assert (state / "ledger.sqlite").read_bytes() == content


def test_a_damaged_page_is_refused(state: Path) -> None:
    with Ledger.open(state) as ledger:
        for number in range(40):
            count(ledger, f"d{number}")
    path = state / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StateError, match=r"(is damaged|malformed).*restore a copy of it"):
        Ledger.open(state)


def test_a_damaged_sum_is_never_merged(state: Path) -> None:
    with Ledger.open(state) as ledger:
        count(ledger, "d1")
    with sqlite3.connect(state / "ledger.sqlite") as raw:
        raw.execute("UPDATE partial SET num = zeroblob(16) WHERE block = 'two'")
    raw.close()
    with Ledger.open(state) as ledger:
        found = ledger.partials(JOB, 1)
        assert next(found).block == "one"
        with pytest.raises(StateError, match="sum of block 'two' in round 1 was damaged"):
            next(found)
        with pytest.raises(StateError, match="was damaged"):
            count(ledger, "d2")
        assert ledger.verdict_of(JOB, 1, "d2") is None
        ledger.abandon(JOB, 1)
        assert healthy(ledger)


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "ledger.sqlite") as raw:
        raw.execute("CREATE TABLE bookmark (url TEXT)")
    raw.close()
    with pytest.raises(StateError, match="another program \\(it has table 'bookmark'\\)"):
        Ledger.open(tmp_path)


def test_a_newer_schema_is_refused(state: Path) -> None:
    with sqlite3.connect(state / "ledger.sqlite") as raw:
        raw.execute("UPDATE ledger_schema SET version = 2")
    raw.close()
    with pytest.raises(StateError, match=r"has schema 2, this server knows 1: .* newer version"):
        Ledger.open(state)


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "nonsense://", "://"])
def test_a_database_we_cannot_use_is_named(url: str) -> None:
    with pytest.raises(StateError):
        Ledger.open(url)


def test_an_sqlite_file_can_be_named_by_url(tmp_path: Path) -> None:
    with Ledger.open(f"sqlite:///{tmp_path}/state/my.db") as ledger:
        start(ledger)
    assert (tmp_path / "state" / "my.db").exists()


def test_a_full_disk_refuses_updates_and_loses_none(small_disk: Path) -> None:
    with Ledger.open(small_disk) as ledger:
        start(ledger)
        assert count(ledger, "d0").verdict == "accepted"
        big = adding("big", size_bytes=2_000_000)
        for device in ("d1", "d2"):
            with pytest.raises(StateError, match=r"ledger\.sqlite: .*; (free some|check its disk)"):
                count_one(ledger, upload(device), big)
            assert ledger.verdict_of(JOB, 1, device) is None
        subprocess.run(["mount", "-o", "remount,size=32m", str(small_disk)], check=True)
        assert count_one(ledger, upload("d1"), big).verdict == "accepted"
        assert ledger.verdict_of(JOB, 1, "d0") == Answer("accepted", repeated=True)
        assert healthy(ledger)


def test_a_read_only_disk_is_named(small_disk: Path) -> None:
    with Ledger.open(small_disk) as ledger:
        start(ledger)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StateError, match="make it writable for this user"):
        Ledger.open(small_disk, exclusive=False)


PRELUDE = """
import os, resource, signal, sys
from pathlib import Path
from tests.ledger_job import *
from reference_server.ledger import *
from edge_sdk.errors import *
state = sys.argv[1]
"""


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)


def test_a_file_size_limit_refuses_updates_and_loses_none(state: Path) -> None:
    script = """
ledger = Ledger.open(state)
count(ledger, "d0")
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try: count_one(ledger, upload("d1"), adding("big", size_bytes=2_000_000))
except StateError as error: print(error)
"""
    done = run(script, state)
    assert "ledger.sqlite" in done.stdout, done.stderr
    with Ledger.open(state) as ledger:
        assert ledger.verdict_of(JOB, 1, "d1") is None
        assert count(ledger, "d0").repeated
        assert healthy(ledger)


@pytest.mark.parametrize("point", ["entered", "loaded", "one saved", "all saved", "committed"])
def test_a_worker_killed_anywhere_counted_all_or_nothing(state: Path, point: str) -> None:
    script = """
def die(here):
    if here == sys.argv[2]: os.kill(os.getpid(), signal.SIGKILL)
def fold(load, save):
    die("entered")
    known = load("one"); die("loaded")
    save("one", bytes([20]) + bytes(7) + bytes([2]) + bytes(7), 20, 2); die("one saved")
    save("two", bytes([20]) + bytes(7) + bytes([2]) + bytes(7), 20, 2); die("all saved")
ledger = Ledger.open(state)
count(ledger, "d1")
count_one(ledger, upload("d2"), fold); die("committed")
"""
    done = run(script, state, point)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Ledger.open(state) as ledger:
        stored = ledger.verdict_of(JOB, 1, "d2")
        assert stored == (Answer("accepted", repeated=True) if point == "committed" else None)
        assert healthy(ledger)
        assert count(ledger, "d2").repeated == (point == "committed")
        assert sums(ledger) == {"one": (20, 2), "two": (20, 2)}
        assert healthy(ledger)


def test_a_worker_killed_at_random_moments_loses_no_acknowledged_update(state: Path) -> None:
    script = """
ledger = Ledger.open(state)
for number in range(100_000):
    count(ledger, f"{sys.argv[2]}-{number}"); print(number, flush=True)
"""
    acknowledged: list[str] = []
    for turn in range(3):
        command = [sys.executable, "-c", PRELUDE + script, str(state), str(turn)]
        worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        for _ in range(5 + 7 * turn):
            acknowledged.append(f"{turn}-{worker.stdout.readline().strip()}")
        worker.kill()
        rest, _ = worker.communicate()
        whole = rest[: rest.rfind("\n") + 1]
        acknowledged += [f"{turn}-{line}" for line in whole.splitlines()]
    with Ledger.open(state) as ledger:
        answers = ledger.answers(JOB, 1)
        assert set(acknowledged) <= answers.verdicts.keys()
        assert sums(ledger)["one"] == (10 * len(answers.verdicts), len(answers.verdicts))
        checks = ledger.audit(JOB, [(1, name) for name in acknowledged])
        assert all(check.ok for check in checks)


def test_two_processes_that_get_every_update_count_each_once(state: Path) -> None:
    script = """
with Ledger.open(state, slot=int(sys.argv[2]), exclusive=False) as ledger:
    print("ready", flush=True); sys.stdin.readline()
    for number in range(40): count(ledger, f"d{number}")
"""
    commands = [[sys.executable, "-c", PRELUDE + script, str(state), str(slot)] for slot in (0, 1)]
    workers = [
        subprocess.Popen(c, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for c in commands
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.communicate("go\n")
        assert worker.returncode == 0
    with Ledger.open(state) as ledger:
        assert sums(ledger) == {"one": (400, 40), "two": (400, 40)}
        assert healthy(ledger)


@pytest.mark.parametrize("name", SPOILERS)
def test_the_audit_notices_cooked_books(state: Path, name: str) -> None:
    with Ledger.open(state) as ledger:
        count(ledger, "d1")
        ledger.close_round(JOB, 1)
        count(ledger, "late")
        ledger.publish(JOB, 1, version=1, sha=NEXT, parent=BASE)
        assert healthy(ledger)
    with sqlite3.connect(state / "ledger.sqlite") as raw:
        raw.execute(SPOILERS[name])
    raw.close()
    with Ledger.open(state) as ledger:
        wrong = [check for check in ledger.audit(JOB) if not check.ok]
        assert any(check.name.startswith(name) and check.detail for check in wrong)

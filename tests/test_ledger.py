"""Every update is counted exactly once, in SQLite and PostgreSQL, whatever repeats or races."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from glob import glob
from pathlib import Path

import pytest

from edge_sdk.errors import ProtocolMisuse, StateError, WrongUpdate
from reference_server.ledger import Answer, Ledger, LoadSum, SaveSum
from reference_server.rounds import Phase
from tests.ledger_job import (
    BASE,
    JOB,
    NEXT,
    SPEC,
    adding,
    count,
    count_one,
    healthy,
    publish,
    start,
    sums,
    upload,
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[], str]]:
    """A real PostgreSQL server; each call makes a database and returns its URL."""
    psycopg = pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    initdb = max(glob("/usr/lib/postgresql/*/bin/initdb"), default=shutil.which("initdb"))
    if initdb is None:
        pytest.skip("no PostgreSQL server is installed")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    # Not in pytest's directory, which is closed to other users.
    with tempfile.TemporaryDirectory(prefix="edge-postgresql-") as home:
        if user is not None:
            shutil.chown(home, user)
        data, port = f"{home}/data", free_port()
        make = [initdb, "-D", data, "-A", "trust", "-U", "edge", "--no-sync"]
        subprocess.run(make, check=True, capture_output=True, user=user, cwd=home)
        serve = [str(Path(initdb).parent / "postgres"), "-D", data, "-p", str(port), "-k", home]
        with open(f"{home}/log", "wb") as log:
            server = subprocess.Popen(serve, user=user, cwd=home, stderr=log)
        address = f"edge@127.0.0.1:{port}"
        names = iter(range(1000))

        def database(deadline_s: float = 0.0) -> str:
            name = f"edge{next(names)}"
            while True:
                try:
                    with psycopg.connect(f"postgresql://{address}/postgres", autocommit=True) as db:
                        db.execute(f"CREATE DATABASE {name}")
                    return f"postgresql+psycopg://{address}/{name}"
                except psycopg.OperationalError:
                    if time.monotonic() > deadline_s or server.poll() is not None:
                        raise
                    time.sleep(0.02)

        try:
            database(time.monotonic() + 20)
            yield database
        finally:
            server.send_signal(signal.SIGQUIT)  # its "immediate" mode: no farewell, nothing left
            server.wait()


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A state directory, or the URL of an empty PostgreSQL database."""
    if request.param == "sqlite":
        return str(tmp_path / "state")
    database: Callable[[], str] = request.getfixturevalue("postgresql")
    return database()


@pytest.fixture
def ledger(where: str) -> Iterator[Ledger]:
    with Ledger.open(where) as opened:
        start(opened)
        yield opened


def test_an_update_is_counted_once_however_often_it_arrives(ledger: Ledger) -> None:
    assert count(ledger, "d1") == Answer("accepted")
    assert count(ledger, "d2", "one") == Answer("accepted")
    assert count(ledger, "d1") == Answer("accepted", repeated=True)
    assert sums(ledger) == {"one": (20, 2), "two": (10, 1)}
    assert ledger.verdict_of(JOB, 1, "d1") == Answer("accepted", repeated=True)
    assert ledger.verdict_of(JOB, 1, "d9") is None
    assert healthy(ledger)


def test_a_device_that_trained_twice_counts_once_and_is_noticed(ledger: Ledger) -> None:
    count(ledger, "d1")
    again = count_one(ledger, upload("d1", digest="another"), adding("one"))
    assert again == Answer("accepted", repeated=True, conflict=True)
    assert sums(ledger)["one"] == (10, 1)
    assert ledger.history(JOB)[0].conflicts == 1


def test_an_update_on_another_base_is_stale_and_stays_so(ledger: Ledger) -> None:
    answer = count_one(ledger, upload("d1", base=NEXT), adding("one"))
    assert answer == Answer("stale", "trained on bbbbbbbbbbbb, the round's base is aaaaaaaaaaaa")
    assert count(ledger, "d1").verdict == "stale"
    assert sums(ledger) == {}


def test_an_update_after_closing_is_late_and_not_counted(ledger: Ledger) -> None:
    count(ledger, "d1")
    ledger.close_round(JOB, 1)
    assert count(ledger, "d2") == Answer("late", "round 1 is closing")
    assert count(ledger, "d1") == Answer("accepted", repeated=True)
    ledger.publish(JOB, 1, version=1, sha=NEXT, parent=BASE)
    assert count(ledger, "d3") == Answer("late", "round 1 is published")
    assert sums(ledger) == {"one": (10, 1), "two": (10, 1)}
    assert healthy(ledger)


def test_an_update_for_a_round_that_is_not_open_yet_decides_nothing(ledger: Ledger) -> None:
    publish(ledger, 1, 1, NEXT, BASE)
    ledger.plan_round(JOB, base_version=1, base_sha=NEXT)
    early = upload("d1", round_number=2, base=NEXT)
    assert count_one(ledger, early, adding("one")) == Answer("late", "round 2 is not open")
    assert ledger.record_verdict(JOB, early, "rejected", "bad").verdict == "rejected"
    assert ledger.verdict_of(JOB, 2, "d1") is None
    ledger.open_round(JOB, 2, 60.0)
    assert count_one(ledger, early, adding("one")).verdict == "accepted"
    unknown = upload("d1", round_number=77)
    assert count_one(ledger, unknown, adding("one")).verdict == "late"


def test_a_rejected_update_stays_rejected(ledger: Ledger) -> None:
    answer = ledger.record_verdict(JOB, upload("d1"), "rejected", "NaN in block 'one'")
    assert answer == Answer("rejected", "NaN in block 'one'")
    assert count(ledger, "d1") == Answer("rejected", "NaN in block 'one'", repeated=True)
    assert count(ledger, "d2").verdict == "accepted"
    assert ledger.record_verdict(JOB, upload("d2"), "rejected", "x").verdict == "accepted"
    with pytest.raises(ProtocolMisuse, match="only count_updates accepts"):
        ledger.record_verdict(JOB, upload("d3"), "accepted", "")


def test_what_a_fold_raises_undoes_everything(ledger: Ledger) -> None:
    def broken(_load: LoadSum, save: SaveSum) -> None:
        save("one", bytes(16), 1, 1)
        raise WrongUpdate("block 'two' does not decode")

    with pytest.raises(WrongUpdate, match="does not decode"):
        count_one(ledger, upload("d1"), broken)
    assert ledger.verdict_of(JOB, 1, "d1") is None
    assert sums(ledger) == {}
    assert count(ledger, "d1").verdict == "accepted"


def test_a_batch_is_judged_one_by_one_and_folded_together(ledger: Ledger) -> None:
    count(ledger, "d1")
    folded: list[int] = []

    def fold(load: LoadSum, save: SaveSum, numbers: Sequence[int]) -> list[list[str]]:
        folded.extend(numbers)
        known = load("one")
        assert known is not None
        total = int.from_bytes(known[:8], "little") + 10 * len(numbers)
        devices = int.from_bytes(known[8:], "little") + len(numbers)
        save("one", total.to_bytes(8, "little") + devices.to_bytes(8, "little"), total, devices)
        return [["one"] for _ in numbers]

    batch = [upload("d2"), upload("d1"), upload("d3", base=NEXT), upload("d4"), upload("d2")]
    answers = ledger.count_updates(JOB, batch, fold)
    verdicts = [(answer.verdict, answer.repeated) for answer in answers]
    assert verdicts == [
        ("accepted", False), ("accepted", True), ("stale", False), ("accepted", False),
        ("accepted", True),
    ]  # fmt: skip
    assert folded == [0, 3]
    assert sums(ledger)["one"] == (30, 3)
    assert healthy(ledger)


@pytest.mark.parametrize("blocks", [(), ("one", "one")])
def test_a_fold_touches_each_of_its_blocks_once(ledger: Ledger, blocks: tuple[str, ...]) -> None:
    def fold(_load: LoadSum, save: SaveSum) -> None:
        for block in blocks:
            save(block, bytes(16), 1, 1)

    with pytest.raises(ProtocolMisuse, match="folded once into each of its blocks"):
        count_one(ledger, upload("d1"), fold)
    assert ledger.verdict_of(JOB, 1, "d1") is None


def test_workers_keep_separate_sums(ledger: Ledger, where: str) -> None:
    with Ledger.open(where, slot=1, exclusive=False) as second:
        count(ledger, "d1")
        count(second, "d2", "one")
        assert count(second, "d1") == Answer("accepted", repeated=True)
        places = [(p.block, p.slot, p.devices) for p in second.partials(JOB, 1)]
    assert places == [("one", 0, 1), ("one", 1, 1), ("two", 0, 1)]
    assert healthy(ledger)


def test_the_life_of_a_job(ledger: Ledger) -> None:
    ledger.record_offers(JOB, 1, ["d1", "d2", "d3"])
    ledger.record_offers(JOB, 1, ["d3", "d4"])
    ledger.record_offers(JOB, 1, [])
    assert ledger.record_decline(JOB, 1, "d3", "battery")
    assert not ledger.record_decline(JOB, 1, "d9", "never asked")
    count(ledger, "d1")
    answers = ledger.answers(JOB, 1)
    assert answers.offered == {"d1", "d2", "d3", "d4"}
    assert answers.declined == {"d3": "battery"}
    assert answers.verdicts == {"d1": "accepted"}
    ledger.close_round(JOB, 1)
    first = ledger.publish(JOB, 1, version=1, sha=NEXT, parent=BASE)
    assert (first.samples, first.devices, first.parent) == (10, 1, BASE)
    assert ledger.latest_version(JOB) == first
    assert ledger.archive(JOB) == []
    assert sums(ledger) == {"one": (10, 1), "two": (10, 1)}
    ledger.plan_round(JOB, base_version=1, base_sha=NEXT, settings={"stage": 2})
    ledger.open_round(JOB, 2, 60.0)
    count_one(ledger, upload("d1", round_number=2, base=NEXT), adding("one", weight=10))
    publish(ledger, 2, 2, "c" * 64, NEXT)
    assert ledger.archive(JOB) == [1]
    assert ledger.archive(JOB) == []
    assert sums(ledger, 1) == {}
    assert sums(ledger, 2) == {"one": (10, 1)}
    assert [row.phase for row in ledger.history(JOB)] == [Phase.ARCHIVED, Phase.PUBLISHED]
    assert [row.version for row in ledger.history(JOB)] == [1, 2]
    assert [row.version for row in ledger.versions(JOB)] == [0, 1, 2]
    assert healthy(ledger)


def test_an_abandoned_round_voids_its_updates_visibly(ledger: Ledger) -> None:
    count(ledger, "d1")
    ledger.record_verdict(JOB, upload("d2"), "rejected", "NaN")
    assert ledger.abandon(JOB, 1).phase is Phase.ABANDONED
    assert ledger.verdict_of(JOB, 1, "d1") == Answer("accepted", repeated=True, voided=True)
    assert count(ledger, "d3") == Answer("late", "round 1 is abandoned")
    summary = ledger.history(JOB)[0]
    assert (summary.voided, summary.version) == (1, None)
    assert summary.verdicts == {"accepted": 1, "rejected": 1, "late": 1}
    assert sums(ledger) == {}
    again = ledger.plan_round(JOB, base_version=0, base_sha=BASE)
    assert (again.round, again.phase) == (2, Phase.PLANNED)
    assert healthy(ledger)


def test_a_round_whose_sums_cannot_be_merged_can_be_abandoned(ledger: Ledger) -> None:
    count(ledger, "d1")
    ledger.close_round(JOB, 1)
    ledger.abandon(JOB, 1)
    assert healthy(ledger)


def test_illegal_moves_are_our_own_bug(ledger: Ledger) -> None:
    with pytest.raises(ProtocolMisuse, match="OPEN cannot be OPENED"):
        ledger.open_round(JOB, 1, 60.0)
    with pytest.raises(ProtocolMisuse, match="OPEN cannot be PUBLISHED"):
        ledger.publish(JOB, 1, version=1, sha=NEXT, parent=BASE)
    with pytest.raises(ProtocolMisuse, match="round 1 of job 'job' is OPEN"):
        ledger.plan_round(JOB, base_version=0, base_sha=BASE)
    with pytest.raises(ProtocolMisuse, match="has no round 9"):
        ledger.close_round(JOB, 9)


def test_publishing_again_after_an_unknown_outcome_changes_nothing(ledger: Ledger) -> None:
    count(ledger, "d1")
    ledger.close_round(JOB, 1)
    first = ledger.publish(JOB, 1, version=1, sha=NEXT, parent=BASE)
    assert ledger.publish(JOB, 1, version=1, sha=NEXT, parent=BASE) == first
    with pytest.raises(ProtocolMisuse, match="PUBLISHED cannot be PUBLISHED"):
        ledger.publish(JOB, 1, version=1, sha="c" * 64, parent=BASE)


def test_versions_neither_fork_nor_leave_a_gap(ledger: Ledger) -> None:
    ledger.close_round(JOB, 1)
    with pytest.raises(StateError, match="cannot enter version 2 of round 1, the ledger is at"):
        ledger.publish(JOB, 1, version=2, sha=NEXT, parent=BASE)
    with pytest.raises(StateError, match="another server works on this job"):
        ledger.publish(JOB, 1, version=1, sha=NEXT, parent="f" * 64)
    ledger.publish(JOB, 1, version=1, sha=NEXT, parent=BASE)
    with pytest.raises(StateError, match="cannot enter a round on version 0"):
        ledger.plan_round(JOB, base_version=0, base_sha=BASE)


def test_a_restart_finds_the_round_and_the_time_it_had_left(where: str) -> None:
    with Ledger.open(where) as first:
        assert first.current_round(JOB) is None
        assert first.latest_version(JOB) is None
        start(first, remaining_s=60.0)
        first.extend_round(JOB, 1, 30.0)
        first.keep_time(JOB, 1, 12.5)
        count(first, "d1")
    with Ledger.open(where) as second:
        assert second.open_job(JOB, SPEC, {"strategy": "other"}) == {"strategy": "full"}
        assert second.record_base(JOB, BASE).version == 0
        row = second.current_round(JOB)
        assert row is not None
        assert (row.round, row.phase, row.remaining_s) == (1, Phase.OPEN, 12.5)
        assert (row.extensions, row.base_version, row.base_sha) == (1, 0, BASE)
        assert row.opened_wall_s is not None
        assert count(second, "d1").repeated
        assert count(second, "d2") == Answer("accepted")
        assert sums(second)["one"] == (20, 2)


def test_another_model_under_the_same_job_is_refused(ledger: Ledger) -> None:
    with pytest.raises(StateError, match="was started with model 555555555555, the task now"):
        ledger.open_job(JOB, "6" * 64, {})
    with pytest.raises(StateError, match="began with model aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        ledger.record_base(JOB, NEXT)


def test_a_postgresql_that_does_not_answer_is_named() -> None:
    pytest.importorskip("psycopg", reason="the PostgreSQL driver psycopg is not installed")
    with pytest.raises(StateError, match="check the database and its address"):
        Ledger.open(f"postgresql+psycopg://edge@127.0.0.1:{free_port()}/edge")


def test_a_paused_worker_and_its_replacement_share_a_slot_without_loss(
    ledger: Ledger, where: str
) -> None:
    with Ledger.open(where, slot=0, exclusive=False) as twin:

        def work(worker: Ledger, name: str) -> None:
            for number in range(20):
                count(worker, f"{name}-{number}")

        pairs = ((ledger, "a"), (twin, "b"))
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sums(ledger) == {"one": (400, 40), "two": (400, 40)}


def test_closing_while_threads_count_leaves_no_accepted_update_out(
    ledger: Ledger, where: str
) -> None:
    seen: list[tuple[str, str]] = []
    some = threading.Event()

    def work(worker: Ledger, name: str) -> None:
        for number in range(1000):
            answer = count(worker, f"{name}-{number}")
            seen.append((f"{name}-{number}", answer.verdict))
            if len(seen) >= 30:
                some.set()
            if answer.verdict == "late":
                return

    with Ledger.open(where, slot=1, exclusive=False) as second:
        pairs = ((ledger, "a"), (ledger, "b"), (second, "c"), (second, "d"))
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        assert some.wait(30)
        counted = ledger.close_round(JOB, 1).counted
        final = sums(ledger)
        for thread in threads:
            thread.join(30)
    accepted = [device for device, verdict in seen if verdict == "accepted"]
    assert final == sums(ledger) == {block: (10 * len(accepted), len(accepted)) for block in final}
    assert counted == len(accepted)
    checks = ledger.audit(JOB, [(1, device) for device in accepted])
    assert [check for check in checks if not check.ok] == []


def test_the_audit_notices_a_receipt_without_a_row(ledger: Ledger) -> None:
    count(ledger, "d1")
    assert all(check.ok for check in ledger.audit(JOB, [(1, "d1")]))
    wrong = [check for check in ledger.audit(JOB, [(1, "d1"), (1, "ghost")]) if not check.ok]
    assert [check.detail for check in wrong] == ["ghost was told accepted in round 1, no row"]

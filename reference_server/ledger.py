"""The server's accounts: what was counted, once, and what became of it.

One transaction looks an update's key up, checks its round, inserts its row and folds its sums, so
an update is counted wholly or not at all, however often it arrives and whenever the server dies.
The receipt is sent after it, the acknowledgement to the broker last.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from edge_sdk.errors import ProtocolMisuse, StateError
from edge_sdk.wire import Verdict
from reference_server import accounts, reports
from reference_server.accounts import (
    Answer,
    Answers,
    Check,
    Partial,
    RoundRow,
    RoundSummary,
    StoredUpload,
    Upload,
    VersionRow,
)
from reference_server.database import (
    Database,
    job_table,
    offer_table,
    partial_table,
    round_table,
    upload_table,
    version_table,
)
from reference_server.reports import decoded, round_row, version_row
from reference_server.rounds import Event, Phase, transition

__all__ = [
    "Answer",
    "Answers",
    "Check",
    "Fold",
    "Ledger",
    "LoadSum",
    "Partial",
    "RoundRow",
    "RoundSummary",
    "SaveSum",
    "StoredUpload",
    "Upload",
    "VersionRow",
]

LoadSum = Callable[[str], bytes | None]
SaveSum = Callable[[str, bytes, int, int], None]
Fold = Callable[[LoadSum, SaveSum, Sequence[int]], Sequence[Sequence[str]]]


class Ledger:
    """The accounts of one state directory, or of one database that several workers share.

    Methods are safe from any thread. ``slot`` numbers this worker: workers never write each
    other's sums.
    """

    def __init__(self, database: Database, slot: int = 0) -> None:
        self._db, self._slot = database, slot
        self._one_writer = threading.Lock()

    @classmethod
    def open(cls, where: str | Path, *, slot: int = 0, exclusive: bool = True) -> Ledger:
        """The ledger in a state directory, or at a database URL; created when there is none.

        exclusive: refuse a directory that another process has open, and check the file; further
        worker processes, and readers such as an audit, pass False. StateError says what to do.
        """
        return cls(Database.open(where, exclusive=exclusive), slot)

    def close(self) -> None:
        """Close the database and let another process have the directory."""
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open_job(self, job: str, digest: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Start or continue a job and return the settings it was started with.

        StateError when the state directory holds another job, or this one with another model.
        """
        with self._db.write() as db:
            others = db.execute(sa.select(job_table.c.id).where(job_table.c.id != job)).all()
            if others and not self._db.is_postgresql:
                raise StateError(
                    f"{self._db.where} belongs to job {others[0].id!r}, not to {job!r}: choose "
                    f"another state directory, or continue job {others[0].id!r}"
                )
            known = db.execute(sa.select(job_table).where(job_table.c.id == job)).first()
            if known is None:
                text = msgspec.json.encode(settings).decode()
                row = {"id": job, "digest": digest, "settings": text, "created_s": time.time()}
                db.execute(sa.insert(job_table).values(row))
                return decoded(text)
            if known.digest != digest:
                raise StateError(
                    f"{self._db.where}: job {job!r} was started with model {known.digest[:12]}, "
                    f"the task now builds {digest[:12]}: restore the task, or start a new job in "
                    "another state directory"
                )
            return decoded(known.settings)

    def record_base(self, job: str, sha: str) -> VersionRow:
        """Enter version 0, the initial model; StateError when the job began with another one."""
        with self._db.write() as db:
            known = _version(db, job, 0)
            if known is None:
                return _add_version(db, job, version=0, round_number=0, sha=sha, parent="")
            if known.sha != sha:
                raise StateError(
                    f"{self._db.where}: job {job!r} began with model {known.sha[:12]}, "
                    f"not {sha[:12]}: continue with its own files, or start a new job"
                )
            return known

    def latest_version(self, job: str) -> VersionRow | None:
        """The highest published version, version 0 included."""
        with self._db.read() as db:
            return _version(db, job)

    def versions(self, job: str) -> list[VersionRow]:
        """All published versions, ascending."""
        with self._db.read() as db:
            return reports.versions(db, job)

    def plan_round(
        self,
        job: str,
        *,
        base_version: int,
        base_sha: str,
        settings: Mapping[str, Any] | None = None,
    ) -> RoundRow:
        """Enter the next round, PLANNED, on the latest version; one round is live at a time."""
        with self._db.write() as db:
            base, last = _version(db, job), _last_round(db, job)
            if base is None or (base.version, base.sha) != (base_version, base_sha):
                raise self._overtaken(f"a round on version {base_version}", base)
            if last is not None and last.live:
                raise ProtocolMisuse(f"round {last.round} of job {job!r} is {last.phase.name}")
            row = {
                "job": job,
                "id": 1 if last is None else last.round + 1,
                "base_version": base_version,
                "base_sha": base_sha,
                "state": Phase.PLANNED.name,
                "settings": msgspec.json.encode(settings or {}).decode(),
                "remaining_s": 0.0,
                "extensions": 0,
            }
            db.execute(sa.insert(round_table).values(row))
            return cast(RoundRow, _last_round(db, job))

    def open_round(self, job: str, round_number: int, remaining_s: float) -> RoundRow:
        """PLANNED to OPEN: from now on updates are counted, for ``remaining_s`` at first."""
        values = {"opened_wall_s": time.time(), "remaining_s": remaining_s}
        return self._move(job, round_number, Event.OPENED, lambda _: values)

    def extend_round(self, job: str, round_number: int, remaining_s: float) -> RoundRow:
        """Give an OPEN round one more extension."""
        values = {"remaining_s": remaining_s, "extensions": round_table.c.extensions + 1}
        return self._move(job, round_number, Event.EXTENDED, lambda _: values)

    def keep_time(self, job: str, round_number: int, remaining_s: float) -> None:
        """Store how much time an open round has left, for the case of a restart."""
        with self._db.write() as db:
            statement = sa.update(round_table).where(_is_round(job, round_number))
            db.execute(statement.values(remaining_s=remaining_s))

    def current_round(self, job: str) -> RoundRow | None:
        """The round that was planned last, whatever became of it."""
        with self._db.read() as db:
            return _last_round(db, job)

    def record_offers(self, job: str, round_number: int, devices: Iterable[str]) -> None:
        """Note who was offered a round; again is allowed."""
        rows = [{"job": job, "round": round_number, "device": device} for device in devices]
        if rows:
            with self._db.write() as db:
                db.execute(self._db.insert(offer_table).on_conflict_do_nothing(), rows)

    def record_decline(self, job: str, round_number: int, device: str, reason: str) -> bool:
        """Note that a device sits a round out; False when it was not offered."""
        mine = _of_round(offer_table, job, round_number) & (offer_table.c.device == device)
        with self._db.write() as db:
            result = db.execute(sa.update(offer_table).where(mine).values(declined=reason))
            return result.rowcount > 0

    def answers(self, job: str, round_number: int) -> Answers:
        """Who was offered a round, who declined, who has which verdict."""
        offered = sa.select(offer_table).where(_of_round(offer_table, job, round_number))
        verdicts = sa.select(upload_table.c.device, upload_table.c.verdict)
        with self._db.read() as db:
            offers = db.execute(offered).all()
            uploads = db.execute(verdicts.where(_of_round(upload_table, job, round_number))).all()
        return Answers(
            offered={row.device for row in offers},
            declined={row.device: row.declined for row in offers if row.declined is not None},
            verdicts={row.device: row.verdict for row in uploads},
        )

    def count_updates(self, job: str, uploads: Sequence[Upload], fold: Fold) -> list[Answer]:
        """Count each of some updates exactly once: the verdicts that stand from now on.

        ``fold(load, save, numbers)`` adds those uploads to the sums, ``save(block, sum, samples,
        devices)`` once for each block after ``load(block)`` (None: no sum yet), and returns each
        one's blocks; it may be run again when the outcome of a commit is unknown, and what it
        raises undoes everything.
        """
        # Two deliveries in one process would otherwise meet in the database's busy handler.
        with self._one_writer:
            return self._db.repeated(lambda: self._count(job, uploads, fold))

    def record_verdict(self, job: str, upload: Upload, verdict: Verdict, reason: str) -> Answer:
        """Store a verdict that counts nothing, such as rejected; an earlier one stands."""
        if verdict == "accepted":
            raise ProtocolMisuse("only count_updates accepts an update: it has to be folded")
        with self._db.write() as db:
            stored = _stored(db, job, upload)
            if stored is not None:
                return stored
            answer = Answer(verdict, reason)
            row = _find_round(db, job, upload.round)
            if row is None or row.phase is Phase.PLANNED:
                return answer
            return self._entered(db, job, upload, answer)[0]

    def verdict_of(self, job: str, round_number: int, device: str) -> Answer | None:
        """The stored verdict on a device's update of a round, if there is one."""
        query = sa.select(upload_table).where(_is_upload(job, round_number, device))
        with self._db.read() as db:
            row = db.execute(query).first()
        return None if row is None else _answer(row)

    def uploads(self, job: str, round_number: int) -> list[StoredUpload]:
        """Every judged update of a round, by device, with what its device measured."""
        mine = _of_round(upload_table, job, round_number)
        with self._db.read() as db:
            rows = db.execute(sa.select(upload_table).where(mine)).all()
        return sorted((reports.stored_upload(row) for row in rows), key=lambda u: u.device)

    def jobs(self) -> list[str]:
        """The jobs this ledger holds."""
        with self._db.read() as db:
            return [row.id for row in db.execute(sa.select(job_table.c.id).order_by("id"))]

    def partials(self, job: str, round_number: int, block: str | None = None) -> Iterator[Partial]:
        """The sums of a round ordered by block and slot, one in memory at a time.

        ``block``: only its. StateError when one was damaged on the disk.
        """
        mine = _of_round(partial_table, job, round_number)
        if block is not None:
            mine &= partial_table.c.block == block
        query = sa.select(partial_table.c.block, partial_table.c.slot).where(mine)
        with self._db.read() as db:
            keys = sorted((row.block, row.slot) for row in db.execute(query))
        for name, slot in keys:
            with self._db.read() as db:
                partial = self._sum(db, job, round_number, name, slot)
            if partial is None:
                raise ProtocolMisuse(f"the sums of round {round_number} were erased while read")
            yield partial

    def close_round(self, job: str, round_number: int) -> RoundRow:
        """OPEN to CLOSING: from now on nothing is counted."""
        return self._move(
            job,
            round_number,
            Event.CLOSED,
            lambda db: {"counted": _accepted(db, job, round_number).devices},
        )

    def publish(
        self, job: str, round_number: int, *, version: int, sha: str, parent: str
    ) -> VersionRow:
        """CLOSING to PUBLISHED together with the version's row; repeating it changes nothing."""
        wanted = (version, round_number, sha, parent)
        return self._db.repeated(lambda: self._publish(job, wanted))

    def abandon(self, job: str, round_number: int) -> RoundRow:
        """End a round without a version: its updates are voided, its sums erased."""

        def void(db: Connection) -> dict[str, Any]:
            mine = _of_round(upload_table, job, round_number)
            accepted = mine & (upload_table.c.verdict == "accepted")
            db.execute(sa.update(upload_table).where(accepted).values(voided=True))
            _erase_sums(db, job, round_number)
            return {}

        return self._move(job, round_number, Event.ABANDONED, void)

    def archive(self, job: str) -> list[int]:
        """Erase the sums of published rounds that a later version has superseded; their numbers."""
        published = round_table.c.state == Phase.PUBLISHED.name
        query = sa.select(round_table).where(round_table.c.job == job, published)
        with self._db.write() as db:
            latest = _version(db, job)
            rows = [round_row(row) for row in db.execute(query.order_by(round_table.c.id))]
            old = [r for r in rows if latest is not None and r.base_version + 1 < latest.version]
            for row in old:
                _step(db, job, row, Event.SUPERSEDED, {})
                _erase_sums(db, job, row.round)
            return [row.round for row in old]

    def history(self, job: str) -> list[RoundSummary]:
        """Every round in order, with what became of it."""
        with self._db.read() as db:
            return reports.history(db, job)

    def audit(self, job: str, receipts: Iterable[tuple[int, str]] = ()) -> list[Check]:
        """Check the invariants of the accounts; ``receipts`` are (round, device) told accepted."""
        with self._db.read() as db:
            return reports.audit(db, job, receipts)

    def _count(self, job: str, uploads: Sequence[Upload], fold: Fold) -> list[Answer]:
        with self._db.write() as db:
            if self._db.is_postgresql:
                # A paused worker and the one that took its slot over must not interleave.
                key = zlib.crc32(f"{job} {self._slot}".encode())
                db.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
            answers, accepted = [], []
            for number, upload in enumerate(uploads):
                answer, is_new = self._judged(db, job, upload)
                answers.append(answer)
                if is_new and answer.verdict == "accepted":
                    accepted.append(number)
            if accepted:
                self._fold(db, job, uploads, accepted, fold)
            return answers

    def _judged(self, db: Connection, job: str, upload: Upload) -> tuple[Answer, bool]:
        """The verdict on an update, and whether it was entered now."""
        stored = _stored(db, job, upload)
        if stored is not None:
            return stored, False
        # FOR SHARE: who closes the round waits for us, or we see it closed. SQLite, which
        # has no such clause, has a single writer.
        answer, storable = accounts.judged(_find_round(db, job, upload.round, "share"), upload)
        return self._entered(db, job, upload, answer) if storable else (answer, False)

    def _entered(
        self, db: Connection, job: str, upload: Upload, answer: Answer
    ) -> tuple[Answer, bool]:
        """The answer that stands, and whether it is this one: another worker may be faster."""
        row = {
            "job": job,
            "round": upload.round,
            "device": upload.device,
            "verdict": answer.verdict,
            "reason": answer.reason,
            "digest": upload.digest,
            "samples": upload.samples,
            "size_bytes": upload.size_bytes,
            "metrics": msgspec.json.encode(upload.metrics).decode(),
            "blocks": "[]",
            "conflicts": 0,
            "voided": False,
            "created_s": time.time(),
        }
        insertion = self._db.insert(upload_table).values(row).on_conflict_do_nothing()
        if db.execute(insertion.returning(upload_table.c.device)).first() is not None:
            return answer, True
        return cast(Answer, _stored(db, job, upload)), False

    def _fold(
        self,
        db: Connection,
        job: str,
        uploads: Sequence[Upload],
        accepted: Sequence[int],
        fold: Fold,
    ) -> None:
        (number,) = {uploads[n].round for n in accepted}  # the one that is open
        saved: list[str] = []

        def load(block: str) -> bytes | None:
            partial = self._sum(db, job, number, block, self._slot)
            return None if partial is None else partial.num

        def save(block: str, num: bytes, samples: int, devices: int) -> None:
            values = {"num": num, "crc": zlib.crc32(num), "samples": samples, "devices": devices}
            key = {"job": job, "round": number, "block": block, "slot": self._slot}
            statement = self._db.insert(partial_table).values(**key, **values)
            db.execute(statement.on_conflict_do_update(index_elements=list(key), set_=values))
            saved.append(block)

        touched = fold(load, save, accepted)
        _check_folded(touched, saved, len(accepted))
        for place, blocks in zip(accepted, touched, strict=True):
            mine = _is_upload(job, number, uploads[place].device)
            text = msgspec.json.encode(list(blocks)).decode()
            db.execute(sa.update(upload_table).where(mine).values(blocks=text))

    def _sum(
        self, db: Connection, job: str, round_number: int, block: str, slot: int
    ) -> Partial | None:
        key = (partial_table.c.block == block) & (partial_table.c.slot == slot)
        mine = _of_round(partial_table, job, round_number) & key
        row = db.execute(sa.select(partial_table).where(mine)).first()
        if row is None:
            return None
        if zlib.crc32(row.num) != row.crc:
            raise StateError(
                f"{self._db.where}: the sum of block {block!r} in round {round_number} was damaged "
                "on the disk; check the disk, then abandon the round"
            )
        return Partial(block, slot, row.samples, row.devices, row.num)

    def _publish(self, job: str, wanted: tuple[int, int, str, str]) -> VersionRow:
        version, round_number, sha, parent = wanted
        with self._db.write() as db:
            row = _locked_round(db, job, round_number)
            latest = _version(db, job)
            if (
                latest is not None
                and row.phase is Phase.PUBLISHED
                and (latest.version, latest.round, latest.sha, latest.parent) == wanted
            ):
                return latest
            _step(db, job, row, Event.PUBLISHED, {})
            if latest is None or (latest.version, latest.sha) != (version - 1, parent):
                raise self._overtaken(f"version {version} of round {round_number}", latest)
            if (row.base_version, row.base_sha) != (latest.version, latest.sha):
                raise ProtocolMisuse(f"round {round_number} cannot become version {version}")
            return _add_version(
                db, job, version=version, round_number=round_number, sha=sha, parent=parent
            )

    def _move(
        self,
        job: str,
        round_number: int,
        event: Event,
        values: Callable[[Connection], Mapping[str, Any]],
    ) -> RoundRow:
        with self._db.write() as db:
            row = _locked_round(db, job, round_number)
            _step(db, job, row, event, values(db))
            return _locked_round(db, job, round_number)

    def _overtaken(self, what: str, latest: VersionRow | None) -> StateError:
        stands = "has no version"
        if latest is not None:
            stands = f"is at version {latest.version} ({latest.sha[:12]})"
        return StateError(
            f"{self._db.where}: cannot enter {what}, the ledger {stands}: another server works on "
            "this job, or files of another job were copied here"
        )


def _check_folded(touched: Sequence[Sequence[str]], saved: list[str], updates: int) -> None:
    """ProtocolMisuse unless each update went once into each of its blocks, all of them saved."""
    once = all(blocks and len(blocks) == len(set(blocks)) for blocks in touched)
    together = sorted({name for blocks in touched for name in blocks})
    if not once or len(touched) != updates or together != sorted(saved):
        raise ProtocolMisuse(
            f"an update is folded once into each of its blocks, each saved once; got {touched} and "
            f"saved {saved}"
        )


def _is_round(job: str, round_number: int) -> sa.ColumnElement[bool]:
    return (round_table.c.job == job) & (round_table.c.id == round_number)


def _of_round(table: sa.Table, job: str, round_number: int) -> sa.ColumnElement[bool]:
    return (table.c.job == job) & (table.c.round == round_number)


def _is_upload(job: str, round_number: int, device: str) -> sa.ColumnElement[bool]:
    return _of_round(upload_table, job, round_number) & (upload_table.c.device == device)


def _version(db: Connection, job: str, version: int | None = None) -> VersionRow | None:
    query = sa.select(version_table).where(version_table.c.job == job)
    if version is not None:
        query = query.where(version_table.c.v == version)
    row = db.execute(query.order_by(version_table.c.v.desc()).limit(1)).first()
    return None if row is None else version_row(row)


def _add_version(
    db: Connection, job: str, *, version: int, round_number: int, sha: str, parent: str
) -> VersionRow:
    total = _accepted(db, job, round_number)
    row = {
        "job": job,
        "v": version,
        "round": round_number,
        "sha": sha,
        "parent": parent,
        "samples": int(total.samples),
        "devices": total.devices,
        "created_s": time.time(),
    }
    db.execute(sa.insert(version_table).values(row))
    return cast(VersionRow, _version(db, job, version))


def _accepted(db: Connection, job: str, round_number: int) -> Any:
    mine = _of_round(upload_table, job, round_number) & (upload_table.c.verdict == "accepted")
    samples = sa.func.coalesce(sa.func.sum(upload_table.c.samples), 0).label("samples")
    return db.execute(sa.select(sa.func.count().label("devices"), samples).where(mine)).one()


def _last_round(db: Connection, job: str) -> RoundRow | None:
    query = sa.select(round_table).where(round_table.c.job == job)
    row = db.execute(query.order_by(round_table.c.id.desc()).limit(1)).first()
    return None if row is None else round_row(row)


def _find_round(db: Connection, job: str, round_number: int, lock: str = "") -> RoundRow | None:
    query = sa.select(round_table).where(_is_round(job, round_number))
    if lock:
        query = query.with_for_update(read=lock == "share")
    row = db.execute(query).first()
    return None if row is None else round_row(row)


def _locked_round(db: Connection, job: str, round_number: int) -> RoundRow:
    row = _find_round(db, job, round_number, "update")
    if row is None:
        raise ProtocolMisuse(f"job {job!r} has no round {round_number}")
    return row


def _step(db: Connection, job: str, row: RoundRow, event: Event, values: Mapping[str, Any]) -> None:
    phase, _effect = transition(row.phase, event)
    statement = sa.update(round_table).where(_is_round(job, row.round))
    db.execute(statement.values(state=phase.name, **values))


def _erase_sums(db: Connection, job: str, round_number: int) -> None:
    db.execute(sa.delete(partial_table).where(_of_round(partial_table, job, round_number)))


def _answer(row: Any, *, conflict: bool = False) -> Answer:
    return Answer(row.verdict, row.reason, True, conflict, bool(row.voided))


def _stored(db: Connection, job: str, upload: Upload) -> Answer | None:
    mine = _is_upload(job, upload.round, upload.device)
    row = db.execute(sa.select(upload_table).where(mine)).first()
    if row is None:
        return None
    conflict = row.digest != upload.digest
    if conflict:
        more = upload_table.c.conflicts + 1
        db.execute(sa.update(upload_table).where(mine).values(conflicts=more))
    return _answer(row, conflict=conflict)

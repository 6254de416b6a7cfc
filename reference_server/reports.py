"""What the ledger says when it is asked: rows as values, the history of a job, its audit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from reference_server import accounts
from reference_server.accounts import (
    Check,
    RoundRow,
    RoundSummary,
    RoundTotals,
    StoredUpload,
    VersionRow,
)
from reference_server.database import partial_table, round_table, upload_table, version_table
from reference_server.rounds import Phase


def decoded(text: str) -> dict[str, Any]:
    """Settings as they were given."""
    return msgspec.json.decode(text, type=dict[str, Any])


def version_row(row: Any) -> VersionRow:
    """A row of the version table as a value."""
    return VersionRow(
        version=row.v,
        round=row.round,
        sha=row.sha,
        parent=row.parent,
        samples=row.samples,
        devices=row.devices,
        created_s=row.created_s,
    )


def round_row(row: Any) -> RoundRow:
    """A row of the round table as a value."""
    return RoundRow(
        round=row.id,
        base_version=row.base_version,
        base_sha=row.base_sha,
        phase=Phase[row.state],
        settings=decoded(row.settings),
        opened_wall_s=row.opened_wall_s,
        remaining_s=row.remaining_s,
        extensions=row.extensions,
        counted=row.counted,
    )


def stored_upload(row: Any) -> StoredUpload:
    """A row of the upload table as a value."""
    return StoredUpload(
        device=row.device,
        verdict=row.verdict,
        samples=row.samples,
        size_bytes=row.size_bytes,
        metrics=decoded(row.metrics),
    )


def versions(db: Connection, job: str) -> list[VersionRow]:
    """All published versions, ascending."""
    query = sa.select(version_table).where(version_table.c.job == job)
    return [version_row(row) for row in db.execute(query.order_by(version_table.c.v))]


def history(db: Connection, job: str) -> list[RoundSummary]:
    """Every round in order, with what became of it."""
    c, total = upload_table.c, sa.func.sum
    query = sa.select(
        c.round,
        c.verdict,
        sa.func.count().label("rows"),
        total(sa.cast(c.voided, sa.Integer)).label("voided"),
        total(c.conflicts).label("conflicts"),
        total(c.samples).label("samples"),
        total(c.size_bytes).label("size_bytes"),
    ).where(c.job == job)
    rounds = _rounds(db, job)
    published = {version.round: version.version for version in versions(db, job)}
    groups: dict[int, list[Any]] = {row.round: [] for row in rounds}
    for group in db.execute(query.group_by(c.round, c.verdict)):
        groups[group.round].append(group)
    return [_summary(row, published.get(row.round), groups[row.round]) for row in rounds]


def audit(db: Connection, job: str, receipts: Iterable[tuple[int, str]]) -> list[Check]:
    """Check the invariants of the accounts in one view of the database."""
    sums = _devices_in_sums(db, job)
    return accounts.audit(
        _rounds(db, job),
        _totals(db, job),
        versions(db, job),
        _coverage(db, job, {round_number for round_number, _ in sums}),
        sums,
        [key for key in receipts if not _was_accepted(db, job, *key)],
    )


def _rounds(db: Connection, job: str) -> list[RoundRow]:
    query = sa.select(round_table).where(round_table.c.job == job).order_by(round_table.c.id)
    return [round_row(row) for row in db.execute(query)]


def _summary(row: RoundRow, version: int | None, groups: list[Any]) -> RoundSummary:
    return RoundSummary(
        round=row.round,
        phase=row.phase,
        base_version=row.base_version,
        version=version,
        verdicts={group.verdict: group.rows for group in groups},
        voided=sum(group.voided for group in groups),
        conflicts=sum(group.conflicts for group in groups),
        samples=sum(int(group.samples) for group in groups if group.verdict == "accepted"),
        size_bytes=sum(int(group.size_bytes) for group in groups),
    )


def _totals(db: Connection, job: str) -> dict[int, RoundTotals]:
    c = upload_table.c

    def how_many(condition: sa.ColumnElement[bool], name: str) -> sa.Label[int]:
        return sa.func.sum(sa.case((condition, 1), else_=0)).label(name)

    accepted = c.verdict == "accepted"
    query = sa.select(
        c.round,
        sa.func.count().label("rows"),
        sa.func.count(sa.distinct(c.device)).label("devices"),
        how_many(accepted, "accepted"),
        how_many(c.voided.is_(True), "voided"),
        how_many(accepted & (c.digest == ""), "undigested"),
    )
    grouped = query.where(c.job == job).group_by(c.round)
    return {row.round: RoundTotals(**row._mapping) for row in db.execute(grouped)}


def _devices_in_sums(db: Connection, job: str) -> dict[tuple[int, str], int]:
    c = partial_table.c
    query = sa.select(c.round, c.block, sa.func.sum(c.devices).label("devices"))
    grouped = query.where(c.job == job).group_by(c.round, c.block)
    return {(row.round, row.block): int(row.devices) for row in db.execute(grouped)}


def _coverage(db: Connection, job: str, with_sums: set[int]) -> dict[tuple[int, str], int]:
    """Accepted updates by (round, block), for rounds whose sums are not erased."""
    c = upload_table.c
    erased = {Phase.ARCHIVED.name, Phase.ABANDONED.name}
    kept = sa.select(round_table.c.id).where(
        round_table.c.job == job, round_table.c.state.not_in(erased)
    )
    numbers = with_sums | set(db.execute(kept).scalars())
    query = sa.select(c.round, c.blocks).where(
        c.job == job, c.round.in_(sorted(numbers)), c.verdict == "accepted", c.voided.is_(False)
    )
    coverage: Counter[tuple[int, str]] = Counter()
    for row in db.execute(query):
        coverage.update(
            (row.round, name) for name in msgspec.json.decode(row.blocks, type=list[str])
        )
    return dict(coverage)


def _was_accepted(db: Connection, job: str, round_number: int, device: str) -> bool:
    c = upload_table.c
    query = sa.select(c.verdict).where(c.job == job, c.round == round_number, c.device == device)
    return db.execute(query).scalar() == "accepted"

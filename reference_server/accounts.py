"""What the ledger's rows mean: the values it keeps, the verdict rule, and the audit. Pure.

Counts go one way: an accepted update is in exactly one published version, or voided with its
round, or in the round that is still open. ``audit`` recomputes that from the rows, never from a
counter that was kept while counting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from edge_sdk.wire import Verdict
from reference_server.rounds import Phase

MAX_NAMED = 5
_LIVE = frozenset({Phase.PLANNED, Phase.OPEN, Phase.CLOSING})
_WITH_VERSION = frozenset({Phase.PUBLISHED, Phase.ARCHIVED})


@dataclass(frozen=True, kw_only=True)
class Upload:
    """One update as it arrived: its key with the job, and what the ledger keeps of it."""

    round: int
    device: str
    base_sha: str
    digest: str
    samples: int
    size_bytes: int = 0
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredUpload:
    """One judged update as the ledger keeps it."""

    device: str
    verdict: Verdict
    samples: int
    size_bytes: int
    metrics: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The terminal verdict on an update. ``repeated``: it was stored before this delivery.

    conflict: the stored one has another digest, so the device trained this round twice.
    voided: it was counted, and its round was abandoned afterwards.
    """

    verdict: Verdict
    reason: str = ""
    repeated: bool = False
    conflict: bool = False
    voided: bool = False


@dataclass(frozen=True, kw_only=True)
class RoundRow:
    """A round as stored; ``settings`` is the caller's own description of it.

    counted: accepted updates when counting ended; None while it has not.
    """

    round: int
    base_version: int
    base_sha: str
    phase: Phase
    settings: dict[str, Any]
    opened_wall_s: float | None
    remaining_s: float
    extensions: int
    counted: int | None

    @property
    def live(self) -> bool:
        """Whether it can still become a version."""
        return self.phase in _LIVE


@dataclass(frozen=True)
class Answers:
    """Who was asked in a round and what came back; enough to decide it after a restart.

    Whoever adds to the ledger while holding one adds to it too: it is read once a round.
    """

    offered: set[str]
    declined: dict[str, str]
    verdicts: dict[str, Verdict]


@dataclass(frozen=True)
class Partial:
    """The sum of one block over the updates that one worker slot counted."""

    block: str
    slot: int
    samples: int
    devices: int
    num: bytes


@dataclass(frozen=True, kw_only=True)
class VersionRow:
    """One published version; version 0 is the initial model and has round 0."""

    version: int
    round: int
    sha: str
    parent: str
    samples: int
    devices: int
    created_s: float


@dataclass(frozen=True, kw_only=True)
class RoundSummary:
    """What became of a round: its version if it has one, its updates by verdict."""

    round: int
    phase: Phase
    base_version: int
    version: int | None
    verdicts: dict[str, int]
    voided: int
    conflicts: int
    samples: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class RoundTotals:
    """Sums over the update rows of one round, computed by the database."""

    round: int
    rows: int
    devices: int
    accepted: int
    voided: int
    undigested: int


@dataclass(frozen=True)
class Check:
    """One audited invariant: ``count`` things looked at, ``detail`` says which are wrong."""

    name: str
    ok: bool
    count: int
    detail: str = ""


def judged(round_row: RoundRow | None, upload: Upload) -> tuple[Answer, bool]:
    """The verdict on an update that has none yet, and whether there is a round to store it in."""
    if round_row is None or round_row.phase is Phase.PLANNED:
        return Answer("late", f"round {upload.round} is not open"), False
    if round_row.phase is not Phase.OPEN:
        return Answer("late", f"round {upload.round} is {round_row.phase.name.lower()}"), True
    if upload.base_sha != round_row.base_sha:
        reason = f"trained on {upload.base_sha[:12]}, the round's base is {round_row.base_sha[:12]}"
        return Answer("stale", reason), True
    return Answer("accepted"), True


def audit(
    rounds: Sequence[RoundRow],
    totals: Mapping[int, RoundTotals],
    versions: Sequence[VersionRow],
    coverage: Mapping[tuple[int, str], int],
    sums: Mapping[tuple[int, str], int],
    unknown_receipts: Sequence[tuple[int, str]],
) -> list[Check]:
    """Check every invariant that the tables can show.

    rounds, versions: ascending. coverage: accepted updates by (round, block), for the rounds that
    still have sums; sums: the devices those sums say they hold. unknown_receipts: (round, device)
    told accepted without an accepted row.
    """
    return [
        _one_row(totals),
        _sums_match(coverage, sums),
        _receipts_have_rows(totals, unknown_receipts),
        _one_chain(rounds, versions),
        _nothing_after_closing(rounds, totals),
        _balance(rounds, totals, versions),
        _one_live_round(rounds),
    ]


def _one_row(totals: Mapping[int, RoundTotals]) -> Check:
    wrong = [
        f"round {t.round}: {t.rows} rows of {t.devices} devices"
        for t in totals.values()
        if t.rows != t.devices
    ]
    rows = sum(t.rows for t in totals.values())
    return _check("I1 one row per round and device", rows, wrong)


def _sums_match(
    coverage: Mapping[tuple[int, str], int], sums: Mapping[tuple[int, str], int]
) -> Check:
    wrong = [
        f"round {key[0]}, block {key[1]!r}: {sums.get(key, 0)} folded, {coverage.get(key, 0)} rows"
        for key in sorted(coverage.keys() | sums.keys())
        if sums.get(key, 0) != coverage.get(key, 0)
    ]
    return _check("I2 sums hold the accepted updates of each block", len(sums), wrong)


def _receipts_have_rows(
    totals: Mapping[int, RoundTotals], unknown_receipts: Sequence[tuple[int, str]]
) -> Check:
    wrong = [f"{device} was told accepted in round {n}, no row" for n, device in unknown_receipts]
    wrong += [
        f"round {t.round}: {t.undigested} without digest" for t in totals.values() if t.undigested
    ]
    accepted = sum(t.accepted for t in totals.values())
    return _check("I5 every accepted receipt has a row", accepted, wrong)


def _one_chain(rounds: Sequence[RoundRow], versions: Sequence[VersionRow]) -> Check:
    by_number = {row.round: row for row in rounds}
    wrong = []
    for place, version in enumerate(versions):
        if version.version != place:
            wrong.append(f"version {version.version} stands at place {place}")
        elif place and version.parent != versions[place - 1].sha:
            wrong.append(f"version {place} does not descend from version {place - 1}")
        elif place and not _made_by(by_number.get(version.round), version):
            wrong.append(f"version {place} was not made by round {version.round}")
    made = {version.round for version in versions}
    wrong += [
        f"round {row.round} is {row.phase.name} without a version"
        for row in rounds
        if row.phase in _WITH_VERSION and row.round not in made
    ]
    return _check("I6 versions form one chain", len(versions), wrong)


def _made_by(round_row: RoundRow | None, version: VersionRow) -> bool:
    return (
        round_row is not None
        and round_row.phase in _WITH_VERSION
        and (round_row.base_version + 1, round_row.base_sha) == (version.version, version.parent)
    )


def _nothing_after_closing(rounds: Sequence[RoundRow], totals: Mapping[int, RoundTotals]) -> Check:
    closed = [row for row in rounds if row.counted is not None]
    wrong = [
        f"round {row.round}: {row.counted} counted at closing, {now} now"
        for row in closed
        if (now := _accepted(totals, row.round)) != row.counted
    ]
    return _check("I7 nothing is counted after closing", len(closed), wrong)


def _balance(
    rounds: Sequence[RoundRow], totals: Mapping[int, RoundTotals], versions: Sequence[VersionRow]
) -> Check:
    published = {version.round: version.devices for version in versions}
    wrong = []
    for row in rounds:
        accepted, total = _accepted(totals, row.round), totals.get(row.round)
        voided = 0 if total is None else total.voided
        kept = accepted if row.live else published.get(row.round, 0)
        if accepted != kept + voided:
            wrong.append(f"round {row.round}: {accepted} accepted, {kept} kept, {voided} voided")
    accepted = sum(t.accepted for t in totals.values())
    return _check("balance: accepted = published + voided + open", accepted, wrong)


def _one_live_round(rounds: Sequence[RoundRow]) -> Check:
    live = [f"round {row.round} is {row.phase.name}" for row in rounds if row.live]
    return _check("at most one round is live", len(rounds), live if len(live) > 1 else [])


def _accepted(totals: Mapping[int, RoundTotals], round_number: int) -> int:
    total = totals.get(round_number)
    return 0 if total is None else total.accepted


def _check(name: str, count: int, wrong: Sequence[str]) -> Check:
    more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
    return Check(name, not wrong, count, "; ".join(wrong[:MAX_NAMED]) + more)

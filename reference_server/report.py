"""What a run did, measured: one JSON document, kept on disk for a killed server to continue."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import StateError
from edge_sdk.store import write_atomically
from edge_sdk.wire import Tally

SCHEMA = 1
ROW_KEYS = (
    "plan_peak_bytes",
    "measured_peak_bytes",
    "budget_bytes",
    "train_s",
    "train_cpu_s",
    "plan_s",
    "plan_up_bytes",
    "flops",
    "loss",
    "steps",
)


class RunReport:
    """The report of one job, growing round by round; ``save`` after every change worth keeping."""

    def __init__(self, path: Path, facts: Mapping[str, Any], spec: ModelSpec) -> None:
        self._path = path
        self._data: dict[str, Any] = {
            "schema": SCHEMA,
            "broker": {"kind": "external", "version": "unknown"},
            **facts,
            "wall_s": 0.0,
            "first_round_s": None,
            "model": {
                "params": spec.params,
                "bytes_fp32": 4 * spec.params,
                "blocks": [{"name": b.name, "params": b.params} for b in spec.blocks],
            },
            "rounds": [],
            "totals": {},
            "model_sha256": "",
            "files": {},
        }
        self._tallies: dict[str, dict[str, Any]] = {}
        self._made: set[tuple[int, str]] = set()
        self._answered: set[tuple[int, str]] = set()
        self._kept: dict[str, Any] = {}
        if path.is_file():
            self._continue(path)

    def opened(self, round_number: int, device: str) -> None:
        """A device announced an update, and was not told its verdict at once."""
        self._made.add((round_number, device))

    def answered(self, round_number: int, device: str) -> None:
        """A device was told the verdict on its update, be it that it came too late."""
        self._answered |= {(round_number, device)} & self._made

    def tally(self, device: str, tally: Tally) -> None:
        """A device said what a round cost it; repeats replace."""
        self._tallies[f"{tally.round}/{device}"] = msgspec.to_builtins(tally)
        for row in self._rows(tally.round):
            if row["id"] == device:
                _add_tally(row, self._tallies[f"{tally.round}/{device}"])

    def missing_tallies(self) -> int:
        """Accepted updates of the last round whose device has not said yet what they cost."""
        rounds = self._data["rounds"]
        rows = rounds[-1]["devices"] if rounds else []
        return sum(r["verdict"] == "accepted" and r.get("up_bytes") is None for r in rows)

    def closed(
        self,
        round_number: int,
        *,
        measured: tuple[float, float] | None,
        wall_s: float,
        coverage: Mapping[str, Mapping[str, int]],
        devices: Sequence[Mapping[str, Any]],
        declined: Mapping[str, str],
    ) -> dict[str, Any]:
        """A round was published; its entry.

        ``devices`` are its rows without tallies, ``declined`` who sat out and why.
        """
        loss, accuracy = measured if measured is not None else (math.nan, math.nan)
        rows = [dict(row) for row in devices]
        for row in rows:
            _add_tally(row, self._tallies.get(f"{round_number}/{row['id']}"))
        entry = {
            "round": round_number,
            "accuracy": None if math.isnan(accuracy) else accuracy,
            "loss": None if math.isnan(loss) else loss,
            "wall_s": wall_s,
            "coverage": coverage,
            "devices": rows,
            "declined": dict(declined),
        }
        kept = [r for r in self._data["rounds"] if r["round"] != round_number]
        self._data["rounds"] = sorted([*kept, entry], key=lambda r: int(r["round"]))
        return entry

    def finish(
        self,
        *,
        model_sha256: str,
        files: Mapping[str, str],
        totals: Mapping[str, Any],
        wall_s: float,
    ) -> dict[str, Any]:
        """Complete the document and return it."""
        rows = [row for entry in self._data["rounds"] for row in entry["devices"]]
        counted = sum(row["verdict"] == "accepted" for row in rows)
        judged = {(e["round"], r["id"]) for e in self._data["rounds"] for r in e["devices"]}
        self._data["model_sha256"] = model_sha256
        self._data["files"] = dict(files)
        self._data["wall_s"] = wall_s
        self._data["totals"] = {
            "up_bytes": _total(rows, "up_bytes"),
            "down_bytes": _total(rows, "down_bytes"),
            "flops": _total(rows, "flops"),
            "peak_rss_agent_bytes": _most(self._tallies.values(), "agent_rss_bytes"),
            "peak_rss_trainer_bytes": _most(self._tallies.values(), "trainer_peak_bytes"),
            "cpu_s_device": sum(t["cpu_s"] for t in self._tallies.values()),
            "updates_made": len(self._made | judged),
            "updates_counted": counted,
            "updates_lost": len(self._made - self._answered - judged),
            **totals,
        }
        return self._data

    def save(self) -> None:
        """Keep everything on disk."""
        kept = {
            "data": self._data,
            "tallies": self._tallies,
            "made": sorted(self._made),
            "answered": sorted(self._answered),
        }
        write_atomically(self._path, msgspec.json.encode(kept))

    def complete(self, model_sha256: str) -> dict[str, Any] | None:
        """The document as an earlier start finished it, if it is about this model."""
        kept = self._kept
        if kept.get("model_sha256") != model_sha256 or not kept.get("totals"):
            return None
        return (
            kept
            if all(Path(path).is_file() for path in dict(kept.get("files") or {}).values())
            else None
        )

    def _rows(self, round_number: int) -> list[dict[str, Any]]:
        return next((e["devices"] for e in self._data["rounds"] if e["round"] == round_number), [])

    def _continue(self, path: Path) -> None:
        try:
            kept = msgspec.json.decode(path.read_bytes())
            self._kept = dict(kept["data"])
            self._data["rounds"] = list(kept["data"]["rounds"])
            self._tallies = dict(kept["tallies"])
            self._made = {(int(number), str(device)) for number, device in kept["made"]}
            self._answered = {(int(number), str(device)) for number, device in kept["answered"]}
        except (msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"{path}: cannot be read as a run's report: {error}; delete it"
            ) from None


def _add_tally(row: dict[str, Any], tally: Mapping[str, Any] | None) -> None:
    row["up_bytes"] = tally["up_bytes"] if tally else None
    row["down_bytes"] = tally["down_bytes"] if tally else None
    row["cpu_s"] = tally["cpu_s"] if tally else None


def _total(rows: Sequence[Mapping[str, Any]], key: str) -> int:
    return sum(row[key] or 0 for row in rows)


def _most(tallies: Any, key: str) -> int:
    return max((tally[key] for tally in tallies), default=0)

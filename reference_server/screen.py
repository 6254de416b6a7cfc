"""What a person sees of a run: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from edge_sdk.errors import MIB

Event = Mapping[str, Any]


class Screen:
    """Shows the events of a run as they come; use as a context manager."""

    def __init__(self, rounds: int) -> None:
        self._console = Console()
        self._rounds = rounds
        self._devices: dict[str, dict[str, str]] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(),
            TextColumn("{task.completed}/{task.total}"), console=self._console,
        )  # fmt: skip
        self._bar = self._progress.add_task("rounds", total=rounds)
        # Errors go above the table only where both would appear on the same screen.
        self._live = Live(
            console=self._console, refresh_per_second=5, transient=True,
            redirect_stderr=sys.stderr.isatty(),
        )  # fmt: skip

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live.start()
            self._live.update(self._picture())
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def line(self, text: str) -> None:
        """Print one line above the live part."""
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        """Show one event of the server."""
        handler = _SHOWN.get(str(event.get("event")))
        if handler is not None:
            handler(self, event)
        if self._console.is_terminal:
            self._live.update(self._picture())

    def _picture(self) -> Group:
        table = Table("device", "state", "trains", "peak MiB (planned)", "up", "down", box=None)
        for name, cells in sorted(self._devices.items()):
            table.add_row(
                name, *(cells.get(k, "") for k in ("state", "blocks", "peak", "up", "down"))
            )
        return Group(table, self._progress)

    def _cells(self, device: str) -> dict[str, str]:
        return self._devices.setdefault(device, {"state": "ready"})

    def _pretrain(self, event: Event) -> None:
        self._progress.update(self._bar, description=f"pre-training, step {event['step']}")

    def _base(self, event: Event) -> None:
        self._progress.update(self._bar, description="rounds")
        if event["samples"]:
            accuracy = event["accuracy"]
            measured = "" if accuracy is None else f", held-out accuracy {accuracy:.3f}"
            self.line(
                f"pre-trained on {event['samples']} public samples, which no device and no test "
                f"set holds ({event['steps']} steps{measured})"
            )

    def _device(self, event: Event) -> None:
        if event["device"] not in self._devices:
            self.line(f"{event['device']} joined (profile {event['profile']})")
        self._cells(event["device"])["state"] = "ready"

    def _presence(self, event: Event) -> None:
        self._cells(event["device"])["state"] = event["state"]
        if event["state"] == "lost":
            self.line(f"{event['device']} is lost; its round goes on")

    def _update(self, event: Event) -> None:
        self._cells(event["device"])["state"] = event["verdict"]
        if event["verdict"] != "accepted":
            self.line(f"{event['device']}: update {event['verdict']}: {event['reason']}")

    def _declined(self, event: Event) -> None:
        self._cells(event["device"])["state"] = "sits out"
        self.line(f"{event['device']} sits this round out: {event['reason']}")

    def _published(self, event: Event) -> None:
        accuracy, loss = event["accuracy"], event["loss"]
        result = "" if accuracy is None else f"  accuracy {accuracy:.3f}"
        result += "" if loss is None else f"  loss {loss:.3f}"
        self.line(f"round {event['round']} of {self._rounds}{result}  {event['wall_s']:.1f} s")
        for row in event["devices"]:
            if row["measured_peak_bytes"] is None:
                continue  # judged before it was decoded, and said so when it was
            cells = _row_cells(row)
            self._cells(row["id"]).update(cells)
            self.line(
                f"  {row['id']:<24} trains {cells['blocks']:<20} peak {cells['peak']} MiB "
                f"of {row['budget_bytes'] / MIB:.0f}  up {cells['up']}  down {cells['down']}"
            )
        self._progress.update(self._bar, completed=event["version"])

    def _waiting(self, event: Event) -> None:
        self.line(f"waiting for {_count(event['needed'], 'device')}")

    def _finished(self, event: Event) -> None:
        done = _count(event["rounds"], "round")
        self.line(f"this job was finished before, with {done}; more --rounds would continue it")

    def _not_exported(self, event: Event) -> None:
        self.line(f"no ONNX file: {event['reason']}")

    def _said(self, event: Event) -> None:
        self.line(
            f"round {event['round']} {event['event']}: {event.get('reason', '')}".rstrip(": ")
        )


def _row_cells(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "blocks": short_names(row["blocks"]),
        "peak": f"{row['measured_peak_bytes'] / MIB:.0f} ({row['plan_peak_bytes'] / MIB:.0f})",
        "up": human_bytes(row["up_bytes"]),
        "down": human_bytes(row["down_bytes"]),
    }


def printable(text: str) -> str:
    """One line of text whose control characters, which a peer may have chosen, are gone."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def short_names(blocks: list[str]) -> str:
    """Block names with runs such as blocks.2, blocks.3, blocks.4 written as blocks.2-4."""
    parts: list[str] = []
    first, last = "", ("", -1)
    for name in blocks:
        stem, _, number = name.rpartition(".")
        place = (stem, int(number)) if number.isdecimal() else ("", -1)
        if parts and place[1] > 0 and last == (stem, place[1] - 1):
            parts[-1] = f"{first}-{number}"
        else:
            parts.append(name)
            first = name
        last = place
    return " ".join(parts)


def round_line(row: Mapping[str, Any]) -> str:
    """One round of a job, as ``status`` shows it."""
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(row["verdicts"].items()))
    version = "no version" if row["version"] is None else f"version {row['version']}"
    return (
        f"round {row['round']:<4} {row['phase'].lower():<10} {version:<11} "
        f"{verdicts or 'no update'}, {_count(row['samples'], 'sample')}, "
        f"{human_bytes(row['update_bytes'])}"
    )


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def human_bytes(count: int | None) -> str:
    """Bytes as a person reads them; '?' while they are not known."""
    if count is None:
        return "?"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


_SHOWN = {
    "pretrain": Screen._pretrain,
    "base": Screen._base,
    "device": Screen._device,
    "presence": Screen._presence,
    "update": Screen._update,
    "decline": Screen._declined,
    "published": Screen._published,
    "finished": Screen._finished,
    "not_exported": Screen._not_exported,
    "waiting": Screen._waiting,
    "abandoned": Screen._said,
    "extended": Screen._said,
    "resumed": Screen._said,
}


def summary(report: Mapping[str, Any]) -> list[str]:
    """The last lines of a run: result, what was saved, where the files are."""
    rounds, totals, model = report["rounds"], report["totals"], report["model"]
    rows = [row for entry in rounds for row in entry["devices"]]
    everything = model["bytes_fp32"] * len(rows)
    accuracy = rounds[-1]["accuracy"] if rounds else None
    lines = [f"done: {_count(len(rounds), 'round')} in {report['wall_s']:.1f} s"]
    if accuracy is not None:
        lines[0] += f", held-out accuracy {accuracy:.3f}"
    if totals["up_bytes"]:
        times = everything / totals["up_bytes"]
        lines.append(
            f"sent {human_bytes(totals['up_bytes'])} up; all weights as float32 would have been "
            f"{human_bytes(everything)}, {times:.{0 if times >= 10 else 1}f} times as much"
        )
    lines.append(
        f"updates: {totals['updates_made']} made, {totals['updates_counted']} counted, "
        f"{totals['updates_lost']} lost, {totals['updates_double']} double"
    )
    lines += [f"model ({kind}): {path}" for kind, path in report["files"].items()]
    return lines

"""What every benchmark's command does: its options, its table, its JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
Measure = Callable[[bool], tuple[dict[str, float], list[Row]]]


def run(name: str, about: str | None, measure: Measure) -> None:
    """The command line around ``measure(quick)``, which gives figures and rows."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    figures, rows = measure(options.quick)
    show(rows)
    for key, value in figures.items():
        print(f"{key:<32}{value:>14,.4g}")
    if options.json:
        machine = {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "load": os.getloadavg()[0],
        }
        report = {
            "name": name, "quick": options.quick, "machine": machine, "figures": figures,
            "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(report, indent=2))


def show(rows: Sequence[Row]) -> None:
    """Rows as a table, one column a key."""
    if not rows:
        return
    table = Table(box=None)
    for key in rows[0]:
        table.add_column(key)
    for row in rows:
        table.add_row(*[_words(value) for value in row.values()])
    Console(width=160).print(table)


def _words(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else str(value)

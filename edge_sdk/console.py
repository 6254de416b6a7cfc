"""What all commands of ``edge-sdk`` share: options, files, and what is printed how."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edge_sdk.errors import ConfigError
from edge_sdk.profile import DeviceProfile

PATH = click.Path(path_type=Path)
MEASURE = "measure"
# What is measured for later plans may take longer: torch alone can need a minute to load.
PATIENCE_S = 120.0

json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
state_option = click.option(
    "--state", "state_dir", type=PATH, help="State directory.  [default: below ~/.edge-sdk]"
)


def home() -> Path:
    """Where jobs are kept unless --state says otherwise."""
    try:
        return Path.home() / ".edge-sdk"
    except RuntimeError as error:
        raise ConfigError("this user has no home directory; give --state DIR") from error


def write(path: Path, data: bytes) -> None:
    """A whole file or none; readable by everybody."""
    from edge_sdk.store import write_atomically

    write_atomically(path, data, mode=0o644)


def pip(extra: str) -> str:
    """The command that installs one of the package's extras."""
    return f"{sys.executable} -m pip install 'edge-sdk[{extra}]'"


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Imports that only work with one of the package's extras."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed: {pip(name)}") from error


def progress(words: str) -> None:
    """Say what takes long, to a person only."""
    if sys.stderr.isatty():
        click.echo(f"{words} ...", err=True)


def print_json(value: dict[str, Any]) -> None:
    """A command's one answer for scripts."""
    click.echo(json.dumps(value, indent=2))


def check_part(part: int, parts: int) -> None:
    """ConfigError for a part that does not exist."""
    if part >= parts:
        raise ConfigError(
            f"--part {part} does not exist: with --parts {parts} it is 0 to {parts - 1}"
        )


def measured_profile(state_dir: Path, *, quick: bool = False) -> DeviceProfile:
    """This machine as it is now; ``quick`` leaves out what only planning needs."""
    from edge_sdk.probe import probe

    progress("measuring this machine")
    return probe(quick, state_dir, patience_s=PATIENCE_S).profile

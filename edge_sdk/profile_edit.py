"""Put a task's correction into the text of a profile; all else stays as somebody wrote it."""

from __future__ import annotations

import json
import re

import msgspec

from edge_sdk.errors import ProfileError
from edge_sdk.profile import Correction, parse_profile, profile_toml

_CORRECTION_KEY = re.compile(r"\s*(memory|time|samples)\s*=")


def with_correction(text: str, where: str, task: str, correction: Correction, source: str) -> str:
    """The profile's text with this correction; ``where`` names the file in a ProfileError.

    A file in which the table cannot be put in place by lines is written anew, without comments.
    """
    before = parse_profile(text, where)
    after = msgspec.structs.replace(
        before,
        corrections={**before.corrections, task: correction},
        sources={**before.sources, "corrections": source},
    )
    lines = _without(text.splitlines(), task)
    lines = _with_source(lines, source)
    table = profile_toml(after).splitlines()
    start = next(n for n, line in enumerate(table) if line.startswith(f"[corrections.{task}]"))
    place = _place(lines)
    edited = "\n".join([*lines[:place], *table[start : start + 4], "", *lines[place:]]) + "\n"
    try:
        if parse_profile(edited, where) == after:
            return edited
    except ProfileError:
        pass
    return profile_toml(after)


def _without(lines: list[str], task: str) -> list[str]:
    """All lines but those of the task's own table."""
    kept: list[str] = []
    inside = False
    for line in lines:
        if _header(line):
            inside = _header(line) == f"corrections.{task}"
            if inside:
                continue
        if inside and (_CORRECTION_KEY.match(line) or not line.strip()):
            continue
        inside = False
        kept.append(line)
    return kept


def _with_source(lines: list[str], source: str) -> list[str]:
    """With where corrections come from, in the table of sources."""
    line, found = f"corrections = {json.dumps(source, ensure_ascii=False)}", ""
    for place, old in enumerate(lines):
        found = _header(old) or found
        if found == "sources" and re.match(r"\s*corrections\s*=", old):
            return [*lines[:place], line, *lines[place + 1 :]]
    for place, old in enumerate(lines):
        if _header(old) == "sources":
            return [*lines[: place + 1], line, *lines[place + 1 :]]
    return [*lines, "", "[sources]", line]


def _place(lines: list[str]) -> int:
    """Before the sources and what is written above them."""
    place = next(n for n, line in enumerate(lines) if _header(line) == "sources")
    while place and lines[place - 1].lstrip().startswith("#"):
        place -= 1
    return place


def _header(line: str) -> str:
    """The table a line begins, else nothing."""
    found = re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", line)
    return found[1].strip() if found else ""

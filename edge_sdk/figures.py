"""What a profile's figures may be: their limits, their checks, and how a person reads them.

Every check raises ProfileError naming the key, the value, what is allowed and what to do.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from edge_sdk.errors import MIB, ProfileError

SOURCE_KINDS = ("measured", "benchmark", "datasheet", "estimated", "assumed")
LABEL = re.compile(r"[a-z0-9-]{1,64}")
MAX_TABLE_KEYS = 64

_RATE_KEY = re.compile(r"[a-z0-9_]{1,48}_(flops_per_s|bytes_per_s|s)")
_OVERHEAD_KEY = re.compile(r"[a-z0-9_]{1,48}_bytes")
_SOURCE_LENGTH = 500


class Limit(NamedTuple):
    """Allowed range of one figure, with what it is, for the error text."""

    whole: bool
    low: float
    high: float
    meaning: str


# The upper ends are about a thousand times today's largest machine: they catch a wrong unit or a
# hostile file, not a good computer.
LIMITS: dict[str, Limit] = {
    "memory_total_bytes": Limit(True, 1, 2**50, "physical RAM, bytes"),
    "memory_bytes": Limit(True, 1, 2**50, "peak resident memory training may use, bytes"),
    "torch_floor_bytes": Limit(True, 1, 2**40, "memory of torch before any model, bytes"),
    "cores": Limit(True, 1, 65536, "CPU cores training may use"),
    "flops_per_s": Limit(False, 1, 1e18, "sustained float32 training rate, FLOP per second"),
    "memory_bandwidth_bytes_per_s": Limit(False, 1, 1e16, "bytes read plus written per second"),
    "uplink_bytes_per_s": Limit(False, 1, 1e13, "upload rate, bytes (not bits) per second"),
    "downlink_bytes_per_s": Limit(False, 1, 1e13, "download rate, bytes (not bits) per second"),
    "storage_bytes": Limit(True, 0, 2**60, "storage the caches and the spool may use, bytes"),
    "storage_write_bytes_per_s": Limit(False, 1, 1e13, "synced write rate, bytes per second"),
    "storage_read_bytes_per_s": Limit(False, 1, 1e13, "read rate past caches, bytes per second"),
}
FIGURES = tuple(LIMITS)
# Tables that ``[sources]`` may name as a whole.
SOURCED = (*FIGURES, "policy", "rates", "overhead", "corrections")

POLICY_LIMITS: dict[str, Limit] = {
    "pause_above_celsius": Limit(False, 20, 150, "degrees Celsius at which training pauses"),
    "resume_below_celsius": Limit(False, 0, 150, "degrees Celsius below which it goes on"),
    "min_battery_percent": Limit(False, 0, 100, "charge below which training pauses on battery"),
    "pause_above_pressure_percent": Limit(
        False, 1, 100, "share of the last 10 s in which something waited for memory"
    ),
}
CORRECTION_LIMITS: dict[str, Limit] = {
    "memory": Limit(False, 0.5, 4, "measured over predicted memory above the floor"),
    "time": Limit(False, 0.1, 10, "measured over predicted seconds"),
    "samples": Limit(True, 0, 2**31, "measurements behind it"),
}
_RATE_LIMITS = {
    "flops_per_s": Limit(False, 1, 1e18, "FLOP per second"),
    "bytes_per_s": Limit(False, 1, 1e16, "bytes per second"),
    # Nothing at all is what a fit may find for work that hides behind other work.
    "s": Limit(False, 0, 1e6, "seconds"),
}
_OVERHEAD_LIMIT = Limit(True, 0, 2**40, "memory of the runtime, bytes")


def check_figure(value: object, key: str, limit: Limit, where: str) -> None:
    """One number: right type, finite, within its limits."""
    wanted = "a whole number" if limit.whole else "a number"
    bounds = f"from {_bound(limit.low)} to {_bound(limit.high)}"
    kinds = (int,) if limit.whole else (int, float)
    right_type = isinstance(value, kinds) and not isinstance(value, bool)
    if not right_type or not limit.low <= value <= limit.high:  # type: ignore[operator]
        raise ProfileError(
            f"{where}: {key} is {show(value)}, it must be {wanted} {bounds} "
            f"({limit.meaning}). Check the value and its unit."
        )


def check_text(value: object, key: str, shortest: int, longest: int, where: str) -> None:
    """One line of printable text of bounded length."""
    if isinstance(value, str) and shortest <= len(value) <= longest and value.isprintable():
        return
    raise ProfileError(
        f"{where}: {key} is {show(value)}, it must be {shortest} to {longest} printable "
        "characters on one line. Shorten it or put it in quotes."
    )


def check_switch(value: object, key: str, where: str) -> None:
    """One yes or no."""
    if not isinstance(value, bool):
        raise ProfileError(
            f"{where}: {key} is {show(value)}, it must be true or false, without quotes."
        )


def check_date(value: object, where: str) -> None:
    """A calendar day in ISO form."""
    try:
        if isinstance(value, str) and len(value) == 10:
            datetime.date.fromisoformat(value)
            return
    except ValueError:
        pass
    raise ProfileError(
        f"{where}: date is {show(value)}, it must be a day like 2026-03-31. "
        "Write the day the figures were taken."
    )


def check_sources(sources: object, where: str) -> None:
    """A table from figures to where they come from."""
    for key, text in check_table(sources, "sources", 'cores = "datasheet: ..."', where):
        if key not in SOURCED:
            raise ProfileError(
                f"{where}: sources names {show(key)}, which is no figure of a profile."
                f"{near_miss(str(key), SOURCED)} Figures: {', '.join(SOURCED)}."
            )
        check_text(text, f"sources.{key}", 1, _SOURCE_LENGTH, where)
        kind, colon, words = text.partition(":")
        if kind not in SOURCE_KINDS or not colon or not words.strip():
            raise ProfileError(
                f"{where}: sources.{key} is {show(text)}, it must begin with one of "
                f"{', '.join(f'{kind}:' for kind in SOURCE_KINDS)} and then say more. "
                "Write where the figure comes from."
            )


def check_rates(rates: object, where: str) -> None:
    """Rates by kind of operation; the key's ending is the unit."""
    for key, value in check_table(rates, "rates", "matmul_flops_per_s = 5e9", where):
        check_figure(value, f"rates.{_rate_key(key, where)}", _rate_limit(key), where)


def check_overhead(overhead: object, where: str) -> None:
    """Memory of the runtime by kind of operation, bytes."""
    for key, value in check_table(overhead, "overhead", "conv_bytes = 4_194_304", where):
        _matching(key, "overhead", _OVERHEAD_KEY, "ending in _bytes", where)
        check_figure(value, f"overhead.{key}", _OVERHEAD_LIMIT, where)


def check_corrections(corrections: object, where: str) -> None:
    """Per task, a complete table of what was measured over what was predicted."""
    example = "memory = 1.1"
    for task, values in check_table(corrections, "corrections", "TASK = {...}", where):
        if not (isinstance(task, str) and LABEL.fullmatch(task)):
            raise ProfileError(
                f"{where}: corrections names task {show(task)}, a task's name is 1 to 64 "
                "characters of a-z, 0-9 and '-'. Take the table out or correct its name."
            )
        table = dict(check_table(values, f"corrections.{task}", example, where))
        check_keys(table, CORRECTION_LIMITS, f"{where}: corrections.{task}")
        for key, limit in CORRECTION_LIMITS.items():
            if key not in table:
                raise ProfileError(
                    f"{where}: corrections.{task}.{key} ({limit.meaning}) is missing. "
                    "Add it, or take the whole table out."
                )
            check_figure(table[key], f"corrections.{task}.{key}", limit, where)


def acceptable(table: Literal["rates", "overhead"], key: str, value: float) -> bool:
    """Whether a measurement may stand in this table of a profile under this key."""
    check = check_rates if table == "rates" else check_overhead
    try:
        check({key: value}, "measured")
    except ProfileError:
        return False
    return True


def check_table(table: object, key: str, example: str, where: str) -> Iterable[tuple[Any, Any]]:
    """The entries of a table of bounded length."""
    if not isinstance(table, Mapping):
        raise ProfileError(
            f"{where}: {key} is {show(table)}, it must be a table. "
            f"Write [{key}], then lines like {example}."
        )
    if len(table) > MAX_TABLE_KEYS:
        raise ProfileError(
            f"{where}: {key} has {len(table)} keys, at most {MAX_TABLE_KEYS} are allowed. "
            "Take out what this device does not need."
        )
    return table.items()


def check_keys(table: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    """No key but the known ones; a near miss is named."""
    names = tuple(known)
    for key in table:
        if key not in names:
            raise ProfileError(
                f"{where}: unknown key {show(key)}.{near_miss(str(key), names)} "
                f"Known keys: {', '.join(names)}."
            )


def near_miss(key: str, known: tuple[str, ...]) -> str:
    """A did-you-mean sentence with a leading space, or nothing."""
    import difflib  # only needed for an error message

    close = difflib.get_close_matches(key[:100], known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def show(value: object) -> str:
    """``repr`` of anything from a file, cut to a line's length."""
    if isinstance(value, int) and value.bit_length() > 256:  # repr refuses very long integers
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def human(key: str, value: float) -> str:
    """The number in a unit people read; nothing where it is one already."""
    if key.endswith("flops_per_s"):
        return f"{value / 1e9:,.4g} GFLOP/s"
    if key.endswith("_bytes_per_s"):
        return f"{value / 1e6:,.6g} MB/s"
    if key == "storage_bytes":  # storage is sold in decimal units, memory in binary ones
        return f"{value / 1e9:,.4g} GB"
    if key.endswith("_bytes"):
        return f"{value / MIB:,.0f} MiB" if value >= MIB else f"{value / 1024:,.0f} KiB"
    if key in POLICY_LIMITS:
        return POLICY_LIMITS[key].meaning
    return f"{value * 1e6:,.4g} microseconds" if key.endswith("_s") else ""


def _rate_key(key: object, where: str) -> str:
    wanted = "ending in _flops_per_s, _bytes_per_s or _s"
    return _matching(key, "rates", _RATE_KEY, wanted, where)


def _rate_limit(key: str) -> Limit:
    return next(limit for unit, limit in _RATE_LIMITS.items() if key.endswith(f"_{unit}"))


def _matching(key: object, table: str, form: re.Pattern[str], ending: str, where: str) -> str:
    if isinstance(key, str) and form.fullmatch(key):
        return key
    raise ProfileError(
        f"{where}: {table} names {show(key)}, a key there is 1 to 48 characters of a-z, 0-9 and "
        f"'_', then its unit: {ending}. Correct the key."
    )


def _bound(value: float) -> str:
    """A limit as people write it."""
    if value < 1e6:
        return f"{value:g}"
    return f"{value:.3g}"

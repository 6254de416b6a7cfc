"""What one device may spend on training: its profile, the TOML form, limits and budgets.

A profile is a TOML file named like its board. Every figure carries its unit in the key, and
``[sources]`` says for each whether it was measured, benchmarked by others, read in a datasheet,
estimated or assumed.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from edge_sdk.errors import MIB, ProfileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_PROFILE_BYTES = 64 * 1024

# Resident memory of a process that has imported torch and done one tiny step, before any model:
# 171 MiB on x86-64 with torch 2.13 once pages that only loading needed are given back; the rest is
# for the spread.
TORCH_FLOOR_BYTES = 180 * MIB

SOURCE_KINDS = ("measured", "benchmark", "datasheet", "estimated", "assumed")

_NAME = re.compile(r"[a-z0-9-]{1,64}")


class _Limit(NamedTuple):
    """Allowed range of one figure, with what it is, for the error text."""

    whole: bool
    low: float
    high: float
    meaning: str


# The upper ends are about a thousand times today's largest machine: they catch a wrong unit or a
# hostile file, not a good computer.
_LIMITS: dict[str, _Limit] = {
    "memory_total_bytes": _Limit(True, 1, 2**50, "physical RAM, bytes"),
    "memory_bytes": _Limit(True, 1, 2**50, "peak resident memory training may use, bytes"),
    "torch_floor_bytes": _Limit(True, 1, 2**40, "memory of torch before any model, bytes"),
    "cores": _Limit(True, 1, 65536, "CPU cores training may use"),
    "flops_per_s": _Limit(False, 1, 1e18, "sustained float32 training rate, FLOP per second"),
    "memory_bandwidth_bytes_per_s": _Limit(False, 1, 1e16, "bytes read plus written per second"),
    "uplink_bytes_per_s": _Limit(False, 1, 1e13, "upload rate, bytes (not bits) per second"),
    "downlink_bytes_per_s": _Limit(False, 1, 1e13, "download rate, bytes (not bits) per second"),
    "storage_bytes": _Limit(True, 0, 2**60, "storage the caches and the spool may use, bytes"),
    "storage_write_bytes_per_s": _Limit(False, 1, 1e13, "synced write rate, bytes per second"),
}
FIGURES = tuple(_LIMITS)
_TEXT_LIMITS = {"board": (1, 128), "accelerator": (0, 128)}
_SOURCE_LENGTH = 500


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one device may spend; an impossible value raises ProfileError when it is built.

    name:                         label of the board, also the file's stem under ``profiles/``.
    board:                        the board in words.
    memory_total_bytes:           physical RAM.
    memory_bytes:                 peak resident memory of the training process, not total RAM.
    torch_floor_bytes:            what of ``memory_bytes`` is gone once torch is imported.
    cores:                        CPU cores training may use.
    flops_per_s:                  sustained float32 training rate of torch on all those cores,
                                  a multiply-add counted as 2.
    memory_bandwidth_bytes_per_s: bytes read plus bytes written by a large copy.
    uplink_bytes_per_s:           payload from the device to the broker.
    downlink_bytes_per_s:         payload from the broker to the device.
    storage_bytes:                disk the block cache, prefix cache and spool may use.
    storage_write_bytes_per_s:    sequential writes, each synced.
    accelerator:                  "" or "cuda ...": present, but not counted in ``flops_per_s``.
    date:                         day the figures were taken, YYYY-MM-DD.
    sources:                      key -> "measured: ...", "datasheet: ..." and so on.
    """

    name: str
    board: str
    memory_total_bytes: int
    memory_bytes: int
    torch_floor_bytes: int = TORCH_FLOOR_BYTES
    cores: int
    flops_per_s: float
    memory_bandwidth_bytes_per_s: float
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    storage_bytes: int
    storage_write_bytes_per_s: float
    accelerator: str = ""
    date: str
    sources: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(msgspec.structs.asdict(self), f"profile {_show(self.name)}")

    def upload_s(self, payload_bytes: int) -> float:
        """Seconds to send ``payload_bytes`` at the profile's uplink rate."""
        return payload_bytes / self.uplink_bytes_per_s

    def download_s(self, payload_bytes: int) -> float:
        """Seconds to receive ``payload_bytes`` at the profile's downlink rate."""
        return payload_bytes / self.downlink_bytes_per_s


@dataclass(frozen=True, slots=True)
class Budget:
    """Memory a plan may use at its peak, and which limit set it."""

    memory_bytes: int
    bound_by: Literal["flag", "profile", "cgroup", "available"]


def budget(
    profile: DeviceProfile,
    *,
    available_bytes: int | None,
    cgroup_limit_bytes: int | None,
    flag_bytes: int | None,
) -> Budget:
    """The least of all known limits on the trainer's memory; ``None`` means not known.

    Of equal limits the one the user set is named, because it is the one to change.
    """
    if flag_bytes is not None and flag_bytes < 1:
        raise ProfileError(
            f"command line: memory flag is {_show(flag_bytes)} bytes, it must be at least 1. "
            "Leave it out to use what the profile and the machine allow."
        )
    limits: list[tuple[Literal["flag", "profile", "cgroup", "available"], int | None]] = [
        ("flag", flag_bytes),
        ("profile", profile.memory_bytes),
        ("cgroup", cgroup_limit_bytes),
        ("available", available_bytes),
    ]
    known = [(value, bound_by) for bound_by, value in limits if value is not None]
    least, bound_by = min(known, key=lambda pair: pair[0])
    return Budget(max(0, least), bound_by)


def parse_profile(text: str, where: str) -> DeviceProfile:
    """Read a profile from TOML; ``where`` names the file in every ProfileError."""
    if len(text) > MAX_PROFILE_BYTES:
        raise ProfileError(
            f"{where}: {len(text)} characters, a profile has at most {MAX_PROFILE_BYTES}. "
            "Is this the right file?"
        )
    values: dict[str, Any]
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also integers too long to read
        raise ProfileError(
            f"{where}: not TOML: {error}. Compare it with a shipped profile."
        ) from error
    if isinstance(values.get("date"), datetime.date):  # an unquoted date is a TOML date
        values["date"] = values["date"].isoformat()
    _check(values, where)
    return msgspec.convert(values, DeviceProfile)


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """Read a shipped profile by its name, or any ``.toml`` file by its path."""
    path = _locate(name_or_path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROFILE_BYTES + 1)
    except FileNotFoundError as error:
        raise ProfileError(
            f"{name_or_path}: no such profile. {_shipped_hint(path.stem)}"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ProfileError(f"{path}: cannot be read: {error}. {_shipped_hint('')}") from error
    if len(data) > MAX_PROFILE_BYTES:
        raise ProfileError(
            f"{path}: larger than {MAX_PROFILE_BYTES} bytes, the limit of a profile. "
            "Is this the right file?"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProfileError(
            f"{path}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}. "
            "Save the file as UTF-8."
        ) from error
    return parse_profile(text, str(path))


def shipped_profiles() -> tuple[str, ...]:
    """Names of the profiles that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _profiles_dir().glob("*.toml")))


def profile_toml(profile: DeviceProfile) -> str:
    """The profile as a commented TOML file that ``parse_profile`` reads back unchanged."""
    lines = []
    for key, value in msgspec.structs.asdict(profile).items():
        if key == "sources":
            continue
        if key not in _LIMITS:
            lines.append(f"{key} = {json.dumps(value, ensure_ascii=False)}")
            continue
        number = f"{value:_}" if _LIMITS[key].whole else f"{float(value):_}"
        lines.append(f"{key} = {number}{_human(key, value)}")
    lines += ["", "[sources]"]
    lines += [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in profile.sources.items()]
    return "\n".join(lines) + "\n"


def _check(values: Mapping[str, Any], where: str) -> None:
    """Raise ProfileError for the first key or value that is wrong."""
    _check_keys(values, where)
    if not (isinstance(values["name"], str) and _NAME.fullmatch(values["name"])):
        raise ProfileError(
            f"{where}: name is {_show(values['name'])}, it must be 1 to 64 characters of "
            "a-z, 0-9 and '-', like raspberry-pi-4b-4gb. Rename the board."
        )
    for key, (shortest, longest) in _TEXT_LIMITS.items():
        _check_text(values.get(key, ""), key, shortest, longest, where)
    for key, limit in _LIMITS.items():
        _check_figure(values.get(key, TORCH_FLOOR_BYTES), key, limit, where)
    if values["memory_bytes"] > values["memory_total_bytes"]:
        raise ProfileError(
            f"{where}: memory_bytes is {_show(values['memory_bytes'])}, more than the "
            f"memory_total_bytes of {_show(values['memory_total_bytes'])}. Lower it to what one "
            "process can have beside the operating system."
        )
    _check_date(values["date"], where)
    _check_sources(values.get("sources", {}), where)


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    """Every required key is there and no other; a near miss is named."""
    fields = DeviceProfile.__struct_fields__
    for key in values:
        if key not in fields:
            raise ProfileError(
                f"{where}: unknown key {_show(key)}.{_near_miss(key, fields)} "
                f"Known keys: {', '.join(fields)}."
            )
    missing = [key for key in _required() if key not in values]
    if missing:
        key = missing[0]
        meaning = f" ({_LIMITS[key].meaning})" if key in _LIMITS else ""
        rest = f"; also missing: {', '.join(missing[1:])}" if missing[1:] else ""
        raise ProfileError(
            f"{where}: {key}{meaning} is missing{rest}. Add it, or let `edge-sdk profile` measure."
        )


def _required() -> list[str]:
    """Keys without a default."""
    return [field.name for field in msgspec.structs.fields(DeviceProfile) if field.required]


def _check_figure(value: object, key: str, limit: _Limit, where: str) -> None:
    """One number: right type, finite, within its limits."""
    wanted = "a whole number" if limit.whole else "a number"
    bounds = f"from {_bound(limit.low)} to {_bound(limit.high)}"
    kinds = (int,) if limit.whole else (int, float)
    right_type = isinstance(value, kinds) and not isinstance(value, bool)
    if not right_type or not limit.low <= value <= limit.high:  # type: ignore[operator]
        raise ProfileError(
            f"{where}: {key} is {_show(value)}, it must be {wanted} {bounds} "
            f"({limit.meaning}). Check the value and its unit."
        )


def _check_text(value: object, key: str, shortest: int, longest: int, where: str) -> None:
    """One line of printable text of bounded length."""
    if isinstance(value, str) and shortest <= len(value) <= longest and value.isprintable():
        return
    raise ProfileError(
        f"{where}: {key} is {_show(value)}, it must be {shortest} to {longest} printable "
        "characters on one line. Shorten it or put it in quotes."
    )


def _check_date(value: object, where: str) -> None:
    """A calendar day in ISO form."""
    try:
        if isinstance(value, str) and len(value) == 10:
            datetime.date.fromisoformat(value)
            return
    except ValueError:
        pass
    raise ProfileError(
        f"{where}: date is {_show(value)}, it must be a day like 2026-03-31. "
        "Write the day the figures were taken."
    )


def _check_sources(sources: object, where: str) -> None:
    """A table from figures to where they come from."""
    if not isinstance(sources, Mapping):
        raise ProfileError(
            f"{where}: sources is {_show(sources)}, it must be a table. "
            'Write [sources], then lines like cores = "datasheet: ...".'
        )
    for key, text in sources.items():
        if key not in FIGURES:
            raise ProfileError(
                f"{where}: sources names {_show(key)}, which is no figure of a profile."
                f"{_near_miss(str(key), FIGURES)} Figures: {', '.join(FIGURES)}."
            )
        _check_text(text, f"sources.{key}", 1, _SOURCE_LENGTH, where)
        kind, colon, words = text.partition(":")
        if kind not in SOURCE_KINDS or not colon or not words.strip():
            raise ProfileError(
                f"{where}: sources.{key} is {_show(text)}, it must begin with one of "
                f"{', '.join(f'{kind}:' for kind in SOURCE_KINDS)} and then say more. "
                "Write where the figure comes from."
            )


def _near_miss(key: str, known: tuple[str, ...]) -> str:
    """A did-you-mean sentence with a leading space, or nothing."""
    import difflib  # only needed for an error message

    close = difflib.get_close_matches(key[:100], known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _show(value: object) -> str:
    """``repr`` of anything from a file, cut to a line's length."""
    if isinstance(value, int) and value.bit_length() > 256:  # repr refuses very long integers
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _bound(value: float) -> str:
    """A limit as people write it."""
    return str(int(value)) if value < 1e6 else f"{value:.3g}"


def _human(key: str, value: float) -> str:
    """A comment that gives the number in a unit people read; nothing where it is one already."""
    if key == "cores":
        return ""
    if key == "flops_per_s":
        return f"  # {value / 1e9:,.4g} GFLOP/s"
    if key.endswith("_bytes_per_s"):
        return f"  # {value / 1e6:,.6g} MB/s"
    if key == "storage_bytes":  # storage is sold in decimal units, memory in binary ones
        return f"  # {value / 1e9:,.4g} GB"
    return f"  # {value / MIB:,.0f} MiB"


def _profiles_dir() -> Path:
    """Where the shipped files are: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "profiles"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "profiles"


def _locate(name_or_path: str | Path) -> Path:
    """A bare name is a shipped profile; anything with a separator or suffix is a path."""
    if isinstance(name_or_path, str) and _NAME.fullmatch(name_or_path):
        return _profiles_dir() / f"{name_or_path}.toml"
    return Path(name_or_path)


def _shipped_hint(name: str) -> str:
    """What a caller may write instead."""
    names = shipped_profiles()
    return (
        f"{_near_miss(name, names)} Shipped profiles: {', '.join(names) or 'none found'}. "
        "Or give the path of a .toml file, or run `edge-sdk profile` to measure this device."
    ).strip()

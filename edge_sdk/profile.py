"""What one device may spend on training: its profile, the TOML form, limits and budgets.

A profile is a TOML file named like its board. Every figure carries its unit in the key, and
``[sources]`` says for each whether it was measured, benchmarked by others, read in a datasheet,
estimated or assumed.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_sdk.errors import MIB, ProfileError
from edge_sdk.figures import (
    CORRECTION_LIMITS,
    FIGURES,
    LABEL,
    LIMITS,
    POLICY_LIMITS,
    SOURCE_KINDS,
    check_corrections,
    check_date,
    check_figure,
    check_keys,
    check_overhead,
    check_rates,
    check_sources,
    check_switch,
    check_table,
    check_text,
    human,
    near_miss,
    show,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "FIGURES",
    "MAX_PROFILE_BYTES",
    "SOURCE_KINDS",
    "TORCH_FLOOR_BYTES",
    "Budget",
    "Correction",
    "DeviceProfile",
    "Policy",
    "budget",
    "load_profile",
    "parse_profile",
    "profile_toml",
    "shipped_profiles",
]

MAX_PROFILE_BYTES = 64 * 1024

# Resident memory of a process that has imported torch and done one tiny step, before any model:
# 171 MiB on x86-64 with torch 2.13 once pages that only loading needed are given back; the rest is
# for the spread.
TORCH_FLOOR_BYTES = 180 * MIB

_TABLES = ("policy", "rates", "overhead", "corrections", "sources")
_MEANINGS = {
    "rates": "by kind of operation, measured on this device",
    "overhead": "memory of the runtime by kind of operation",
    "corrections": "measured over predicted, learnt on this device",
}
_TEXT_LIMITS = {"board": (1, 128), "accelerator": (0, 128), "measured_with": (0, 128)}
_OPTIONAL_FIGURES = ("torch_floor_bytes", "storage_read_bytes_per_s")


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a device does not train although it could; each rule holds until it is well past.

    pause_above_celsius:          training pauses above, and goes on only below
                                  ``resume_below_celsius``.
    train_on_battery:             False: only while a charger is connected.
    min_battery_percent:          charge below which it pauses, unless it is being charged.
    pause_when_throttled:         pause while the processor runs slower to cool or to save power.
    pause_above_pressure_percent: share of the last 10 s in which some process waited for memory.
    release_memory_after_round:   the training process ends after each round; its next start costs
                                  loading torch again.
    """

    pause_above_celsius: float = 80.0
    resume_below_celsius: float = 70.0
    min_battery_percent: float = 30.0
    train_on_battery: bool = True
    pause_when_throttled: bool = False
    pause_above_pressure_percent: float = 40.0
    release_memory_after_round: bool = False

    def __post_init__(self) -> None:
        _check_policy(msgspec.structs.asdict(self), "policy")


class Correction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured over predicted for one task on this device, and from how many measurements."""

    memory: float
    time: float
    samples: int

    def __post_init__(self) -> None:
        for key, value in msgspec.structs.asdict(self).items():
            check_figure(value, key, CORRECTION_LIMITS[key], "correction")


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
    storage_read_bytes_per_s:     sequential reads of what is not in memory; None: not known.
    accelerator:                  "" or "cuda ...": present, but not counted in ``flops_per_s``.
    date:                         day the figures were taken, YYYY-MM-DD.
    measured_with:                versions that measured, or "".
    policy:                       when not to train.
    rates:                        by kind of operation, the unit in the key's ending.
    overhead:                     memory of the runtime by kind of operation, bytes.
    corrections:                  by task, measured over predicted.
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
    storage_read_bytes_per_s: float | None = None
    accelerator: str = ""
    date: str
    measured_with: str = ""
    policy: Policy = msgspec.field(default_factory=Policy)
    rates: dict[str, float] = msgspec.field(default_factory=dict)
    overhead: dict[str, int] = msgspec.field(default_factory=dict)
    corrections: dict[str, Correction] = msgspec.field(default_factory=dict)
    sources: dict[str, str] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        values = msgspec.structs.asdict(self)
        if self.storage_read_bytes_per_s is None:
            del values["storage_read_bytes_per_s"]
        _check(values, f"profile {show(self.name)}")

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
            f"command line: memory flag is {show(flag_bytes)} bytes, it must be at least 1. "
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
    values = {k: v for k, v in msgspec.structs.asdict(profile).items() if v is not None}
    tables = {key: values.pop(key) for key in _TABLES}
    lines = list(_entries(values))
    lines += ["", "[policy]", *_entries(msgspec.structs.asdict(profile.policy))]
    for name in ("rates", "overhead"):
        if tables[name]:
            lines += ["", f"[{name}]  # {_MEANINGS[name]}", *_entries(tables[name])]
    for task, correction in profile.corrections.items():
        lines += ["", f"[corrections.{task}]  # {_MEANINGS['corrections']}"]
        lines += _entries(msgspec.structs.asdict(correction))
    lines += ["", "[sources]", *_entries(profile.sources)]
    return "\n".join(lines) + "\n"


def _entries(values: Mapping[str, Any]) -> Iterator[str]:
    """Lines of one table, numbers with a comment in the unit people read."""
    for key, value in values.items():
        if isinstance(value, (str, bool)):
            yield f"{key} = {json.dumps(value, ensure_ascii=False)}"
            continue
        # The limit's kind decides, so that a float is read back as one.
        whole = LIMITS[key].whole if key in LIMITS else isinstance(value, int)
        number = f"{value:_}" if whole else f"{float(value):_}"
        comment = human(key, value)
        yield f"{key} = {number}  # {comment}" if comment else f"{key} = {number}"


def _check(values: Mapping[str, Any], where: str) -> None:
    """Raise ProfileError for the first key or value that is wrong."""
    check_keys(values, DeviceProfile.__struct_fields__, where)
    _check_missing(values, where)
    if not (isinstance(values["name"], str) and LABEL.fullmatch(values["name"])):
        raise ProfileError(
            f"{where}: name is {show(values['name'])}, it must be 1 to 64 characters of "
            "a-z, 0-9 and '-', like raspberry-pi-4b-4gb. Rename the board."
        )
    for key, (shortest, longest) in _TEXT_LIMITS.items():
        check_text(values.get(key, ""), key, shortest, longest, where)
    for key, limit in LIMITS.items():
        if key in values or key not in _OPTIONAL_FIGURES:
            check_figure(values[key], key, limit, where)
    if values["memory_bytes"] > values["memory_total_bytes"]:
        raise ProfileError(
            f"{where}: memory_bytes is {show(values['memory_bytes'])}, more than the "
            f"memory_total_bytes of {show(values['memory_total_bytes'])}. Lower it to what one "
            "process can have beside the operating system."
        )
    check_date(values["date"], where)
    _check_tables(values, where)


def _check_tables(values: Mapping[str, Any], where: str) -> None:
    """The tables; what was built here already has been checked."""
    policy = values.get("policy", {})
    if not isinstance(policy, Policy):
        _check_policy(dict(check_table(policy, "policy", "train_on_battery = false", where)), where)
    corrections = values.get("corrections", {})
    if isinstance(corrections, Mapping):
        corrections = {
            task: msgspec.structs.asdict(value) if isinstance(value, Correction) else value
            for task, value in corrections.items()
        }
    check_rates(values.get("rates", {}), where)
    check_overhead(values.get("overhead", {}), where)
    check_corrections(corrections, where)
    check_sources(values.get("sources", {}), where)


def _check_policy(values: Mapping[str, Any], where: str) -> None:
    """Each rule by itself, and that what pauses also resumes."""
    place = where if where == "policy" else f"{where}: policy"
    check_keys(values, Policy.__struct_fields__, place)
    fields = msgspec.structs.fields(Policy)
    rules: dict[str, Any] = {field.name: field.default for field in fields} | dict(values)
    for key, value in rules.items():
        if key in POLICY_LIMITS:
            check_figure(value, key, POLICY_LIMITS[key], place)
        else:
            check_switch(value, key, place)
    if rules["resume_below_celsius"] > rules["pause_above_celsius"]:
        raise ProfileError(
            f"{place}: resume_below_celsius is {rules['resume_below_celsius']:g}, above the "
            f"pause_above_celsius of {rules['pause_above_celsius']:g}. Make it some degrees lower."
        )


def _check_missing(values: Mapping[str, Any], where: str) -> None:
    """Every key without a default is there."""
    required = [field.name for field in msgspec.structs.fields(DeviceProfile) if field.required]
    missing = [key for key in required if key not in values]
    if missing:
        key = missing[0]
        meaning = f" ({LIMITS[key].meaning})" if key in LIMITS else ""
        rest = f"; also missing: {', '.join(missing[1:])}" if missing[1:] else ""
        raise ProfileError(
            f"{where}: {key}{meaning} is missing{rest}. Add it, or let `edge-sdk profile` measure."
        )


def _profiles_dir() -> Path:
    """Where the shipped files are: inside an installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "profiles"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "profiles"


def _locate(name_or_path: str | Path) -> Path:
    """A bare name is a shipped profile; anything with a separator or suffix is a path."""
    if isinstance(name_or_path, str) and LABEL.fullmatch(name_or_path):
        return _profiles_dir() / f"{name_or_path}.toml"
    return Path(name_or_path)


def _shipped_hint(name: str) -> str:
    """What a caller may write instead."""
    names = shipped_profiles()
    return (
        f"{near_miss(name, names)} Shipped profiles: {', '.join(names) or 'none found'}. "
        "Or give the path of a .toml file, or run `edge-sdk profile` to measure this device."
    ).strip()

"""The state of the board now: how warm, whether slowed down, on what power, short of memory.

Nothing is guessed: what no file tells is ``None``, with the reason in ``unknown``.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edge_sdk.memory import CGROUP, PROC, memory_groups, read
from edge_sdk.profile import Policy

SYS = Path("/sys")
VCGENCMD_LIMIT_S = 1.0
# A charge below the limit ends a pause only when it is well above, and so does pressure.
BATTERY_RESUME_PERCENT = 5.0
PRESSURE_RESUME_SHARE = 0.5

# Sensors that say nothing about the processor: on the first Jetsons "PMIC-Die" always reads 100.
_OTHER_SENSORS = re.compile(r"pmic|nvme|drivetemp|iwlwifi|ath\d|mt7|battery|BAT\d", re.IGNORECASE)
_PLAUSIBLE_CELSIUS = (-60.0, 150.0)
# A share below that is no rounding of the highest clock.
_FULL_CLOCK_SHARE = 0.95
_FIRMWARE = "devices/platform/soc/soc:firmware/get_throttled"
# Bits of the firmware's answer that hold now; 16 places higher the same since the start.
_FIRMWARE_BITS = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}

HOT, BATTERY, SUPPLY = "too hot", "battery low", "on battery"
PRESSURE, THROTTLED = "memory pressure", "throttled"


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """What the system says now; every ``None`` has its reason in ``unknown``, by field name.

    celsius:          warmest sensor of processor and board; ``sensor`` names it.
    throttled:        whether the processor is slowed down; ``throttled_by`` says by what.
    throttled_before: what slowed it down since the start, as far as the firmware remembers.
    throttle_count:   the processor's own counter of such events.
    clock_share:      clock now over the highest, of the slowest core; low when idle.
    on_battery:       whether a battery is being used up.
    battery_percent:  charge, the mean of several.
    pressure_some_percent, pressure_full_percent: share of the last 10 s in which some, or all,
                      processes waited for memory; the worst of the machine and our cgroups.
    """

    celsius: float | None = None
    sensor: str = ""
    throttled: bool | None = None
    throttled_by: tuple[str, ...] = ()
    throttled_before: tuple[str, ...] = ()
    throttle_count: int | None = None
    clock_share: float | None = None
    on_battery: bool | None = None
    battery_percent: float | None = None
    pressure_some_percent: float | None = None
    pressure_full_percent: float | None = None
    unknown: dict[str, str] = msgspec.field(default_factory=dict)


def read_condition(
    before: Condition | None = None,
    *,
    proc_root: Path = PROC,
    sys_root: Path = SYS,
    cgroup_root: Path = CGROUP,
    firmware_command: str | None = "vcgencmd",
) -> Condition:
    """Look at everything, in milliseconds where the firmware need not be asked by a command.

    ``before`` is an earlier reading: counted events since then are throttling now.
    """
    unknown: dict[str, str] = {}
    celsius, sensor = _warmest(sys_root, unknown)
    share = _clock_share(sys_root, unknown)
    count = _throttle_count(sys_root, unknown)
    throttled, causes, earlier = _throttling(sys_root, firmware_command, unknown)
    counted = before.throttle_count if before is not None else None
    if count is not None and counted is not None:
        unknown.pop("throttled", None)
        throttled = throttled or count > counted
        causes += ("slowed down by its own heat sensor",) if count > counted else ()
    on_battery, percent = _power(sys_root, unknown)
    some, full = _pressure(proc_root, cgroup_root, unknown)
    return Condition(
        celsius=celsius,
        sensor=sensor,
        throttled=throttled,
        throttled_by=causes,
        throttled_before=earlier,
        throttle_count=count,
        clock_share=share,
        on_battery=on_battery,
        battery_percent=percent,
        pressure_some_percent=some,
        pressure_full_percent=full,
        unknown=unknown,
    )


def must_pause(condition: Condition, policy: Policy, paused: str | None = None) -> str | None:
    """Why training must pause now, or ``None``; what is not known pauses nothing.

    ``paused`` is the reason of the pause that holds already: its rule ends it only well past the
    limit, so that training does not stop and start all the time. A reason begins with one of HOT,
    BATTERY, SUPPLY, PRESSURE and THROTTLED.
    """
    for kind, rule in _RULES.items():
        words = rule(condition, policy, paused is not None and paused.startswith(kind))
        if words is not None:
            return f"{kind}: {words}"
    return None


def firmware_words(bits: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a Raspberry Pi's throttling bits say: now, and since the start."""
    now = tuple(words for bit, words in _FIRMWARE_BITS.items() if bits >> bit & 1)
    earlier = tuple(words for bit, words in _FIRMWARE_BITS.items() if bits >> (bit + 16) & 1)
    return now, earlier


def _heat(condition: Condition, policy: Policy, held: bool) -> str | None:
    above, below = policy.pause_above_celsius, policy.resume_below_celsius
    if condition.celsius is None or condition.celsius <= (below if held else above):
        return None
    return (
        f"{condition.celsius:.0f} degrees Celsius at {condition.sensor}, training pauses above "
        f"{above:g} and goes on below {below:g}"
    )


def _battery(condition: Condition, policy: Policy, held: bool) -> str | None:
    least = policy.min_battery_percent
    resume = min(100.0, least + BATTERY_RESUME_PERCENT)
    percent = condition.battery_percent
    # Not known to be charging counts as discharging: an empty battery ends everything.
    if percent is None or condition.on_battery is False or percent >= (resume if held else least):
        return None
    return (
        f"{percent:.0f} % left, training pauses below {least:g} % and goes on at {resume:g} % "
        "or when charging"
    )


def _supply(condition: Condition, policy: Policy, held: bool) -> str | None:
    if policy.train_on_battery or not condition.on_battery:
        return None
    return "the policy lets this device train only while it is charging"


def _stalled(condition: Condition, policy: Policy, held: bool) -> str | None:
    above = policy.pause_above_pressure_percent
    below = above * PRESSURE_RESUME_SHARE
    percent = condition.pressure_some_percent
    if percent is None or percent <= (below if held else above):
        return None
    return (
        f"{percent:.0f} % of the last 10 s something waited for memory, training pauses above "
        f"{above:g} % and goes on below {below:g} %"
    )


def _slowed(condition: Condition, policy: Policy, held: bool) -> str | None:
    if not policy.pause_when_throttled or not condition.throttled:
        return None
    return f"the processor is slowed down ({', '.join(condition.throttled_by) or 'cause unknown'})"


_RULES: dict[str, Callable[[Condition, Policy, bool], str | None]] = {
    HOT: _heat,
    BATTERY: _battery,
    SUPPLY: _supply,
    PRESSURE: _stalled,
    THROTTLED: _slowed,
}


def _warmest(sys_root: Path, unknown: dict[str, str]) -> tuple[float | None, str]:
    """Degrees and name of the warmest sensor that is the processor's or the board's."""
    low, high = _PLAUSIBLE_CELSIUS
    found = [
        (milli / 1000, name)
        for name, path in _sensors(sys_root)
        if not _OTHER_SENSORS.search(name)
        and (milli := _integer(path)) is not None
        and low <= milli / 1000 <= high
    ]
    if not found:
        unknown["celsius"] = f"no sensor can be read below {sys_root / 'class'}"
        return None, ""
    return max(found)


def _sensors(sys_root: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of every temperature sensor."""
    for zone in sorted((sys_root / "class" / "thermal").glob("thermal_zone*")):
        yield _word(zone / "type") or zone.name, zone / "temp"
    for chip in sorted((sys_root / "class" / "hwmon").glob("hwmon*")):
        name = _word(chip / "name") or chip.name
        for path in sorted(chip.glob("temp*_input")):
            yield name, path


def _clock_share(sys_root: Path, unknown: dict[str, str]) -> float | None:
    """Clock now over the highest possible, of the slowest core."""
    shares = [now / top for now, top in _clocks(sys_root, "scaling_cur_freq")]
    if not shares:
        unknown["clock_share"] = "the kernel tells no clock of the processor"
        return None
    return min(1.0, *shares)


def _clocks(sys_root: Path, file: str) -> Iterator[tuple[int, int]]:
    """A clock in kHz of each group of cores, and the highest of the hardware."""
    for policy in sorted((sys_root / "devices/system/cpu/cpufreq").glob("policy*")):
        now, top = _integer(policy / file), _integer(policy / "cpuinfo_max_freq")
        if now is not None and top:
            yield now, top


def _throttle_count(sys_root: Path, unknown: dict[str, str]) -> int | None:
    """Events all cores have counted since the start; x86-64 has such counters."""
    pattern = "devices/system/cpu/cpu*/thermal_throttle/*_throttle_count"
    counts = [_integer(path) for path in sys_root.glob(pattern)]
    known = [count for count in counts if count is not None]
    if not known:
        unknown["throttle_count"] = "this processor has no counter of it"
        return None
    return sum(known)


def _throttling(
    sys_root: Path, firmware_command: str | None, unknown: dict[str, str]
) -> tuple[bool | None, tuple[str, ...], tuple[str, ...]]:
    """Whether the processor is slowed down now, by what, and by what earlier."""
    bits, reason = _firmware_bits(sys_root, firmware_command)
    now, earlier = firmware_words(bits or 0)
    causes = list(now)
    told = bits is not None
    for device in sorted((sys_root / "class" / "thermal").glob("cooling_device*")):
        kind, state = _word(device / "type"), _integer(device / "cur_state")
        if state is not None and (kind == "Processor" or "cpufreq" in kind):
            told = True
            causes += [f"{kind} lowers the clock"] if state > 0 else []
    for allowed, top in _clocks(sys_root, "scaling_max_freq"):
        told = True
        if allowed < _FULL_CLOCK_SHARE * top:
            causes.append(f"clock capped at {allowed // 1000} of {top // 1000} MHz")
    if not told:
        unknown["throttled"] = f"neither firmware nor kernel tells: {reason}"
        return None, (), ()
    return bool(causes), tuple(dict.fromkeys(causes)), earlier


def _firmware_bits(sys_root: Path, command: str | None) -> tuple[int | None, str]:
    """The bits a Raspberry Pi's firmware gives, or why there are none."""
    answer = _word(sys_root / _FIRMWARE)
    found = re.fullmatch(r"(?:0x)?([0-9a-fA-F]{1,8})", answer)
    if found:
        return int(found[1], 16), ""
    path = shutil.which(command) if command else None
    if path is None:
        return None, "no vcgencmd here"
    try:
        done = subprocess.run(
            [path, "get_throttled"], capture_output=True, timeout=VCGENCMD_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, f"vcgencmd does not answer: {str(error)[:200]}"
    said = done.stdout[:200].decode("utf-8", "replace").strip()
    told = re.search(r"throttled=0x([0-9a-fA-F]{1,8})\b", said)
    return (int(told[1], 16), "") if told else (None, f"vcgencmd answers {said[:80]!r}")


def _power(sys_root: Path, unknown: dict[str, str]) -> tuple[bool | None, float | None]:
    """Whether a battery is being used up, and its charge."""
    if sys_root == SYS and sys.platform != "linux":
        import psutil

        if (battery := psutil.sensors_battery()) is not None:
            return not battery.power_plugged, float(battery.percent)
    root = sys_root / "class" / "power_supply"
    # A mouse's battery is listed too, with the scope "Device".
    supplies = [path for path in sorted(root.glob("*")) if _word(path / "scope") != "Device"]
    batteries = [path for path in supplies if _word(path / "type") == "Battery"]
    plugs = [_integer(path / "online") for path in supplies if path not in batteries]
    if not batteries:
        why = "no battery is listed"
        unknown["battery_percent"] = f"{why} in {root}"
        if 1 in plugs:
            return False, None
        unknown["on_battery"] = f"{why} and no charger is connected, in {root}"
        return None, None
    charges = [charge for path in batteries if (charge := _charge(path)) is not None]
    if not charges:
        unknown["battery_percent"] = f"{batteries[0]} tells no charge"
    states = {_word(path / "status") for path in batteries}
    known = states & {"Charging", "Discharging", "Full", "Not charging"}
    on_battery: bool | None = "Discharging" in states if known else None
    if not known and any(online is not None for online in plugs):
        on_battery = 1 not in plugs
    if on_battery is None:
        unknown["on_battery"] = f"{batteries[0]} tells no status"
    return on_battery, statistics.fmean(charges) if charges else None


def _charge(battery: Path) -> float | None:
    """Percent, as told or from its parts."""
    told = _integer(battery / "capacity")
    if told is not None and 0 <= told <= 100:
        return float(told)
    for unit in ("energy", "charge"):
        now, full = _integer(battery / f"{unit}_now"), _integer(battery / f"{unit}_full")
        if now is not None and full is not None and now >= 0 and full > 0:
            return min(100.0, 100.0 * now / full)
    return None


def _pressure(
    proc_root: Path, cgroup_root: Path, unknown: dict[str, str]
) -> tuple[float | None, float | None]:
    """Share of the last 10 s in which some and all processes waited for memory."""
    files = [proc_root / "pressure" / "memory"]
    files += [path / "memory.pressure" for _, path in memory_groups(proc_root, cgroup_root)]
    text = "\n".join(read(path) or "" for path in files)
    worst: list[float | None] = []
    for kind in ("some", "full"):
        found = re.findall(rf"^{kind} avg10=(\d{{1,3}}\.\d{{1,3}}) ", text, re.MULTILINE)
        worst.append(max((min(100.0, float(share)) for share in found), default=None))
        if not found:
            unknown[f"pressure_{kind}_percent"] = f"{files[0]} and the cgroups' do not tell it"
    return worst[0], worst[1]


def _integer(path: Path) -> int | None:
    """A file that holds one whole number, which may be negative."""
    text = _word(path)
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _word(path: Path) -> str:
    """A small file without the space around it; "" if it cannot be read."""
    return (read(path) or "")[:100].strip()

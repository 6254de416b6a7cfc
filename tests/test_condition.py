"""Heat, throttling, power and pressure read from real files, and when they make training pause."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.condition import (
    BATTERY,
    HOT,
    PRESSURE,
    SUPPLY,
    THROTTLED,
    Condition,
    firmware_words,
    must_pause,
    read_condition,
)
from edge_sdk.profile import Policy

ZONE = "sys/class/thermal/thermal_zone"
SUPPLIES = "sys/class/power_supply"
CPUFREQ = "sys/devices/system/cpu/cpufreq/policy0"
COUNT = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
PSI = "some avg10={} avg60=0.00 avg300=0.00 total=1\nfull avg10={} avg60=0.00 avg300=0.00 total=1"
POLICY = Policy()


def look(
    root: Path,
    files: dict[str, str | int] | None = None,
    before: Condition | None = None,
    command: str | None = None,
) -> Condition:
    for name, content in (files or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return read_condition(
        before,
        proc_root=root / "proc",
        sys_root=root / "sys",
        cgroup_root=root / "cgroup",
        firmware_command=command,
    )


def test_a_bare_machine_knows_nothing_and_says_why(tmp_path: Path) -> None:
    found = look(tmp_path)
    values = msgspec.structs.asdict(found)
    unknown = values.pop("unknown")
    assert {key for key, value in values.items() if value is None} == set(unknown)
    assert all(unknown.values())
    assert must_pause(found, Policy(train_on_battery=False, pause_when_throttled=True)) is None


def test_this_machine_answers_at_once() -> None:
    found = read_condition()
    assert set(found.unknown) <= set(Condition.__struct_fields__)


# Temperature


def test_the_warmest_sensor_that_matters(tmp_path: Path) -> None:
    found = look(
        tmp_path,
        {
            f"{ZONE}0/type": "cpu-thermal",
            f"{ZONE}0/temp": 61_234,
            f"{ZONE}1/type": "GPU-therm",
            f"{ZONE}1/temp": 64_000,
            f"{ZONE}2/type": "PMIC-Die",
            f"{ZONE}2/temp": 100_000,
            "sys/class/hwmon/hwmon0/name": "nvme",
            "sys/class/hwmon/hwmon0/temp1_input": 80_000,
            "sys/class/hwmon/hwmon1/name": "coretemp",
            "sys/class/hwmon/hwmon1/temp2_input": 63_000,
        },
    )
    assert (found.celsius, found.sensor) == (64.0, "GPU-therm")


@pytest.mark.parametrize("content", ["", "-274000", "999999", "warm", "1e5", "9" * 30, "6\n1"])
def test_a_sensor_that_reads_nonsense_is_unknown(tmp_path: Path, content: str) -> None:
    found = look(tmp_path, {f"{ZONE}0/temp": content})
    assert found.celsius is None
    assert "no sensor can be read" in found.unknown["celsius"]


def test_frost_is_a_temperature(tmp_path: Path) -> None:
    found = look(tmp_path, {f"{ZONE}0/temp": -12_500})
    assert (found.celsius, found.sensor) == (-12.5, "thermal_zone0")


# Throttling


def test_the_bits_of_the_firmware() -> None:
    assert firmware_words(0) == ((), ())
    assert firmware_words(0x50005) == (
        ("under-voltage", "throttled"),
        ("under-voltage", "throttled"),
    )
    assert firmware_words(0xA0002) == (
        ("frequency capped",),
        ("frequency capped", "soft temperature limit"),
    )


@pytest.mark.parametrize(
    ("bits", "now", "before"),
    [
        ("0", (), ()),
        ("80008", ("soft temperature limit",), ("soft temperature limit",)),
        ("0x10000", (), ("under-voltage",)),
    ],
)
def test_the_kernel_hands_the_bits_on(
    tmp_path: Path, bits: str, now: tuple[str, ...], before: tuple[str, ...]
) -> None:
    found = look(tmp_path, {"sys/devices/platform/soc/soc:firmware/get_throttled": bits})
    assert (found.throttled, found.throttled_by) == (bool(now), now)
    assert found.throttled_before == before


def command(tmp_path: Path, script: str) -> str:
    path = tmp_path / "vcgencmd"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_the_firmware_is_asked_by_its_command(tmp_path: Path) -> None:
    found = look(tmp_path, command=command(tmp_path, 'echo "throttled=0x4 for $1"'))
    assert found.throttled_by == ("throttled",)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo VCHI initialization failed; exit 255", "vcgencmd answers 'VCHI initialization"),
        ("exec sleep 30", "vcgencmd does not answer: .*timed out"),
        ("printf 'throttled=0x%0300d' 7", "vcgencmd answers 'throttled=0x0000"),
    ],
)
def test_a_command_that_does_not_answer_is_given_up(
    tmp_path: Path, script: str, reason: str
) -> None:
    found = look(tmp_path, command=command(tmp_path, script))
    assert found.throttled is None
    assert re.search(reason, found.unknown["throttled"])


def test_a_lowered_clock_is_throttling_and_an_idle_one_is_not(tmp_path: Path) -> None:
    clocks: dict[str, str | int] = {
        f"{CPUFREQ}/cpuinfo_max_freq": 1_500_000,
        f"{CPUFREQ}/scaling_max_freq": 1_500_000,
        f"{CPUFREQ}/scaling_cur_freq": 600_000,
    }
    idle = look(tmp_path, clocks)
    assert (idle.throttled, idle.clock_share) == (False, 0.4)
    capped = look(tmp_path, {f"{CPUFREQ}/scaling_max_freq": 900_000})
    assert capped.throttled_by == ("clock capped at 900 of 1500 MHz",)


def test_a_cooling_device_at_work_is_throttling(tmp_path: Path) -> None:
    device = "sys/class/thermal/cooling_device0"
    idle = look(tmp_path, {f"{device}/type": "thermal-cpufreq-0", f"{device}/cur_state": 0})
    assert idle.throttled is False
    busy = look(tmp_path, {f"{device}/cur_state": 2})
    assert busy.throttled_by == ("thermal-cpufreq-0 lowers the clock",)
    fan = look(tmp_path, {f"{device}/type": "pwm-fan"})
    assert fan.throttled is None


def test_counted_events_are_throttling_only_when_they_are_new(tmp_path: Path) -> None:
    first = look(tmp_path, {COUNT: 5})
    assert (first.throttle_count, first.throttled) == (5, None)
    same = look(tmp_path, before=first)
    assert same.throttled is False
    assert "throttled" not in same.unknown
    more = look(tmp_path, {COUNT: 6}, before=same)
    assert more.throttled_by == ("slowed down by its own heat sensor",)


# Power


@pytest.mark.parametrize(
    ("files", "on_battery", "percent"),
    [
        ({"AC/type": "Mains", "AC/online": 1}, False, None),
        ({"AC/type": "Mains", "AC/online": 0}, None, None),
        ({"B/type": "Battery", "B/status": "Discharging", "B/capacity": 71}, True, 71.0),
        ({"B/type": "Battery", "B/status": "Full", "B/capacity": 100}, False, 100.0),
        (
            {
                "B/type": "Battery",
                "B/status": "Unknown",
                "B/capacity": 50,
                "AC/type": "USB",
                "AC/online": 0,
            },
            True,
            50.0,
        ),
        ({"B/type": "Battery", "B/status": "Unknown"}, None, None),
        (
            {
                "A/type": "Battery",
                "A/status": "Charging",
                "A/capacity": 0,
                "B/type": "Battery",
                "B/status": "Discharging",
                "B/capacity": 90,
            },
            True,
            45.0,
        ),
        (
            {
                "B/type": "Battery",
                "B/status": "Charging",
                "B/capacity": -1,
                "B/energy_now": 20,
                "B/energy_full": 80,
            },
            False,
            25.0,
        ),
        ({"mouse/type": "Battery", "mouse/scope": "Device", "mouse/capacity": 3}, None, None),
        ({"B/type": "Battery", "B/energy_now": 5, "B/energy_full": 0}, None, None),
    ],
)
def test_power_and_charge(
    tmp_path: Path, files: dict[str, str | int], on_battery: bool | None, percent: float | None
) -> None:
    found = look(tmp_path, {f"{SUPPLIES}/{name}": value for name, value in files.items()})
    assert (found.on_battery, found.battery_percent) == (on_battery, percent)
    assert ("on_battery" in found.unknown) == (on_battery is None)
    assert ("battery_percent" in found.unknown) == (percent is None)


# Pressure


def test_the_worst_of_machine_and_cgroups(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "proc/pressure/memory": PSI.format("1.50", "0.25"),
        "proc/self/cgroup": "0::/a/b",
        "cgroup/a/b/memory.pressure": PSI.format("12.00", "0.00"),
        "cgroup/a/memory.pressure": PSI.format("3.00", "2.00"),
    }
    found = look(tmp_path, files)
    assert (found.pressure_some_percent, found.pressure_full_percent) == (12.0, 2.0)


@pytest.mark.parametrize("content", ["", "some avg10=nan avg60=1", "some avg10=-1.00 ", "x" * 999])
def test_pressure_that_is_nonsense_is_unknown(tmp_path: Path, content: str) -> None:
    found = look(tmp_path, {"proc/pressure/memory": content})
    assert found.pressure_some_percent is None
    assert "pressure_some_percent" in found.unknown


# When to pause


@pytest.mark.parametrize(
    ("state", "policy", "reason"),
    [
        (
            Condition(celsius=83.4, sensor="cpu-thermal"),
            POLICY,
            "too hot: 83 degrees Celsius at cpu-thermal, training pauses above 80 and goes on "
            "below 70",
        ),
        (
            Condition(on_battery=True, battery_percent=20.0),
            POLICY,
            "battery low: 20 % left, training pauses below 30 % and goes on at 35 % or when "
            "charging",
        ),
        (
            Condition(on_battery=True, battery_percent=99.0),
            Policy(train_on_battery=False),
            "on battery: the policy lets this device train only while it is charging",
        ),
        (
            Condition(pressure_some_percent=55.0),
            POLICY,
            "memory pressure: 55 % of the last 10 s something waited for memory, training pauses "
            "above 40 % and goes on below 20 %",
        ),
        (
            Condition(throttled=True, throttled_by=("under-voltage",)),
            Policy(pause_when_throttled=True),
            "throttled: the processor is slowed down (under-voltage)",
        ),
        (Condition(throttled=True), POLICY, None),
        (Condition(on_battery=False, battery_percent=5.0), POLICY, None),
        (Condition(celsius=80.0, pressure_some_percent=40.0, battery_percent=30.0), POLICY, None),
        (Condition(), Policy(train_on_battery=False, pause_when_throttled=True), None),
    ],
)
def test_reasons(state: Condition, policy: Policy, reason: str | None) -> None:
    assert must_pause(state, policy) == reason


def run_through(states: list[Condition], policy: Policy = POLICY) -> list[bool]:
    """Whether it pauses at each of these, one after the other."""
    paused: str | None = None
    found = []
    for state in states:
        paused = must_pause(state, policy, paused)
        found.append(paused is not None)
    return found


def test_heat_must_fall_well_below_before_training_goes_on() -> None:
    degrees = [79.0, 80.5, 79.0, 70.5, 70.0, 75.0, 80.0]
    states = [Condition(celsius=celsius, sensor="x") for celsius in degrees]
    assert run_through(states) == [False, True, True, True, False, False, False]


def test_a_battery_must_be_clearly_fuller_or_charging() -> None:
    charges = [31.0, 29.0, 31.0, 34.0, 35.0, 31.0]
    states = [Condition(on_battery=True, battery_percent=charge) for charge in charges]
    assert run_through(states) == [False, True, True, True, False, False]
    charging = Condition(on_battery=False, battery_percent=29.0)
    assert run_through([states[1], charging]) == [True, False]


def test_pressure_must_fall_to_half() -> None:
    states = [Condition(pressure_some_percent=share) for share in (39.0, 41.0, 25.0, 20.0, 30.0)]
    assert run_through(states) == [False, True, True, False, False]


def test_a_pause_for_one_reason_does_not_tighten_another() -> None:
    held = must_pause(Condition(pressure_some_percent=90.0), POLICY)
    assert held is not None
    assert must_pause(Condition(celsius=75.0, sensor="x"), POLICY, held) is None


@pytest.mark.parametrize("least", [0.0, 100.0])
def test_the_ends_of_the_battery_rule(least: float) -> None:
    policy = Policy(min_battery_percent=least)
    full, empty = (Condition(on_battery=True, battery_percent=share) for share in (100.0, 0.0))
    assert must_pause(full, policy, must_pause(empty, policy)) is None


maybe = st.none() | st.floats(0, 100)


@given(
    st.builds(
        Condition,
        celsius=maybe,
        on_battery=st.none() | st.booleans(),
        battery_percent=maybe,
        pressure_some_percent=maybe,
        throttled=st.none() | st.booleans(),
    ),
    st.builds(Policy, train_on_battery=st.booleans(), pause_when_throttled=st.booleans()),
)
def test_what_pauses_goes_on_pausing_and_what_holds_no_pause_starts_none(
    state: Condition, policy: Policy
) -> None:
    reason = must_pause(state, policy)
    if reason is None:
        return
    assert reason.startswith((HOT, BATTERY, SUPPLY, PRESSURE, THROTTLED))
    assert must_pause(state, policy, reason) == reason

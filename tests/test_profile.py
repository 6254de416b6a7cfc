"""A profile round-trips through TOML, and every way to be wrong is a ProfileError that helps."""

from __future__ import annotations

import math
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import MIB, ConfigError, ProfileError
from edge_sdk.figures import CORRECTION_LIMITS, MAX_TABLE_KEYS, POLICY_LIMITS, SOURCED
from edge_sdk.profile import (
    FIGURES,
    MAX_PROFILE_BYTES,
    SOURCE_KINDS,
    TORCH_FLOOR_BYTES,
    Budget,
    Correction,
    DeviceProfile,
    Policy,
    budget,
    load_profile,
    parse_profile,
    profile_toml,
    shipped_profiles,
)

VALUES: dict[str, Any] = {
    "name": "test-board",
    "board": "Test Board, rev 2",
    "memory_total_bytes": 512 * MIB,
    "memory_bytes": 300 * MIB,
    "cores": 4,
    "flops_per_s": 5e9,
    "memory_bandwidth_bytes_per_s": 2e9,
    "uplink_bytes_per_s": 1e6,
    "downlink_bytes_per_s": 4e6,
    "storage_bytes": 10**9,
    "storage_write_bytes_per_s": 1e7,
    "date": "2026-03-31",
}
PROFILE = DeviceProfile(**VALUES)


def toml(**changes: str | None) -> str:
    """The text of a valid profile with lines replaced by raw TOML, or left out for None."""
    lines = {key: f"{key} = {value!r}" for key, value in VALUES.items()}
    lines |= {key: f"{key} = {raw}" for key, raw in changes.items()}
    return "\n".join(line for key, line in lines.items() if changes.get(key, "") is not None)


def refusal(text: str) -> str:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text, "boards/mine.toml")
    message = str(caught.value)
    assert message.startswith("boards/mine.toml: ")
    return message


def test_reads_a_minimal_file_with_defaults() -> None:
    profile = parse_profile(toml(), "mine.toml")
    assert profile == PROFILE
    assert profile.torch_floor_bytes == TORCH_FLOOR_BYTES == 180 * MIB
    assert profile.accelerator == profile.measured_with == ""
    assert profile.storage_read_bytes_per_s is None
    assert profile.policy == Policy()
    tables = [profile.sources, profile.rates, profile.overhead, profile.corrections]
    assert tables == [{}, {}, {}, {}]


def test_whole_numbers_do_for_rates_and_dates_need_no_quotes() -> None:
    profile = parse_profile(toml(flops_per_s="5_000_000_000", date="2026-03-31"), "mine.toml")
    assert profile == PROFILE
    assert isinstance(profile.flops_per_s, float)


def test_transfer_times() -> None:
    assert PROFILE.upload_s(2_000_000) == 2.0
    assert PROFILE.download_s(2_000_000) == 0.5


def test_toml_shows_units_and_round_trips() -> None:
    text = profile_toml(msgspec.structs.replace(PROFILE, sources={"cores": "datasheet: four"}))
    assert "memory_bytes = 314_572_800  # 300 MiB" in text
    assert "flops_per_s = 5_000_000_000.0  # 5 GFLOP/s" in text
    assert "uplink_bytes_per_s = 1_000_000.0  # 1 MB/s" in text
    assert 'cores = "datasheet: four"' in text.partition("[sources]")[2]
    assert parse_profile(text, "x").sources == {"cores": "datasheet: four"}


rates = st.floats(1, 1e13)
kind = st.text(string.ascii_lowercase + string.digits + "_", min_size=1, max_size=48)
label = st.text(string.ascii_lowercase + string.digits + "-", min_size=1, max_size=64)
line = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=60)
profiles = st.builds(
    DeviceProfile,
    name=label,
    board=line,
    memory_total_bytes=st.integers(2**40, 2**50),
    memory_bytes=st.integers(1, 2**40),
    torch_floor_bytes=st.integers(1, 2**40),
    cores=st.integers(1, 65536),
    flops_per_s=st.floats(1, 1e18),
    memory_bandwidth_bytes_per_s=rates,
    uplink_bytes_per_s=rates,
    downlink_bytes_per_s=rates,
    storage_bytes=st.integers(0, 2**60),
    storage_write_bytes_per_s=rates,
    storage_read_bytes_per_s=st.none() | rates,
    accelerator=st.just("") | line,
    date=st.dates().map(lambda day: day.isoformat()),
    measured_with=st.just("") | line,
    policy=st.builds(
        Policy,
        pause_above_celsius=st.floats(75, 150),
        resume_below_celsius=st.floats(0, 75),
        min_battery_percent=st.floats(0, 100),
        train_on_battery=st.booleans(),
        pause_when_throttled=st.booleans(),
        pause_above_pressure_percent=st.floats(1, 100),
        release_memory_after_round=st.booleans(),
    ),
    rates=st.dictionaries(kind.map(lambda word: f"{word}_flops_per_s"), rates, max_size=5)
    | st.dictionaries(kind.map(lambda word: f"{word}_s"), st.floats(1, 1e6), max_size=5),
    overhead=st.dictionaries(
        kind.map(lambda word: f"{word}_bytes"), st.integers(0, 2**40), max_size=5
    ),
    corrections=st.dictionaries(
        label,
        st.builds(
            Correction,
            memory=st.floats(0.5, 4),
            time=st.floats(0.1, 10),
            samples=st.integers(0, 2**31),
        ),
        max_size=3,
    ),
    sources=st.dictionaries(
        st.sampled_from(SOURCED),
        st.tuples(st.sampled_from(SOURCE_KINDS), line).map(": ".join),
    ),
)


@given(profiles)
def test_any_profile_round_trips(profile: DeviceProfile) -> None:
    assert parse_profile(profile_toml(profile), "x") == profile


@given(st.text(max_size=200))
def test_any_text_is_a_profile_or_a_profile_error(text: str) -> None:
    with pytest.raises(ProfileError):
        parse_profile(text, "x")


HOSTILE = (
    *("nan", "inf", "-inf", "-1", "-1e300", "1e300", "true", '"4"', "[]", "{}"),
    *("9" * 5000, "0x" + "f" * 9000, "1979-05-27"),
)


@pytest.mark.parametrize("key", FIGURES)
@pytest.mark.parametrize(
    "raw",
    ["nan", "inf", "-1", "1e300", "true", '"4"', "[]", "9" * 5000, "0x" + "f" * 9000, "1979-05-27"],
)
def test_impossible_figures_are_refused(key: str, raw: str) -> None:
    message = refusal(toml(**{key: raw}))
    assert len(message) < 400
    if "not TOML" not in message:  # Python refuses to read the longest decimal at all
        assert f" {key} is " in message
        assert "it must be a" in message
        assert "Check the value and its unit." in message


@pytest.mark.parametrize("key", [key for key in FIGURES if key != "storage_bytes"])
def test_zero_is_refused(key: str) -> None:
    assert f"{key} is 0" in refusal(toml(**{key: "0"}))


def test_a_full_disk_is_a_profile() -> None:
    assert parse_profile(toml(storage_bytes="0"), "x").storage_bytes == 0


def test_counts_must_be_whole() -> None:
    assert "cores is 4.0, it must be a whole number from 1 to 65536" in refusal(toml(cores="4.0"))


def test_a_missing_key_is_named_with_its_meaning_and_the_others() -> None:
    message = refusal(toml(cores=None, date=None))
    assert "cores (CPU cores training may use) is missing; also missing: date." in message
    assert "edge-sdk profile" in message


def test_an_unknown_key_gets_a_suggestion() -> None:
    message = refusal(toml() + "\nmemory_byte = 5\n")
    assert "unknown key 'memory_byte'. Did you mean memory_bytes?" in message
    assert "Known keys: name, board," in message


def test_training_memory_cannot_exceed_ram() -> None:
    message = refusal(toml(memory_bytes=str(513 * MIB)))
    assert (
        f"memory_bytes is {513 * MIB}, more than the memory_total_bytes of {512 * MIB}" in message
    )


@pytest.mark.parametrize("raw", ['""', '"Pi 4"', '"pi_4"', "4", f'"{"a" * 65}"', '"pi\\n"'])
def test_names_are_labels(raw: str) -> None:
    assert "it must be 1 to 64 characters of a-z, 0-9 and '-'" in refusal(toml(name=raw))


@pytest.mark.parametrize("raw", ['""', "7", f'"{"a" * 129}"', '"two\\nlines"', '"\\u0000"'])
def test_boards_are_one_line(raw: str) -> None:
    assert "board is " in refusal(toml(board=raw))


@pytest.mark.parametrize("raw", ['"yesterday"', "2026", '"2026-02-30"', "2026-03-31T10:00:00"])
def test_dates_are_days(raw: str) -> None:
    assert "it must be a day like 2026-03-31" in refusal(toml(date=raw))


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ('"datasheet"', "it must be a table"),
        ('{flops = "measured: x"}', "Did you mean flops_per_s?"),
        ('{cores = "the web"}', "it must begin with one of measured:, benchmark:"),
        ('{cores = "measured:"}', "and then say more"),
        ("{cores = 4}", "sources.cores is 4"),
        (f'{{cores = "measured: {"x" * 500}"}}', "1 to 500 printable characters"),
    ],
)
def test_sources_name_figures_and_kinds(raw: str, said: str) -> None:
    assert said in refusal(toml(sources=raw))


@pytest.mark.parametrize("text", ["cores 4", "a = " + "[" * 5000, "x = 'a", "\ufeffx = 1"])
def test_what_is_not_toml_is_said(text: str) -> None:
    assert "not TOML: " in refusal(text)


def test_a_profile_cannot_be_built_wrong() -> None:
    with pytest.raises(ProfileError, match="profile 'test-board': flops_per_s is nan"):
        msgspec.structs.replace(PROFILE, flops_per_s=math.nan)
    with pytest.raises(ProfileError, match=r"cores is 1e.300"):
        DeviceProfile(**VALUES | {"cores": 1e300})
    assert issubclass(ProfileError, ConfigError)


def test_loads_by_name_and_by_path(tmp_path: Path) -> None:
    assert load_profile("raspberry-pi-zero-2w").cores == 4
    path = tmp_path / "mine.toml"
    path.write_text(toml(), encoding="utf-8")
    assert load_profile(path) == load_profile(str(path)) == PROFILE


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(ProfileError) as caught:
        load_profile("raspberry-pi-zero-2")
    message = str(caught.value)
    assert message.startswith("raspberry-pi-zero-2: no such profile. Did you mean")
    assert all(name in message for name in shipped_profiles())


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"none\.toml: no such profile\..*generic-x86"):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(ProfileError, match=r"cannot be read: .*directory"):
        load_profile(tmp_path)
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile("a\0.toml")


def test_the_size_and_the_encoding_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * (MAX_PROFILE_BYTES + 1))
    with pytest.raises(ProfileError, match=r"big\.toml: larger than 65536 bytes"):
        load_profile(path)
    path.write_bytes(b"board = '\xff'")
    with pytest.raises(ProfileError, match="not UTF-8: byte 0xff at offset 9"):
        load_profile(path)
    with pytest.raises(ProfileError, match="a profile has at most 65536"):
        parse_profile("#" * (MAX_PROFILE_BYTES + 1), "x")


@pytest.mark.parametrize(
    ("available", "cgroup", "flag", "expected"),
    [
        (None, None, None, Budget(300 * MIB, "profile")),
        (400 * MIB, 350 * MIB, 320 * MIB, Budget(300 * MIB, "profile")),
        (100 * MIB, 350 * MIB, 320 * MIB, Budget(100 * MIB, "available")),
        (400 * MIB, 200 * MIB, None, Budget(200 * MIB, "cgroup")),
        (400 * MIB, 350 * MIB, 64 * MIB, Budget(64 * MIB, "flag")),
        (300 * MIB, 300 * MIB, 300 * MIB, Budget(300 * MIB, "flag")),
        (-1, None, None, Budget(0, "available")),
        (100 * MIB, 0, None, Budget(0, "cgroup")),
    ],
)
def test_budget_is_the_least_limit(
    available: int | None, cgroup: int | None, flag: int | None, expected: Budget
) -> None:
    found = budget(PROFILE, available_bytes=available, cgroup_limit_bytes=cgroup, flag_bytes=flag)
    assert found == expected


def test_a_memory_flag_of_nothing_is_refused() -> None:
    with pytest.raises(ProfileError, match="memory flag is 0 bytes, it must be at least 1"):
        budget(PROFILE, available_bytes=None, cgroup_limit_bytes=None, flag_bytes=0)


def test_importing_profiles_is_light() -> None:
    heavy = "numpy", "torch", "rich", "psutil", "paho"
    code = (
        "import sys, edge_sdk.profile as p; p.load_profile('generic-x86');"
        f"sys.exit(' '.join(set({heavy}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.strip() == ""


# What only some profiles have


def test_tables_are_read() -> None:
    text = toml(storage_read_bytes_per_s="4e7", measured_with='"edge_sdk 0.1, torch 2.13"')
    text += """
[policy]
train_on_battery = false
pause_above_celsius = 75
[rates]
conv_flops_per_s = 3_000_000_000
matmul_bytes_per_s = 2.5e9
call_s = 0
[overhead]
conv_bytes = 4_194_304
[corrections.digits]
memory = 1.1
time = 1
samples = 3
[sources]
rates = "measured: each by itself"
policy = "assumed: a warm room"
"""
    profile = parse_profile(text, "x")
    assert profile.policy == Policy(train_on_battery=False, pause_above_celsius=75.0)
    assert profile.rates == {
        "conv_flops_per_s": 3e9, "matmul_bytes_per_s": 2.5e9, "call_s": 0.0
    }  # fmt: skip
    assert profile.overhead == {"conv_bytes": 4 << 20}
    assert profile.corrections == {"digits": Correction(memory=1.1, time=1.0, samples=3)}
    assert profile.storage_read_bytes_per_s == 4e7
    written = profile_toml(profile)
    assert parse_profile(written, "x") == profile
    assert "conv_flops_per_s = 3_000_000_000.0  # 3 GFLOP/s" in written
    assert "conv_bytes = 4_194_304  # 4 MiB" in written
    assert "pause_above_celsius = 75.0  # degrees Celsius at which training pauses" in written
    assert "[corrections.digits]  # measured over predicted" in written


def in_table(table: str, line: str) -> str:
    return f"{toml()}\n[{table}]\n{line}\n"


PLACES = [
    *(("policy", key, "policy: ") for key in POLICY_LIMITS),
    *(("rates", f"conv_{unit}", "rates.") for unit in ("flops_per_s", "bytes_per_s", "s")),
    ("overhead", "conv_bytes", "overhead."),
]


@pytest.mark.parametrize(("table", "key", "place"), PLACES)
@pytest.mark.parametrize("raw", HOSTILE)
def test_impossible_figures_in_tables_are_refused(
    table: str, key: str, place: str, raw: str
) -> None:
    message = refusal(in_table(table, f"{key} = {raw}"))
    assert len(message) < 400
    if "not TOML" not in message:
        assert f"{place}{key} is " in message
        assert " from " in message
        assert "Check the value and its unit." in message


@pytest.mark.parametrize("key", CORRECTION_LIMITS)
@pytest.mark.parametrize("raw", ["nan", "1e300", "-1", '"x"', "true", "0x" + "f" * 9000])
def test_impossible_corrections_are_refused(key: str, raw: str) -> None:
    values = {"memory": "1.0", "time": "1.0", "samples": "1"} | {key: raw}
    lines = "\n".join(f"{name} = {value}" for name, value in values.items())
    assert f"corrections.digits.{key} is " in refusal(in_table("corrections.digits", lines))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rates = 5", "rates is 5, it must be a table"),
        ("policy = []", "policy is [], it must be a table"),
        ("corrections = 'x'", "corrections is 'x', it must be a table"),
        ("[rates]\nconv_flops = 5", "rates names 'conv_flops', a key there is 1 to 48"),
        ("[rates]\nconv_flops_per_s = 0", "rates.conv_flops_per_s is 0, it must be a number from"),
        ("[rates]\n_s = 5", "ending in _flops_per_s, _bytes_per_s or _s"),
        (f"[rates]\n{'a' * 49}_s = 5", "1 to 48 characters"),
        ("[rates]\n'a b_s' = 5", "rates names 'a b_s'"),
        ("[rates]\na_s = {b_s = 1}", "rates.a_s is {'b_s': 1}, it must be a number from"),
        ("[overhead]\nconv = 5", "overhead names 'conv', a key there is"),
        ("[overhead]\nconv_bytes = 5.5", "overhead.conv_bytes is 5.5, it must be a whole number"),
        ("[corrections]\ndigits = 1.1", "corrections.digits is 1.1, it must be a table"),
        ("[corrections.'Digits!']\nmemory = 1", "corrections names task 'Digits!'"),
        ("[corrections.digits]\nmemory = 1.0", "corrections.digits.time (measured over predicted"),
        ("[corrections.digits]\nmemry = 1.0", "unknown key 'memry'. Did you mean memory?"),
        ("[policy]\npause_above_celcius = 5", "Did you mean pause_above_celsius?"),
        ("[policy]\ntrain_on_battery = 1", "train_on_battery is 1, it must be true or false"),
        ("[policy]\ntrain_on_battery = 'no'", "is 'no', it must be true or false"),
        ("[policy]\npause_above_celsius = 60", "resume_below_celsius is 70, above the pause_above"),
        ("[sources]\nrate = 'measured: x'", "Did you mean rates?"),
        ("[sources]\nrates = 'x'", "it must begin with one of measured:"),
        ("measured_with = 7", "measured_with is 7, it must be 0 to 128 printable"),
        ("storage_read_bytes_per_s = 0", "storage_read_bytes_per_s is 0, it must be"),
    ],
)
def test_tables_that_are_wrong_say_where_and_what(text: str, said: str) -> None:
    message = refusal(f"{toml()}\n{text}\n")
    assert said in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("table", "ending"), [("rates", "_s"), ("overhead", "_bytes"), ("corrections", "")]
)
def test_tables_are_short(table: str, ending: str) -> None:
    value = {"rates": "1", "overhead": "1", "corrections": "{}"}[table]
    lines = "\n".join(f"key{n}{ending} = {value}" for n in range(MAX_TABLE_KEYS + 1))
    said = f"{table} has 65 keys, at most 64 are allowed"
    assert said in refusal(in_table(table, lines))


def test_policies_and_corrections_cannot_be_built_wrong() -> None:
    with pytest.raises(ProfileError, match="policy: pause_above_celsius is nan"):
        Policy(pause_above_celsius=math.nan)
    with pytest.raises(ProfileError, match="policy: resume_below_celsius is 90, above"):
        Policy(resume_below_celsius=90.0)
    with pytest.raises(ProfileError, match=r"correction: memory is 0\.1"):
        Correction(memory=0.1, time=1.0, samples=0)
    with pytest.raises(ProfileError, match=r"profile 'test-board': rates\.x_s is nan"):
        msgspec.structs.replace(PROFILE, rates={"x_s": math.nan})


def test_a_profile_of_an_earlier_version_is_read() -> None:
    text = profile_toml(PROFILE).replace("[policy]", "[sources]", 1).partition("[sources]")[0]
    assert parse_profile(text, "old") == PROFILE

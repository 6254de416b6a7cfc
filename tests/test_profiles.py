"""Every shipped profile loads, says where each figure comes from, and is plausible."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.errors import MIB
from edge_sdk.profile import (
    FIGURES,
    DeviceProfile,
    load_profile,
    parse_profile,
    profile_toml,
    shipped_profiles,
)

DIRECTORY = Path(__file__).parent.parent / "profiles"
BOARDS = [
    "container-512mb",
    "generic-x86",
    "jetson-agx-orin-64gb",
    "jetson-nano-4gb",
    "jetson-orin-nano-4gb",
    "jetson-orin-nano-8gb",
    "jetson-orin-nx-16gb",
    "jetson-xavier-nx",
    "raspberry-pi-3b-plus",
    "raspberry-pi-4b-2gb",
    "raspberry-pi-4b-4gb",
    "raspberry-pi-4b-8gb",
    "raspberry-pi-5-16gb",
    "raspberry-pi-5-4gb",
    "raspberry-pi-5-8gb",
    "raspberry-pi-zero-2w",
]


@pytest.fixture(params=BOARDS)
def profile(request: pytest.FixtureRequest) -> DeviceProfile:
    return load_profile(str(request.param))


def test_the_boards_shipped_are_the_boards_promised() -> None:
    assert list(shipped_profiles()) == BOARDS


def test_every_file_is_a_profile_named_like_it() -> None:
    for path in DIRECTORY.iterdir():
        assert path.suffix == ".toml"
        assert load_profile(path).name == path.stem


def test_every_figure_has_a_source(profile: DeviceProfile) -> None:
    assert set(profile.sources) == {*FIGURES, "policy"}


def test_no_board_claims_to_be_measured(profile: DeviceProfile) -> None:
    measured = {key for key, text in profile.sources.items() if text.startswith("measured:")}
    assert measured <= {"torch_floor_bytes"}


def test_training_leaves_room_for_the_system(profile: DeviceProfile) -> None:
    assert profile.memory_bytes <= profile.memory_total_bytes - 80 * MIB
    assert profile.memory_bytes > profile.torch_floor_bytes


def test_names_tell_the_memory(profile: DeviceProfile) -> None:
    size = profile.name.rpartition("-")[2]
    if size.endswith("gb"):
        assert profile.memory_total_bytes == int(size[:-2]) * 1024 * MIB


def test_only_jetsons_have_an_accelerator(profile: DeviceProfile) -> None:
    assert profile.accelerator.startswith("cuda ") == profile.name.startswith("jetson-")


def test_files_round_trip(profile: DeviceProfile) -> None:
    assert parse_profile(profile_toml(profile), "x") == profile


def test_faster_boards_are_faster() -> None:
    rates = [
        load_profile(name).flops_per_s
        for name in (
            "raspberry-pi-zero-2w",
            "raspberry-pi-3b-plus",
            "raspberry-pi-4b-4gb",
            "jetson-orin-nano-8gb",
            "jetson-agx-orin-64gb",
        )
    ]
    assert rates == sorted(rates)


def test_the_policy_leaves_room_below_what_slows_the_board_down(profile: DeviceProfile) -> None:
    policy = profile.policy
    slows_celsius = 80.0 if profile.name.startswith("raspberry-pi-") else 95.0
    assert 8 <= policy.pause_above_celsius - policy.resume_below_celsius <= 15
    assert policy.pause_above_celsius < slows_celsius


def test_reading_is_faster_than_synced_writing(profile: DeviceProfile) -> None:
    assert profile.storage_read_bytes_per_s is not None
    assert profile.storage_read_bytes_per_s > profile.storage_write_bytes_per_s

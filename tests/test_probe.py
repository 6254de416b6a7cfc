"""A whole profile measured on this machine; boards and accelerators read from real files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_sdk.errors import MIB, ConfigError
from edge_sdk.measure import MAX_THREAD_KEYS
from edge_sdk.probe import (
    FULL_LIMIT_S,
    QUICK_LIMIT_S,
    accelerator,
    board_name,
    probe,
)
from edge_sdk.profile import FIGURES, parse_profile, profile_toml
from reference_server.broker import BrokerProcess


def lay_out(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def test_the_board_is_what_the_device_tree_says(tmp_path: Path) -> None:
    lay_out(tmp_path, {"device-tree/model": "Raspberry Pi Zero 2 W Rev 1.0\0"})
    assert board_name(proc_root=tmp_path) == "Raspberry Pi Zero 2 W Rev 1.0"


@pytest.mark.parametrize(
    ("vendor", "product", "expected"),
    [
        ("LENOVO", "ThinkCentre M710q", "LENOVO ThinkCentre M710q"),
        ("System manufacturer", "System Product Name", None),
        ("To Be Filled By O.E.M.", "x", None),
        ("", "", None),
    ],
)
def test_without_one_dmi_names_the_machine(
    tmp_path: Path, vendor: str, product: str, expected: str | None
) -> None:
    lay_out(tmp_path, {"sys_vendor": vendor, "product_name": product})
    found = board_name(proc_root=tmp_path, dmi_root=tmp_path)
    assert found == expected or (expected is None and os.uname().machine in found)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ""),
        ({"proc/driver/nvidia/gpus/0/information": "Model: \t RTX A2000"}, "cuda RTX A2000"),
        ({"proc/driver/nvidia/gpus/0/information": "IRQ: 7"}, ""),
        (
            {"proc/device-tree/compatible": "nvidia,p3768-0000\0nvidia,tegra234\0"},
            "cuda Ampere, memory shared with the processor",
        ),
        (
            {"proc/device-tree/compatible": "nvidia,tegra999"},
            "cuda integrated, memory shared with the processor",
        ),
        ({"dev/nvhost-gpu": ""}, "cuda integrated"),
        ({"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"}, ""),
    ],
)
def test_accelerators_are_told_by_files(
    tmp_path: Path, files: dict[str, str | int], expected: str
) -> None:
    lay_out(tmp_path, files)
    assert accelerator(tmp_path / "proc", tmp_path / "dev") == expected


@pytest.mark.parametrize(("quick", "limit_s"), [(True, QUICK_LIMIT_S), (False, FULL_LIMIT_S)])
def test_probe_gives_a_complete_profile_in_time(
    tmp_path: Path, quick: bool, limit_s: float
) -> None:
    result = probe(quick, tmp_path / "state" / "not yet made")
    slack_s = 1.0  # a shared machine; the children themselves are stopped in time
    assert result.took_s < limit_s + slack_s
    assert result.limit_s == limit_s
    profile = result.profile
    assert set(FIGURES) <= set(profile.sources)
    assert {"uplink_bytes_per_s", "downlink_bytes_per_s"} <= set(result.not_measured)
    for key in ("flops_per_s", "memory_bandwidth_bytes_per_s", "storage_write_bytes_per_s"):
        assert (key in result.spreads) != (key in result.not_measured)
        assert profile.sources[key].startswith(
            "measured: " if key in result.spreads else "assumed: "
        )
    assert 0 < profile.memory_bytes < profile.memory_total_bytes
    assert parse_profile(profile_toml(profile), "probe") == profile
    assert list(tmp_path.iterdir()) == []


def test_quick_says_what_it_leaves_out(tmp_path: Path) -> None:
    result = probe(True, tmp_path)
    for key in ("torch_floor_bytes", "rates", "overhead"):
        assert result.not_measured[key] == "left out by --quick"
    assert result.profile.rates == result.profile.overhead == {}
    assert "torch" not in result.profile.measured_with
    assert result.profile.sources["torch_floor_bytes"].startswith("estimated: ")


def test_whatever_has_no_time_is_named_with_what_helps(tmp_path: Path) -> None:
    result = probe(False, tmp_path, limit_s=1.0)
    assert result.took_s < 2.0
    assert "give more" in result.not_measured["rates"]
    assert "--seconds" in result.not_measured["rates"]
    if (os.cpu_count() or 1) > 1:
        assert "--seconds" in result.not_measured["rates.numpy_matmul_threads_1_flops_per_s"]


@pytest.mark.timeout(200)
def test_with_enough_time_torch_is_measured_too(tmp_path: Path) -> None:
    result = probe(False, tmp_path, patience_s=150.0)
    profile = result.profile
    assert not {"rates", "overhead", "torch_floor_bytes"} & set(result.not_measured)
    assert profile.overhead
    assert 50 * MIB < profile.torch_floor_bytes < 1024 * MIB
    assert ", torch " in profile.measured_with
    for key in profile.rates:
        assert f"rates.{key}" in result.spreads
    threads = [key for key in profile.rates if key.startswith("numpy_matmul_threads_")]
    assert 0 < len(threads) <= MAX_THREAD_KEYS
    for key in ("rates", "overhead", "torch_floor_bytes"):
        assert profile.sources[key].startswith("measured: ")
    assert parse_profile(profile_toml(profile), "probe") == profile


def test_the_link_to_a_broker_is_measured(tmp_path: Path, broker: BrokerProcess) -> None:
    result = probe(True, tmp_path, broker=broker.url)
    for key in ("uplink_bytes_per_s", "downlink_bytes_per_s"):
        assert key in result.spreads, result.not_measured
        assert result.profile.sources[key].startswith("measured: messages the broker ")
        assert getattr(result.profile, key) > 1e5


def test_a_broker_that_is_not_there_costs_only_the_link(tmp_path: Path, no_broker: str) -> None:
    result = probe(True, tmp_path, broker=no_broker)
    assert "no MQTT broker" in result.not_measured["uplink_bytes_per_s"]
    assert "no MQTT broker" in result.profile.sources["downlink_bytes_per_s"]
    assert result.took_s < QUICK_LIMIT_S + 1.0
    with pytest.raises(ConfigError, match="names no broker"):
        probe(True, tmp_path, broker="http://x")

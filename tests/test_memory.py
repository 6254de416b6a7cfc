"""Memory and cgroups of odd and hostile machines, read from real files."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edge_sdk import memory as memory_module
from edge_sdk.allowance import Allowance
from edge_sdk.errors import MIB
from edge_sdk.memory import (
    CgroupMemory,
    available_memory,
    is_tegra,
    memory_groups,
    read,
    read_number,
)
from edge_sdk.profile import load_profile

V1_UNLIMITED = 9223372036854771712


def lay_out(root: Path, files: dict[str, str | int]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def machine(root: Path, cgroup_lines: str) -> Path:
    """A /proc of a machine with 4 GiB, 3 GiB of it available."""
    meminfo = "MemTotal:        4194304 kB\nMemAvailable:    3145728 kB\nSwapTotal:     102400 kB"
    return lay_out(root / "proc", {"meminfo": meminfo, "self/cgroup": cgroup_lines})


def cgroup(root: Path, lines: str, files: dict[str, str | int]) -> CgroupMemory | None:
    groups = lay_out(root / "cgroup", files)
    return available_memory(proc_root=machine(root, lines), cgroup_root=groups).cgroup


def test_no_proc_and_no_cgroup_means_unknown(tmp_path: Path) -> None:
    memory = available_memory(proc_root=tmp_path / "proc", cgroup_root=tmp_path / "cgroup")
    assert memory.total_bytes is memory.available_bytes is memory.usable_bytes is None
    assert memory.swap_bytes is memory.zram_bytes is memory.cgroup_free_bytes is None
    assert memory.cgroup is None
    assert memory.sources == {}


def test_swap_and_zram_are_told_but_not_counted(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/")
    swaps = (
        "Filename   Type       Size   Used Priority\n"
        "/dev/zram0 partition  51200  0    100\n/var/swap  file  51200  0  -2"
    )
    lay_out(proc, {"swaps": swaps})
    memory = available_memory(proc_root=proc, cgroup_root=tmp_path)
    assert memory.total_bytes == 4096 * MIB
    assert memory.available_bytes == memory.usable_bytes == 3072 * MIB
    assert memory.swap_bytes == 100 * MIB
    assert memory.zram_bytes == 50 * MIB
    assert memory.sources == {
        "total_bytes": f"{proc}/meminfo MemTotal",
        "available_bytes": f"{proc}/meminfo MemAvailable",
        "swap_bytes": f"{proc}/meminfo SwapTotal",
        "zram_bytes": f"{proc}/swaps",
    }


def test_an_old_kernel_without_memavailable_is_unknown_not_guessed(tmp_path: Path) -> None:
    proc = lay_out(tmp_path, {"meminfo": "MemTotal: 1024 kB\nMemFree: 512 kB"})
    memory = available_memory(proc_root=proc, cgroup_root=tmp_path)
    assert memory.total_bytes == MIB
    assert memory.available_bytes is None


def test_v2_limit_less_what_cannot_be_reclaimed(tmp_path: Path) -> None:
    limit = cgroup(
        tmp_path,
        "0::/edge.slice/sdk.service",
        {
            "edge.slice/sdk.service/memory.max": 512 * MIB,
            "edge.slice/sdk.service/memory.high": "max",
            "edge.slice/sdk.service/memory.current": 200 * MIB,
            "edge.slice/sdk.service/memory.stat": f"anon 1\ninactive_file {60 * MIB}",
            "edge.slice/memory.max": "max",
        },
    )
    source = str(tmp_path / "cgroup/edge.slice/sdk.service/memory.max")
    assert limit == CgroupMemory(2, 512 * MIB, 140 * MIB, 372 * MIB, source)


def test_v2_parent_with_less_left_binds(tmp_path: Path) -> None:
    limit = cgroup(
        tmp_path,
        "0::/a/b",
        {
            "a/b/memory.max": 300 * MIB,
            "a/b/memory.current": 10 * MIB,
            "a/memory.max": 400 * MIB,
            "a/memory.current": 350 * MIB,  # a sibling of b uses most of it
        },
    )
    assert limit is not None
    assert (limit.limit_bytes, limit.free_bytes) == (400 * MIB, 50 * MIB)
    assert limit.source.endswith("cgroup/a/memory.max")


def test_v2_high_counts_as_a_limit(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "a/memory.max": "max",
        "a/memory.high": 256 * MIB,
        "a/memory.current": 0,
    }
    limit = cgroup(tmp_path, "0::/a", files)
    assert limit is not None
    assert limit.free_bytes == 256 * MIB
    assert limit.source.endswith("a/memory.high")


@pytest.mark.parametrize("group", ["/", "/docker/0123abcd", "/../outside"])
def test_in_a_container_the_mount_is_its_own_group(tmp_path: Path, group: str) -> None:
    files: dict[str, str | int] = {"memory.max": 512 * MIB, "memory.current": 12 * MIB}
    limit = cgroup(tmp_path, f"0::{group}", files)
    assert limit is not None
    assert limit.free_bytes == 500 * MIB


def test_v2_max_everywhere_is_no_limit(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"a/memory.max": "max", "memory.max": "max"}
    assert cgroup(tmp_path, "0::/a", files) is None


@pytest.mark.parametrize("content", ["", "-5", "12 34", "٣", "9" * 40])
def test_a_limit_that_is_no_number_is_no_limit(tmp_path: Path, content: str) -> None:
    assert cgroup(tmp_path, "0::/a", {"a/memory.max": content}) is None


def test_v1_limit_and_its_parents(tmp_path: Path) -> None:
    lines = "9:name=systemd:/\n4:cpu,memory:/docker/abc\n0::/"
    limit = cgroup(
        tmp_path,
        lines,
        {
            "memory/docker/abc/memory.limit_in_bytes": V1_UNLIMITED,
            "memory/docker/abc/memory.usage_in_bytes": 90 * MIB,
            "memory/docker/memory.limit_in_bytes": 512 * MIB,
            "memory/docker/memory.usage_in_bytes": 300 * MIB,
            "memory/docker/memory.stat": f"total_inactive_file {50 * MIB}",
            "memory/memory.limit_in_bytes": V1_UNLIMITED,
        },
    )
    source = str(tmp_path / "cgroup/memory/docker/memory.limit_in_bytes")
    assert limit == CgroupMemory(1, 512 * MIB, 250 * MIB, 262 * MIB, source)


def test_v1_limit_of_a_parent_that_is_not_visible(tmp_path: Path) -> None:
    limit = cgroup(
        tmp_path,
        "4:memory:/docker/abc",
        {
            "memory/memory.limit_in_bytes": V1_UNLIMITED,
            "memory/memory.usage_in_bytes": 28 * MIB,
            "memory/memory.stat": f"hierarchical_memory_limit {128 * MIB}",
        },
    )
    assert limit is not None
    assert limit.free_bytes == 100 * MIB
    assert limit.source.endswith("memory.stat hierarchical_memory_limit")


def test_v1_unlimited_is_no_limit(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"memory/a/memory.limit_in_bytes": V1_UNLIMITED}
    assert cgroup(tmp_path, "4:memory:/a", files) is None


def test_a_hybrid_system_has_version_2_one_level_down(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"unified/a/memory.max": MIB, "unified/a/memory.current": 0}
    limit = cgroup(tmp_path, "1:cpu:/\n0::/a", files)
    assert limit is not None
    assert limit.version == 2


def test_an_unreadable_usage_leaves_the_bare_limit(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/a")
    groups = lay_out(tmp_path / "cgroup", {"a/memory.max": 512 * MIB})
    memory = available_memory(proc_root=proc, cgroup_root=groups)
    assert memory.cgroup is not None
    assert memory.cgroup.used_bytes is memory.cgroup.free_bytes is None
    assert memory.cgroup_free_bytes == memory.usable_bytes == 512 * MIB
    assert memory.sources["cgroup"] == str(groups / "a/memory.max")


def test_a_full_group_leaves_nothing(tmp_path: Path) -> None:
    files: dict[str, str | int] = {"a/memory.max": MIB, "a/memory.current": 2 * MIB}
    limit = cgroup(tmp_path, "0::/a", files)
    assert limit is not None
    assert limit.usable_bytes == 0


def test_a_jetson_says_that_processor_and_gpu_share_the_memory(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/")
    assert not available_memory(proc_root=proc, cgroup_root=tmp_path).unified
    lay_out(proc, {"device-tree/compatible": "nvidia,p3450-0000\0nvidia,tegra210\0"})
    assert is_tegra(proc)
    assert available_memory(proc_root=proc, cgroup_root=tmp_path).unified


def test_directories_and_loops_in_place_of_files_are_nothing(tmp_path: Path) -> None:
    proc = machine(tmp_path, "0::/a")
    (proc / "swaps").mkdir()
    (tmp_path / "a" / "memory.max").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    memory = available_memory(proc_root=proc, cgroup_root=tmp_path)
    assert (memory.cgroup, memory.zram_bytes) == (None, None)
    assert memory.available_bytes == 3072 * MIB
    assert read(tmp_path / "loop") is None
    assert read_number(tmp_path / "loop") is None


def test_a_hostile_list_of_groups_stays_below_the_mount(tmp_path: Path) -> None:
    lines = "\n".join(["0::/../../etc", "nonsense", "0::", "::::", "4:memory:/a/../../b", "\0"])
    proc = machine(tmp_path, lines)
    mount = tmp_path / "cgroup"
    for _, path in memory_groups(proc, mount):
        assert ".." not in path.parts
        assert path.is_relative_to(mount)
    assert available_memory(proc_root=proc, cgroup_root=mount).cgroup is None


def test_without_meminfo_the_system_is_asked_itself() -> None:
    values, source = memory_module._without_meminfo()
    assert source in ("sysconf", "psutil")
    assert 0 < values["MemAvailable"] < values["MemTotal"]
    real = available_memory()
    assert real.total_bytes is not None
    assert math.isclose(values["MemTotal"], real.total_bytes, rel_tol=0.05)


@pytest.mark.parametrize("flag_bytes", [None, 2**50])
def test_a_lying_profile_never_raises_the_budget(tmp_path: Path, flag_bytes: int | None) -> None:
    lies: dict[str, Any] = {
        "memory_total_bytes": 2**50, "memory_bytes": 2**50, "storage_bytes": 2**60
    }  # fmt: skip
    honest = load_profile("raspberry-pi-4b-2gb")
    liar = msgspec.structs.replace(honest, **lies)
    allowance = Allowance(
        liar, flag_bytes, tmp_path, prefix_dir=tmp_path / "prefix", simulated=False
    )
    budget = allowance.budget(None)
    total_bytes = available_memory().total_bytes
    assert total_bytes is not None
    assert budget.bound_by in ("available", "cgroup")
    assert budget.memory_bytes < total_bytes
    assert allowance.storage_bytes() < shutil.disk_usage(tmp_path).free


def test_what_is_kept_already_has_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = msgspec.structs.replace(load_profile("raspberry-pi-4b-2gb"), storage_bytes=30 << 20)

    def storage_bytes(*, simulated: bool = False) -> int:
        prefix_dir = tmp_path / "prefix"
        allowance = Allowance(profile, None, tmp_path, prefix_dir=prefix_dir, simulated=simulated)
        return allowance.storage_bytes()

    assert storage_bytes() == 30 << 20, "as the profile says, where the disk has room"
    nearly_full = SimpleNamespace(free=4 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: nearly_full)
    assert storage_bytes() == 2 << 20
    lay_out(tmp_path, {"prefix/one/rows": "0" * (20 << 20)})
    assert storage_bytes() == pytest.approx(22 << 20, abs=1 << 16)
    (tmp_path / "prefix" / "one" / "rows").write_bytes(bytes(40 << 20))
    assert storage_bytes() == 30 << 20
    assert storage_bytes(simulated=True) == 30 << 20
    monkeypatch.undo()
    shutil.rmtree(tmp_path)
    assert storage_bytes() == 0

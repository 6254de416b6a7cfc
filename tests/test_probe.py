"""Memory, cgroups and boards read from real files; rates and peaks measured on this machine."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk import probe as probe_module
from edge_sdk.errors import MIB, ProfileError
from edge_sdk.probe import (
    FULL_LIMIT_S,
    QUICK_LIMIT_S,
    CgroupMemory,
    available_memory,
    board_name,
    measure_compute,
    measure_memory_bandwidth,
    measure_storage,
    probe,
)
from edge_sdk.process import (
    process_cpu_s,
    process_peak,
    process_peak_bytes,
    process_rss_bytes,
    reset_peak,
    shed_library_pages,
)
from edge_sdk.profile import FIGURES, parse_profile, profile_toml

ROOT = Path(__file__).parent.parent
LINUX = sys.platform == "linux" and Path("/proc/self/status").exists()
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


def test_rates_are_positive_and_repeat() -> None:
    for rate in (measure_compute(0.1), measure_memory_bandwidth(0.05)):
        assert rate.per_s > 1e7
        assert rate.samples >= 3
        assert rate.spread >= 0


def test_measuring_loads_no_numpy_here() -> None:
    code = (
        "import sys; from edge_sdk.probe import measure_compute; measure_compute(0.01);"
        "sys.exit(' '.join({'numpy', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.stderr.strip() == b""


def test_the_child_command_writes_one_line_per_rate() -> None:
    command = [sys.executable, "-m", "edge_sdk.probe", "--compute", "0.05", "--bandwidth", "0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    keys = [json.loads(line)[0] for line in done.stdout.splitlines()]
    assert keys == ["memory_bandwidth_bytes_per_s", "flops_per_s"]


def test_a_measurement_that_is_cut_off_says_so() -> None:
    rates, reason = probe_module._child_rates({"flops_per_s": 30.0}, 0.3)
    assert rates == {}
    assert reason == "not done within 0.3 s"


@pytest.mark.parametrize(
    ("code", "stderr", "said"),
    [
        (-4, b"", "was killed: Illegal instruction"),
        (1, b"Traceback\nImportError: No module named 'numpy'\n", "No module named 'numpy'"),
        (3, b"", "ended with 3: no message"),
    ],
)
def test_the_reason_of_a_failed_child_is_kept(code: int, stderr: bytes, said: str) -> None:
    assert said in probe_module._exit_reason(code, stderr)


def test_lines_of_others_and_cut_lines_are_left_out() -> None:
    output = b'hello\n["flops_per_s", 2.0, 0.5, 3]\n["memory_bandwidth_bytes_per_s", 1.'
    assert list(probe_module._parse_rates(output)) == ["flops_per_s"]


def test_storage_is_measured_and_leaves_no_file(tmp_path: Path) -> None:
    rate = measure_storage(tmp_path, 5.0, max_bytes=3 * MIB)
    assert rate.per_s > 1e4
    assert rate.samples == 3
    assert list(tmp_path.iterdir()) == []


def test_storage_without_a_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"nowhere: storage cannot be measured: .*state dir"):
        measure_storage(tmp_path / "nowhere", 0.1)


@pytest.mark.parametrize(("quick", "limit_s"), [(True, QUICK_LIMIT_S), (False, FULL_LIMIT_S)])
def test_probe_gives_a_complete_profile_in_time(
    tmp_path: Path, quick: bool, limit_s: float
) -> None:
    result = probe(quick, tmp_path / "state" / "not yet made")
    slack_s = 1.0  # a shared machine; the child itself is stopped in time
    assert result.took_s < limit_s + slack_s
    profile = result.profile
    assert set(profile.sources) == set(FIGURES)
    assert {"uplink_bytes_per_s", "downlink_bytes_per_s"} <= set(result.not_measured)
    for key in ("flops_per_s", "memory_bandwidth_bytes_per_s", "storage_write_bytes_per_s"):
        assert (key in result.spreads) != (key in result.not_measured)
        assert profile.sources[key].startswith(
            "measured: " if key in result.spreads else "assumed: "
        )
    assert 0 < profile.memory_bytes < profile.memory_total_bytes
    assert parse_profile(profile_toml(profile), "probe") == profile
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits until its input is closed."""
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_memory_and_cpu_of_this_and_another_process(child: subprocess.Popen[bytes]) -> None:
    for pid in (None, os.getpid(), child.pid):
        assert process_rss_bytes(pid) > 4 * MIB
        assert process_peak_bytes(pid) >= 4 * MIB
    before_s = process_cpu_s()
    end_s = time.process_time() + 0.05
    while time.process_time() < end_s:
        pass
    assert process_cpu_s() >= before_s + 0.03


def test_a_process_that_has_ended_uses_nothing(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    assert process_rss_bytes(child.pid) == 0
    assert process_peak_bytes(child.pid) == 0
    assert process_cpu_s(child.pid) == 0
    assert not reset_peak(child.pid)


@pytest.mark.skipif(not LINUX, reason="only Linux can reset a peak")
def test_the_peak_can_be_reset() -> None:
    size = 50 * MIB
    if not reset_peak():
        pytest.skip("this kernel cannot reset a peak")
    for _ in range(2):
        base = process_rss_bytes()
        block = bytearray(b"\1") * size
        assert process_peak_bytes() >= base + 0.9 * size
        del block
        assert process_peak_bytes() >= base + 0.9 * size  # it stays until it is reset
        assert reset_peak()
        assert process_peak_bytes() < base + 0.5 * size
    assert process_peak().source == "VmHWM"


def test_without_proc_the_source_of_the_peak_is_told(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    assert process_rss_bytes(proc_root=tmp_path) > 4 * MIB
    own = process_peak(proc_root=tmp_path)
    assert own.bytes > 4 * MIB
    assert own.source.startswith("ru_maxrss")
    other = process_peak(child.pid, proc_root=tmp_path)
    assert other.bytes > 4 * MIB
    assert other.source.startswith("rss now")
    assert not reset_peak(proc_root=tmp_path)


@pytest.mark.skipif(not LINUX, reason="only Linux can be asked for pages of files")
def test_pages_of_files_are_given_back(tmp_path: Path) -> None:
    path = tmp_path / "library"
    path.write_bytes(b"\1" * (40 * MIB))
    # Not a shared library: the kernel keeps pages that other processes map too.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[place] for place in range(0, len(mapped), 4096)) > 0
        before = process_rss_bytes()
        assert shed_library_pages() >= 40 * MIB
        assert process_rss_bytes() < before - 20 * MIB
        assert mapped[39 * MIB] == 1


def test_without_maps_no_pages_are_given_back(tmp_path: Path) -> None:
    assert shed_library_pages(proc_root=tmp_path) == 0


def test_a_gpu_is_found_by_its_driver(tmp_path: Path) -> None:
    assert probe_module._accelerator(tmp_path, tmp_path) == ""
    lay_out(tmp_path, {"nvhost-gpu": ""})
    assert probe_module._accelerator(tmp_path, tmp_path) == "cuda integrated"
    information = "driver/nvidia/gpus/0000:01:00.0/information"
    lay_out(tmp_path, {information: "Model: \t\t NVIDIA H200\nIRQ: 7"})
    assert probe_module._accelerator(tmp_path, tmp_path) == "cuda NVIDIA H200"

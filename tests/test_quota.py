"""A child's share of the processor: real groups where permitted, trees of files elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.process import process_cpu_s
from edge_sdk.quota import CpuQuota

BUSY = "print('up', flush=True)\nwhile True:\n    pass\n"


@pytest.fixture
def busy() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        try:
            yield child.pid
        finally:
            child.kill()


def test_a_process_gets_no_more_than_its_share(busy: int) -> None:
    quota = CpuQuota(busy)
    quota.limit(0.1)
    if not quota.how.startswith("cgroup"):
        pytest.skip(f"no CPU cgroup can be made here: {quota.why_no_group}")
    assert quota.cores == 0.1
    began_cpu_s, began_s = process_cpu_s(busy), time.monotonic()
    while (took_s := time.monotonic() - began_s) < 1.0:
        os.sched_yield()
    assert (process_cpu_s(busy) - began_cpu_s) / took_s < 0.25
    made = quota._made
    os.kill(busy, 9)
    os.waitid(os.P_PID, busy, os.WEXITED | os.WNOWAIT)
    quota.release()
    assert made is None or not made.exists()


def test_without_a_group_it_is_kept_to_whole_cores(busy: int, tmp_path: Path) -> None:
    quota = CpuQuota(busy, cgroup_root=tmp_path)
    quota.limit(0.3)
    assert (quota.cores, quota.how) == (1.0, "affinity, whole cores only")
    assert quota.why_no_group == "this process is in no CPU cgroup it can see"
    assert len(os.sched_getaffinity(busy)) == 1
    quota.release()


def test_a_process_that_is_gone_has_no_limit(tmp_path: Path) -> None:
    quota = CpuQuota(2**22 - 1, proc_root=tmp_path, cgroup_root=tmp_path)
    quota.limit(0.3)
    assert (quota.cores, quota.how) == (0.0, "nothing")


def of_version_2(root: Path, group: str, pid: int) -> Path:
    """Trees of a /proc and a /sys/fs/cgroup in which the process is in this group."""
    directory = root / "cgroup" / group
    directory.mkdir(parents=True)
    (directory / "cgroup.procs").write_text(f"{pid}\n")
    (directory / "cpu.max").write_text("max 100000\n")
    (directory.parent / "cgroup.subtree_control").write_text("memory\n")
    process = root / "proc" / str(pid)
    process.mkdir(parents=True)
    (process / "cgroup").write_text(f"0::/{group}\n")
    return directory


def test_version_2_limits_the_group_made_for_the_process(tmp_path: Path) -> None:
    directory = of_version_2(tmp_path, "service/edge-sdk-77-1", 4000)
    quota = CpuQuota(4000, proc_root=tmp_path / "proc", cgroup_root=tmp_path / "cgroup")
    quota.limit(0.25)
    assert (quota.cores, quota.how) == (0.25, "cgroup v2 CPU quota")
    assert (directory / "cpu.max").read_text() == "25000 100000"
    assert (directory.parent / "cgroup.subtree_control").read_text() == "+cpu"


def test_version_2_leaves_the_group_of_others_alone(tmp_path: Path) -> None:
    directory = of_version_2(tmp_path, "service/edge-sdk-agent", 4000)
    quota = CpuQuota(4000, proc_root=tmp_path / "proc", cgroup_root=tmp_path / "cgroup")
    quota.limit(0.25)
    assert quota.why_no_group == f"{directory}: the process has no cgroup of its own"
    assert (directory / "cpu.max").read_text() == "max 100000\n"


def test_groups_of_a_killed_command_are_swept(tmp_path: Path) -> None:
    home, process = tmp_path / "cgroup" / "cpu", tmp_path / "proc" / "4000"
    for directory in (home, process, home / "edge-sdk-77-1", home / f"edge-sdk-{os.getpid()}-0"):
        directory.mkdir(parents=True)
    (tmp_path / "proc" / str(os.getpid())).mkdir()
    (home / "cgroup.procs").write_text("4000\n")
    (process / "cgroup").write_text("1:cpu,cpuacct:/\n")
    CpuQuota(4000, proc_root=tmp_path / "proc", cgroup_root=tmp_path / "cgroup").limit(2)
    assert not (home / "edge-sdk-77-1").exists()
    made = [path for path in home.iterdir() if (path / "cpu.cfs_quota_us").exists()]
    assert [(path / "cpu.cfs_quota_us").read_text() for path in made] == ["200000"]
    assert [(path / "cgroup.procs").read_text() for path in made] == ["4000"]

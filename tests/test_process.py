"""What this and other processes use, measured on this machine."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.errors import MIB
from edge_sdk.process import (
    process_cpu_s,
    process_peak,
    process_peak_bytes,
    process_rss_bytes,
    reset_peak,
    shed_library_pages,
)

LINUX = sys.platform == "linux" and Path("/proc/self/status").exists()


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

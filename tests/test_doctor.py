"""What the doctor sees: real child processes, real files, a real broker."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from edge_sdk.doctor import (
    RELEASED,
    Finding,
    check_broker,
    check_clock,
    check_heat,
    check_memory,
    check_package,
    check_python,
    check_storage,
    check_throttling,
    exit_code,
    throttling,
)
from edge_sdk.errors import MIB
from edge_sdk.probe import CgroupMemory, Memory
from edge_sdk.profile import TORCH_FLOOR_BYTES
from reference_server.broker import BrokerProcess

MISSING = 'raise ModuleNotFoundError("No module named {0!r}", name={0!r})\n'


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose modules the doctor's child processes find first."""
    directory = tmp_path / "packages"
    directory.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(directory))
    return directory


@pytest.mark.parametrize("module", ["msgpack", "paho.mqtt.client", "zstandard", "onnxruntime"])
def test_a_working_package_shows_its_version(module: str) -> None:
    finding = check_package(module)
    assert (finding.status, finding.fix) == ("ok", "")
    assert re.match(r"\d+\.\d+", finding.seen)


@pytest.mark.parametrize(
    ("module", "source", "status", "seen", "fix"),
    [
        (
            "torch",
            "import os\nos.kill(os.getpid(), 4)\n",
            "fail",
            "killed by SIGILL: this build uses instructions this .* processor does not have",
            "pip install 'torch<2.10'$",
        ),
        (
            "torch",
            "import os\nos.kill(os.getpid(), 9)\n",
            "fail",
            "killed by SIGKILL: most likely there was not enough memory",
            "free -m",
        ),
        (
            "numpy",
            "raise ImportError('libgomp.so.1: cannot open')\n",
            "fail",
            "does not work: ImportError: libgomp.so.1: cannot open$",
            "pip install --force-reinstall numpy$",
        ),
        ("numpy", "ones = None\n", "fail", "does not work: TypeError: ", "--force-reinstall"),
        (
            "zstandard",
            MISSING.format("zstandard"),
            "fail",
            "is not installed$",
            "pip install zstandard$",
        ),
        (
            "torch",
            MISSING.format("torch"),
            "warn",
            "`edge-sdk run` needs it$",
            r"'edge-sdk\[train\]'$",
        ),
        (
            "onnxruntime",
            MISSING.format("onnxruntime"),
            "warn",
            "is not installed; `edge-sdk infer` needs it$",
            r"'edge-sdk\[infer\]'$",
        ),
        # Something it needs is missing: installing the package itself again brings that too.
        ("torch", MISSING.format("sympy"), "fail", "No module named 'sympy'$", "--force-reinstall"),
    ],
)
def test_missing_broken_and_killed_packages_are_told_apart(
    packages: Path, module: str, source: str, status: str, seen: str, fix: str
) -> None:
    (packages / f"{module}.py").write_text(source)
    finding = check_package(module)
    assert finding.status == status, finding
    assert re.search(seen, finding.seen), finding
    assert re.search(fix, finding.fix), finding


def test_python_is_fit_to_run_this() -> None:
    assert check_python().status == "ok"


def test_memory_without_swap_decides() -> None:
    small = check_memory(Memory(512 * MIB, 200 * MIB, 100 * MIB, 100 * MIB, None, {}))
    assert small.status == "warn"
    assert "200 MiB usable of 512 MiB; swap 100 MiB (100 in zram) is not counted" in small.seen
    need_mib = TORCH_FLOOR_BYTES // MIB + 32
    assert f"training needs at least {need_mib} MiB" in small.seen
    assert check_memory(Memory(512 * MIB, 400 * MIB, 0, None, None, {})).status == "ok"
    assert check_memory(Memory(None, None, None, None, None, {})).status == "warn"


def test_a_tight_cgroup_is_named() -> None:
    group = CgroupMemory(2, 256 * MIB, 56 * MIB, 200 * MIB, "/sys/fs/cgroup/memory.max")
    finding = check_memory(Memory(8192 * MIB, 8000 * MIB, 0, None, group, {}))
    assert finding.status == "warn"
    assert "cgroup limit 256 MiB (/sys/fs/cgroup/memory.max)" in finding.seen
    assert "MemoryMax=" in finding.fix


def test_storage_is_tried_where_the_state_will_be(tmp_path: Path) -> None:
    finding = check_storage(tmp_path / "not" / "yet")
    assert finding.status in ("ok", "warn")
    assert re.search(rf"MiB free in {tmp_path}, a synced write takes \d+ ms$", finding.seen)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    refused = check_storage(tmp_path / "file" / "state")
    assert refused.status == "fail"
    assert f"{tmp_path / 'file'} is a file, not a directory" in refused.seen


def test_storage_that_cannot_be_written_is_found() -> None:
    refused = check_storage(Path("/proc/state"))
    assert refused.status == "fail"
    assert refused.seen.startswith("/proc: a synced write fails: ")
    assert refused.fix.startswith(f"sudo chown {os.getuid()} /proc")


def test_a_clock_in_the_past_is_found() -> None:
    seen = f"1970-01-01 00:00 UTC, before this program was released ({RELEASED})"
    assert check_clock(0.0).status == "fail"
    assert seen in check_clock(0.0).seen
    assert check_clock(4e9).status == "ok"


def test_heat_is_read_from_every_sensor_that_answers(tmp_path: Path) -> None:
    assert check_heat(tmp_path).seen == "no sensor can be read here"
    for zone, text in enumerate(["41000\n", "70500\n", "unknown\n"]):
        sensor = tmp_path / f"thermal_zone{zone}" / "temp"
        sensor.parent.mkdir()
        sensor.write_text(text)
    assert check_heat(tmp_path).status == "ok"
    (tmp_path / "thermal_zone1" / "temp").write_text("83600\n")
    hot = check_heat(tmp_path)
    assert hot.status == "warn"
    assert hot.seen == "84 degrees Celsius at the warmest of 2 sensors: it slows down"


def test_throttling_is_read_from_the_firmware(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    firmware = tmp_path / "vcgencmd"
    firmware.write_text("#!/bin/sh\n[ $1 = get_throttled ] && echo throttled=0x50005\n")
    firmware.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_throttling().status == "warn"
    assert check_throttling().seen == "now: under-voltage, throttled"
    firmware.unlink()
    assert check_throttling().status == "ok"


def test_throttling_bits() -> None:
    assert throttling("throttled=0x0\n").status == "ok"
    assert throttling("throttled=0x80000\n").seen == "since the start: soft temperature limit"
    assert throttling("throttled=0x80000\n").status == "warn"
    assert throttling("error=1").status == "ok"


def test_a_broker_is_described(broker: BrokerProcess) -> None:
    finding = check_broker(broker.url, None)
    assert finding.status == "ok"
    assert re.match(r"answers in \d+ ms, MQTT (5|3\.1\.1), ", finding.seen)


def test_the_worst_finding_decides_the_exit_code() -> None:
    broker = Finding(name="broker", status="fail", seen="")
    clock = Finding(name="clock", status="fail", seen="")
    warned = Finding(name="memory", status="warn", seen="")
    assert exit_code([warned]) == 0
    assert exit_code([warned, broker]) == 3
    assert exit_code([broker, clock]) == 2

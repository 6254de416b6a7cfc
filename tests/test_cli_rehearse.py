"""``plan --emulate`` and ``tune`` as people meet them: real trainers, limits and files."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_sdk.cli import main
from edge_sdk.errors import MIB
from edge_sdk.profile import DeviceProfile, load_profile, profile_toml

TASK = """
import numpy as np
from torch import nn
from edge_sdk import Task, Training

def train_data(part, parts):
    inputs = np.random.default_rng(part).normal(size=(64, 256)).astype("float32")
    return inputs, inputs[:, :3].argmax(axis=1)

def task():
    return Task(
        name="tiny",
        build_model=lambda: nn.Sequential(
            nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3)
        ),
        loss=nn.functional.cross_entropy,
        train_data=train_data,
        training=Training(optimizer="adam", batch_size=16),
    )
"""
Call = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Call:
    """Run one command in this process, with an empty home and the task in the directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny.py").write_text(TASK)
    board("toy", memory_bytes=600 * MIB)

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        words = [str(arg) for arg in args]
        code = main(words)
        return subprocess.CompletedProcess(words, code, *capfd.readouterr())

    return run


def board(name: str, **changes: Any) -> DeviceProfile:
    """A slow board with a profile in the working directory."""
    profile = msgspec.structs.replace(
        load_profile("raspberry-pi-4b-2gb"), name=name, flops_per_s=2e10, **changes
    )
    Path(f"{name}.toml").write_text("# Ours.\n" + profile_toml(profile))
    return profile


def emulate(call: Call, *args: object) -> subprocess.CompletedProcess[str]:
    return call("plan", "--task", "tiny.py", "--emulate", "toy.toml", *args)


def test_a_round_is_carried_out_as_on_the_board(call: Call) -> None:
    done = emulate(call, "--json", "--batch-size", "8", "--codec", "lossless")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["board"], answer["finished"], answer["reason"]) == ("toy", True, "")
    assert answer["limit_bytes"] == 600 * MIB
    assert "RLIMIT_DATA" in answer["memory_by"]
    assert answer["plan"]["batch_size"] == 8
    assert answer["plan"]["blocks"] == ["0", "2", "4"]
    assert answer["cores"] >= 0.05
    figures = {row["name"]: row for row in answer["figures"]}
    assert figures["flops"]["ratio"] == 1.0
    assert figures["upload_bytes"]["measured"] > 1 * MIB
    assert figures["peak_bytes"]["measured"] < 600 * MIB
    assert figures["train_s"]["measured"] > 0
    above, peak = figures["above_floor_bytes"], figures["peak_bytes"]
    floor = peak["measured"] - above["measured"]
    assert peak["predicted"] - above["predicted"] == floor
    by_file = figures["peak_with_profile_floor_bytes"]
    assert by_file["predicted"] - above["predicted"] == load_profile("toy.toml").torch_floor_bytes


def test_too_little_memory_ends_with_2_and_the_smallest_limit(call: Call) -> None:
    done = emulate(call, "--memory-mb", "120")
    assert done.returncode == 2
    assert done.stdout.startswith("toy, emulated here\n  memory  120.0 MiB, limited by ")
    assert "toy: the trainer does not start in 120 MiB (limited by " in done.stderr
    assert "the smallest limit is about " in done.stderr
    least_mb = int(done.stderr.partition("limit is about ")[2].split()[0])
    assert 150 < least_mb < 600


def test_a_trainer_killed_in_its_round_ends_with_2(call: Call) -> None:
    # Memory that no prediction sees and no allocator is refused: only the kernel can object.
    hungry = """
import mmap
KEPT = mmap.mmap(-1, 700 << 20)

def loss(output, targets):
    if output.device.type != "meta":
        for offset in range(0, len(KEPT), 4096):
            KEPT[offset] = 1
    return nn.functional.cross_entropy(output, targets)

def task():"""
    text = TASK.replace("loss=nn.functional.cross_entropy", "loss=loss")
    Path("tiny.py").write_text(text.replace("def task():", hungry))
    done = emulate(call, "--json")
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    if not answer["memory_by"].startswith("cgroup"):
        pytest.skip(f"no memory cgroup can be made here, only {answer['memory_by']}")
    assert not answer["finished"]
    assert "toy: the round did not finish in 600 MiB (limited by cgroup" in done.stderr
    assert "the trainer was killed for memory; the plan was to take " in done.stderr


def test_emulation_needs_what_it_can_train(call: Call) -> None:
    refused = emulate(call, "--num-examples", "5")
    assert refused.returncode == 2
    assert "--emulate trains for real: it needs --task" in refused.stderr
    absent = call("plan", "--task", "nowhere.py", "--emulate", "toy.toml")
    assert (absent.returncode, "nowhere.py: no such file" in absent.stderr) == (2, True)
    neither = call("plan", "--task", "tiny.py")
    assert (neither.returncode, "give --profile NAME" in neither.stderr) == (2, True)


def test_tuning_corrects_the_profile_it_was_given(call: Call) -> None:
    before = load_profile("toy.toml")
    done = call("tune", "--task", "tiny.py", "--profile", "toy.toml", "--seconds", "3", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["profile"] == "toy.toml"
    largest = answer["rows"][0]
    assert largest["what"] == "largest"
    assert largest["plan"]["blocks"] == ["0", "2", "4"]
    assert largest["steps"] >= 3
    assert largest["measured_bytes"] > 8 * MIB
    after = load_profile("toy.toml")
    correction = after.corrections["tiny"]
    assert msgspec.to_builtins(correction) == answer["correction"]
    assert correction.memory >= 0.8
    assert correction.samples >= 1
    assert after.sources.pop("corrections").startswith("measured: by edge-sdk tune")
    assert msgspec.structs.replace(after, corrections={}) == before
    assert Path("toy.toml").read_text().startswith("# Ours.\n")
    left = {path.name for path in Path().iterdir()} - {".cache"}  # a library's, in this home
    assert left == {"tiny.py", "toy.toml"}


def test_tuning_a_kept_profile_and_showing_it(call: Call) -> None:
    Path("state").mkdir()
    Path("toy.toml").rename("state/profile.toml")
    done = call(
        "tune", "--task", "tiny.py", "--profile", "measure", "--state", "state", "--seconds", "1"
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("task tiny: memory above the ")
    assert lines[1].split() == ["predicted", "measured", "ratio", "after"] * 2
    assert any(line.startswith("largest ") for line in lines)
    assert "correction: memory x " in done.stdout
    assert lines[-1] == "written to state/profile.toml"
    assert "tiny" in load_profile("state/profile.toml").corrections


def test_tuning_asks_where_to_write(call: Call) -> None:
    shipped = call("tune", "--task", "tiny.py", "--profile", "generic-x86")
    assert shipped.returncode == 2
    assert "generic-x86 comes with the package: say where to write it with --save" in shipped.stderr
    fresh = call("tune", "--task", "tiny.py", "--profile", "measure")
    assert fresh.returncode == 2
    assert "--save FILE or --state DIR" in fresh.stderr
    nowhere = call("tune", "--task", "tiny.py", "--profile", "generic-x86", "--save", "no/x.toml")
    assert (nowhere.returncode, "its directory does not exist" in nowhere.stderr) == (2, True)


def test_nothing_is_written_when_nothing_could_be_measured(call: Call) -> None:
    before = Path("toy.toml").read_text()
    Path("tiny.py").write_text("def task():\n    return 5\n")
    done = call("tune", "--task", "tiny.py", "--profile", "toy.toml")
    assert done.returncode == 2
    assert "tiny.py: task() at line 1 returned int" in done.stderr
    assert Path("toy.toml").read_text() == before

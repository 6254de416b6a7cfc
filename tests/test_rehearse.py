"""Local rounds without a server: a real trainer, its limits, and what is read of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edge_sdk.allowance import limits_of
from edge_sdk.errors import MIB, TaskError
from edge_sdk.plan import Plan
from edge_sdk.profile import budget, load_profile
from edge_sdk.rehearse import Died, Rehearsal
from edge_sdk.trainer import Described, Failed
from edge_sdk.ways import Costing, FrozenPrefix
from edge_sdk.wire import Training, UpdateMetrics

TASK = """
import numpy as np
from torch import nn
from edge_sdk import Task, Training

print("read by", __name__)

def train_data(part, parts):
    inputs = np.random.default_rng(part).normal(size=(40, 8)).astype("float32")
    return inputs, inputs[:, :3].argmax(axis=1)

def task():
    return Task(
        name="tiny",
        build_model=lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)),
        loss=nn.functional.cross_entropy,
        train_data=train_data,
        training=Training(optimizer="adam", batch_size=8),
    )
"""
PLAN = Plan(
    blocks=("0", "2"),
    batch_size=8,
    micro_batch=8,
    codec="lossless",
    peak_bytes=1,
    budget_bytes=1 << 40,
    train_s=1.0,
    round_s=1.0,
    upload_bytes=1,
    flops=1,
)


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    folder = tmp_path_factory.mktemp("rehearsal")
    (folder / "tiny.py").write_text(TASK)
    with Rehearsal(folder / "tiny.py", folder / "files", threads=1) as started:
        assert isinstance(started.start(), Described)
        yield started


def test_the_trainer_describes_itself_and_the_task(rehearsal: Rehearsal) -> None:
    described = rehearsal.described
    assert described is not None
    assert (rehearsal.published.task, described.table.task) == ("tiny", "tiny")
    assert rehearsal.published.training == Training(optimizer="adam", batch_size=8)
    assert rehearsal.start_peak_bytes > described.floor_bytes > rehearsal.file_bytes > 0


def test_a_round_is_carried_out_and_leaves_nothing(rehearsal: Rehearsal) -> None:
    metrics = rehearsal.round(PLAN, rehearsal.published.training)
    assert isinstance(metrics, UpdateMetrics)
    assert metrics.steps == 5
    assert metrics.measured_peak_bytes > 50 * MIB
    assert metrics.train_s > 0
    # 195 numbers of four bytes, compressed, and a header.
    assert 300 < rehearsal.upload_bytes < 2000
    spool = Path(rehearsal._setup.spool_dir)
    assert [path.name for path in spool.iterdir() if path.is_file()] == []


def test_a_limit_in_the_middle_is_in_force(rehearsal: Rehearsal) -> None:
    assert rehearsal.how_confined == "nothing"
    rehearsal.confine(2 << 30)
    assert "RLIMIT_DATA" in rehearsal.how_confined
    quota = rehearsal.slow_down(0.5)
    assert quota.cores == (0.5 if quota.how.startswith("cgroup") else 1.0)
    assert isinstance(rehearsal.round(PLAN, Training(batch_size=8)), UpdateMetrics)


def test_what_goes_wrong_in_a_round_is_told(rehearsal: Rehearsal) -> None:
    answer = rehearsal.round(msgspec.structs.replace(PLAN, steps=0), Training())
    assert isinstance(answer, Failed)
    assert "steps: each must be at least 1" in answer.message
    assert rehearsal.pid is not None
    rehearsal._trainer._child.kill()  # type: ignore[union-attr]  # as anybody might
    died = rehearsal.round(PLAN, Training())
    assert died == Died(killed_for_memory=False, exit_code=-9)
    assert str(died) == "the trainer died with exit code -9"


@pytest.mark.parametrize(
    ("prefix", "steps"),
    [(FrozenPrefix(), None), (FrozenPrefix(blocks=("0",), cache="memory"), 2)],
)
def test_counted_operations_are_the_predicted_ones(
    rehearsal: Rehearsal, prefix: FrozenPrefix, steps: int | None
) -> None:
    described, training = rehearsal.described, Training(batch_size=8, local_epochs=2)
    assert described is not None
    profile = load_profile("generic-x86")
    allowed = budget(profile, available_bytes=None, cgroup_limit_bytes=None, flag_bytes=None)
    limits = limits_of(profile, allowed, floor_bytes=described.floor_bytes, deadline_s=1e6)
    blocks = ("2",) if prefix.blocks else ("0", "2")
    ways = Costing(described.table, training, limits, described.num_examples).ways(blocks)
    (flops, *_) = [
        way.flops for way in ways if way.prefix.cache == prefix.cache and way.micro_batch == 8
    ]
    plan = msgspec.structs.replace(PLAN, blocks=blocks, prefix=prefix, steps=steps)
    assert rehearsal.count_flops(plan, training) == flops * (2 / 10 if steps else 1)


def test_a_broken_task_is_a_task_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def task():\n    return 5\n")
    with (
        pytest.raises(TaskError, match=r"broken.py.*returned int"),
        Rehearsal(tmp_path / "broken.py", tmp_path / "files", threads=1),
    ):
        pass


def test_a_task_that_ends_the_process_is_a_task_error(tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import os\nos._exit(7)\n")
    with (
        pytest.raises(TaskError, match="ended with exit code 7"),
        Rehearsal(tmp_path / "ends.py", tmp_path / "files", threads=1),
    ):
        pass

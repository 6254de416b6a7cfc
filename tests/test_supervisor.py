"""The trainer's supervisor on a real trainer: kills, refusals, pauses, release, what it learns."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_sdk.assignment import MAX_WAIT_S, Damaged, Down, Fits, GaveUp, Outcome
from edge_sdk.condition import Condition
from edge_sdk.confine import Confinement
from edge_sdk.errors import MIB, TaskError
from edge_sdk.memory import Memory, available_memory
from edge_sdk.profile import DeviceProfile, Policy, load_profile
from edge_sdk.supervisor import (
    CONDITION_S,
    LINGER_S,
    MAX_CRASHES,
    MAX_SHORT_S,
    WAIT_SHARE,
    Supervisor,
)
from edge_sdk.trainer import Described, Trained, TrainerDied
from edge_sdk.wire import Offer
from tests.test_trainer import PATIENCE_S, Bench

DEADLINE_S = 600.0
PAUSE_S = 0.5
DEFAULT = Policy()

TASK = """\
import mmap
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk import Task

HERE = Path(__file__).parent
# The weights a test publishes are large: what is trained must not diverge.
SMALL = 1e-9


def loss(output, targets):
    with (HERE / "steps").open("a") as file:
        file.write(f"{os.getpid()} {len(targets)}\\n")
    if (HERE / "slow").exists():
        time.sleep(0.02)
    if (HERE / "shared").exists():  # a limit on private memory does not see it
        taken = mmap.mmap(-1, 600 << 20)
        for offset in range(0, len(taken), 4096):
            taken[offset] = 1
    if (HERE / "private").exists():
        (HERE / "private").unlink()
        torch.ones(600 << 18)
    return nn.functional.cross_entropy(output * SMALL, targets)


def train_data(part, parts):
    if (HERE / "no-data").exists():
        raise OSError("the card is gone")
    rng = np.random.default_rng(part)
    return rng.standard_normal((24, 512)).astype("float32"), rng.integers(0, 3, 24)


def task():
    return Task(
        name="toy",
        build_model=lambda: nn.Sequential(
            nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 3)
        ),
        loss=loss,
        train_data=train_data,
    )
"""


class Device:
    """A supervisor as an agent drives it, on a board whose state the test decides."""

    def __init__(self, folder: Path, policy: Policy, flag_bytes: int | None) -> None:
        self.folder, self.bench = folder, Bench(folder, TASK)
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.reports: list[dict[str, Any]] = []
        self.condition = Condition()
        board = load_profile("generic-x86")
        self.profile: DeviceProfile = msgspec.structs.replace(board, policy=policy)
        self.supervisor = Supervisor(
            self.bench.setup(), self.profile, self.inbox, self.reports.append,
            state_dir=folder, flag_bytes=flag_bytes, look=lambda before: self.condition,
            memory=self.memory,
        )  # fmt: skip
        self.late_s, self.rounds = 0.0, 0
        self.others_take_all = False

    def memory(self) -> Memory:
        """The machine's, less what a test lets others take."""
        memory = available_memory()
        return dataclasses.replace(memory, available_bytes=0) if self.others_take_all else memory

    def fresh(self) -> None:
        """Forget what a test did; the trainer stays."""
        self.supervisor.drop()
        self.reports.clear()
        self.condition, self.late_s = Condition(), 0.0
        self.allow(None)
        self.others_take_all = False
        for name in ("slow", "shared", "private", "no-data"):
            self.marker(name).unlink(missing_ok=True)

    def allow(self, flag_bytes: int | None) -> None:
        """From now on the trainer may have so much memory."""
        self.supervisor._allowance._flag_bytes = flag_bytes

    def marker(self, name: str) -> Path:
        return self.folder / name

    def steps(self) -> int:
        path = self.folder / "steps"
        return path.read_text().count("\n") if path.exists() else 0

    def offer(self, **training: Any) -> Offer:
        """Of the next round."""
        self.rounds += 1
        order = self.bench.order(self.rounds, blocks=("4",), **training)
        return msgspec.structs.replace(order.offer, deadline_s=DEADLINE_S)

    def now_s(self) -> float:
        """The clock the supervisor is shown: it runs ahead where a test wants no waiting."""
        return time.monotonic() + self.late_s

    def outcome(self) -> Outcome:
        """What the agent would be told next."""
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            outcome = self.supervisor.watch(self.now_s())
            if outcome is None:
                due_s = self.supervisor.due_s()
                wait_s = 0.05 if due_s is None else min(0.05, max(0.0, due_s - self.now_s()))
                try:
                    outcome = self.supervisor.heard(self.inbox.get(timeout=wait_s))
                except queue.Empty:
                    continue
            if outcome is not None:
                return outcome
        raise AssertionError("nothing came of it")

    def take(self, offer: Offer) -> None:
        assert self.supervisor.take_up(offer, 0) == Fits()
        assert self.supervisor.train(offer, time.monotonic() + DEADLINE_S) is None

    def until_training(self, more: int = 1) -> None:
        """Until so many more steps were begun; nothing else may come."""
        wanted = self.steps() + more
        end_s = time.monotonic() + PATIENCE_S
        while self.steps() < wanted:
            assert time.monotonic() < end_s, "training did not begin"
            try:
                event = self.inbox.get(timeout=0.01)
            except queue.Empty:
                assert self.supervisor.watch(self.now_s()) is None
            else:
                assert self.supervisor.heard(event) is None

    def look_now(self) -> Outcome | None:
        """The next look at the board, without the wait for it."""
        self.late_s += CONDITION_S
        return self.supervisor.watch(self.now_s())

    def said(self, event: str) -> list[dict[str, Any]]:
        return [report for report in self.reports if report["event"] == event]

    @property
    def pid(self) -> int | None:
        return self.supervisor._trainer.pid


@contextmanager
def device(
    folder: Path, policy: Policy = DEFAULT, flag_bytes: int | None = None
) -> Iterator[Device]:
    made = Device(folder, policy, flag_bytes)
    made.supervisor.start()
    try:
        assert isinstance(made.outcome(), Described)
        yield made
    finally:
        made.supervisor.stop()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Device]:
    """One trainer for all tests that leave it alive: it takes seconds to load torch."""
    with device(tmp_path_factory.mktemp("board")) as made:
        yield made


@pytest.fixture
def board(shared: Device) -> Device:
    """The shared device, as new."""
    shared.fresh()
    return shared


def held_by_a_group(made: Device) -> bool:
    held = made.supervisor._confinement
    return isinstance(held, Confinement) and held.how.startswith("cgroup")


def test_a_round_is_trained_and_its_costs_are_kept(board: Device) -> None:
    board.take(board.offer(local_epochs=30))
    assert isinstance(board.outcome(), Trained)
    (key,) = msgspec.json.decode((board.folder / "corrections.json").read_bytes())["corrections"]
    task, digest, name = key.split("/")
    assert (task, len(digest), name) == ("toy", 12, "generic-x86")
    assert board.supervisor.due_s() is None, "an idle device is not woken up"
    assert board.supervisor.peak_bytes > 50 * MIB


def test_a_kernels_kill_is_told_and_the_round_is_trained_lower(tmp_path: Path) -> None:
    with device(tmp_path, flag_bytes=500 * MIB) as board:
        if not held_by_a_group(board):
            pytest.skip("no memory cgroup can be made here")
        board.marker("shared").touch()
        board.take(board.offer())
        first = board.supervisor._assignment
        assert first is not None
        planned = first.plan
        assert isinstance(board.outcome(), Down)
        assert board.said("killed") == [
            {"event": "killed", "memory": True, "exit_code": -signal.SIGKILL}
        ]
        board.marker("shared").unlink()
        assert board.supervisor.train_again() is None
        assert isinstance(board.outcome(), Trained)
        lower = first.plan
        assert planned is not None
        assert lower is not None
        assert (len(lower.blocks), lower.micro_batch) < (len(planned.blocks), planned.micro_batch)
        assert list(Path(tmp_path / "spool").glob("*.json"))


def test_a_refused_allocation_costs_a_plan_and_no_process(board: Device) -> None:
    board.allow(500 * MIB)
    pid = board.pid
    board.marker("private").touch()
    board.take(board.offer())
    assert isinstance(board.outcome(), Down)
    assert board.supervisor.train_again() is None
    assert isinstance(board.outcome(), Trained)
    assert board.pid == pid
    assert board.said("killed") == []
    assert len(board.said("plan")) == 2


def test_a_crash_does_not_lower_the_plan(tmp_path: Path) -> None:
    with device(tmp_path) as board:
        board.marker("slow").touch()
        board.take(board.offer(local_epochs=20))
        board.until_training()
        assert board.pid is not None
        os.kill(board.pid, signal.SIGKILL)
        assert isinstance(board.outcome(), Down)
        assert board.said("killed") == [{"event": "killed", "memory": False, "exit_code": -9}]
        board.marker("slow").unlink()
        assert board.supervisor.train_again() is None
        assert isinstance(board.outcome(), Trained)
        first, second = board.said("plan")
        assert first == second


def test_a_trainer_that_always_crashes_ends_the_round_not_the_agent(board: Device) -> None:
    board.take(board.offer())
    assert board.supervisor._assignment is not None
    board.supervisor._assignment.crashes = MAX_CRASHES
    gave_up = board.supervisor.train_again()
    assert isinstance(gave_up, GaveUp)
    assert gave_up.reason == (
        "the trainer was killed for memory 0 times and died for other reasons 4 times in this round"
    )


def test_heat_pauses_between_steps_and_training_goes_on_where_it_was(board: Device) -> None:
    board.marker("slow").touch()
    described, began_s = board.steps(), time.monotonic()
    board.take(board.offer(local_epochs=20))
    board.until_training(more=3)
    board.condition = Condition(celsius=85.0, sensor="cpu-thermal")
    assert board.look_now() is None
    (paused,) = board.said("paused")
    assert paused["reason"].startswith("too hot: 85 degrees Celsius at cpu-thermal")
    begun = board.steps()
    time.sleep(PAUSE_S)
    assert board.steps() <= begun + 1, "no more than the step that was running"
    board.condition = Condition(celsius=75.0, sensor="cpu-thermal")
    assert board.look_now() is None
    assert board.said("resumed") == [], "not yet well below the limit"
    board.condition = Condition(celsius=60.0, sensor="cpu-thermal")
    assert board.look_now() is None
    assert len(board.said("resumed")) == 1
    trained = board.outcome()
    wall_s = time.monotonic() - began_s
    assert isinstance(trained, Trained)
    assert board.steps() - described == trained.metrics.steps == 60, "no step was taken twice"
    # It began when the step that was running had ended.
    assert trained.metrics.train_s < wall_s - PAUSE_S / 2, "a pause is no training"


def test_a_pause_that_eats_the_deadline_gives_the_round_up(board: Device) -> None:
    board.marker("slow").touch()
    board.take(board.offer(local_epochs=20))
    board.until_training()
    board.condition = Condition(on_battery=True, battery_percent=20.0)
    assert board.look_now() is None
    board.late_s += DEADLINE_S - 1.0
    assert board.look_now() == GaveUp(
        "paused until too little time was left: battery low: 20 % left, training pauses below "
        "30 % and goes on at 35 % or when charging"
    )
    board.condition = Condition()
    board.marker("slow").unlink()
    board.late_s = 0.0
    board.take(board.offer())
    assert isinstance(board.outcome(), Trained)


def test_a_board_that_is_too_hot_already_does_not_begin(board: Device) -> None:
    board.condition = Condition(celsius=85.0, sensor="cpu-thermal")
    board.take(board.offer())
    assert board.look_now() is None
    assert board.said("plan") == []
    board.condition = Condition()
    assert board.look_now() is None
    assert isinstance(board.outcome(), Trained)


def test_pressure_gives_memory_back_and_trains_lower_when_it_is_over(board: Device) -> None:
    board.marker("slow").touch()
    board.take(board.offer(local_epochs=20))
    board.until_training()
    mine = board.supervisor._assignment
    assert mine is not None
    assert mine.plan is not None
    peak_bytes = mine.plan.peak_bytes
    board.condition = Condition(pressure_some_percent=60.0)
    assert board.look_now() is None
    assert mine.plan is None
    board.condition = Condition(pressure_some_percent=5.0)
    board.marker("slow").unlink()
    assert board.look_now() is None
    assert mine.plan is None, "memory has to be free for a while"
    assert board.look_now() is None
    assert mine.plan is not None
    assert mine.plan.peak_bytes < peak_bytes
    assert isinstance(board.outcome(), Trained)


def test_memory_is_released_after_a_round_and_at_idle(tmp_path: Path) -> None:
    with device(tmp_path, Policy(release_memory_after_round=True)) as board:
        assert board.pid is not None
        board.late_s += LINGER_S
        assert board.supervisor.watch(board.now_s()) is None
        assert board.pid is None
        assert board.supervisor.due_s() is None
        for _ in range(2):
            board.take(board.offer())
            assert isinstance(board.outcome(), Trained)
            pid = board.pid
            assert pid is not None
            assert board.supervisor.watch(board.now_s()) is None
            assert board.pid is None
            assert not Path(f"/proc/{pid}").exists()
            assert board.supervisor.peak_bytes > 50 * MIB, "the tally comes after the end"
        assert board.supervisor.described is not None, "a device without a trainer still greets"
        while not board.inbox.empty():
            event = board.inbox.get()
            assert isinstance(event, TrainerDied)
            assert board.supervisor.heard(event) is None


def test_memory_that_went_since_the_offer_is_waited_for_a_while(board: Device) -> None:
    offer = board.offer()
    assert board.supervisor.take_up(offer, 0) == Fits()
    board.others_take_all = True
    assert board.supervisor.train(offer, time.monotonic() + DEADLINE_S) is None
    assert board.said("plan") == []
    board.others_take_all = False
    board.late_s += 1.0
    assert isinstance(board.outcome(), Trained)
    board.others_take_all = True
    assert board.supervisor.train(offer, time.monotonic() + DEADLINE_S) is None
    board.late_s += MAX_SHORT_S + 1.0
    gave_up = board.supervisor.watch(board.now_s())
    assert isinstance(gave_up, GaveUp)
    assert "allowed by available" in gave_up.reason


def test_what_never_fits_is_declined_at_once(board: Device) -> None:
    board.allow(100 * MIB)
    gave_up = board.supervisor.take_up(board.offer(), 0)
    assert isinstance(gave_up, GaveUp)
    assert "allowed by flag" in gave_up.reason
    assert board.supervisor.due_s() is None


def test_an_offer_waits_a_little_for_memory_that_others_have(board: Device) -> None:
    board.others_take_all = True
    assert board.supervisor.take_up(board.offer(), 0) is None
    board.late_s += 1.0
    assert board.supervisor.watch(board.now_s()) is None
    board.others_take_all = False
    board.late_s += MAX_WAIT_S
    assert board.supervisor.watch(board.now_s()) == Fits()
    board.others_take_all = True
    assert board.supervisor.take_up(board.offer(), 0) is None
    board.late_s += WAIT_SHARE * DEADLINE_S
    gave_up = board.supervisor.watch(board.now_s())
    assert isinstance(gave_up, GaveUp)
    assert "allowed by available" in gave_up.reason
    assert board.supervisor.due_s() is None


def test_a_task_that_cannot_be_described_later_ends_the_round_not_the_agent(
    tmp_path: Path,
) -> None:
    with device(tmp_path) as board:
        board.take(board.offer())
        board.marker("no-data").touch()
        assert board.pid is not None
        os.kill(board.pid, signal.SIGKILL)
        assert isinstance(board.outcome(), Down)
        assert board.supervisor.train_again() is None
        gave_up = board.outcome()
        assert isinstance(gave_up, GaveUp)
        assert "OSError: the card is gone" in gave_up.reason


def test_a_task_that_cannot_be_described_at_all_is_the_users_to_mend(tmp_path: Path) -> None:
    made = Device(tmp_path, Policy(), None)
    made.marker("no-data").touch()
    made.supervisor.start()
    try:
        with pytest.raises(TaskError, match="the card is gone"):
            made.outcome()
    finally:
        made.supervisor.stop()


def test_a_damaged_block_is_said(board: Device) -> None:
    offer = board.offer()
    board.bench.cache.path(offer.blocks[0].sha256).write_bytes(b"x")
    board.take(offer)
    assert isinstance(board.outcome(), Damaged)


def test_the_kernel_is_offered_the_trainer_first(board: Device) -> None:
    assert Path(f"/proc/{board.pid}/oom_score_adj").read_text().strip() == "1000"
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 1000

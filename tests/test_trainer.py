"""The training process: a real child, its answers, its deaths, and the files it leaves."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk.codec import block_hash, encode_block
from edge_sdk.errors import DamagedBlock, ProtocolMisuse
from edge_sdk.merge import BlockSum
from edge_sdk.model import BlockModel
from edge_sdk.plan import FrozenPrefix, Plan
from edge_sdk.store import BlockCache, Spool
from edge_sdk.task import load_task
from edge_sdk.trainer import (
    Described,
    Failed,
    Setup,
    Train,
    Trained,
    Trainer,
    TrainerDied,
    TrainerSaid,
    _kind,
    seed_of,
)
from edge_sdk.wire import BlockEntry, Offer, Training, decode_update

PATIENCE_S = 30.0
NO_PREFIX = FrozenPrefix()
SAMPLES = 24

SLOW_S = 0.05
# Long training writes `begun`, so that a test can act in the middle of it.
TASK = (
    f"""\
SLOW_S = {SLOW_S}
"""
    + """\
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk import Task

HERE = Path(__file__).parent


def loss(output, targets):
    if (HERE / "watched").exists():
        (HERE / "begun").touch()
    if (HERE / "no-memory").exists():
        raise MemoryError("DefaultCPUAllocator: not enough memory")
    if (HERE / "diverges").exists():
        return output.sum() * float("nan")
    if (HERE / "raises").exists():
        raise ValueError("labels of class 7 are missing")
    return nn.functional.cross_entropy(output, targets)


class First(nn.Linear):
    def forward(self, x):
        if (HERE / "slow").exists():
            time.sleep(SLOW_S)
        return super().forward(x)


def train_data(part, parts):
    rng = np.random.default_rng(part)
    return rng.standard_normal((24, 4)).astype("float32"), rng.integers(0, 3, 24)


def task():
    return Task(
        name="toy",
        build_model=lambda: nn.Sequential(First(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
        loss=loss,
        train_data=train_data,
    )
"""
)


class Bench:
    """A device's directories, its model, and a trainer at work on them."""

    def __init__(self, folder: Path, task: str = TASK) -> None:
        self.folder = folder
        self.task_path = folder / "toytask.py"
        self.task_path.write_text(task)
        self.cache, self.spool = BlockCache(folder / "blocks"), Spool(folder / "spool")
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.trainer = Trainer(self.setup(), self.inbox)
        self.model = BlockModel(load_task(self.task_path))
        self.described: Any = None

    def setup(self) -> Setup:
        return Setup(
            job="job",
            task_path=str(self.task_path),
            part=1,
            parts=2,
            cache_dir=str(self.folder / "blocks"),
            spool_dir=str(self.folder / "spool"),
            prefix_dir=str(self.folder / "prefix"),
            storage_bytes=1 << 30,
            threads=1,
        )

    def publish(self) -> tuple[BlockEntry, ...]:
        """Put a version with random weights into the cache."""
        rng = np.random.default_rng(5)
        entries = []
        for block in self.model.spec.blocks:
            arrays = {t.name: np.asarray(rng.random(t.shape), t.dtype) for t in block.tensors}
            self.model.write(block.name, arrays)
            sha256, payload = block_hash(block, arrays), encode_block(block, arrays)
            self.cache.put(sha256, payload)
            entries.append(
                BlockEntry(
                    name=block.name,
                    sha256=sha256,
                    size_bytes=len(payload),
                    raw_bytes=block.size_bytes,
                )
            )
        return tuple(entries)

    def order(
        self,
        number: int,
        blocks: tuple[str, ...] = ("1", "2"),
        prefix: FrozenPrefix = NO_PREFIX,
        codec: str = "balanced",
        **how: Any,
    ) -> Train:
        training = Training(batch_size=8, seed=3, **how)
        offer = Offer(
            round=number,
            ticket=bytes(16),
            version=1,
            base_sha="ab" * 32,
            blocks=self.publish(),
            strategy="last_blocks",
            open_blocks=self.model.spec.names,
            codec=codec,
            deadline_s=60.0,
            training=training,
        )
        plan = Plan(
            blocks=blocks,
            batch_size=8,
            micro_batch=4,
            codec=codec,
            prefix=prefix,
            peak_bytes=11,
            budget_bytes=1 << 30,
            train_s=1.0,
            round_s=2.0,
            upload_bytes=13,
            flops=14,
        )
        return Train(offer=offer, plan=plan)

    def answer(self) -> Any:
        """What the trainer of the present life says next."""
        while True:
            event = self.inbox.get(timeout=PATIENCE_S)
            if event.life == self.trainer.life:
                return event.answer if isinstance(event, TrainerSaid) else event

    def update(self, number: int) -> tuple[Any, dict[str, bytes]]:
        """The spooled update of a round, taken out of the spool."""
        (entry,) = [e for e in self.spool.entries() if e.round == number]
        body = self.spool.read_piece(entry, 0, entry.size_bytes)
        self.spool.remove(entry)
        header, parts = decode_update(memoryview(body))
        return header, {name: bytes(part) for name, part in parts}

    def change(self, number: int) -> dict[str, Any]:
        """What the spooled update of a round says that each tensor changed by; out of the spool."""
        header, parts = self.update(number)
        changes = {}
        for name, payload in parts.items():
            total = BlockSum.zero(self.model.spec.block(name))
            total.fold(header.codec, payload, 1)
            for spec in total.block.tensors:
                unit = 2.0**-30 if spec.is_float else 1.0
                changes[spec.name] = unit * total.numerators()[spec.name]
        return changes

    def begin_endless_training(self, number: int) -> None:
        """Return once the trainer is in the middle of it."""
        (self.folder / "begun").unlink(missing_ok=True)
        (self.folder / "watched").touch()
        self.trainer.train(self.order(number, local_epochs=1000))
        deadline_s = time.monotonic() + PATIENCE_S
        while not (self.folder / "begun").exists():
            assert time.monotonic() < deadline_s, "training did not begin"
            time.sleep(0.005)
        (self.folder / "watched").unlink()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """One child for all tests that leave it alive: it takes seconds to load torch."""
    bench = Bench(tmp_path_factory.mktemp("trainer"))
    bench.trainer.start()
    bench.described = bench.answer()
    yield bench
    bench.trainer.stop()


def test_a_started_trainer_describes_the_task(bench: Bench) -> None:
    described = bench.described
    assert isinstance(described, Described)
    assert described.pid == bench.trainer.pid
    assert described.table.spec == bench.model.spec
    assert described.table.task == "toy"
    assert described.num_examples == SAMPLES
    assert 20 << 20 < described.floor_bytes < 1 << 30


def test_a_plan_carried_out_is_an_update_in_the_spool(bench: Bench) -> None:
    order = bench.order(1)
    bench.trainer.train(order)
    trained = bench.answer()
    assert isinstance(trained, Trained)
    assert trained.round == 1
    header, parts = bench.update(1)
    assert (header.round, header.ticket, header.base_sha) == (1, bytes(16), "ab" * 32)
    assert (header.codec, header.num_examples) == ("balanced", SAMPLES)
    assert list(parts) == ["1", "2"]
    assert header.metrics.steps == 3
    assert header.metrics.loss > 0
    assert (header.metrics.plan_peak_bytes, header.metrics.flops) == (11, 14)
    assert header.metrics.measured_peak_bytes > 20 << 20
    assert trained.metrics.train_s >= header.metrics.train_s > 0
    bench.trainer.train(order)
    assert isinstance(bench.answer(), Trained)
    changed = bench.change(1)
    assert changed["1.num_batches_tracked"] == 6  # micro-batches of 4 of 24 samples
    assert np.any(changed["2.weight"] != 0)


def test_the_same_offer_gives_the_same_update_and_another_round_another(bench: Bench) -> None:
    parts = []
    for number in (2, 2, 3):
        bench.trainer.train(bench.order(number))
        assert isinstance(bench.answer(), Trained)
        parts.append(bench.update(number)[1])
    assert parts[0] == parts[1]
    assert parts[0] != parts[2]


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_prefix_that_is_kept_changes_nothing_but_the_cost(bench: Bench, cache: Any) -> None:
    prefix = FrozenPrefix(blocks=("0",), cache=cache)
    changes = []
    # Afterwards the model has weights again for who trains the whole of it.
    for blocks, how in (
        (("1", "2"), FrozenPrefix()),
        (("1", "2"), prefix),
        (("1", "2"), prefix),
        (("0", "1", "2"), FrozenPrefix()),
        (("1", "2"), FrozenPrefix()),
    ):
        bench.trainer.train(bench.order(20, blocks, how, codec="lossless"))
        assert isinstance(bench.answer(), Trained)
        changes.append(bench.change(20))
    for other in (changes[1], changes[2], changes[4]):
        assert other.keys() == changes[0].keys()
        for name, change in changes[0].items():
            np.testing.assert_allclose(other[name], change, rtol=0, atol=1e-6)
    assert any(name.startswith("0.") for name in changes[3])
    assert bool(list(bench.folder.glob("prefix/*"))) == (cache == "disk")


def test_seconds_of_training_are_with_the_filling_of_a_prefix(bench: Bench) -> None:
    (bench.folder / "slow").touch()
    bench.trainer.train(bench.order(21, prefix=FrozenPrefix(blocks=("0",), cache="memory")))
    trained = bench.answer()
    (bench.folder / "slow").unlink()
    bench.update(21)
    assert isinstance(trained, Trained)
    assert trained.metrics.train_s >= 2 * SLOW_S, "24 samples are two batches of 16"


def test_a_prefix_that_cannot_run_apart_is_said_and_the_next_plan_carried_out(
    bench: Bench,
) -> None:
    plain = bench.order(21)
    bench.trainer.train(plain)
    assert isinstance(bench.answer(), Trained)
    expected = bench.update(21)[1]
    # Half a kibibyte of storage cannot hold what block 0 computes.
    small = msgspec.structs.replace(
        bench.order(21, prefix=FrozenPrefix(blocks=("0",), cache="memory")).plan, budget_bytes=512
    )
    bench.trainer.train(Train(offer=plain.offer, plan=small))
    failed = bench.answer()
    assert isinstance(failed, Failed)
    assert (failed.round, failed.kind) == (21, "prefix")
    bench.trainer.train(plain)
    assert isinstance(bench.answer(), Trained)
    assert bench.update(21)[1] == expected


def test_a_damaged_block_is_dropped_and_reported(bench: Bench) -> None:
    order = bench.order(4, blocks=("2",))
    entry = order.offer.blocks[2]
    path = bench.cache.path(entry.sha256)
    for damage in (path.read_bytes()[:-1], bytes(entry.raw_bytes), b""):
        # What was trained is loaded anew, so the next round reads the file.
        bench.trainer.train(bench.order(4, blocks=("2",)))
        assert isinstance(bench.answer(), Trained)
        bench.update(4)
        path.write_bytes(damage)
        bench.trainer.train(order)
        failed = bench.answer()
        assert isinstance(failed, Failed)
        assert (failed.round, failed.kind) == (4, "damaged")
        assert failed.message.startswith("cached block '2': ")
        assert failed.message.endswith("it is fetched again")
        assert not path.exists()
    bench.trainer.train(order)
    failed = bench.answer()
    assert failed.kind == "damaged"
    assert "the block is missing" in failed.message


def test_a_stop_while_training_is_obeyed(bench: Bench) -> None:
    bench.begin_endless_training(5)
    bench.trainer.give_up()
    bench.trainer.train(bench.order(6))
    answer = bench.answer()
    assert isinstance(answer, Trained)
    assert answer.round == 6
    bench.update(6)
    assert bench.spool.entries() == []


def test_a_newer_plan_replaces_the_one_being_trained(bench: Bench) -> None:
    bench.begin_endless_training(7)
    bench.trainer.train(bench.order(8, blocks=("2",)))
    assert bench.answer().round == 8
    header, parts = bench.update(8)
    assert list(parts) == ["2"]
    assert header.metrics.steps == 3


def test_a_pause_rests_between_steps_and_a_stop_ends_it(bench: Bench) -> None:
    bench.begin_endless_training(22)
    bench.trainer.pause()
    bench.trainer.resume()
    bench.trainer.pause()
    bench.trainer.train(bench.order(23))
    answer = bench.answer()
    assert (type(answer), answer.round) == (Trained, 23)
    bench.update(23)
    bench.trainer.pause()  # nothing is being trained: the next plan is not held up
    bench.trainer.resume()
    bench.trainer.train(bench.order(24))
    assert isinstance(bench.answer(), Trained)
    bench.update(24)


@pytest.mark.parametrize(
    ("marker", "kind", "message"),
    [
        ("raises", "task", "ValueError: labels of class 7 are missing"),
        (
            "diverges",
            "task",
            "task 'toy': the loss is nan at step 0; nothing is sent. Lower the learning rate or "
            "check the data.",
        ),
        ("no-memory", "memory", "MemoryError: DefaultCPUAllocator: not enough memory"),
    ],
)
def test_a_task_that_raises_is_reported(bench: Bench, marker: str, kind: str, message: str) -> None:
    (bench.folder / marker).touch()
    try:
        bench.trainer.train(bench.order(9))
        assert bench.answer() == Failed(round=9, kind=kind, message=message)
    finally:
        (bench.folder / marker).unlink()
    assert bench.spool.entries() == []


def test_a_loss_that_diverges_is_reported(bench: Bench) -> None:
    bench.trainer.train(bench.order(10, learning_rate=1000.0, local_epochs=1000, momentum=0.99))
    failed = bench.answer()
    assert (failed.round, failed.kind) == (10, "task")
    assert "nothing is sent. Lower the learning rate" in failed.message or "limit" in failed.message


def test_a_plan_of_a_block_the_model_has_not_is_reported(bench: Bench) -> None:
    bench.trainer.train(bench.order(11, blocks=("1", "nine")))
    failed = bench.answer()
    assert (failed.round, failed.kind) == (11, "task")
    assert failed.message == "no block 'nine' in this model; it has 0, 1, 2"


def test_after_failures_the_same_process_still_trains(bench: Bench) -> None:
    bench.trainer.train(bench.order(12))
    assert isinstance(bench.answer(), Trained)
    bench.update(12)
    assert bench.trainer.life == 1


def test_a_killed_trainer_is_noticed_and_started_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.trainer.start()
    try:
        assert isinstance(bench.answer(), Described)
        bench.begin_endless_training(1)
        assert bench.trainer.pid is not None
        os.kill(bench.trainer.pid, signal.SIGKILL)
        assert bench.inbox.get(timeout=PATIENCE_S) == TrainerDied(1, -signal.SIGKILL)
        bench.trainer.train(bench.order(1))  # nobody is there: no error, its death was said
        bench.trainer.start()
        assert bench.trainer.life == 2
        assert isinstance(bench.answer(), Described)
    finally:
        bench.trainer.stop()
    assert bench.inbox.get(timeout=PATIENCE_S) == TrainerDied(2, -signal.SIGKILL)
    bench.trainer.stop()
    assert bench.trainer.pid is None


def test_a_task_file_that_is_wrong_is_reported(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.task_path.write_text("def task():\n    raise OSError('no data on this disk')\n")
    bench.trainer.start()
    try:
        assert bench.answer() == Failed(
            round=0,
            kind="task",
            message=f"task file {bench.task_path}: task() failed at line 2: "
            "OSError: no data on this disk",
        )
    finally:
        bench.trainer.stop()


def test_a_device_without_samples_says_so(tmp_path: Path) -> None:
    task = TASK.replace("((24, 4))", "((0, 4))").replace("rng.integers(0, 3, 24)", "[]")
    bench = Bench(tmp_path, task)
    bench.trainer.start()
    try:
        answer = bench.answer()
        assert isinstance(answer, Failed)
        assert answer.message == "task 'toy': train_data(1, 2): there are no samples"
    finally:
        bench.trainer.stop()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "memory"),
        (RuntimeError("could not create a primitive"), "memory"),
        (RuntimeError("can't start new thread"), "memory"),
        (OSError(12, "Cannot allocate memory"), "memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), "task"),
        (ValueError("the alloc column is missing"), "task"),
        (DamagedBlock("x"), "damaged"),
    ],
)
def test_what_an_error_is_about(error: Exception, kind: str) -> None:
    assert _kind(error) == kind


def test_an_order_before_the_start_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(ProtocolMisuse, match="given an order before it was started"):
        Bench(tmp_path).trainer.give_up()


def child() -> tuple[Connection, subprocess.Popen[bytes]]:
    """A trainer started as the agent does it, with the agent's end in our hands."""
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_sdk.trainer", str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stderr=subprocess.PIPE,
    )
    theirs.close()
    return Connection(ours.detach()), process


@pytest.mark.parametrize("moment", ["idle", "training"])
def test_a_trainer_leaves_when_its_agent_is_gone(tmp_path: Path, moment: str) -> None:
    bench = Bench(tmp_path)
    connection, process = child()
    with process:
        connection.send_bytes(msgspec.msgpack.encode(bench.setup()))
        if moment == "training":
            connection.recv_bytes()
            order = bench.order(1, local_epochs=1000)
            (tmp_path / "watched").touch()
            connection.send_bytes(msgspec.msgpack.encode(order))
            deadline_s = time.monotonic() + PATIENCE_S
            while not (tmp_path / "begun").exists():
                assert time.monotonic() < deadline_s, "training did not begin"
                time.sleep(0.005)
        connection.close()
        _, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, said) == (0, b"")
    assert bench.spool.entries() == []


def test_the_trainer_is_not_started_by_hand() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk.trainer"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "edge_sdk.trainer is started by the agent, not by hand" in done.stderr


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of(1, 2, "codec") == 0x6DC6748765BD  # of `printf 1/2/codec | sha256sum`
    assert seed_of(1, 2) != seed_of(12)
    assert 0 <= seed_of("x") < 1 << 48

"""The training process: a long-lived child that owns torch.

An out-of-memory kill or a crash of it costs a plan, not the agent, which stays small. The two talk
over a socket pair, one message a frame; weights do not pass through it: the trainer reads blocks
from the cache and puts the finished update into the spool itself. When the agent dies the trainer
sees its end of the pair close and leaves.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_sdk.cost import CostTable
from edge_sdk.errors import ConfigError, DamagedBlock, EdgeError, ProtocolMisuse, TaskError
from edge_sdk.plan import Plan
from edge_sdk.store import BlockCache, Spool
from edge_sdk.wire import Offer, UpdateMetrics

if TYPE_CHECKING:
    import numpy as np

    from edge_sdk.model import BlockModel
    from edge_sdk.train import Samples

# glibc keeps freed memory in arenas unless told otherwise: up to a fifth of the peak that no cost
# model can predict. With one mebibyte thresholds large tensors go back to the system at once.
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "1048576",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "2",
}


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: this is your task and where the blocks and the spool are."""

    job: str
    task_path: str
    part: int
    parts: int
    cache_dir: str
    spool_dir: str
    threads: int


class Train(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: carry this plan out."""

    offer: Offer
    plan: Plan


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: give up what you are training; no answer."""


class Described(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Trainer: what the task costs here, ``floor_bytes`` is my memory without the model."""

    pid: int
    table: CostTable
    floor_bytes: int
    num_examples: int


class Trained(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Trainer: the update of this round is in the spool."""

    round: int
    metrics: UpdateMetrics


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Trainer: it could not be done; ``kind`` says what the agent can do about it."""

    round: int
    kind: str
    message: str


Order = Setup | Train | Stop
Answer = Described | Trained | Failed


@dataclass(frozen=True, slots=True)
class TrainerSaid:
    """An answer arrived from the trainer started as number ``life``."""

    life: int
    answer: Answer


@dataclass(frozen=True, slots=True)
class TrainerDied:
    """The trainer started as number ``life`` is gone; ``exit_code`` is None when not our child."""

    life: int
    exit_code: int | None


class Trainer:
    """The agent's handle on its training process."""

    def __init__(
        self, setup: Setup, inbox: queue.SimpleQueue[Any], nursery: str | None = None
    ) -> None:
        """``nursery`` is the socket of a process that forks trainers, see ``fleet_sim``."""
        self._setup, self._inbox, self._nursery = setup, inbox, nursery
        self._connection: Connection | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self.life = 0
        self.pid: int | None = None

    def start(self) -> None:
        """Start a fresh process and give it its task."""
        self.stop()
        self.life += 1
        self._connection = self._from_nursery() if self._nursery else self._spawn()
        self._send(self._setup)
        reader = threading.Thread(
            target=_read, args=(self._connection, self._child, self.life, self._inbox), daemon=True
        )
        reader.start()

    def train(self, order: Train) -> None:
        """Start on a plan; the answer comes through the inbox."""
        self._send(order)

    def give_up(self) -> None:
        """Abandon the plan being trained; the process stays."""
        self._send(Stop())

    def stop(self) -> None:
        """End the process; a no-op when there is none."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None
        if self._connection is not None:
            # Wakes the reader thread, which owns the descriptor from here on.
            with (
                suppress(OSError),
                socket.socket(fileno=os.dup(self._connection.fileno())) as end,
            ):
                end.shutdown(socket.SHUT_RDWR)
            self._connection = None
        self.pid = None

    def _send(self, order: Order) -> None:
        if self._connection is None:
            raise ProtocolMisuse("the trainer was given an order before it was started")
        with suppress(OSError):  # its death is an event of its own
            self._connection.send_bytes(msgspec.msgpack.encode(order))

    def _spawn(self) -> Connection:
        ours, theirs = socket.socketpair()
        threads = str(self._setup.threads)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "edge_sdk.trainer", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            # What a task file prints must not end up in the agent's own, machine-readable output.
            stdout=sys.stderr,
            env={**os.environ, **MALLOC, **dict.fromkeys(THREAD_LIMITS, threads)},
        )
        self.pid = self._child.pid
        theirs.close()
        return Connection(ours.detach())

    def _from_nursery(self) -> Connection:
        link = socket.socket(socket.AF_UNIX)
        link.connect(str(self._nursery))
        return Connection(link.detach())


def _read(
    connection: Connection,
    child: subprocess.Popen[bytes] | None,
    life: int,
    inbox: queue.SimpleQueue[Any],
) -> None:
    """Reader thread: only decodes and enqueues."""
    decoder = msgspec.msgpack.Decoder(Answer)
    with suppress(EOFError, OSError):
        while True:
            inbox.put(TrainerSaid(life, decoder.decode(connection.recv_bytes())))
    connection.close()
    inbox.put(TrainerDied(life, child.wait() if child is not None else None))


def serve(connection: Connection) -> None:
    """The trainer's own loop: one order, one answer, until the agent is gone."""
    decoder = msgspec.msgpack.Decoder(Order)
    worker: _Worker | None = None
    while True:
        try:
            order = decoder.decode(connection.recv_bytes())
        except (EOFError, OSError):
            return
        try:
            if isinstance(order, Setup):
                worker = _Worker(order, connection)
                answer: Answer = worker.described
            elif isinstance(order, Train) and worker is not None:
                answer = worker.train(order)
            else:
                continue
        except _Superseded:
            continue
        except Exception as error:
            number = order.offer.round if isinstance(order, Train) else 0
            answer = Failed(round=number, kind=_kind(error), message=_words(error))
        with suppress(OSError):  # the agent is gone, which the next receive says
            connection.send_bytes(msgspec.msgpack.encode(answer))


def _floor_bytes() -> int:
    """What this process holds before it trains: torch, the task's imports and data, the model."""
    import ctypes

    import edge_sdk.strategies  # noqa: F401  (belongs to the floor: it loads the codec)
    from edge_sdk.process import process_rss_bytes, shed_library_pages
    from edge_sdk.train import warm_up

    with suppress(AttributeError):  # glibc only: give freed memory back before measuring
        ctypes.CDLL(None).malloc_trim(0)
    shed_library_pages()
    warm_up()
    return process_rss_bytes()


def _kind(error: Exception) -> str:
    if isinstance(error, DamagedBlock):
        return "damaged"
    return "memory" if isinstance(error, MemoryError) or "alloc" in str(error) else "task"


def _words(error: Exception) -> str:
    text = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
    return text[:1900]


def seed_of(*parts: int | str) -> int:
    """A seed drawn from its parts, the same on every machine: 48 bits of their SHA-256."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


class _Superseded(Exception):
    """Another order waits, or the agent is gone: what is being trained is abandoned."""


class _Worker:
    """The task, its model and its data in the trainer's memory, between rounds."""

    def __init__(self, setup: Setup, connection: Connection) -> None:
        import torch

        from edge_sdk.model import BlockModel
        from edge_sdk.task import load_task
        from edge_sdk.train import Samples, costs

        torch.set_num_threads(setup.threads)
        task = load_task(Path(setup.task_path))
        torch.manual_seed(0)
        where = f"task {task.name!r}: train_data({setup.part}, {setup.parts})"
        try:
            data = task.train_data(setup.part, setup.parts)
        except Exception as error:
            raise TaskError(f"{where} failed: {type(error).__name__}: {error}") from error
        self.samples: Samples = Samples(data, where)
        del data
        self.model: BlockModel = BlockModel(task)
        self.setup, self._connection = setup, connection
        self.cache, self.spool = BlockCache(Path(setup.cache_dir)), Spool(Path(setup.spool_dir))
        self.loaded: dict[str, str] = {}
        table = costs(self.model, self.samples)
        self.described = Described(
            pid=os.getpid(),
            table=table,
            floor_bytes=_floor_bytes() - self.model.spec.size_bytes,
            num_examples=self.samples.count,
        )

    def pause(self) -> None:
        """Between steps: stop when the agent has said something, or is gone."""
        if self._connection.poll(0):
            raise _Superseded

    def train(self, order: Train) -> Trained:
        """Carry a plan out and put the update into the spool."""
        import numpy as np

        from edge_sdk.process import reset_peak
        from edge_sdk.strategies import strategy_named

        reset_peak()
        local = _Local(self, order)
        offer = order.offer
        rng = np.random.default_rng(
            seed_of(offer.training.seed, offer.round, self.setup.part, "codec")
        )
        halves = strategy_named(offer.strategy)
        device = halves.device_round(offer, self.model.spec, order.plan, local, rng)
        body = next(device)
        self.spool.put(self.setup.job, offer.round, offer.ticket, body, time.time())
        return Trained(round=offer.round, metrics=local.metrics())


class _Local:
    """One round's view of the worker's model, as a strategy wants it."""

    def __init__(self, worker: _Worker, order: Train) -> None:
        self._worker, self._order = worker, order
        self._entries = {entry.name: entry for entry in order.offer.blocks}
        self._loss, self._steps = 0.0, 0
        self._train_s = self._train_cpu_s = 0.0

    def train(self, plan: Plan) -> int:
        """Load the offer's blocks, then take the local steps."""
        from edge_sdk.train import train

        self._load()
        training = self._order.offer.training
        part, number = self._worker.setup.part, self._order.offer.round
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        for name in plan.blocks:
            self._worker.loaded.pop(name, None)
        self._loss, self._steps = train(
            self._worker.model,
            self._worker.samples,
            plan.blocks,
            training,
            micro_batch=plan.micro_batch,
            order_seed=seed_of(training.seed, number, part),
            pause=self._worker.pause,
        )
        self._train_s = time.monotonic() - started_s
        self._train_cpu_s = time.process_time() - started_cpu_s
        return self._worker.samples.count

    def metrics(self) -> UpdateMetrics:
        """Measured up to now; the peak is the process's since the round began."""
        from edge_sdk.process import process_peak_bytes

        plan = self._order.plan
        return UpdateMetrics(
            loss=self._loss,
            steps=self._steps,
            train_s=self._train_s,
            train_cpu_s=self._train_cpu_s,
            plan_s=plan.round_s,
            plan_peak_bytes=plan.peak_bytes,
            measured_peak_bytes=process_peak_bytes(os.getpid()),
            budget_bytes=plan.budget_bytes,
            plan_up_bytes=plan.upload_bytes,
            flops=plan.flops,
        )

    def base(self, block: str) -> dict[str, np.ndarray[Any, Any]]:
        """A block as the offer's version has it, from the cache."""
        from edge_sdk.codec import block_hash, decode_block

        entry = self._entries[block]
        spec = self._worker.model.spec.block(block)
        try:
            arrays = decode_block(spec, self._worker.cache.read(entry.sha256))
            if block_hash(spec, arrays) != entry.sha256:
                raise DamagedBlock(
                    f"block {block!r}: content does not have its hash {entry.sha256}"
                )
        except EdgeError as error:
            self._worker.cache.drop(entry.sha256)
            raise DamagedBlock(f"cached block {block!r}: {error}; it is fetched again") from error
        return arrays

    def read(self, block: str) -> dict[str, np.ndarray[Any, Any]]:
        """A block as it is now."""
        return self._worker.model.read(block)

    def _load(self) -> None:
        for name, entry in self._entries.items():
            if self._worker.loaded.get(name) != entry.sha256:
                self._worker.model.write(name, self.base(name))
                self._worker.loaded[name] = entry.sha256


def main() -> int:
    """Entry of the child process: the descriptor of its socket is its one argument."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        raise ConfigError("edge_sdk.trainer is started by the agent, not by hand")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which then closes us
    serve(Connection(int(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())

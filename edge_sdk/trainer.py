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
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_sdk.blocks import Block
from edge_sdk.cost import CostTable
from edge_sdk.errors import ConfigError, DamagedBlock, EdgeError, ProtocolMisuse, TaskError
from edge_sdk.memory import MALLOC, THREAD_LIMITS
from edge_sdk.plan import Plan
from edge_sdk.store import BlockCache, Spool, disk_errors
from edge_sdk.ways import FILL_BATCH
from edge_sdk.wire import Offer, UpdateMetrics

if TYPE_CHECKING:
    import numpy as np

    from edge_sdk.model import BlockModel
    from edge_sdk.prefix import OpenPrefix
    from edge_sdk.train import Samples

# When memory runs out the kernel is to take this process, before anybody else's.
OOM_SCORE = "1000"
# How torch, oneDNN, glibc and Python say that they were refused memory or a thread's stack.
REFUSED_MEMORY = (
    *("alloc", "out of memory", "could not create a primitive", "start new thread"),
    *("Cannot allocate", "thread creation failed", "Resource temporarily unavailable"),
)


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: this is your task and where the blocks and the spool are.

    prefix_dir: where the outputs of frozen blocks may be kept, up to ``storage_bytes``.
    describe:   False for one who was told before what the task costs: finding out takes longer,
                and more memory, than all else at the start.
    """

    job: str
    task_path: str
    part: int
    parts: int
    cache_dir: str
    spool_dir: str
    prefix_dir: str
    storage_bytes: int
    threads: int
    describe: bool = True


class Train(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: carry this plan out."""

    offer: Offer
    plan: Plan


class Stop(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: give up what you are training; no answer."""


class Pause(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: rest after the present step, keeping everything, until Resume; no answer."""


class Resume(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Agent: go on where you paused; no answer."""


class Described(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Trainer: what the task costs here, ``floor_bytes`` is my memory without the model."""

    pid: int
    table: CostTable
    floor_bytes: int
    num_examples: int


class Up(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Trainer: I am there; what the task costs you know."""

    pid: int


class Trained(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Trainer: the update of this round is in the spool."""

    round: int
    metrics: UpdateMetrics


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Trainer: it could not be done; ``kind`` says what the agent can do about it."""

    round: int
    kind: str
    message: str


Order = Setup | Train | Stop | Pause | Resume
Answer = Described | Up | Trained | Failed


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

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped; one that died stays running until then."""
        return self._connection is not None

    def start(self, *, describe: bool = True) -> None:
        """Start a fresh process and give it its task, to be described or only to be loaded."""
        self.stop()
        self.life += 1
        self._connection = self._from_nursery() if self._nursery else self._spawn()
        self._send(msgspec.structs.replace(self._setup, describe=describe))
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

    def pause(self) -> None:
        """Rest between two steps until ``resume``."""
        self._send(Pause())

    def resume(self) -> None:
        """Go on from the last finished step."""
        self._send(Resume())

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
    orders = _Orders(connection)
    worker: _Worker | None = None
    _offer_to_the_kernel()
    while True:
        try:
            order = orders.next()
        except (EOFError, OSError):
            return
        try:
            if isinstance(order, Setup):
                worker = _Worker(order, orders)
                answer: Answer = worker.hello
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


def floor_bytes() -> int:
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
    if type(error).__name__ == "NoPrefix":  # its module loads torch, which may have failed
        return "prefix"
    refused = isinstance(error, (MemoryError, RuntimeError, OSError)) and any(
        words in str(error) for words in REFUSED_MEMORY
    )
    return "memory" if refused or isinstance(error, MemoryError) else "task"


def _words(error: Exception) -> str:
    text = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
    return text[:1900]


def seed_of(*parts: int | str) -> int:
    """A seed drawn from its parts, the same on every machine: 48 bits of their SHA-256."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


def _offer_to_the_kernel() -> None:
    """Be the first to go when memory runs out: anybody may raise the score of his own process."""
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)


class _Superseded(Exception):
    """Another order waits, or the agent is gone: what is being trained is abandoned."""


class _Orders:
    """The agent's orders, one after another; those to pause are obeyed between two steps."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._decoder = msgspec.msgpack.Decoder(Order)
        self._waiting: Order | None = None
        self.paused_s = 0.0

    def next(self) -> Order:
        """The next order; EOFError or OSError when the agent is gone."""
        order, self._waiting = self._waiting, None
        return order if order is not None else self._receive()

    def rest(self) -> None:
        """Between steps: wait through a pause; _Superseded for any other order."""
        while self._connection.poll(0):
            order = self._receive()
            started_s = time.monotonic()
            while isinstance(order, Pause):
                order = self._receive()
            self.paused_s += time.monotonic() - started_s
            if not isinstance(order, Resume):
                self._waiting = order
                raise _Superseded

    def _receive(self) -> Order:
        return self._decoder.decode(self._connection.recv_bytes())  # type: ignore[no-any-return]


class _Worker:
    """The task, its model and its data in the trainer's memory, between rounds."""

    def __init__(self, setup: Setup, orders: _Orders) -> None:
        import torch

        from edge_sdk.model import BlockModel
        from edge_sdk.prefix import Prefixes
        from edge_sdk.task import load_task
        from edge_sdk.trace import cost_table_apart
        from edge_sdk.train import Samples

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
        self.setup, self.orders = setup, orders
        self.cache, self.spool = BlockCache(Path(setup.cache_dir)), Spool(Path(setup.spool_dir))
        self.prefixes = Prefixes(self.model, self.samples, Path(setup.prefix_dir))
        self.loaded: dict[str, str] = {}
        self.hello: Described | Up = Up(pid=os.getpid())
        if setup.describe:
            table = cost_table_apart(self.model, self.samples)
            self.hello = Described(
                pid=os.getpid(),
                table=table,
                floor_bytes=floor_bytes() - self.model.spec.size_bytes,
                num_examples=self.samples.count,
            )

    def pause(self) -> None:
        """Between steps: rest when the agent says so, stop when it has another order or is gone."""
        try:
            self.orders.rest()
        except (EOFError, OSError) as error:
            raise _Superseded from error

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
        update = next(device)
        with self.spool.scratch() as scratch:
            body = update.chunks(scratch)
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
        """Load the offer's blocks, then take the local steps; filling a prefix's cache counts."""
        from edge_sdk.train import train

        how = plan.prefix
        apart = () if how.engine == "torch" and how.cache == "none" else how.blocks
        self._load([name for name in self._entries if name not in apart])
        training = self._order.offer.training
        part, number = self._worker.setup.part, self._order.offer.round
        orders = self._worker.orders
        started_s, started_cpu_s = time.monotonic(), time.process_time()
        paused_s = orders.paused_s
        prefix = self._prefix(plan)
        for name in plan.blocks:
            self._worker.loaded.pop(name, None)
        done = train(
            self._worker.model,
            self._worker.samples,
            plan,
            training,
            order_seed=seed_of(training.seed, number, part),
            prefix=prefix,
            pause=self._worker.pause,
        )
        self._train_s = time.monotonic() - started_s - (orders.paused_s - paused_s)
        self._train_cpu_s = time.process_time() - started_cpu_s
        self._loss, self._steps = done.loss, done.steps
        return done.num_examples

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
        sha256 = self._entries[block].sha256
        try:
            return _cached(self._worker.cache, self._worker.model.spec.block(block), sha256)
        except EdgeError as error:
            self._worker.cache.drop(sha256)
            raise DamagedBlock(f"cached block {block!r}: {error}; it is fetched again") from error

    def read(self, block: str) -> dict[str, np.ndarray[Any, Any]]:
        """A block as it is now."""
        return self._worker.model.read(block)

    def _prefix(self, plan: Plan) -> OpenPrefix | None:
        """The plan's frozen prefix, where that runs apart, with what is kept of it filled.

        Raises NoPrefix when it does not run apart: run with the rest it needs more memory.
        """
        how = plan.prefix
        in_memory = how.cache == "memory"
        return self._worker.prefixes.open(
            how,
            {name: self._entries[name].sha256 for name in how.blocks},
            limit_bytes=plan.budget_bytes if in_memory else self._worker.setup.storage_bytes,
            batch_size=FILL_BATCH,
            load=lambda name: self._load([name]),
            # Only some of the samples are needed for some of the steps: those, when they are.
            wanted=None if plan.steps is None else (),
            pause=self._worker.pause,
        )

    def _load(self, names: Iterable[str]) -> None:
        """Have these blocks in the model as the offer has them."""
        from edge_sdk.hollow import restore, unloaded

        model, loaded = self._worker.model, self._worker.loaded
        empty = unloaded(model)
        for name in names:
            sha256 = self._entries[name].sha256
            if name in empty:
                restore(model, [name])
            if name in empty or loaded.get(name) != sha256:
                loaded.pop(name, None)
                model.write(name, self.base(name))
                loaded[name] = sha256


def _cached(cache: BlockCache, spec: Block, sha256: str) -> dict[str, np.ndarray[Any, Any]]:
    """A block from the cache; if it was there as a difference, it is there whole afterwards."""
    from edge_sdk.codec import block_hash, decode_block, decode_block_delta, encode_block

    delta = cache.delta(sha256)
    if delta is None:
        arrays = decode_block(spec, cache.read(sha256))
    else:
        with disk_errors("read", delta[0]):
            payload = delta[0].read_bytes()
        arrays = decode_block_delta(spec, decode_block(spec, cache.read(delta[1])), payload)
    if block_hash(spec, arrays) != sha256:
        raise DamagedBlock(f"block {spec.name!r}: content does not have its hash {sha256}")
    if delta is not None:
        cache.put(sha256, encode_block(spec, arrays))
    return arrays


def main() -> int:
    """Entry of the child process: the descriptor of its socket is its one argument."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        raise ConfigError("edge_sdk.trainer is started by the agent, not by hand")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the agent, which then closes us
    serve(Connection(int(sys.argv[1])))
    return 0


if __name__ == "__main__":
    sys.exit(main())

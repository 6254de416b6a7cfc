"""The smallest memory cgroup in which something finishes, by bisection over real limits."""

from __future__ import annotations

import queue
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from edge_sdk.confine import Confinement
from edge_sdk.errors import MIB
from edge_sdk.trainer import Described, Setup, Train, Trained, Trainer, TrainerSaid, Up

# Near its limit a process crawls before it dies: one that takes so long does not finish.
TRY_LIMIT_S = 120.0
# How far to go first from a guess.
STRIDE_MIB = 32
# What needs more than this fails for another reason.
MOST_MIB = 4096


def trainer_finishes(setup: Setup, order: Train | None, limit_bytes: int) -> bool:
    """Whether a new trainer carries an order out under a limit; without one, describes its task."""
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()
    trainer = Trainer(setup, heard)
    trainer.start(describe=order is None)
    assert trainer.pid is not None
    with confined(trainer.pid, limit_bytes, trainer.stop):
        said = _answer(heard)
        if order is None or not isinstance(said, Up):
            return isinstance(said, Described)
        trainer.train(order)
        return isinstance(_answer(heard), Trained)


def program_finishes(
    command: Sequence[str], surroundings: Mapping[str, str], limit_bytes: int
) -> bool:
    """Whether a program ends well under a limit."""
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(surroundings)
    )

    def end() -> None:
        process.kill()
        process.wait()

    with confined(process.pid, limit_bytes, end), suppress(subprocess.TimeoutExpired):
        return process.wait(TRY_LIMIT_S) == 0
    return False


def _answer(heard: queue.SimpleQueue[Any]) -> Any:
    """What the trainer says next; None when it dies or takes too long."""
    with suppress(queue.Empty):
        event = heard.get(timeout=TRY_LIMIT_S)
        return event.answer if isinstance(event, TrainerSaid) else None


_making = threading.Lock()


@contextmanager
def confined(pid: int, limit_bytes: int, end: Callable[[], None]) -> Iterator[None]:
    """A process that has just started, in a cgroup of its own; ended when the block ends."""
    try:
        with _making:  # making one sweeps those that are still empty
            confinement = Confinement(pid)
        if confinement.why_no_group:
            sys.exit(f"no memory cgroup can be made here: {confinement.why_no_group}")
        confinement.limit(limit_bytes)
        # What is sought is the kernel's limit: memory that is mapped but not touched is free.
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        yield
    finally:
        end()
    confinement.release()


def smallest_mib(finishes: Callable[[int], bool], guess_mib: float, step_mib: int) -> int:
    """The smallest limit in MiB, to ``step_mib``, under which a try finishes."""

    def passes(steps: int) -> bool:
        return finishes(steps * step_mib * MIB)

    # Away from the guess in growing strides until it lies in between.
    high, stride = max(1, round(guess_mib / step_mib)), max(1, STRIDE_MIB // step_mib)
    if passes(high):
        low = max(0, high - stride)
        while low and passes(low):
            low, high, stride = max(0, low - 2 * stride), low, 2 * stride
    else:
        low, high = high, high + stride
        while not passes(high):
            if high * step_mib > MOST_MIB:
                sys.exit(f"does not finish in {high * step_mib} MiB: not for want of memory")
            low, high, stride = high, high + 2 * stride, 2 * stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high * step_mib

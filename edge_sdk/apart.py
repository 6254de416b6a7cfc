"""Work on a task that needs torch once, in a process of its own that ends with it.

So the process that asks stays small, and has no part in the memory of a trainer that is measured:
of two processes that map the same libraries, neither can give its pages back.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec

from edge_sdk.errors import TaskError
from edge_sdk.plan import Plan
from edge_sdk.store import BlockCache, make_directory
from edge_sdk.trainer import Setup
from edge_sdk.ways import FILL_BATCH
from edge_sdk.wire import BlockEntry, Training

if TYPE_CHECKING:
    from edge_sdk.model import BlockModel
    from edge_sdk.prefix import OpenPrefix
    from edge_sdk.train import Samples


class Publish(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Put the blocks of the task's new model into the block cache."""

    setup: Setup


class Count(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Count the operations of a plan's local steps while one of them runs."""

    setup: Setup
    plan: Plan
    training: Training
    entries: tuple[BlockEntry, ...]


class Published(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The blocks are in the cache; and how the task says that it is trained."""

    task: str
    training: Training
    entries: tuple[BlockEntry, ...]


class Counted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Floating-point operations of all local steps."""

    flops: int


class _Refused(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What is wrong with the task."""

    message: str


_Order = Publish | Count
_Answer = Published | Counted | _Refused
T = TypeVar("T", Published, Counted)


def carry_out(order: Publish | Count, answer: type[T], directory: Path) -> T:
    """Have a process of its own do it; TaskError with its reason. ``directory`` is for files."""
    file = make_directory(directory) / "answer"
    file.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk.apart", str(file)],
        input=msgspec.msgpack.encode(order),
        # What a task file prints must not end up in a command's machine-readable output.
        stdout=2,
        check=False,
    )
    if done.returncode != 0 or not file.exists():
        raise TaskError(
            f"task file {order.setup.task_path}: the process that read it ended with exit code "
            f"{done.returncode}; load it by hand to see why"
        )
    said = msgspec.msgpack.decode(file.read_bytes(), type=_Answer)
    if not isinstance(said, answer):
        raise TaskError(said.message if isinstance(said, _Refused) else f"unexpected {said!r}")
    return said


def publish(task_path: Path, cache_dir: Path) -> Published:
    """Put the blocks of a task's new model into a block cache, as a server's version 0 would be."""
    from edge_sdk.codec import block_hash, encode_block
    from edge_sdk.model import BlockModel
    from edge_sdk.task import load_task

    task = load_task(task_path)
    model, cache = BlockModel(task), BlockCache(cache_dir)
    entries = []
    for block in model.spec.blocks:
        arrays = model.read(block.name)
        payload, address = encode_block(block, arrays), block_hash(block, arrays)
        cache.put(address, payload)
        entries.append(
            BlockEntry(
                name=block.name, sha256=address, size_bytes=len(payload), raw_bytes=block.size_bytes
            )
        )
    return Published(task=task.name, training=task.training, entries=tuple(entries))


def count(order: Count) -> Counted:
    """Take a step, then the same once more and count what it does; times the plan's samples."""
    from edge_sdk.model import BlockModel
    from edge_sdk.tally import Tally
    from edge_sdk.task import load_task
    from edge_sdk.train import Samples, train

    setup, plan, task = order.setup, order.plan, load_task(Path(order.setup.task_path))
    where = f"task {task.name!r}: train_data({setup.part}, {setup.parts})"
    samples = Samples(task.train_data(setup.part, setup.parts), where)
    model = BlockModel(task)
    prefix = _prefix(order, model, samples)
    one = msgspec.structs.replace(plan, steps=1)
    # What is kept of a frozen prefix is computed in the first.
    train(model, samples, one, order.training, order_seed=0, prefix=prefix)
    with Tally() as tally:
        train(model, samples, one, order.training, order_seed=0, prefix=prefix)
    taken = samples.count * order.training.local_epochs
    if plan.steps is not None:
        taken = min(taken, plan.steps * plan.batch_size)
    return Counted(flops=round(tally.flops * taken / min(plan.batch_size, samples.count)))


def _prefix(order: Count, model: BlockModel, samples: Samples) -> OpenPrefix | None:
    """The plan's frozen prefix, as the trainer runs it."""
    from edge_sdk.codec import decode_block
    from edge_sdk.prefix import Prefixes

    cache = BlockCache(Path(order.setup.cache_dir))
    hashes = {entry.name: entry.sha256 for entry in order.entries}

    def load(name: str) -> None:
        model.write(name, decode_block(model.spec.block(name), cache.read(hashes[name])))

    return Prefixes(model, samples, Path(order.setup.prefix_dir)).open(
        order.plan.prefix, hashes, limit_bytes=1 << 50, batch_size=FILL_BATCH, load=load, wanted=()
    )


def main() -> int:
    """Entry of the child: an order on standard input, its answer into the named file."""
    order = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=_Order)
    try:
        if isinstance(order, Publish):
            cache_dir = Path(order.setup.cache_dir)
            answer: _Answer = publish(Path(order.setup.task_path), cache_dir)
        else:
            answer = count(order)
    except TaskError as error:
        answer = _Refused(message=str(error))
    Path(sys.argv[1]).write_bytes(msgspec.msgpack.encode(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Local training with torch: open the planned blocks, take the planned steps, evaluate."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from edge_sdk.errors import EdgeError, ProtocolMisuse, TaskError
from edge_sdk.model import BlockModel
from edge_sdk.optimizer import Optimizer
from edge_sdk.plan import Plan
from edge_sdk.recompute import recomputing
from edge_sdk.task import Task
from edge_sdk.wire import Training


class Samples:
    """Inputs and targets with samples along the first axis.

    Inputs are one array, or a tuple or dict of arrays; floats become float32, integers int64.
    TaskError when there are none, or their numbers differ.
    """

    def __init__(self, data: tuple[Any, Any], where: str) -> None:
        if not isinstance(data, tuple) or len(data) != 2:
            raise TaskError(f"{where} must return (inputs, targets), got {type(data).__name__}")
        try:
            self.inputs, self.targets = _tensors(data[0]), _tensors(data[1])
            sizes = {len(t) for t in [*_leaves(self.inputs), *_leaves(self.targets)]}
        except (TypeError, ValueError) as error:
            raise TaskError(
                f"{where}: no arrays with samples along the first axis: {error}"
            ) from None
        if len(sizes) != 1:
            raise TaskError(
                f"{where}: inputs and targets have different numbers of samples: {sizes}"
            )
        self.count = sizes.pop()
        if self.count == 0:
            raise TaskError(f"{where}: there are no samples")

    def take(self, index: torch.Tensor) -> tuple[Any, Any]:
        """Inputs and targets of the samples at ``index``."""
        return self.inputs_at(index), self.targets_at(index)

    def inputs_at(self, index: torch.Tensor) -> Any:
        """Inputs of the samples at ``index``."""
        return _index(self.inputs, index)

    def targets_at(self, index: torch.Tensor) -> Any:
        """Targets of the samples at ``index``."""
        return _index(self.targets, index)

    def first(self, count: int) -> tuple[Any, Any]:
        """The first ``count`` samples, repeated when there are fewer."""
        return self.take(torch.arange(count) % self.count)


class Diverged(TaskError):
    """The loss or a weight is no finite number any more; nothing is sent."""


class Prefix(Protocol):
    """Something that runs the frozen blocks, or remembers what they compute."""

    def output(self, index: torch.Tensor, view: int) -> Any:
        """The model's output for the samples at ``index``, with a gradient for trained blocks.

        ``view`` is the number of the augmented view, as ``view_of`` makes it.
        """


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What training did.

    loss:         mean over the samples of the last epoch, or of the steps taken in it.
    num_examples: distinct samples used.
    """

    loss: float
    steps: int
    num_examples: int


def train(
    model: BlockModel,
    samples: Samples,
    plan: Plan,
    training: Training,
    *,
    order_seed: int,
    prefix: Prefix | None = None,
    pause: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Carry the plan's local steps out.

    ``order_seed`` fixes the order of the samples and their views. ``pause`` is called before every
    step and may raise to stop. Raises Diverged when the loss or a weight is not finite, TaskError
    when the task's model, loss or data cannot be trained this way.
    """
    smallest = _check(model, samples, plan)
    run = _Trainer(model, samples, plan, training, prefix, smallest)
    torch.manual_seed(order_seed)
    try:
        with ExitStack() as stack:
            if plan.checkpoint:
                stack.enter_context(recomputing(model))
            if plan.step_in_backward:
                stack.enter_context(run.optimizer.in_backward())
            result = run.epochs(training.local_epochs, order_seed, pause)
    finally:
        # What was given up half-way must not count in the next round.
        model.module.zero_grad(set_to_none=True)
    _check_weights(model, plan.blocks)
    return result


def _check(model: BlockModel, samples: Samples, plan: Plan) -> int:
    """The fewest samples the model can be run on; TaskError when the plan gives it fewer."""
    if plan.step_in_backward and plan.micro_batch < plan.batch_size:
        raise ProtocolMisuse(
            f"a plan steps in backward with micro-batches of {plan.micro_batch} of a batch of "
            f"{plan.batch_size}: a gradient is complete only after the last of them"
        )
    if min(plan.batch_size, plan.micro_batch, plan.steps or 1) < 1 or plan.steps == 0:
        raise ProtocolMisuse(
            f"a plan of batches of {plan.batch_size}, micro-batches of {plan.micro_batch} and "
            f"{plan.steps} steps: each must be at least 1"
        )
    layers = batch_statistics(model)
    block = next((name for name in plan.blocks if name in layers), None)
    if block is None:
        return 1
    for what, count in (
        ("the batch size is", plan.batch_size),
        ("the micro-batch is", plan.micro_batch),
        ("the number of samples is", samples.count),
    ):
        if count < 2:
            raise TaskError(
                f"task {model.task.name!r}: block {block!r} cannot be trained: {layers[block]!r} "
                f"takes its statistics over a batch and needs 2 samples, {what} {count}. Raise it, "
                "normalise with GroupNorm or LayerNorm, or leave the block frozen."
            )
    return 2


def batch_statistics(model: BlockModel) -> dict[str, str]:
    """The blocks with a layer that normalises over the batch, and the first such layer of each."""
    block_of = {t.name: b.name for b in model.spec.blocks for t in b.tensors}
    found: dict[str, str] = {}
    for path, module in model.module.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            owner = path
            # A layer without tensors goes with the module it is in.
            while not (inside := _blocks_below(block_of, owner)) and owner:
                owner = owner.rpartition(".")[0]
            for name in inside:
                found.setdefault(name, path)
    return found


def _blocks_below(block_of: Mapping[str, str], path: str) -> set[str]:
    return {block for key, block in block_of.items() if not path or key.startswith(path + ".")}


def _check_weights(model: BlockModel, blocks: Collection[str]) -> None:
    for name, tensor in [item for b in blocks for item in model.tensors(b).items()]:
        # The least and the largest are NaN when one element is.
        ends = torch.aminmax(tensor.detach()) if tensor.numel() else ()
        if not all(math.isfinite(float(end)) for end in ends):
            raise Diverged(
                f"task {model.task.name!r}: tensor {name!r} is not finite after training; "
                "nothing is sent. Lower the learning rate or check the data."
            )


class _Trainer:
    """The optimiser and what it works on, for one call of ``train``."""

    def __init__(
        self,
        model: BlockModel,
        samples: Samples,
        plan: Plan,
        training: Training,
        prefix: Prefix | None,
        smallest: int,
    ) -> None:
        parameters = model.open_only(plan.blocks)
        if not parameters:
            raise TaskError(
                f"task {model.task.name!r}: blocks {list(plan.blocks)} have no parameter that can "
                "be trained; put their tensors into a block with parameters"
            )
        self.optimizer = Optimizer(parameters, training)
        self._model, self._samples, self._plan = model, samples, plan
        self._prefix, self._smallest = prefix, smallest
        self._steps = 0

    def epochs(self, epochs: int, order_seed: int, pause: Callable[[], None]) -> TrainResult:
        """All epochs, or as many steps as the plan says."""
        generator = torch.Generator().manual_seed(order_seed)
        seen, total, used = 0, 0.0, 0
        for epoch in range(epochs):
            order = torch.randperm(self._samples.count, generator=generator)
            view = (order_seed + epoch) % self._model.task.augment_views
            batches = _parts(order, self._plan.batch_size, self._smallest)
            for place, batch in enumerate(batches):
                if self._steps == self._plan.steps:
                    break
                pause()
                if place == 0:
                    seen, total = 0, 0.0
                total += self._step(batch, view)
                seen += len(batch)
                used = max(used, seen)
        return TrainResult(loss=total / seen, steps=self._steps, num_examples=used)

    def _step(self, batch: torch.Tensor, view: int) -> float:
        """One optimiser step, its gradient accumulated over micro-batches; the summed loss."""
        total = 0.0
        for part in _parts(batch, self._plan.micro_batch, self._smallest):
            total += self._backward(part, len(part) / len(batch), view) * len(part)
        self.optimizer.step()
        self._steps += 1
        return total

    def _backward(self, part: torch.Tensor, share: float, view: int) -> float:
        """Gradients of one micro-batch; its mean loss."""
        task = self._model.task
        if self._prefix is not None:
            output = self._prefix.output(part, view)
        else:
            output = self._model.run(view_of(task, self._samples, part, view))
        loss = task.loss(output, self._samples.targets_at(part))
        del output
        value = self._value(loss)
        (loss if share == 1 else loss * share).backward()
        return value

    def _value(self, loss: Any) -> float:
        task = self._model.task.name
        if not isinstance(loss, torch.Tensor):
            raise TaskError(f"task {task!r}: loss() returned {type(loss).__name__}, not a tensor")
        if loss.numel() != 1 or not loss.is_floating_point():
            raise TaskError(
                f"task {task!r}: loss() returned a tensor of shape {tuple(loss.shape)} and "
                f"{loss.dtype}; return one number, the mean over the samples"
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"task {task!r}: the loss is {value} at step {self._steps}; nothing is sent. "
                "Lower the learning rate or check the data."
            )
        if not loss.requires_grad:
            raise TaskError(
                f"task {task!r}: the loss does not depend on the trained blocks "
                f"{list(self._plan.blocks)}; in loss() and forward() use no detach(), item() or "
                "numpy(), and let every block have a part in the output"
            )
        return value


def _parts(index: torch.Tensor, size: int, smallest: int) -> list[torch.Tensor]:
    """Parts of at most ``size``, none below ``smallest`` (1 or 2).

    A single one left over takes a second from the part before it; a part of 2 takes it in.
    """
    parts = list(torch.split(index, size))
    if len(parts) > 1 and len(parts[-1]) < smallest:
        last = torch.cat(parts[-2:])
        parts[-2:] = [last[:-2], last[-2:]] if size > 2 else [last]
    return parts


def view_of(task: Task, samples: Samples, index: torch.Tensor, view: int) -> Any:
    """Inputs of the samples at ``index`` as augmented view ``view`` has them; always the same."""
    if task.augment is None:
        return samples.inputs_at(index)
    seen = []
    for number in index.tolist():
        # Only 32 bits of a seed count for torch.
        digest = hashlib.sha256(f"{number}/{view}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        one = samples.inputs_at(torch.tensor([number]))
        try:
            seen.append(_tensors(task.augment(one, generator)))
        except (EdgeError, MemoryError):
            raise
        except Exception as error:
            raise TaskError(
                f"task {task.name!r}: augment() failed on sample {number}: "
                f"{type(error).__name__}: {error}"
            ) from error
    try:
        return _stacked(seen)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise TaskError(
            f"task {task.name!r}: augment() must return, for every sample, inputs of one structure "
            f"and shape with a batch of 1 along the first axis: {error}"
        ) from error


def _stacked(batches: Sequence[Any]) -> Any:
    first = batches[0]
    if isinstance(first, (Mapping, tuple)):
        keys = list(first) if isinstance(first, Mapping) else range(len(first))
        if any(type(batch) is not type(first) or len(batch) != len(first) for batch in batches):
            raise TypeError("the structures differ")
        parts = {key: _stacked([batch[key] for batch in batches]) for key in keys}
        return parts if isinstance(first, Mapping) else tuple(parts.values())
    whole = torch.cat(list(batches))
    if len(whole) != len(batches):
        raise TypeError(f"{len(batches)} samples became {len(whole)}")
    return whole


@torch.no_grad()
def evaluate(model: BlockModel, samples: Samples, batch_size: int = 256) -> tuple[float, float]:
    """Mean loss and, for class labels, accuracy (NaN for other targets) on held-out samples."""
    model.module.eval()
    loss, right, labels = 0.0, 0, 0
    for index in torch.split(torch.arange(samples.count), batch_size):
        inputs, targets = samples.take(index)
        output = model.run(inputs)
        loss += float(model.task.loss(output, targets)) * len(index)
        if _are_labels(output, targets):
            right += int((output.argmax(1) == targets).sum())
            labels += targets.numel()
    return loss / samples.count, right / labels if labels else math.nan


def _are_labels(output: Any, targets: Any) -> bool:
    return (
        isinstance(output, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and targets.dtype == torch.int64
        and output.dim() == targets.dim() + 1
    )


def _tensors(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _tensors(value) for key, value in data.items()}
    if isinstance(data, tuple):
        return tuple(_tensors(value) for value in data)
    tensor = data if isinstance(data, torch.Tensor) else torch.from_numpy(np.asarray(data))
    if tensor.is_floating_point():
        return tensor.float()
    return tensor.long() if tensor.dtype != torch.bool else tensor


def _leaves(data: Any) -> Iterator[torch.Tensor]:
    if isinstance(data, (Mapping, tuple)):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from _leaves(value)
    else:
        yield data


def _index(data: Any, index: torch.Tensor) -> Any:
    if isinstance(data, Mapping):
        return {key: _index(value, index) for key, value in data.items()}
    if isinstance(data, tuple):
        return tuple(_index(value, index) for value in data)
    return data[index]


def warm_up() -> None:
    """One tiny step, so that what torch loads on first use is part of the runtime floor."""
    layer = torch.nn.Linear(8, 8)
    layer(torch.zeros(1, 8)).sum().backward()
    Optimizer(list(layer.parameters()), Training()).step()

"""Local training with torch: open the planned blocks, step the optimiser, measure what it cost.

The optimisers are written out, equal to torch's to the bit, because the first step of a
``torch.optim`` optimiser loads torch's compiler: two seconds and 70 MiB on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from edge_sdk.cost import CostTable
from edge_sdk.errors import TaskError
from edge_sdk.model import BlockModel, cost_table
from edge_sdk.wire import Training

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8


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
        return _index(self.inputs, index), _index(self.targets, index)

    def first(self, count: int) -> tuple[Any, Any]:
        """The first ``count`` samples, repeated when there are fewer."""
        return self.take(torch.arange(count) % self.count)


class Optimizer:
    """SGD with momentum, Adam or AdamW over the given parameters; state starts empty."""

    def __init__(self, parameters: list[torch.nn.Parameter], training: Training) -> None:
        self._parameters, self._training = parameters, training
        self._state: dict[int, tuple[torch.Tensor, ...]] = {}
        self._steps = 0

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients and drop them."""
        self._steps += 1
        update = _sgd if self._training.optimizer == "sgd" else _adam
        for place, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                state = self._state.get(place)
                self._state[place] = update(parameter, state, self._training, self._steps)
                parameter.grad = None


State = tuple[torch.Tensor, ...] | None


def _sgd(parameter: torch.nn.Parameter, state: State, how: Training, _step: int) -> Any:
    gradient = parameter.grad
    assert gradient is not None
    if how.weight_decay:
        gradient = gradient.add(parameter, alpha=how.weight_decay)
    if not how.momentum:
        parameter.add_(gradient, alpha=-how.learning_rate)
        return ()
    velocity = gradient.clone() if state is None else state[0].mul_(how.momentum).add_(gradient)
    parameter.add_(velocity, alpha=-how.learning_rate)
    return (velocity,)


def _adam(parameter: torch.nn.Parameter, state: State, how: Training, step: int) -> Any:
    gradient = parameter.grad
    assert gradient is not None
    if how.weight_decay and how.optimizer == "adamw":
        parameter.mul_(1 - how.learning_rate * how.weight_decay)
    elif how.weight_decay:
        gradient = gradient.add(parameter, alpha=how.weight_decay)
    mean, square = state or (torch.zeros_like(parameter), torch.zeros_like(parameter))
    mean.lerp_(gradient, 1 - ADAM_BETA1)
    square.mul_(ADAM_BETA2).addcmul_(gradient, gradient, value=1 - ADAM_BETA2)
    step_size = how.learning_rate / (1 - ADAM_BETA1**step)
    denominator = (square.sqrt() / math.sqrt(1 - ADAM_BETA2**step)).add_(ADAM_EPSILON)
    parameter.addcdiv_(mean, denominator, value=-step_size)
    return mean, square


class Diverged(TaskError):
    """The loss is no number any more; nothing is sent."""


def train(
    model: BlockModel,
    samples: Samples,
    blocks: tuple[str, ...],
    training: Training,
    *,
    micro_batch: int,
    order_seed: int,
    pause: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Train ``blocks`` for the given epochs; the last epoch's mean loss and the number of steps.

    ``order_seed`` fixes the order of the samples. ``pause`` is called before every step and may
    raise to stop. Raises Diverged when the loss is not finite.
    """
    optimizer = Optimizer(model.open_only(blocks), training)
    generator = torch.Generator().manual_seed(order_seed)
    torch.manual_seed(order_seed)
    steps, total = 0, 0.0
    for _ in range(training.local_epochs):
        total = 0.0
        order = torch.randperm(samples.count, generator=generator)
        for batch in torch.split(order, training.batch_size):
            pause()
            total += _step(model, samples, batch, micro_batch, optimizer, steps)
            steps += 1
    return total / samples.count, steps


def _step(
    model: BlockModel,
    samples: Samples,
    batch: torch.Tensor,
    micro_batch: int,
    optimizer: Optimizer,
    step: int,
) -> float:
    """One optimiser step, its gradient accumulated over micro-batches; the summed loss."""
    total = 0.0
    for part in torch.split(batch, micro_batch):
        inputs, targets = samples.take(part)
        loss = model.task.loss(model.run(inputs), targets)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise Diverged(
                f"task {model.task.name!r}: the loss is {value} at step {step}; nothing is sent. "
                "Lower the learning rate or check the data."
            )
        (loss if len(part) == len(batch) else loss * (len(part) / len(batch))).backward()
        total += value * len(part)
    optimizer.step()
    return total


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


def costs(model: BlockModel, samples: Samples) -> CostTable:
    """The cost table of a model on the first samples of its data."""
    return cost_table(model, lambda n: samples.first(n)[0], lambda n: samples.first(n)[1])


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

"""SGD, Adam and AdamW, equal to torch's to the bit, in as little memory as that takes.

Written out because the first step of a ``torch.optim`` optimiser loads torch's compiler: two
seconds and 70 MiB on every device. A step consumes its gradient: it is changed in place, or becomes
the momentum. Only Adam needs room beside, for a slice of its denominator at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from edge_sdk.wire import Training

ADAM_BETA1, ADAM_BETA2, ADAM_EPSILON = 0.9, 0.999, 1e-8
# Half a mebibyte: small enough to be given out again from the heap and to stay in a cache.
SLICE_ELEMENTS = 1 << 17

State = tuple[torch.Tensor, ...]
Rule = Callable[[torch.nn.Parameter, torch.Tensor, State, Training, int], State]


def step_temporary_bytes(optimizer: str, elements: int) -> int:
    """The most a step allocates, and frees again, for a contiguous parameter of this size."""
    return 0 if optimizer == "sgd" else 4 * min(elements, SLICE_ELEMENTS)


class Optimizer:
    """Steps the given parameters; state starts empty."""

    def __init__(self, parameters: list[torch.nn.Parameter], training: Training) -> None:
        self._parameters, self._training = parameters, training
        self._rule: Rule = _sgd if training.optimizer == "sgd" else _adam
        self._states: dict[int, tuple[int, State]] = {}

    def step(self) -> None:
        """Apply the gradients and drop them."""
        for place in range(len(self._parameters)):
            self._step_one(place)

    @contextmanager
    def in_backward(self) -> Iterator[None]:
        """Within, backward steps each parameter as soon as its gradient is complete."""
        with ExitStack() as stack:
            for place, parameter in enumerate(self._parameters):
                handle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    lambda _, place=place: self._step_one(place)
                )
                stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def _step_one(self, place: int) -> None:
        parameter = self._parameters[place]
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        steps, state = self._states.get(place, (0, ()))
        state = self._rule(parameter, gradient, state, self._training, steps + 1)
        self._states[place] = steps + 1, state


def _sgd(
    parameter: torch.nn.Parameter, gradient: torch.Tensor, state: State, how: Training, _step: int
) -> State:
    if how.weight_decay:
        gradient.add_(parameter, alpha=how.weight_decay)
    if not how.momentum:
        parameter.add_(gradient, alpha=-how.learning_rate)
        return ()
    velocity = state[0].mul_(how.momentum).add_(gradient) if state else _owned(gradient)
    parameter.add_(velocity, alpha=-how.learning_rate)
    return (velocity,)


def _owned(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient itself, unless it is a part of something larger that it would keep alive."""
    alone = gradient.untyped_storage().nbytes() == gradient.nbytes
    return gradient if alone else gradient.clone()


def _adam(
    parameter: torch.nn.Parameter, gradient: torch.Tensor, state: State, how: Training, step: int
) -> State:
    if how.weight_decay and how.optimizer == "adamw":
        parameter.mul_(1 - how.learning_rate * how.weight_decay)
    elif how.weight_decay:
        gradient.add_(parameter, alpha=how.weight_decay)
    mean, square = state or (torch.zeros_like(parameter), torch.zeros_like(parameter))
    mean.lerp_(gradient, 1 - ADAM_BETA1)
    square.mul_(ADAM_BETA2).addcmul_(gradient, gradient, value=1 - ADAM_BETA2)
    step_size = how.learning_rate / (1 - ADAM_BETA1**step)
    correction = math.sqrt(1 - ADAM_BETA2**step)
    for part, part_mean, part_square in zip(*map(_slices, (parameter, mean, square)), strict=True):
        denominator = part_square.sqrt().div_(correction).add_(ADAM_EPSILON)
        part.addcdiv_(part_mean, denominator, value=-step_size)
    return mean, square


def _slices(tensor: torch.Tensor) -> Any:
    """Views of a tensor, each small enough for a temporary; one when it is not contiguous."""
    if not tensor.is_contiguous():
        return (tensor,)
    return torch.split(tensor.view(-1), SLICE_ELEMENTS)

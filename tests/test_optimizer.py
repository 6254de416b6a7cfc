"""Optimisers: equal to torch's to the bit, in how little memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from edge_sdk.optimizer import SLICE_ELEMENTS, Optimizer, step_temporary_bytes
from edge_sdk.wire import Training

kinds = pytest.mark.parametrize(
    ("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)]
)
decays = pytest.mark.parametrize("weight_decay", [0.0, 0.03])


def torch_optimizer(parameters: list[nn.Parameter], how: Training) -> torch.optim.Optimizer:
    if how.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, how.learning_rate, how.momentum, weight_decay=how.weight_decay
        )
    kind = torch.optim.Adam if how.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, how.learning_rate, weight_decay=how.weight_decay)


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def same(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@decays
@kinds
def test_they_equal_those_of_torch_to_the_bit(
    optimizer: Any, momentum: float, weight_decay: float
) -> None:
    how = Training(
        optimizer=optimizer, momentum=momentum, weight_decay=weight_decay, learning_rate=0.037
    )
    shapes = [(1,), (7, 13), (0, 3), (SLICE_ELEMENTS - 1,), (3, SLICE_ELEMENTS + 5), (5, 4, 3, 3)]
    ours, theirs = parameters(*shapes), parameters(*shapes)
    for made in (ours, theirs):
        made[-1].data = made[-1].data.contiguous(memory_format=torch.channels_last)
    mine, reference = Optimizer(ours, how), torch_optimizer(theirs, how)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a) * 10 ** (step - 2)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
        assert same(ours, theirs)
        assert all(parameter.grad is None for parameter in ours)


@kinds
def test_a_parameter_without_a_gradient_in_some_steps(optimizer: Any, momentum: float) -> None:
    how = Training(optimizer=optimizer, momentum=momentum, weight_decay=0.5)
    ours, theirs = parameters((3,), (4,)), parameters((3,), (4,))
    mine, reference = Optimizer(ours, how), torch_optimizer(theirs, how)
    for used in (0, 1, 1, 0, 1):
        before = ours[1 - used].clone()
        ours[used].grad, theirs[used].grad = torch.ones(3 + used), torch.ones(3 + used)
        mine.step()
        reference.step()
        reference.zero_grad()
        assert torch.equal(ours[1 - used], before)
        assert same(ours, theirs)


@decays
@kinds
def test_a_step_in_backward_is_the_same_step(
    optimizer: Any, momentum: float, weight_decay: float
) -> None:
    how = Training(optimizer=optimizer, momentum=momentum, weight_decay=weight_decay)
    early, late = parameters((4, 4), (4,)), parameters((4, 4), (4,))
    first, second = Optimizer(early, how), Optimizer(late, how)
    x = torch.randn(5, 4)
    for _ in range(3):
        # The first matrix is used twice: it may be stepped only after both gradients are in.
        with first.in_backward():
            ((x @ early[0]).tanh() @ early[0] + early[1]).square().mean().backward()
        assert all(parameter.grad is None for parameter in early)
        ((x @ late[0]).tanh() @ late[0] + late[1]).square().mean().backward()
        second.step()
        assert same(early, late)
    (x @ early[0]).sum().backward()
    assert early[0].grad is not None


def test_a_gradient_that_is_part_of_something_larger_is_not_kept() -> None:
    (parameter,) = parameters((4,))
    larger = torch.ones(1000)
    parameter.grad = larger[:4]
    optimizer = Optimizer([parameter], Training(momentum=0.9))
    optimizer.step()
    larger.zero_()
    ((_, (velocity,)),) = optimizer._states.values()
    assert velocity.untyped_storage().nbytes() == 16
    assert velocity.tolist() == [1.0] * 4


MEASURE = """
import os
import torch
from edge_sdk.optimizer import Optimizer
from edge_sdk.process import process_peak_bytes, process_rss_bytes, reset_peak
from edge_sdk.wire import Training

for kind, momentum in ("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0):
    parameter = torch.nn.Parameter(torch.ones(8 << 20))
    optimizer = Optimizer([parameter], Training(optimizer=kind, momentum=momentum, weight_decay=1))
    for _ in range(2):
        parameter.grad = torch.ones(8 << 20)
        reset_peak()
        before = process_rss_bytes()
        optimizer.step()
    print(kind, process_peak_bytes(os.getpid()) - before)
"""


def test_a_step_allocates_next_to_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, timeout=60
    )
    measured = [line.split() for line in done.stdout.splitlines()]
    assert [kind for kind, _ in measured] == ["sgd", "sgd", "adam", "adamw"]
    for kind, rise_bytes in measured:
        # Code and stacks touched for the first time come on top; one copy would be 32 MiB.
        assert int(rise_bytes) < step_temporary_bytes(kind, 8 << 20) + (4 << 20)


def test_the_room_a_step_needs() -> None:
    assert step_temporary_bytes("sgd", 1 << 40) == 0
    assert step_temporary_bytes("adam", 5) == 20
    assert step_temporary_bytes("adamw", 1 << 40) == 4 * SLICE_ELEMENTS == 1 << 19

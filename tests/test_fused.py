"""Layers as a CPU computes them: the same results, operators and memory as the CPU's own."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edge_sdk.fused import WORKSPACE_OUTPUTS, as_on_cpu, told_of_loops
from edge_sdk.watch import without_compiler

Build = Callable[[], nn.Module]
# What only makes views, or only takes memory.
FREE = {"t", "view", "detach", "transpose", "transpose_", "select", "unbind", "expand", "new_empty"}
FREE |= {"new_empty_strided", "copy_", "zeros", "new_zeros", "slice"}

LAYERS: list[Build] = [
    lambda: nn.LSTM(6, 8, batch_first=True),
    lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True),
    lambda: nn.LSTM(6, 8, bias=False),
    lambda: nn.GRU(6, 8, batch_first=True),
    lambda: nn.GRU(6, 8, num_layers=2, bidirectional=True, bias=False),
    lambda: nn.RNN(6, 8),
    lambda: nn.RNN(6, 8, nonlinearity="relu", bidirectional=True),
]
NAMES = ["LSTM", "LSTM-both-ways", "LSTM-no-bias", "GRU", "GRU-both-ways", "tanh", "relu"]


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is computed, and the elements of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[str] = Counter()
        self.elements: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.calls[name] += 1
            tensors = out if isinstance(out, (tuple, list)) else [out]
            self.elements[name] += sum(t.numel() for t in tensors if t.dtype == torch.float32)
        return out


def outputs_of(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    output, states = layer(x)
    return [output, *(states if isinstance(states, tuple) else [states])]


@pytest.mark.parametrize("build", LAYERS, ids=NAMES)
def test_results_and_gradients_are_those_of_torch(build: Build) -> None:
    torch.manual_seed(0)
    layer, x = build(), torch.randn(5, 7, 6)
    found: list[list[torch.Tensor]] = []
    for manner in (nullcontext(), as_on_cpu()):
        with manner:
            outputs = outputs_of(layer, x)
        layer.zero_grad()
        sum((each * each).sum() for each in outputs).backward()  # type: ignore[union-attr]
        found.append(
            [*outputs, *[p.grad.clone() for p in layer.parameters() if p.grad is not None]]
        )
    own, ours = found
    assert len(own) == len(ours) > 3
    for one, other in zip(own, ours, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", LAYERS, ids=NAMES)
def test_without_memory_the_operators_are_the_cpus(build: Build) -> None:
    found = []
    for device, manner in (("cpu", nullcontext()), ("meta", as_on_cpu())):
        layer, x = build().to(device), torch.zeros(5, 7, 6, device=device)
        with without_compiler(), manner, Operators() as operators:
            outputs_of(layer, x)[0].sum().backward()
        found.append(operators)
    assert found[0].calls == found[1].calls
    assert found[0].elements == found[1].elements


@pytest.mark.parametrize(("batch", "steps", "hidden"), [(1, 30, 128), (16, 60, 256), (4, 10, 96)])
def test_a_workspace_is_about_as_large_as_onednns(batch: int, steps: int, hidden: int) -> None:
    weights = [torch.zeros(4 * hidden, 8), torch.zeros(4 * hidden, hidden)]
    weights += [torch.zeros(4 * hidden)] * 2
    state = torch.zeros(batch, hidden)
    output, *_, workspace = torch.ops.aten.mkldnn_rnn_layer(
        torch.zeros(steps, batch, 8), *weights, state, state, False, [], 2, hidden, 1, True, False,
        False, True,
    )  # fmt: skip
    assert workspace.nbytes == pytest.approx(WORKSPACE_OUTPUTS * output.nbytes, rel=0.1)


def test_packed_sequences_and_projections_are_left_to_torch() -> None:
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 6), torch.tensor([5, 3]))
    for layer in (nn.LSTM(6, 8), nn.GRU(6, 8), nn.RNN(6, 8)):
        own = layer(packed)[0].data
        with as_on_cpu():
            torch.testing.assert_close(layer(packed)[0].data, own)
    projected, x = nn.LSTM(6, 8, proj_size=4), torch.randn(5, 2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = projected(x)[0]
        with as_on_cpu():
            torch.testing.assert_close(projected(x)[0], own)


def test_loops_are_told_and_everything_is_as_before() -> None:
    before = [getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh")]
    told: list[str] = []

    class Loop(nullcontext[None]):
        def __enter__(self) -> None:
            told.append("begins")

        def __exit__(self, *_: object) -> None:
            told.append("ends")

    with told_of_loops(Loop), as_on_cpu():
        nn.LSTM(6, 8)(torch.zeros(2, 1, 6))
        assert told == []
    with as_on_cpu(), told_of_loops(Loop):
        nn.GRU(6, 8)(torch.zeros(2, 1, 6))
    assert told == ["begins", "ends"]
    assert [getattr(torch._VF, name) for name in ("lstm", "gru", "rnn_tanh")] == before

"""Layers that a CPU computes otherwise than torch's meta device says: attention and recurrence.

What they do here is what their CPU kernels do, so that watching a model without memory sees the
same operators and the same tensors as a training step has. Recurrent layers without a fused kernel
run many small operators in a loop of their own; where that loop is, a watch is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

# oneDNN keeps gates and states of every step for backward: 15.3 to 17 times a layer's output.
WORKSPACE_OUTPUTS = 16
_LSTM_MODE = 2  # as torch numbers them for oneDNN

Tensors = Sequence[torch.Tensor]
Loop = Callable[[], AbstractContextManager[None]]


@contextmanager
def told_of_loops(loop: Loop) -> Iterator[None]:
    """Within, recurrent layers that are loops of operators run inside of ``loop()``."""
    names = ("gru", "rnn_tanh", "rnn_relu")
    before = {name: getattr(torch._VF, name) for name in names}

    def looped(inner: Callable[..., Any]) -> Callable[..., Any]:
        def layer(*args: Any, **kwargs: Any) -> Any:
            with loop():
                return inner(*args, **kwargs)

        return layer

    with _replaced(torch._VF, {name: looped(inner) for name, inner in before.items()}):
        yield


@contextmanager
def as_on_cpu() -> Iterator[None]:
    """Within, the layers do on any device what they do on a CPU."""
    layers = {
        name: _unless_packed(getattr(torch._VF, name), step)
        for name, step in (("gru", _gru_step), ("rnn_tanh", _tanh_step), ("rnn_relu", _relu_step))
    }
    functional: Any = nn.functional
    with (
        _replaced(torch._VF, {"lstm": _lstm_unless_packed(torch._VF.lstm), **layers}),
        _replaced(functional, {"scaled_dot_product_attention": _attention}),
    ):
        yield


@contextmanager
def _replaced(owner: Any, others: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(owner, name) for name in others}
    try:
        for name, other in others.items():
            setattr(owner, name, other)
        yield
    finally:
        for name, own in before.items():
            setattr(owner, name, own)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attention as a CPU runs it: fused, unless it has dropout or a trained mask."""
    trained_mask = attn_mask is not None and attn_mask.requires_grad
    if dropout_p or enable_gqa or query.dim() != 4 or trained_mask:
        given = (query, key, value, attn_mask, dropout_p, is_causal)
        return torch._C._nn.scaled_dot_product_attention(*given, scale=scale, enable_gqa=enable_gqa)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


class _Kept(torch.autograd.Function):
    """Keeps a workspace for the backward of what it belongs to."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(workspace)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _lstm_unless_packed(inner: Callable[..., Any]) -> Callable[..., Any]:
    """The layer that oneDNN has, for what it takes: whole sequences of float32, no projection."""

    def layer(*args: Any) -> Any:
        if not isinstance(args[1], (tuple, list)):  # packed sequences come with their sizes there
            return inner(*args)
        inputs, _, weights, has_biases, layers, _, _, bidirectional, _ = args
        plain = len(weights) == layers * (1 + bidirectional) * (4 if has_biases else 2)
        able = plain and inputs.dtype == torch.float32 and torch._C._has_mkldnn
        return _lstm(*args) if able else inner(*args)

    return layer


def _lstm(
    inputs: torch.Tensor, states: Tensors, weights: Tensors, has_biases: bool, layers: int,
    dropout: float, training: bool, bidirectional: bool, batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    directions, hidden = 1 + bidirectional, weights[1].shape[1]
    x = (inputs.transpose(0, 1) if batch_first else inputs).contiguous()
    shares, ends = _shares(weights, layers * directions), []
    for layer in range(layers):
        outputs = []
        for number in range(layer * directions, (layer + 1) * directions):
            share = shares[number]
            if not has_biases:
                share = [*share, *[share[0].new_zeros(len(share[0])) for _ in range(2)]]
            output, *end, _ = torch.ops.aten.mkldnn_rnn_layer(
                x, *share, states[0][number], states[1][number], number % directions > 0, [],
                _LSTM_MODE, hidden, layers, has_biases, bidirectional, False, training,
            )  # fmt: skip
            # Without a backward it is the same memory, given back at once.
            size_bytes = WORKSPACE_OUTPUTS * output.numel() * output.element_size()
            workspace = output.new_empty(size_bytes, dtype=torch.uint8)
            if training:
                output = _Kept.apply(output, workspace)  # type: ignore[no-untyped-call]
            del workspace
            outputs.append(output)
            ends.append(end)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and training and layer < layers - 1:
            x = nn.functional.dropout(x, dropout)
    hidden_states, cells = (torch.stack(tensors) for tensors in zip(*ends, strict=True))
    return (x.transpose(0, 1) if batch_first else x), hidden_states, cells


Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _unless_packed(inner: Callable[..., Any], step: Step) -> Callable[..., Any]:
    def layer(*args: Any) -> Any:
        return _looped(step, *args) if isinstance(args[2], (tuple, list)) else inner(*args)

    return layer


def _looped(
    step: Step, inputs: torch.Tensor, states: torch.Tensor, weights: Tensors, has_biases: bool,
    layers: int, dropout: float, training: bool, bidirectional: bool, batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Step by step, but for the product with the inputs, which a CPU computes at once."""
    directions = 1 + bidirectional
    x = inputs.transpose(0, 1) if batch_first else inputs
    shares, ends = _shares(weights, layers * directions), []
    for layer in range(layers):
        outputs = []
        for number in range(layer * directions, (layer + 1) * directions):
            first, again, *biases = shares[number]
            gates = nn.functional.linear(x, first, biases[0] if biases else None).unbind(0)
            state, steps = states[number], []
            for gate in reversed(gates) if number % directions else gates:
                inner = nn.functional.linear(state, again, biases[1] if biases else None)
                state = step(gate, inner, state)
                steps.append(state)
            outputs.append(torch.stack(steps[::-1] if number % directions else steps))
            ends.append(state)
        x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
        if dropout and training and layer < layers - 1:
            x = nn.functional.dropout(x, dropout)
    return (x.transpose(0, 1) if batch_first else x), torch.stack(ends)


def _gru_step(gates: torch.Tensor, inner: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    of_input, of_state = gates.unsafe_chunk(3, 1), inner.unsafe_chunk(3, 1)
    reset = of_state[0].add_(of_input[0]).sigmoid_()
    update = of_state[1].add_(of_input[1]).sigmoid_()
    new = of_input[2].add(of_state[2].mul_(reset)).tanh_()
    return (state - new).mul_(update).add_(new)


def _tanh_step(gates: torch.Tensor, inner: torch.Tensor, _state: torch.Tensor) -> torch.Tensor:
    return inner.add_(gates).tanh()


def _relu_step(gates: torch.Tensor, inner: torch.Tensor, _state: torch.Tensor) -> torch.Tensor:
    return inner.add_(gates).relu()


def _shares(weights: Tensors, count: int) -> list[Tensors]:
    """The weights of each layer and direction."""
    each = len(weights) // count
    return [weights[place : place + each] for place in range(0, len(weights), each)]

"""What kind of work an operator of torch is, and how many floating-point operations it does.

The kinds are those ``cost`` has a rate for. A multiply-add counts as two; operators without a count
here cost what they move through memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from edge_sdk.cost import Kind

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_addmm_activation", "mv", "addmv", "dot")
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(_PRODUCTS, "matmul"),
    **dict.fromkeys(("convolution", "_convolution", "convolution_backward"), "convolution"),
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_native_multi_head_attention",
        ),
        "attention",
    ),
    **dict.fromkeys(
        ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward", "_thnn_fused_gru_cell"), "recurrent"
    ),
    **dict.fromkeys(
        ("bernoulli", "bernoulli_", "native_dropout", "rand", "randn", "uniform_", "normal_"),
        "random",
    ),
    **dict.fromkeys(
        (
            "embedding", "embedding_dense_backward", "index", "index_put", "_index_put_impl_",
            "index_select", "gather", "scatter", "scatter_add", "nll_loss_backward", "sort",
        ),
        "gather",
    ),
}  # fmt: skip
# Parts of names: functions that take many instructions an element, and sliding windows.
_MATHS = ("gelu", "tanh", "sigmoid", "exp", "silu", "log", "pow", "erf", "sin", "cos",
          "elu", "mish", "softplus")  # fmt: skip
_WINDOWS = ("pool", "upsample", "im2col", "col2im", "grid_sampler", "unfold")


def kind_of(name: str, args: Sequence[Any]) -> Kind:
    """The kind of an ATen operator called with ``args``."""
    kind = _KINDS.get(name)
    if kind == "convolution":
        return "grouped" if _groups(name, args) > 1 else kind
    if kind is not None:
        return kind
    if "norm" in name or "softmax" in name:
        return "norm"
    if any(part in name for part in _WINDOWS):
        return "window"
    return "maths" if any(part in name for part in _MATHS) else "elementwise"


def flops_of(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of one call, 0 where memory traffic is what counts."""
    count = _FLOPS.get(name)
    return int(count(args, kwargs, out)) if count is not None else 0


def _groups(name: str, args: Sequence[Any]) -> int:
    place = 9 if name == "convolution_backward" else 8
    return int(args[place]) if len(args) > place else 1


def _product(left: torch.Tensor, out: Any) -> int:
    return 2 * int(out.numel()) * int(left.shape[-1])


def _convolution(args: Sequence[Any], _kwargs: Mapping[str, Any], out: Any) -> int:
    inputs, weight, transposed = args[0], args[1], bool(args[6])
    return _convolved(inputs.shape, weight.shape, out.shape, transposed)


def _convolution_backward(args: Sequence[Any], _kwargs: Mapping[str, Any], _out: Any) -> int:
    gradient, inputs, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
    one = _convolved(inputs.shape, weight.shape, gradient.shape, bool(transposed))
    return one * (int(mask[0]) + int(mask[1]))


def _convolved(
    inputs: Sequence[int], weight: Sequence[int], out: Sequence[int], transposed: bool
) -> int:
    places = math.prod(inputs) if transposed else math.prod(out)
    return 2 * places * math.prod(weight[1:])


def _attention(args: Sequence[Any], _kwargs: Mapping[str, Any], _out: Any) -> int:
    query, key = args[0], args[1]
    return 4 * int(query.numel()) * int(key.shape[-2])


def _attention_backward(args: Sequence[Any], _kwargs: Mapping[str, Any], _out: Any) -> int:
    query, key = args[1], args[2]  # five products: scores again, and one for each of four gradients
    return 10 * int(query.numel()) * int(key.shape[-2])


def _native_attention(args: Sequence[Any], _kwargs: Mapping[str, Any], _out: Any) -> int:
    query, key = args[0], args[1]
    width, places = int(query.shape[-1]), int(query.numel()) // int(query.shape[-1])
    return places * (8 * width * width + 4 * int(key.shape[-2]) * width)


def _recurrent(args: Sequence[Any], _kwargs: Mapping[str, Any], _out: Any) -> int:
    inputs = args[0]
    steps = int(inputs.numel()) // int(inputs.shape[-1])
    weights = [t for t in args[1:5] if isinstance(t, torch.Tensor) and t.dim() == 2]
    return 2 * steps * sum(int(weight.numel()) for weight in weights)


_FLOPS: dict[str, Callable[[Sequence[Any], Mapping[str, Any], Any], int]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), lambda args, _kw, out: _product(args[0], out)),
    **dict.fromkeys(
        ("addmm", "baddbmm", "_addmm_activation", "addmv"),
        lambda args, _kw, out: _product(args[1], out),
    ),
    **dict.fromkeys(("convolution", "_convolution"), _convolution),
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_native_multi_head_attention": _native_attention,
    "mkldnn_rnn_layer": _recurrent,
    "mkldnn_rnn_layer_backward": lambda args, kw, out: 2 * _recurrent(args, kw, out),
}

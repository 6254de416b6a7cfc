"""The frozen blocks of a model as ONNX, to be run where torch is slower.

In this process and not in a child: a child would need torch and the model a second time, six times
what the exporter adds here.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edge_sdk.model import BlockModel
from edge_sdk.prefix_cut import Cut, NoPrefix

if TYPE_CHECKING:
    from edge_sdk.infer import OnnxModel

Compute = Callable[[Any], list[torch.Tensor]]


class _Below(nn.Module):
    """The frozen blocks as a module: inputs by place, every kept output in a tuple."""

    def __init__(self, model: BlockModel, cut: Cut, inputs: Any) -> None:
        super().__init__()
        self.module = model.module
        self._model, self._cut, self._inputs = model, cut, inputs

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(values)
        if isinstance(self._inputs, Mapping):
            inputs: Any = {name: next(given) for name in self._inputs}
        else:
            inputs = tuple(given) if isinstance(self._inputs, tuple) else next(given)
        return tuple(self._cut.below(self._model, inputs))


def onnx_engine(model: BlockModel, cut: Cut, inputs: Any, *, int8: bool) -> Compute:
    """Something that computes what ``cut.below`` does, in ONNX Runtime; holds its own weights.

    ``inputs`` are those of a few samples. NoPrefix says what is missing or cannot be exported.
    """
    for package in ("onnx", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            raise NoPrefix(
                f"the frozen blocks cannot run in ONNX Runtime: the package {package} is not "
                f"installed; pip install {package}"
            )
    leaves = _values(inputs)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        raise NoPrefix("the frozen blocks cannot run in ONNX Runtime: their inputs are nested")
    names = [f"input{place}" for place in range(len(leaves))]
    try:
        session = _session(_export(model, cut, inputs, names), int8)
    except Exception as error:  # the exporter fails in many ways, each a reason not to use it
        raise NoPrefix(f"the frozen blocks cannot run in ONNX Runtime: {error}") from error
    # An input that only the rest of the model reads is none of the exported graph.
    taken = [place for place, name in enumerate(names) if name in session.inputs]

    def compute(batch: Any) -> list[torch.Tensor]:
        arrays = [np.asarray(value) for value in _values(batch)]
        return [torch.from_numpy(a) for a in session.run({names[p]: arrays[p] for p in taken})]

    return compute


def _values(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple) else [inputs]


def _export(model: BlockModel, cut: Cut, inputs: Any, names: list[str]) -> bytes:
    buffer = io.BytesIO()
    outputs = [f"output{place}" for place in range(len(cut.kept))]
    grads = [(p, p.requires_grad) for p in model.module.parameters()]
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            # The exporter without torch's compiler is marked old, but loads no 70 MiB.
            warnings.simplefilter("ignore")
            exporter.setLevel(logging.ERROR)
            # With gradients, torch's attention takes the path that is made of exportable
            # operations.
            for parameter, _ in grads:
                parameter.requires_grad_(parameter.is_floating_point())
            torch.onnx.export(
                _Below(model, cut, inputs),
                tuple(_values(inputs)),
                buffer,  # type: ignore[arg-type]  # documented, but missing in its type
                input_names=names,
                output_names=outputs,
                dynamic_axes={name: {0: "batch"} for name in [*names, *outputs]},
                dynamo=False,
            )
    finally:
        exporter.setLevel(level)
        for parameter, grad in grads:
            parameter.requires_grad_(grad)
    return buffer.getvalue()


def _session(exported: bytes, int8: bool) -> OnnxModel:
    from edge_sdk.infer import OnnxModel, quantize

    threads = torch.get_num_threads()
    if not int8:
        return OnnxModel(exported, threads, spin=False)
    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory) / "float32.onnx", Path(directory) / "int8.onnx"
        source.write_bytes(exported)
        quantize(source, target)
        return OnnxModel(target, threads, spin=False)

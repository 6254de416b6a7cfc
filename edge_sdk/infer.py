"""Run an exported model, or exported frozen blocks, with ONNX Runtime: a quarter of torch's memory.

The only importer of onnxruntime.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.errors import TaskError

_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(double)": np.float64}


class OnnxModel:
    """A model loaded from ONNX bytes or a file; TaskError when it is none."""

    def __init__(self, source: bytes | Path, threads: int = 1, *, spin: bool = True) -> None:
        """``spin``: waiting threads keep their cores busy, which is bad for torch beside them."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                source if isinstance(source, bytes) else str(source),
                options,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:
            raise TaskError(f"not an ONNX model onnxruntime can run: {error}") from error
        self._inputs = {i.name: i for i in self._session.get_inputs()}

    @property
    def inputs(self) -> dict[str, tuple[Any, ...]]:
        """Input names and their shapes; a free axis is a name."""
        return {name: tuple(i.shape) for name, i in self._inputs.items()}

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        """The model's outputs; TaskError names the input that is missing, unknown or misshapen."""
        if set(inputs) != set(self._inputs):
            raise TaskError(
                f"the model takes inputs {sorted(self._inputs)}, given were {sorted(inputs)}"
            )
        try:
            fed = {
                name: np.asarray(array, dtype=_DTYPES.get(self._inputs[name].type))
                for name, array in inputs.items()
            }
            outputs: list[np.ndarray[Any, Any]] = self._session.run(None, fed)
        except Exception as error:
            shapes = {name: np.shape(array) for name, array in inputs.items()}
            raise TaskError(
                f"inputs of shapes {shapes} do not fit {self.inputs}: {error}"
            ) from error
        return outputs


def quantize(source: Path, target: Path) -> None:
    """Write a model again with int8 weights, its inputs quantised as they come (dynamic).

    TaskError when it cannot be, or the package ``onnx`` is not installed.
    """
    root = logging.getLogger()
    level = root.level
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        # It asks, through the root logger, for a preparation that dynamic quantisation can do
        # without.
        root.setLevel(logging.ERROR)
        # Seven of the eight bits: with all, sums overflow on processors without VNNI, for an error
        # ten times as large.
        quantize_dynamic(source, target, weight_type=QuantType.QInt8, reduce_range=True)
    except Exception as error:
        raise TaskError(f"the model cannot be quantised: {error}") from error
    finally:
        root.setLevel(level)

"""Run an exported model with ONNX Runtime: a quarter of the memory torch needs.

The only importer of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.errors import TaskError

_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(double)": np.float64}


class OnnxModel:
    """A model loaded from ONNX bytes or a file; TaskError when it is none."""

    def __init__(self, source: bytes | Path, threads: int = 1) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
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

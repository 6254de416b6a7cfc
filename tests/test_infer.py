"""Exported models in ONNX Runtime: what they compute, and inputs that do not fit."""

from __future__ import annotations

import io
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.errors import TaskError
from edge_sdk.infer import OnnxModel, quantize


class Pair(nn.Module):
    """Two inputs, one of them integers, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = x + self.table(word)
        return self.out(hidden), hidden


@pytest.fixture(scope="module")
def module() -> Pair:
    torch.manual_seed(0)
    return Pair().eval()


@pytest.fixture(scope="module")
def onnx_bytes(module: Pair) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)),
            buffer,
            input_names=["x", "word"],
            output_names=["out", "hidden"],
            dynamic_axes={name: {0: "batch"} for name in ("x", "word", "out", "hidden")},
            dynamo=False,
        )
    return buffer.getvalue()


def test_outputs_equal_those_of_torch_from_bytes_and_from_a_file(
    module: Pair, onnx_bytes: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_bytes)
    rng = np.random.default_rng(0)
    for count in (1, 7):
        x, word = rng.standard_normal((count, 3)).astype(np.float32), rng.integers(0, 5, count)
        with torch.no_grad():
            expected = module(torch.from_numpy(x), torch.from_numpy(word))
        for model in (OnnxModel(onnx_bytes), OnnxModel(path, threads=2)):
            for got, wanted in zip(model.run({"x": x, "word": word}), expected, strict=True):
                np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5, atol=1e-6)


def test_inputs_are_named_with_their_free_axis(onnx_bytes: bytes) -> None:
    assert OnnxModel(onnx_bytes).inputs == {"x": ("batch", 3), "word": ("batch",)}


def test_numbers_are_converted_to_what_the_model_takes(onnx_bytes: bytes) -> None:
    model = OnnxModel(onnx_bytes)
    exact = model.run({"x": np.ones((2, 3), np.float32), "word": np.array([1, 2], np.int64)})
    given = model.run({"x": np.ones((2, 3)), "word": np.array([1, 2], np.uint8)})
    assert all(np.array_equal(a, b) for a, b in zip(exact, given, strict=True))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, r"the model takes inputs \['word', 'x'\], given were \[\]"),
        ({"x": np.zeros((1, 3))}, r"given were \['x'\]"),
        ({"x": np.zeros((1, 3)), "word": np.zeros(1), "y": np.zeros(1)}, r"\['word', 'x', 'y'\]"),
        (
            {"x": np.zeros((1, 4)), "word": np.zeros(1)},
            r"inputs of shapes {'x': \(1, 4\), 'word': \(1,\)} do not fit {'x': \('batch', 3\)",
        ),
        ({"x": np.zeros(3), "word": np.zeros(1)}, "do not fit"),
        ({"x": np.array([["a", "b", "c"]]), "word": np.zeros(1)}, "could not convert string"),
        ({"x": np.zeros((1, 3)), "word": np.array([77])}, "do not fit .*77"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    onnx_bytes: bytes, inputs: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        OnnxModel(onnx_bytes).run(inputs)


@pytest.mark.parametrize("content", [b"", b"not a model", bytes(1000)])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    for source in (content, path, tmp_path / "missing.onnx"):
        with pytest.raises(TaskError, match="not an ONNX model onnxruntime can run: "):
            OnnxModel(source)


def test_a_model_cut_short_is_refused(onnx_bytes: bytes) -> None:
    with pytest.raises(TaskError, match="not an ONNX model"):
        OnnxModel(onnx_bytes[: len(onnx_bytes) // 2])


def test_running_a_model_loads_no_torch() -> None:
    code = "import sys, edge_sdk.infer; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_int8_weights_take_less_and_compute_nearly_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)).eval()
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.zeros(8, 64),), str(whole), input_names=["x"], dynamo=False)
    quantize(whole, small)
    assert small.stat().st_size < 0.4 * whole.stat().st_size
    x = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    exact, rough = (OnnxModel(path, spin=False).run({"x": x})[0] for path in (whole, small))
    assert 0 < np.linalg.norm(exact - rough) < 0.03 * np.linalg.norm(exact)


def test_what_is_no_model_cannot_be_quantised(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(TaskError, match="the model cannot be quantised: "):
        quantize(tmp_path / "model.onnx", tmp_path / "small.onnx")

"""``edge-sdk infer``: real models and array files, good and bad."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from edge_sdk.cli import main


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    """ONNX: class scores of shape (samples, 3) from x of shape (samples, 2)."""
    weights = onnx.numpy_helper.from_array(np.eye(2, 3, dtype=np.float32), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "scores",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 3])],
        [weights],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    path = tmp_path / "scores.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def infer(*words: object) -> subprocess.CompletedProcess[str]:
    """The command as people and scripts run it, in a process of its own."""
    command = [sys.executable, "-m", "edge_sdk", "infer", *(str(word) for word in words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=50)


def test_infer_runs_a_model(model_path: Path, tmp_path: Path) -> None:
    inputs = np.array([[1, 0], [0, 1]] * 8, dtype=np.float64)
    input_path, output_path = tmp_path / "in.npy", tmp_path / "out.npz"
    np.save(input_path, inputs)
    done = infer(model_path, "--input", input_path, "--output", output_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "input x: float64 [16, 2]\noutput 0: float32 [16, 3]\n" in done.stdout
    assert "top-1 classes: 0 1 0 1 0 1 0 1 0 1 and 6 more\n" in done.stdout
    assert re.search(r"^took \d+\.\d ms$", done.stdout, re.M)
    with np.load(output_path) as outputs:
        assert (outputs["output_0"] == inputs @ np.eye(2, 3)).all()


@pytest.mark.parametrize("name", ["x", "whatever"])
def test_a_lone_array_is_the_lone_input(model_path: Path, tmp_path: Path, name: str) -> None:
    np.savez(tmp_path / "in.npz", **{name: np.array([[0.0, 1.0]])})
    answer = json.loads(infer(model_path, "--input", tmp_path / "in.npz", "--json").stdout)
    assert answer["inputs"] == {"x": [1, 2]}
    assert answer["outputs"] == [[1, 3]]
    assert answer["top1"] == [[1]]
    assert answer["run_s"] > 0


@pytest.fixture
def files(tmp_path: Path, model_path: Path) -> Path:
    """Array files good and bad, and a text that is called a model."""
    np.save(tmp_path / "good.npy", np.ones((1, 2), np.float32))
    np.save(tmp_path / "wide.npy", np.ones((1, 5), np.float32))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    np.savez(tmp_path / "two.npz", x=np.ones((1, 2)), z=np.ones(1))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:100])
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:130])
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty.npy").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("model", "arrays", "complaint"),
    [
        ("none.onnx", "good.npy", "none.onnx: no such file"),
        ("text.onnx", "good.npy", "not an ONNX model onnxruntime can run"),
        ("scores.onnx", "none.npy", "none.npy: no arrays can be read from it: No such file"),
        ("scores.onnx", "pickled.npy", "allow_pickle=False; write them with numpy.save"),
        ("scores.onnx", "cut.npz", "cut.npz: no arrays can be read from it: "),
        ("scores.onnx", "cut.npy", "cut.npy: no arrays can be read from it: "),
        ("scores.onnx", "empty.npy", "empty.npy: no arrays can be read from it: "),
        ("scores.onnx", "words.npy", "the array has dtype <U1, not numbers"),
        ("scores.onnx", "two.npz", r"takes inputs \['x'\], given were \['x', 'z'\]"),
        ("scores.onnx", "wide.npy", r"inputs of shapes {'x': \(1, 5\)} do not fit"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(
    files: Path, model: str, arrays: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["infer", str(files / model), "--input", str(files / arrays)]) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(rf"edge-sdk: .*{complaint}.*\n", errors), errors

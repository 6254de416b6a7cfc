"""The server's model: its versions measured, and the files others can open equal to it."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.numpy
import torch

from edge_sdk.errors import DamagedBlock, TaskError
from edge_sdk.infer import OnnxModel
from reference_server.evaluate import Evaluator
from reference_server.export import export_onnx, export_safetensors
from reference_server.versions import Manifest, VersionStore

HEAD = """\
import numpy as np
import torch
from torch import nn
from edge_sdk import Task, Training

def data(count, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 1, 4, 4)).astype("float32")
    return x, (x.mean((1, 2, 3)) > 0).astype("int64")

def task_of(build, inputs=lambda x: x, **more):
    def samples(count, seed):
        x, y = data(count, seed)
        return inputs(x), y
    given = dict(name="toy", build_model=build, loss=nn.functional.cross_entropy,
                 train_data=lambda part, parts: samples(20, part),
                 test_data=lambda: samples(30, 100))
    return Task(**{**given, **more})
"""

NET = """
def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(),
                         nn.Flatten(), nn.Linear(16, 2))
"""

PLAIN = NET + "def task():\n    return task_of(build)\n"
PRETRAINED = NET + (
    "def task():\n"
    "    return task_of(build, public_data=lambda: data(200, 7),\n"
    "                   pretraining=Training(optimizer='adam', learning_rate=0.01,\n"
    "                                        local_epochs=8))\n"
)
UNTESTED = NET + "def task():\n    return task_of(build, test_data=None)\n"

# Two inputs by name, given in another order than the model takes them.
BY_NAME = """
class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.out = nn.Linear(16, 3), nn.Linear(4, 3), nn.Linear(3, 2)
    def forward(self, whole, edge):
        return self.out(self.left(whole.flatten(1)) - self.right(edge))

def task():
    return task_of(Join, lambda x: {"edge": x[:, 0, 0], "whole": x})
"""
BY_PLACE = BY_NAME.replace('{"edge": x[:, 0, 0], "whole": x}', "(x, x[:, 0, 0])")

ENCODER = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 2)
    def forward(self, x):
        return self.head(self.body(x.flatten(1, 2)).mean(1))

def task():
    return task_of(Net)
"""


def bad(body: str) -> str:
    return f"""
class Bad(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(16, 2)
    def forward(self, x):
        y = self.out(x.flatten(1))
        {body}

def task():
    return task_of(Bad)
"""


class Bench:
    """An evaluator with its versions."""

    def __init__(self, folder: Path, text: str, seed: int = 3) -> None:
        path = folder / "toytask.py"
        path.write_text(HEAD + text)
        self.folder = folder
        self.evaluator = Evaluator(path, seed)
        self.versions = VersionStore(folder / "server")

    def publish(self, version: int = 0) -> Manifest:
        spec = self.evaluator.spec
        entries = [self.versions.put_block(b, self.evaluator.weights(b.name)) for b in spec.blocks]
        manifest = Manifest(
            job="job",
            version=version,
            round=version,
            parent_sha="",
            created_s=0.0,
            blocks=tuple(entries),
        )
        self.versions.write_manifest(manifest)
        return manifest

    def shuffle(self) -> None:
        """Give the model in memory other weights, statistics too."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for tensor in self.evaluator.model.module.state_dict().values():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)

    def onnx(self, manifest: Manifest) -> Path:
        return export_onnx(self.evaluator, self.versions, manifest, self.folder / "model.onnx")


# --- measuring versions ------------------------------------------------------------------------


def test_the_same_seed_builds_the_same_model(tmp_path: Path) -> None:
    shas = [Bench(tmp_path, PLAIN, seed).publish().model_sha256 for seed in (3, 3, 4)]
    assert shas[0] == shas[1] != shas[2]


def test_pretraining_learns_and_is_measured(tmp_path: Path) -> None:
    bench = Bench(tmp_path, PRETRAINED)
    first = bench.publish()
    before = bench.evaluator.measure(bench.versions, first)
    steps: list[int] = []
    count, loss = bench.evaluator.pretrain(lambda: steps.append(1))
    assert count == 200
    assert 0 < loss < 0.7
    assert len(steps) == 8 * math.ceil(200 / 32)
    second = bench.publish(1)
    after = bench.evaluator.measure(bench.versions, second)
    assert before is not None
    assert after is not None
    assert after[1] > before[1]
    assert bench.evaluator.measure(bench.versions, first) == before


@pytest.mark.parametrize(
    "text", [PLAIN, UNTESTED, PRETRAINED.replace("lambda: data(200, 7)", "None")]
)
def test_without_public_data_or_a_way_nothing_is_pretrained(tmp_path: Path, text: str) -> None:
    bench = Bench(tmp_path, text)
    before = bench.publish()
    assert bench.evaluator.pretrain(lambda: None) == (0, 0.0)
    assert bench.publish() == before


def test_a_task_without_test_data_is_not_measured(tmp_path: Path) -> None:
    bench = Bench(tmp_path, UNTESTED)
    assert bench.evaluator.measure(bench.versions, bench.publish()) is None


def test_loading_a_version_brings_back_every_tensor(tmp_path: Path) -> None:
    bench = Bench(tmp_path, PLAIN)
    first = bench.publish()
    bench.shuffle()
    second = bench.publish(1)
    assert first.model_sha256 != second.model_sha256
    for manifest in (first, second, first):
        bench.evaluator.load(bench.versions, manifest)
        assert bench.publish().model_sha256 == manifest.model_sha256


def test_a_damaged_version_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, PLAIN)
    manifest = bench.publish()
    path = bench.versions.block_path(manifest.blocks[0].sha256)
    path.write_bytes(path.read_bytes()[:-4] + b"\x07\x07\x07\x07")
    with pytest.raises(DamagedBlock, match="has hash"):
        bench.evaluator.measure(bench.versions, manifest)


# --- safetensors -------------------------------------------------------------------------------


def test_the_safetensors_file_has_all_tensors_of_the_version(tmp_path: Path) -> None:
    bench = Bench(tmp_path, PLAIN)
    bench.shuffle()
    manifest = bench.publish(7)
    state = {n: t.clone() for n, t in bench.evaluator.model.module.state_dict().items()}
    path = tmp_path / "model.safetensors"
    assert export_safetensors(bench.evaluator, bench.versions, manifest, path) == path
    loaded = safetensors.numpy.load_file(path)
    assert {n: (a.shape, str(a.dtype)) for n, a in loaded.items()} == {
        n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in state.items()
    }
    assert all(np.array_equal(loaded[n], t.numpy()) for n, t in state.items())
    torch.manual_seed(0)
    fresh = bench.evaluator.task.build_model()
    fresh.load_state_dict({n: torch.from_numpy(a) for n, a in loaded.items()}, strict=True)


def test_the_safetensors_file_says_what_it_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path, PLAIN)
    manifest = bench.publish(7)
    path = tmp_path / "model.safetensors"
    export_safetensors(bench.evaluator, bench.versions, manifest, path)
    content = path.read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    notes = json.loads(content[8 : 8 + size])["__metadata__"]
    assert notes == {"job": "job", "version": "7", "sha256": manifest.model_sha256}


# --- ONNX --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [PLAIN, BY_NAME, BY_PLACE, ENCODER])
def test_the_onnx_file_computes_what_torch_computes(tmp_path: Path, text: str) -> None:
    bench = Bench(tmp_path, text)
    bench.shuffle()
    manifest = bench.publish()
    path = bench.onnx(manifest)
    model = OnnxModel(path)
    for count in (1, 2, 5):
        inputs: Any = bench.evaluator.example(count)
        with torch.no_grad():
            expected = bench.evaluator.model.run(inputs).numpy()
        if not isinstance(inputs, dict):
            values = inputs if isinstance(inputs, tuple) else (inputs,)
            inputs = {f"input{place}": value for place, value in enumerate(values)}
        (got,) = model.run({name: value.numpy() for name, value in inputs.items()})
        assert got.shape == expected.shape == (count, 2)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_onnx_file_is_the_versions_not_what_is_in_memory(tmp_path: Path) -> None:
    bench = Bench(tmp_path, PLAIN)
    first = bench.publish()
    before = bench.onnx(first).read_bytes()
    bench.shuffle()
    second = bench.publish(1)
    assert bench.onnx(second).read_bytes() != before
    assert bench.onnx(first).read_bytes() == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return torch.linalg.matrix_exp(y[:, :, None] * y[:, None])[0]", "cannot be exported"),
        ("return y + torch.rand_like(y)", r"differs from torch by \d"),
        ("return y, y", "the model returns tuple: ONNX export needs one tensor as output"),
        ("return y * y.new_tensor([[1.0, 2.0]] * int(x.shape[0])).cumsum(0)", "do not fit|differs"),
    ],
    ids=["unknown operation", "random", "two outputs", "batch size baked in"],
)
def test_a_model_that_cannot_be_exported_is_refused(
    tmp_path: Path, body: str, message: str
) -> None:
    bench = Bench(tmp_path, bad(body))
    with pytest.raises(TaskError, match=message):
        bench.onnx(bench.publish())
    assert not (tmp_path / "model.onnx").exists()


def test_without_test_data_there_is_no_onnx(tmp_path: Path) -> None:
    bench = Bench(tmp_path, UNTESTED)
    with pytest.raises(TaskError, match="task 'toy' has no test_data: ONNX export needs example"):
        bench.onnx(bench.publish())


def test_a_manifest_of_another_model_is_refused(tmp_path: Path) -> None:
    bench = Bench(tmp_path, PLAIN)
    manifest = bench.publish()
    foreign = msgspec.structs.replace(
        manifest, blocks=(msgspec.structs.replace(manifest.blocks[0], name="other"),)
    )
    with pytest.raises(TaskError, match="no block 'other' in this model"):
        bench.onnx(foreign)

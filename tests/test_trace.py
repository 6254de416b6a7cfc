"""Cost tables from watched passes: operations and memory by block, and models of every manner."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edge_sdk.cost import CostTable, Line
from edge_sdk.model import BlockModel
from edge_sdk.step import Outline, Sizes, Step
from edge_sdk.task import Task
from edge_sdk.trace import cost_table, cost_table_apart
from edge_sdk.train import Samples
from edge_sdk.wire import Training
from tests.benchmarks.models import ResNet, Transformer, TwoModalities
from tests.toy_tables import cut_of

ROOT = Path(__file__).resolve().parent.parent
SGD = Training(optimizer="sgd", momentum=0.9)
X = np.random.default_rng(0).standard_normal((12, 4), dtype=np.float32)
X.flags.writeable = True


def model_of(build: Callable[[], Any], **how: Any) -> BlockModel:
    torch.manual_seed(1)
    loss = how.pop("loss", lambda output, _: output.square().mean())
    how.setdefault("training", Training(batch_size=8))
    return BlockModel(
        Task(name="t", build_model=build, loss=loss, train_data=lambda part, parts: ([], []), **how)
    )


def samples_of(inputs: Any, targets: Any = None) -> Samples:
    count = len(inputs[0] if isinstance(inputs, tuple) else inputs)
    targets = np.zeros(count, np.int64) if targets is None else targets
    return Samples((inputs, targets), "train_data")


def table_of(build: Callable[[], Any], inputs: Any = X, **how: Any) -> CostTable:
    return cost_table(model_of(build, **how), samples_of(inputs))


def named(table: CostTable, field: str) -> dict[str, int]:
    return {block.name: getattr(block, field) for block in table.blocks}


def flops(table: CostTable) -> dict[str, tuple[int, int]]:
    """Forward and backward, per sample."""
    return {b.name: (b.flops_forward_per_sample, b.flops_backward_per_sample) for b in table.blocks}


def step_of(table: CostTable, *trained: str) -> Step:
    return Step(Outline(table), trained or table.spec.names, SGD)


def step_flops(table: CostTable, *trained: str) -> int:
    return step_of(table, *trained).flops_per_sample()


def peak_bytes(table: CostTable, micro_batch: int, *trained: str) -> int:
    return step_of(table, *trained).peak_bytes(Sizes(Outline(table), micro_batch))


class Pair(nn.Module):
    """Two layers; ``between`` says how one follows the other."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.between(self, x)


PAIR_FLOPS = {"a": (2 * 4 * 6, 2 * 4 * 6), "b": (2 * 6 * 3, 2 * 2 * 6 * 3)}


# --- operations by hand --------------------------------------------------------------------------


def test_linear_layers() -> None:
    table = table_of(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
    )
    # The lowest layer has no gradient of its input to compute.
    assert flops(table) == {"0": (64, 64), "2": (0, 0), "3": (48, 96)}
    assert named(table, "params") == {"0": 40, "2": 16, "3": 27}
    assert named(table, "size_bytes") == {"0": 160, "2": 4 * 32 + 8, "3": 108}
    assert named(table, "elements") == {"0": 40, "2": 33, "3": 27}
    assert step_flops(table) == 64 * 2 + 48 * 3
    assert step_flops(table, "3") == 64 + 48 * 2
    assert step_flops(table, "2") == 64 + 48 * 2
    assert step_flops(table, "0") == 64 * 2 + 48 * 2


def test_convolutions() -> None:
    build = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, groups=4),
        nn.ConvTranspose2d(8, 2, 2),
        nn.Flatten(2),
        nn.Conv1d(2, 5, 4),
    )
    forward = {
        "0": 2 * (3 * 9) * 8 * 81,
        "1": 2 * (2 * 9) * 8 * 16,
        "2": 2 * (2 * 4) * 8 * 16,
        "4": 2 * (2 * 4) * 5 * 22,
    }
    table = table_of(build, np.zeros((9, 3, 9, 9), np.float32))
    times = {"0": 1, "1": 2, "2": 2, "4": 2}
    assert flops(table) == {name: (n, times[name] * n) for name, n in forward.items()}
    assert step_flops(table, "1", "4") == sum(forward.values()) + sum(
        {"1": 1, "2": 1, "4": 2}[n] * forward[n] for n in ("1", "2", "4")
    )


class Attention(nn.Module):
    """Scaled dot-product attention over 5 places of width 8, written in three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv = way, nn.Linear(8, 24)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return self.out(self.mixed(query, key, value))

    def mixed(self, query: Any, key: Any, value: Any) -> Any:
        if self.way == "fused":
            return functional.scaled_dot_product_attention(query=query, key=key, value=value)
        if self.way == "einsum":
            weights = torch.einsum("bhik,bhjk->bhij", query, key).softmax(3)
            return torch.einsum("...ij,...jk", [weights, value])
        return (query @ key.transpose(2, 3)).softmax(3) @ value


@pytest.mark.parametrize(("way", "products"), [("matmul", 4), ("fused", 5), ("einsum", 4)])
def test_attention(way: str, products: int) -> None:
    table = table_of(lambda: Attention(way), np.zeros((9, 5, 8), np.float32))
    projection, product, last = 2 * 5 * 8 * 24, 2 * 5 * 5 * 8, 2 * 10 * 4 * 2
    assert flops(table) == {
        "qkv": (projection + 2 * product, projection + products * product),
        "out": (last, 2 * last),
    }


class Reader(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.cells = kind(6, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(self.embed(x))[0][:, -1])


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_recurrent_layers_and_embeddings(kind: Any, gates: int) -> None:
    table = table_of(lambda: Reader(kind), np.ones((9, 7), np.int64))
    inner = 2 * 7 * gates * 6 * 5, 2 * 7 * gates * 5 * 5
    found = flops(table)
    assert found["embed"] == (0, 0)
    assert found["head"] == (2 * 5 * 2, 2 * 2 * 5 * 2)
    assert found["cells"][0] == sum(inner)
    assert found["cells"][1] == pytest.approx(2 * sum(inner), rel=0.1)
    assert cut_of(table, "head").blocks == ("embed", "cells")
    assert table.batch_bytes_per_sample == 7 * 8 + 8


def test_two_chains() -> None:
    table = table_of(
        lambda: TwoModalities(16),
        (np.zeros((9, 5, 40), np.float32), np.zeros((9, 6, 8), np.float32)),
    )
    found = flops(table)
    sound = [n for n in table.spec.names if n.startswith("sound")]
    first, second, third = (2 * c * 5 * 16 * 8 for c in (6, 16, 16))
    assert [found[name] for name in sound] == [(first, first), (second, 2 * second),
                                               (third, 2 * third)]  # fmt: skip
    assert found["head"] == (2 * 32 * 6, 2 * 2 * 32 * 6)
    forward = sum(both[0] for both in found.values())
    # Only one chain has a gradient; the other one is a prefix.
    assert step_flops(table, sound[2]) == forward + third + found["head"][0]
    assert set(sound[:2]) < set(cut_of(table, sound[2]).blocks)
    assert any(name.startswith("series") for name in cut_of(table, sound[2]).blocks)
    assert step_flops(table, sound[2]) < step_flops(table, *sound)


@pytest.fixture(scope="module")
def vit() -> CostTable:
    """The transformer of METHODS 2.5: 12 blocks, d=192, 65 tokens."""
    return table_of(
        lambda: Transformer(192, 12, 3, 65, 48, classes=100),
        np.zeros((2, 65, 48), np.float32),
        loss=functional.cross_entropy,
        training=Training(batch_size=32),
    )


@pytest.mark.parametrize(("last", "giga"), [(14, 70.1), (3, 31.1), (5, 38.9), (7, 46.7), (1, 23.4)])
def test_operations_of_a_transformer_as_measured_elsewhere(
    vit: CostTable, last: int, giga: float
) -> None:
    assert 32 * step_flops(vit, *vit.spec.names[-last:]) / 1e9 == pytest.approx(giga, rel=0.03)


def test_memory_of_a_transformer_grows_with_what_is_trained(vit: CostTable) -> None:
    last_two, four, six, full = (peak_bytes(vit, 32, *vit.spec.names[-n:]) for n in (3, 5, 7, 14))
    # Measured elsewhere: 86.5, 148.0, 209.5 MB.
    assert [n / 1e6 for n in (last_two, four, six)] == pytest.approx([86.5, 148.0, 209.5], rel=0.1)
    assert full > 4 * last_two


def test_a_low_trainable_layer_is_dear(vit: CostTable) -> None:
    forward = sum(both[0] for both in flops(vit).values())
    lowest = step_flops(vit, "embed", "head")
    # A gradient passes all twelve frozen blocks.
    assert lowest == pytest.approx(2 * forward, rel=0.05)
    assert lowest > 1.9 * step_flops(vit, "head")
    full = peak_bytes(vit, 32)
    assert peak_bytes(vit, 32, "embed", "head") > 0.5 * full > 2 * peak_bytes(vit, 32, "head")


# --- memory by hand ------------------------------------------------------------------------------


def test_activations_are_what_backward_needs() -> None:
    table = table_of(
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)),
        np.zeros((9, 16), np.float32),
    )
    # Rectified output, kept by both; the loss's own input.
    assert named(table, "activation_bytes_per_sample") == {"0": 4 * 32, "2": 4 * 8}
    assert table.batch_bytes_per_sample == 4 * 16 + 8
    (crossing,) = table.crossings
    assert (crossing.born, crossing.last_use, crossing.size) == (0, 1, Line(0, 4 * 32))
    assert (crossing.savers_trained, crossing.savers_passed) == ((0, 1), (0,))
    assert cut_of(table, "2").bytes_per_sample == 4 * 32
    upper = table.segments[1]
    assert upper.kept_trained == upper.kept_passed == Line(0, 4 * 8)
    assert max(line.fixed for line in upper.back_trained) >= 4 * (32 * 8 + 8)
    assert max(line.fixed for line in upper.back_passed) < 4 * 32


def test_peaks_of_real_tables_obey_the_laws(vit: CostTable) -> None:
    for table in (vit, table_of(ResNet, np.zeros((9, 3, 32, 32), np.float32))):
        names = table.spec.names
        suffixes = [names[start:] for start in range(len(names))]
        for micro_batch in (1, 8, 32):
            peaks = [peak_bytes(table, micro_batch, *blocks) for blocks in suffixes]
            assert peaks == sorted(peaks, reverse=True)
        amounts = [step_flops(table, *blocks) for blocks in suffixes]
        assert amounts == sorted(amounts, reverse=True)
        step, outline, parts = step_of(table), Outline(table), Sizes(Outline(table), 8)
        peak, gradients = step.peak_bytes(parts), sum(outline.gradients.values())
        early = step.peak_bytes(parts, step_in_backward=True)
        assert early <= peak + max(outline.largest)
        assert step.peak_bytes(parts, accumulate=True) <= peak + gradients + max(outline.largest)
        again = Step(Outline(table), names, SGD, checkpoint=True)
        assert again.peak_bytes(parts) < peak


# --- what tables are -----------------------------------------------------------------------------


def test_what_a_table_says_of_its_task() -> None:
    table = table_of(
        lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3)),
        augment=lambda one, _: one,
        augment_views=3,
        lossy_prefix=True,
    )
    assert (table.batch_statistics, table.views) == (("0",), 3)
    assert (table.lossy_prefix, table.random_prefix) == (True, False)
    assert table.recomputable == ("0",)
    assert table.cuttable == ("0", "1")
    assert table_of(lambda: Pair(plain)).batch_statistics == ()


def plain(pair: Any, x: torch.Tensor) -> torch.Tensor:
    return pair.b(pair.a(x).relu())


def peeks(pair: Any, x: torch.Tensor) -> torch.Tensor:
    return pair.b(pair.a(x) * float(x.abs().max().item() > 0))


def test_a_table_is_small_and_comes_back() -> None:
    deep = lambda: nn.Sequential(  # noqa: E731
        *[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(99)], nn.Linear(8, 3)
    )
    table = table_of(deep, np.zeros((3, 8), np.float32))
    stored = msgspec.json.encode(table)
    assert len(table.blocks) == 100
    assert len(stored) < 5e6 / 10
    assert msgspec.json.decode(stored, type=CostTable) == table
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(table), type=CostTable) == table


@pytest.mark.parametrize("build", [lambda: Pair(plain), lambda: Pair(peeks)])
def test_a_table_made_apart_is_the_same(build: Any) -> None:
    model = model_of(build)
    assert cost_table_apart(model, samples_of(X)) == cost_table(model, samples_of(X))


@pytest.mark.parametrize("end", [threading.Event().wait, lambda: os._exit(3)])
def test_a_child_that_hangs_or_dies_does_not_matter(end: Callable[[], object]) -> None:
    """As one would that waits for a thread of its parent."""
    parent = os.getpid()

    def between(pair: Any, x: torch.Tensor) -> torch.Tensor:
        if os.getpid() != parent:
            end()
        return plain(pair, x)

    model = model_of(lambda: Pair(between))
    assert cost_table_apart(model, samples_of(X), limit_s=0.5) == cost_table(model, samples_of(X))


def test_no_model_is_too_large() -> None:
    with torch.device("meta"):
        huge = nn.Sequential(*[nn.Linear(20_000, 20_000, bias=False) for _ in range(5)])
    table = table_of(lambda: huge, np.zeros((3, 20_000), np.float32))
    assert table.spec.params == 2 * 10**9
    assert step_flops(table) == 2 * 20_000**2 * (5 + 9)
    assert all(parameter.is_meta for parameter in huge.parameters())


def test_watching_takes_no_memory_and_no_compiler() -> None:
    code = """
import resource, sys
import numpy as np, torch
from tests.test_trace import table_of
from torch import nn

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

build = lambda: nn.Sequential(*[nn.Linear(1000, 1000) for _ in range(12)])
with torch.device("meta"):
    model = build()
small = table_of(lambda: nn.Sequential(nn.Linear(4, 4)), np.zeros((2, 4), np.float32))
before = peak()
table_of(lambda: model, np.zeros((2, 1000), np.float32))
assert peak() - before < 20, peak() - before
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


# --- the model stays as it was -------------------------------------------------------------------


class Counting(nn.Module):
    """Keeps a running mean by replacing it, counts its calls, remembers its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.drop, self.b = nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mean", torch.ones(4))
        self.calls, self.last = 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
        self.last = self.norm(self.a(x - self.mean))
        return self.b(self.drop(self.last))


class CountingByValue(Counting):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * float(x.abs().sum().item() > 0)


@pytest.mark.parametrize("build", [Counting, CountingByValue])
def test_watching_leaves_the_model_as_it_was(build: Any) -> None:
    model = model_of(build)
    module: Any = model.module
    model.open_only(["b"])
    parameters = dict(module.named_parameters())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    cost_table(model, samples_of(X))
    assert all(parameters[name] is p for name, p in module.named_parameters())
    assert [n for n, p in parameters.items() if p.requires_grad] == ["b.weight", "b.bias"]
    assert all(p.grad is None and p.device.type == "cpu" for p in parameters.values())
    assert not module.norm.training
    assert module.b.training
    after = module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (module.calls, module.last) == (0, None)
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert functional.scaled_dot_product_attention.__name__ == "scaled_dot_product_attention"


# --- what can be kept of frozen blocks -----------------------------------------------------------


def test_a_prefix_is_kept_as_its_last_module_returns_it() -> None:
    table = table_of(lambda: ResNet(32, 4), np.zeros((9, 3, 16, 16), np.float32))
    cut = cut_of(table, "head")
    # The mean over all places is taken by the model itself, each time.
    assert cut.bytes_per_sample == 4 * 32 * 16 * 16
    assert set(cut.blocks) <= set(table.cuttable)


def test_two_chains_keep_two_outputs() -> None:
    table = table_of(
        lambda: TwoModalities(16),
        (np.zeros((9, 5, 40), np.float32), np.zeros((9, 6, 8), np.float32)),
        blocks={"series": ["series"], "sound": ["sound"], "head": ["head"]},
        chains={"left": ["series"], "right": ["sound"]},
    )
    assert cut_of(table, "head").bytes_per_sample == 4 * (5 * 16 + 16 * 8)
    assert cut_of(table, "sound").bytes_per_sample == 4 * 5 * 16


def test_what_returns_no_tensor_or_runs_twice_cannot_be_kept() -> None:
    recurrent = table_of(lambda: Reader(nn.GRU), np.ones((9, 7), np.int64))
    assert recurrent.cuttable == ("embed", "head")
    twice = table_of(lambda: Pair(lambda p, x: p.b(p.a(p.a(x)[:, :4]))))
    assert twice.cuttable == ("b",)

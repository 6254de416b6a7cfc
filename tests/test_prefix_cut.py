"""Models cut above their frozen blocks: what is kept, what is proven, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edge_sdk.hollow import is_hollow, restore, unload, unloaded
from edge_sdk.prefix_cut import Cut, NoPrefix, find_cut
from tests.prefix_models import (
    COUNT,
    Bench,
    Two,
    Vit,
    Words,
    cnn,
    images,
    mlp,
    one_thread,  # noqa: F401
)

ROOT = Path(__file__).resolve().parent.parent
AUDIO = ("audio.layers.0", "audio.layers.1")
CASES: list[tuple[Callable[[], nn.Module], tuple[str, ...], list[str]]] = [
    (mlp, ("1",), ["1"]),
    (mlp, ("1", "3", "5"), ["5"]),
    (cnn, ("0", "1", "4", "5"), ["5"]),
    (Vit, ("embed",), ["embed"]),
    (Vit, ("embed", "layers.0", "layers.1"), ["layers.1"]),
    (Words, ("embed", "body.layers.0", "body.layers.1"), ["body.layers.1"]),
    (Two, AUDIO[:1], ["audio.layers.0"]),
    (Two, (*AUDIO, "image.embed", "image.layers.0"), ["audio.layers.1", "image.layers.0"]),
    (
        Two,
        (*AUDIO, "image.embed", "image.layers.0", "image.layers.1", "image.head"),
        ["audio.layers.1", "image.head"],
    ),
]


def cut_of(bench: Bench, blocks: tuple[str, ...]) -> tuple[Cut, list[torch.Tensor]]:
    return find_cut(bench.model, blocks, bench.samples.inputs_at, bench.samples.count, 16)


def gradients(bench: Bench, output: torch.Tensor) -> dict[str, torch.Tensor]:
    bench.model.module.zero_grad()
    output.square().sum().backward()
    found = bench.model.module.named_parameters()
    return {name: p.grad.clone() for name, p in found if p.grad is not None}


@pytest.mark.parametrize(("build", "blocks", "ends"), CASES)
def test_the_rest_runs_from_what_was_kept_as_the_whole_does(
    build: Callable[[], nn.Module], blocks: tuple[str, ...], ends: list[str], tmp_path: Path
) -> None:
    bench = Bench(build, tmp_path)
    model = bench.model
    cut, _ = cut_of(bench, blocks)
    assert [output.path for output in cut.kept] == ends
    model.open_only([name for name in model.spec.names if name not in blocks])
    index = torch.randperm(COUNT)[:11]
    with torch.no_grad():
        kept = cut.below(model, bench.samples.inputs_at(index))
    unload(model, cut.tensors)
    assert set(unloaded(model)) <= set(blocks)
    assert len(unloaded(model)) == len(blocks)
    model.module.eval()
    output = cut.above(model, [k.clone() for k in kept], lambda: bench.samples.inputs_at(index))
    got = gradients(bench, output)
    restore(model, blocks)
    for name in blocks:
        bench.load(name)
    wanted = model.run(bench.samples.inputs_at(index))
    assert torch.equal(output, wanted)
    expected = gradients(bench, wanted)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert all("forward" not in vars(module) for module in model.module.modules())
    assert all(not module._forward_hooks for module in model.module.modules())


@pytest.mark.parametrize(("build", "blocks", "ends"), CASES)
def test_finding_a_cut_leaves_the_model_as_it_was(
    build: Callable[[], nn.Module], blocks: tuple[str, ...], ends: list[str], tmp_path: Path
) -> None:
    model = (bench := Bench(build, tmp_path)).model
    model.open_only(model.spec.names[-1:])
    state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    modes = [module.training for module in model.module.modules()]
    grads = [parameter.requires_grad for parameter in model.module.parameters()]
    cut_of(bench, blocks)
    assert modes == [module.training for module in model.module.modules()]
    assert grads == [parameter.requires_grad for parameter in model.module.parameters()]
    now = model.module.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


def test_inputs_are_not_needed_when_they_are_floats_the_rest_does_not_read(tmp_path: Path) -> None:
    assert cut_of(Bench(Vit, tmp_path), ("embed", "layers.0"))[0].blind is not None
    assert cut_of(Bench(Words, tmp_path), ("embed", "body.layers.0"))[0].blind is None
    assert cut_of(Bench(Two, tmp_path), AUDIO)[0].blind is None


def test_modules_without_tensors_below_the_cut_do_not_run(tmp_path: Path) -> None:
    cut, _ = cut_of(Bench(cnn, tmp_path), ("0", "1", "4", "5"))
    assert {"2", "3"} <= cut.stubs.keys()


class SkipsAhead(nn.Module):
    """What a module without tensors computes below the cut is read above it, too."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.Tanh()
        self.a, self.b, self.c = (nn.Linear(36, 36) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(x.flatten(1))
        return self.c(self.b(self.a(x)) + x)


def test_a_module_without_tensors_that_the_rest_reads_runs(tmp_path: Path) -> None:
    bench = Bench(SkipsAhead, tmp_path)
    cut, kept = cut_of(bench, ("a", "b"))
    assert cut.blind is None
    assert "act" not in cut.stubs
    index = torch.arange(len(kept[0]))
    bench.model.module.eval()
    output = cut.above(bench.model, kept, lambda: bench.samples.inputs_at(index))
    assert torch.equal(output, bench.model.run(bench.samples.inputs_at(index)))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(36, 36) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x.flatten(1))
        x += 1
        return self.c(torch.relu_(self.b(x)))


def test_outputs_may_be_changed_in_place(tmp_path: Path) -> None:
    bench = Bench(InPlace, tmp_path)
    cut, kept = cut_of(bench, ("a", "b"))
    assert cut.dense
    bench.model.module.eval()
    index = torch.arange(len(kept[0]))
    inputs = bench.samples.inputs_at(index)
    assert torch.equal(cut.above(bench.model, kept, lambda: inputs), bench.model.run(inputs))


class Windows(nn.Module):
    """Three windows a sample along the first axis, as models of video and of large images have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x.reshape(-1, 12)).unflatten(0, (-1, 3)).mean(1))


def test_several_entries_a_sample_are_kept_together(tmp_path: Path) -> None:
    bench = Bench(Windows, tmp_path)
    cut, kept = cut_of(bench, ("a",))
    assert kept[0].shape == (16, 3, 8)
    bench.model.module.eval()
    wanted = bench.model.run(bench.samples.inputs_at(torch.tensor([5, 2])))
    assert torch.equal(cut.above(bench.model, [kept[0][[5, 2]]], lambda: None), wanted)


class Reused(Vit):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.layers[0](self.layers[0](x))).mean(1))


class Skips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(36, 36) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.a(x.flatten(1))
        return self.c(self.b(low) + low)


class OverTheBatch(Skips):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.a(x.flatten(1))
        return self.c(self.b(low - low.mean(0)))


class Drops(Skips):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = nn.functional.dropout(self.a(x.flatten(1)), 0.5, self.training)
        return self.c(self.b(low))


class Listed(Skips):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.a.weight + self.b.weight
        return self.c(nn.functional.linear(x.flatten(1), weight))


class Summed(Skips):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x.flatten(1)).sum(0)).expand(x.shape[0], -1))


def dropout_at_the_root() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 5)
    )


@pytest.mark.parametrize(
    ("build", "blocks", "message"),
    [
        (Skips, ("a", "b"), "from the output of b alone the rest of the model does not compute"),
        (OverTheBatch, ("a", "b"), "module 'b' computes of a sample depends on chance or on the"),
        (Drops, ("a", "b"), "module 'b' computes of a sample depends on chance or on the"),
        (dropout_at_the_root, ("1", "3"), "module '3' computes of a sample depends on chance"),
        (Listed, ("a", "b"), "no module of the frozen blocks of chain 'main' runs exactly once"),
        (Summed, ("a", "b"), r"module 'b', of shape \(36,\), has no axis of samples"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    build: Callable[[], Any], blocks: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    bench = Bench(build, tmp_path, images())
    with pytest.raises(NoPrefix, match=message):
        cut_of(bench, blocks)


def test_a_block_that_runs_twice_is_left_to_the_rest(tmp_path: Path) -> None:
    bench = Bench(Reused, tmp_path)
    cut, _ = cut_of(bench, ("embed", "layers.0"))
    assert [output.path for output in cut.kept] == ["embed"]
    assert all(name.startswith("embed.") for name in cut.tensors)


def test_unloaded_weights_are_gone_refuse_writes_and_come_back(tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    model = bench.model
    parameter = model.module.get_parameter("layers.1.up.weight")
    unload(model, [t.name for t in model.spec.block("layers.1").tensors])
    assert unloaded(model) == ("layers.1",)
    assert is_hollow(parameter)
    assert parameter.untyped_storage().nbytes() == 4
    assert bool(parameter.isnan().all())
    with pytest.raises(RuntimeError, match="single memory location"):
        model.write("layers.1", bench.stored["layers.1"])
    restore(model, model.spec.names)
    assert unloaded(model) == ()
    model.write("layers.1", bench.stored["layers.1"])
    assert parameter is model.module.get_parameter("layers.1.up.weight")
    assert (
        parameter.detach().numpy().tobytes()
        == bench.stored["layers.1"]["layers.1.up.weight"].tobytes()
    )


def test_no_cut_loads_the_compiler() -> None:
    code = (
        "import sys, torch; from pathlib import Path; from tests import test_prefix_cut as t\n"
        "for build, blocks, _ in t.CASES:\n"
        "    bench = t.Bench(build, Path('/nowhere'))\n"
        "    cut, kept = t.cut_of(bench, blocks)\n"
        "    t.unload(bench.model, cut.tensors)\n"
        "    index = torch.arange(len(kept[0]))\n"
        "    cut.above(bench.model, kept, lambda: bench.samples.inputs_at(index))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"

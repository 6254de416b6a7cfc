"""Blocks run again in backward: the same gradients to the bit, in less memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from edge_sdk.errors import TaskError
from edge_sdk.memory import MALLOC
from edge_sdk.model import BlockModel
from edge_sdk.optimizer import Optimizer
from edge_sdk.recompute import block_modules, recomputed_blocks, recomputing
from edge_sdk.task import Task
from edge_sdk.wire import Training
from tests.test_model import Encoder, Residual, Tower, TwoTowers, small_net


def model_of(build: Callable[[], nn.Module], **how: Any) -> BlockModel:
    torch.manual_seed(1)
    return BlockModel(
        Task(
            name="t",
            build_model=build,
            loss=lambda output, _: output.square().mean(),
            train_data=lambda part, parts: ([], []),
            **how,
        )
    )


def deep(wide: int = 8, blocks: int = 3, *inside: nn.Module) -> nn.Sequential:
    layers = [
        nn.Sequential(nn.Linear(wide, 2 * wide), nn.Tanh(), nn.Linear(2 * wide, wide), *inside)
        for _ in range(blocks)
    ]
    return nn.Sequential(*layers, nn.Linear(wide, 3))


class Convolutions(nn.Module):
    """Two residual blocks with batch statistics and activations in place."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.act = nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
            out += x
            return self.act(out)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(self.Layer(), self.Layer())
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(x).mean((2, 3)))


class Two(NamedTuple):
    """What a layer hands on beside its output."""

    out: torch.Tensor
    gate: torch.Tensor


class Gated(nn.Module):
    """Takes and returns tuples, dicts, numbers and named arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.gate, self.drop = nn.Linear(4, 4), nn.Linear(4, 4), nn.Dropout(0.4)

    def forward(self, both: Two, *, extra: dict[str, Any], power: int = 1) -> tuple[Two, str]:
        x = both.out * both.gate.sigmoid() ** power + extra["more"][0] * extra["scale"]
        return Two(self.drop(self.out(x).tanh()), self.gate(x).exp()), "made"


class Tuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Gated(), Gated(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both, _ = self.first(Two(x, x + 1), extra={"more": [x], "scale": 0.5}, power=2)
        both, what = self.second(both, extra={"more": [both.gate, 3], "scale": 2})
        return self.head(both.out + both.gate) * len(what)


def step(model: BlockModel, blocks: tuple[str, ...], inputs: Any, again: bool) -> Any:
    """Loss, gradients and state after two passes, the second with what the first left behind."""
    model.open_only(blocks)
    torch.manual_seed(3)
    losses = []
    for _ in range(2):
        if again:
            with recomputing(model):
                loss = model.task.loss(model.run(inputs), None)
                loss.backward()
        else:
            loss = model.task.loss(model.run(inputs), None)
            loss.backward()
        losses.append(float(loss.detach()))
    gradients = {
        n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None
    }
    after = torch.rand(1)  # dropout has drawn as many numbers as without
    return losses, gradients, dict(model.module.state_dict()), after


MODELS = [
    (deep, (5, 8)),
    (lambda: deep(8, 2, nn.Dropout(0.3)), (5, 8)),
    (Tower, (5, 4)),
    (Convolutions, (4, 3, 6, 6)),
    (Tuples, (5, 4)),
    (lambda: nn.Sequential(nn.GRU(4, 5, batch_first=True), First(), nn.Linear(5, 2)), (3, 6, 4)),
]


class First(nn.Module):
    def forward(self, both: tuple[torch.Tensor, Any]) -> torch.Tensor:
        return both[0]


def equal(plain: Any, again: Any) -> None:
    assert again[0] == plain[0]
    for one, other in ((plain[1], again[1]), (plain[2], again[2])):
        assert one.keys() == other.keys()
        assert [n for n in one if not torch.equal(one[n], other[n])] == []
    assert plain[1]
    assert torch.equal(plain[3], again[3])


@pytest.mark.parametrize("lowest", [0, 1, -1])
@pytest.mark.parametrize(("build", "shape"), MODELS)
def test_gradients_and_state_are_the_same_to_the_bit(
    build: Callable[[], nn.Module], shape: tuple[int, ...], lowest: int
) -> None:
    results = []
    for again in (False, True):
        model = model_of(build)
        torch.manual_seed(2)
        inputs = torch.randn(shape)
        results.append(step(model, model.spec.names[lowest:], inputs, again))
    equal(*results)


def test_two_chains_and_a_block_a_gradient_only_passes_through() -> None:
    inputs = (torch.randn(5, 4), torch.randn(5, 4))
    for blocks in (("image.layers.0",), ("audio.layers.0", "head"), ("image.embed", "audio.embed")):
        results = [step(model_of(TwoTowers), blocks, inputs, again) for again in (False, True)]
        equal(*results)


def test_a_transformer_whose_frozen_layers_have_a_fast_path() -> None:
    class Words(Encoder):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
            self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    words = torch.arange(20).reshape(4, 5) % 10
    for blocks in (("embed",), ("body.layers.0",), ("body.layers.1", "head")):
        results = [step(model_of(Words), blocks, words, again) for again in (False, True)]
        equal(*results)


def test_blocks_that_change_their_input_or_their_buffers() -> None:
    class Averaging(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("mask", torch.ones(4), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.mul_(2).add_(1)
            self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            return self.other((self.out(x.clone()) - self.mean).tanh() * self.mask)

    build = lambda: nn.Sequential(nn.Linear(4, 4), Averaging(), Averaging(), nn.Linear(4, 2))  # noqa: E731
    x = torch.randn(6, 4)
    equal(*(step(model_of(build), ("0", "2", "3"), x, again) for again in (False, True)))


def test_a_block_run_several_times_in_one_pass() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                x = self.cell(x)
            return self.head(x)

    x, whole = torch.randn(5, 4), {"cell": ["cell"], "head": ["head"]}
    equal(*(step(model_of(Looped, blocks=whole), ("cell",), x, again) for again in (False, True)))


def test_second_derivatives_are_the_same() -> None:
    results = []
    for again in (False, True):
        model, x = model_of(deep), torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
        model.open_only(model.spec.names)
        x.requires_grad_()

        def penalised() -> None:
            output = model.run(x).square().mean()  # noqa: B023
            (slope,) = torch.autograd.grad(output, x, create_graph=True)  # noqa: B023
            (output + slope.square().sum()).backward()

        if again:
            with recomputing(model):
                penalised()
        else:
            penalised()
        results.append([p.grad for p in model.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_block_that_computes_gradients_itself() -> None:
    class Downhill(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            place = x if x.requires_grad else x.clone().requires_grad_()
            energy = self.energy(place).exp().sum()
            (slope,) = torch.autograd.grad(energy, place, create_graph=True)
            return self.out((x - slope).tanh()).exp()

    build = lambda: nn.Sequential(Downhill(), Downhill(), nn.Linear(4, 2))  # noqa: E731
    x = 0.1 * torch.randn(5, 4)
    equal(*(step(model_of(build), ("0", "1", "2"), x, again) for again in (False, True)))


# --- what is kept ------------------------------------------------------------------------------


def test_only_inputs_of_blocks_are_kept() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 64), nn.Linear(64, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            wide = self.up(x).exp()
            alive.append(weakref.ref(wide))
            return self.down(wide)

    model = model_of(lambda: nn.Sequential(Watched(), Watched(), nn.Linear(4, 2)))
    model.open_only(model.spec.names)
    loss = model.run(torch.randn(3, 4)).sum()
    assert sum(ref() is not None for ref in alive) == 2
    del loss
    alive.clear()
    with recomputing(model):
        loss = model.run(torch.randn(3, 4)).sum()
        assert sum(ref() is not None for ref in alive) == 0
        loss.backward()
        assert len(alive) == 4
        assert sum(ref() is not None for ref in alive) == 0


def test_a_block_is_run_no_further_than_needed() -> None:
    class Counted(nn.Linear):
        runs = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            Counted.runs += 1
            return out

    build = lambda: nn.Sequential(nn.Sequential(Counted(4, 4), nn.Tanh(), Counted(4, 4)))  # noqa: E731
    model = model_of(build, blocks={"all": ["0"]})
    model.open_only(["all"])
    with recomputing(model):
        model.run(torch.randn(3, 4)).sum().backward()
    assert Counted.runs == 2 + 1


def test_nothing_stays_behind() -> None:
    model = model_of(Tower)
    own = model.module.get_submodule("layers.1")
    own.forward = marked = lambda x: x * 2
    x, before = torch.randn(2, 4), {n: vars(m).copy() for n, m in model.module.named_modules()}
    model.open_only(model.spec.names)
    with recomputing(model):
        assert "forward" in vars(model.module.get_submodule("layers.0"))
        loss = model.run(x).sum()
    assert vars(own)["forward"] is marked
    assert {n: vars(m).keys() for n, m in model.module.named_modules()} == {
        n: attributes.keys() for n, attributes in before.items()
    }
    loss.backward()
    with pytest.raises(InterruptedError), recomputing(model):
        raise InterruptedError
    assert "forward" not in vars(model.module.get_submodule("layers.0"))
    del loss, own
    reference = weakref.ref(model.module)
    del model
    gc.collect()
    assert reference() is None


def test_without_gradients_blocks_run_as_they_are() -> None:
    model, x = model_of(Tower), torch.randn(2, 4)
    model.module.eval()
    with torch.no_grad():
        expected = model.run(x)
        with recomputing(model):
            assert torch.equal(model.run(x), expected)


# --- which blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "blocks", "expected"),
    [
        (small_net, None, {"0": "0", "2": "2", "4": "4"}),
        (Tower, None, {"layers.0": "layers.0", "layers.1": "layers.1"}),
        (lambda: deep(2, 2), None, {"0": "0", "1": "1", "2": "2"}),
        (lambda: nn.Linear(2, 2), None, {}),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU())),
            {"a": ["0.0.0.weight", "0.0.0.bias"]},
            {"a": "0"},
        ),
        (
            lambda: nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]), nn.Linear(2, 2)),
            None,
            {"0": "0.0", "1": "1"},
        ),
        (Tower, {"low": ["place", "embed"], "rest": ["layers", "norm", "head"]}, {}),
        (lambda: deep(2, 2), {"a": ["0.0"], "b": ["0.2", "1"], "c": ["2"]}, {"a": "0.0", "c": "2"}),
    ],
)
def test_blocks_that_are_one_module(build: Any, blocks: Any, expected: dict[str, str]) -> None:
    assert block_modules(model_of(build, blocks=blocks)) == expected


def test_blocks_that_keep_only_their_input_are_left_alone() -> None:
    assert recomputed_blocks(model_of(small_net)) == {}
    assert recomputed_blocks(model_of(Residual)) == {}
    assert list(recomputed_blocks(model_of(Convolutions))) == ["layers.0", "layers.1"]
    assert list(recomputed_blocks(model_of(Encoder))) == [f"body.layers.{n}" for n in range(3)]


# --- blocks that cannot be recomputed ----------------------------------------------------------


class Odd(nn.Module):
    """Does something else in its second run."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.out, self.what, self.runs = nn.Linear(4, 4), what, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        if self.what == "shorter" and self.runs > 1:
            return self.out(x)
        if self.what == "other" and self.runs > 1:
            x = x[:2]
        if self.what == "later" and self.runs > 1:
            x.add_(1)
            return self.out(x).exp()
        return self.out(x).exp().tanh()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "shorter",
            "block '1': run a second time, it did something else, so it cannot be recomput",
        ),
        (
            "other",
            "block '1': run a second time, it did something else, so it cannot be recomputed",
        ),
    ],
)
def test_a_block_that_differs_the_second_time(what: str, message: str) -> None:
    model = model_of(lambda: nn.Sequential(nn.Linear(4, 4), Odd(what), nn.Linear(4, 2)))
    model.open_only(model.spec.names)
    random = torch.get_rng_state()
    with recomputing(model):
        loss = model.run(torch.randn(5, 4)).sum()
        after = torch.get_rng_state()
        with pytest.raises(TaskError) as caught:
            loss.backward()
    assert str(caught.value).startswith(message)
    assert torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(after, random)


def test_an_input_changed_by_what_runs_after() -> None:
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
            self.block = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.low(x)
            x += self.block(x)
            return self.head(x)

    model = model_of(Adding)
    model.open_only(model.spec.names)
    with recomputing(model):
        loss = model.run(torch.randn(5, 4)).sum()
        with pytest.raises(TaskError, match="'block': its input was changed in place after it ran"):
            loss.backward()


def test_a_block_that_changes_its_input_in_some_runs_only() -> None:
    model = model_of(lambda: nn.Sequential(nn.Linear(4, 4), Odd("later"), nn.Linear(4, 2)))
    model.open_only(model.spec.names)
    with recomputing(model):
        model.run(torch.randn(5, 4))
        with pytest.raises(
            TaskError, match="'1': its input or one of its buffers is changed in pl"
        ):
            model.run(torch.randn(5, 4))


class Scaled(nn.Module):
    """Uses one parameter twice, once detached: its gradient is complete before its last use."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.out, self.scale, self.detached = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), detached

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.scale.detach() if self.detached else 2
        return self.out(x).tanh() * scale + self.scale


@pytest.mark.parametrize("detached", [False, True])
def test_parameters_stepped_while_backward_runs(detached: bool) -> None:
    weights = []
    for again in (False, True):
        model = model_of(lambda: nn.Sequential(Scaled(detached), nn.Linear(4, 2)))
        optimizer = Optimizer(model.open_only(model.spec.names), Training())
        with ExitStack() as stack:
            stack.enter_context(optimizer.in_backward())
            if again:
                stack.enter_context(recomputing(model))
            loss = model.run(torch.linspace(-1, 1, 12).reshape(3, 4)).square().sum()
            if not detached:
                loss.backward()
            elif again:
                with pytest.raises(
                    TaskError, match="was changed in place before it was used: a pa"
                ):
                    loss.backward()
            else:  # as torch says it without recomputing
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()
        weights.append(dict(model.module.state_dict()))
    assert detached or all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- memory ------------------------------------------------------------------------------------

MEASURE = """
import os
import sys
import torch
from torch import nn
from edge_sdk.model import BlockModel
from edge_sdk.process import process_peak_bytes, process_rss_bytes, reset_peak
from edge_sdk.recompute import recomputing
from edge_sdk.task import Task
from contextlib import nullcontext

torch.set_num_threads(1)
def block():
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Dropout(0.1))
task = Task(name="t", build_model=lambda: nn.Sequential(*(block() for _ in range(8))),
            loss=nn.functional.mse_loss, train_data=lambda part, parts: None)
model, x = BlockModel(task), torch.randn(8192, 64)
model.open_only(model.spec.names)
def run(x):
    with recomputing(model) if sys.argv[1] == "again" else nullcontext():
        model.run(x).square().mean().backward()
run(x[:2])
reset_peak()
before = process_rss_bytes()
run(x)
print(process_peak_bytes(os.getpid()) - before)
"""


def test_memory_falls() -> None:
    peaks = []
    for how in ("once", "again"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, how],
            env={**os.environ, **MALLOC},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        peaks.append(int(done.stdout))
    # Each of eight blocks keeps its input, two wide and one narrow activation, and a mask.
    assert peaks[1] < peaks[0] / 3

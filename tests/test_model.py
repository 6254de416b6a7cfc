"""Torch modules as blocks: how they are cut, written and frozen, and which of them is at work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.blocks import TRUNK
from edge_sdk.errors import TaskError
from edge_sdk.model import BlockModel, watch_modules
from edge_sdk.task import Task


def model_of(build: Callable[[], Any], **how: Any) -> BlockModel:
    torch.manual_seed(1)
    loss = how.pop("loss", lambda output, _: output.square().mean())
    return BlockModel(
        Task(name="t", build_model=build, loss=loss, train_data=lambda part, parts: ([], []), **how)
    )


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(8, 3)
    )


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(6), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(self.out(self.norm(x)))


class Tower(nn.Module):
    """Embedding and place, a list of layers, norm and head: the usual transformer."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 6))
        self.embed = nn.Linear(4, 6)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.audio, self.image = Tower(3), Tower(2)
        self.join = nn.Linear(6, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, audio: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.out(self.join(torch.cat([self.audio(audio), self.image(image)], 1)))


class Residual(nn.Module):
    """Two stages of two layers between a stem and a head, as ResNet has four."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3)
        self.bn = nn.BatchNorm2d(2)
        self.stage1 = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1))
        self.stage2 = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
        self.fc = nn.Linear(2, 3)


class Encoder(nn.Module):
    """A list of layers two modules down, as in nn.TransformerEncoder and most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


# --- how a module is cut -----------------------------------------------------------------------


def test_a_sequential_is_cut_at_its_layers_with_tensors() -> None:
    model = model_of(small_net)
    assert model.spec.names == ("0", "2", "4")
    assert [t.name for t in model.spec.block("2").tensors] == [
        "2.weight",
        "2.bias",
        "2.running_mean",
        "2.running_var",
        "2.num_batches_tracked",
    ]
    kinds = {t.name: (t.kind, t.dtype, t.shape) for t in model.spec.block("2").tensors}
    assert kinds["2.weight"] == ("parameter", "float32", (8,))
    assert kinds["2.running_mean"] == ("buffer", "float32", (8,))
    assert kinds["2.num_batches_tracked"] == ("buffer", "int64", ())
    assert {block.chain for block in model.spec.blocks} == {"main"}
    assert model.spec.params == sum(p.numel() for p in model.module.parameters())


def test_layers_between_an_embedding_and_a_head() -> None:
    model = model_of(Tower)
    assert model.spec.names == ("embed", "layers.0", "layers.1", "head")
    assert [t.name for t in model.spec.block("embed").tensors] == [
        "place",
        "embed.weight",
        "embed.bias",
    ]
    assert model.spec.block("head").tensors[0].name == "norm.weight"


def test_several_branches_are_chains_and_the_rest_is_the_trunk() -> None:
    model = model_of(TwoTowers)
    chains: dict[str, list[str]] = {}
    for block in model.spec.blocks:
        chains.setdefault(block.chain, []).append(block.name)
    assert chains == {
        "audio": ["audio.embed", *(f"audio.layers.{n}" for n in range(3)), "audio.head"],
        "image": ["image.embed", "image.layers.0", "image.layers.1", "image.head"],
        TRUNK: ["head"],
    }
    assert model.spec.block("head").tensors[0].name == "join.weight"


def test_several_lists_one_after_another_are_all_cut() -> None:
    assert model_of(Residual).spec.names == (
        *("embed", "stage1.0", "stage1.2", "stage2.0", "stage2.1", "head"),
    )


def test_a_list_further_down_is_found() -> None:
    names = model_of(Encoder).spec.names
    assert names == ("embed", "body.layers.0", "body.layers.1", "body.layers.2", "head")


def test_a_plain_module_is_cut_at_its_children() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.first, self.act, self.last = nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)

    assert model_of(Plain).spec.names == ("own", "first", "last")


@pytest.mark.parametrize("build", [small_net, Tower, TwoTowers, Residual, Encoder])
def test_every_tensor_lies_in_one_block(build: Callable[[], nn.Module]) -> None:
    model = model_of(build)
    tensors = [t.name for block in model.spec.blocks for t in block.tensors]
    assert sorted(tensors) == sorted(model.module.state_dict())
    assert model.spec.digest() == model_of(build).spec.digest()


def test_blocks_and_chains_can_be_named() -> None:
    model = model_of(
        TwoTowers,
        blocks={"ears": ["audio"], "eyes": ["image"], "mind": ["join", "out"]},
        chains={"sound": ["ears"], "sight": ["eyes"]},
    )
    assert [(b.name, b.chain) for b in model.spec.blocks] == [
        ("ears", "sound"),
        ("eyes", "sight"),
        ("mind", TRUNK),
    ]
    whole = model_of(small_net, blocks={"low": ["0", "2.weight", "2.bias"], "high": ["2", "4"][1:],
                                        "statistics": ["2.running_mean", "2.running_var",
                                                       "2.num_batches_tracked"]})  # fmt: skip
    assert [len(b.tensors) for b in whole.spec.blocks] == [4, 2, 3]


def test_a_prefix_ends_at_a_dot() -> None:
    build = lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))  # noqa: E731
    model = model_of(build, blocks={"a": ["1"], "b": [str(n) for n in range(12) if n != 1]})
    assert [t.name for t in model.spec.block("a").tensors] == ["1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"blocks": {"a": ["0"]}}, "task 't': tensor '2.weight' lies in no block; every tensor ne"),
        (
            {"blocks": {"a": ["0", "2"], "b": ["2", "4"]}},
            r"tensor '2.weight' lies in blocks \['a', 'b'\]; every tensor needs one",
        ),
        (
            {"blocks": {"a": ["0", "2", "4"], "b": ["layers.7"]}},
            r"blocks \['b'\] match no tensor of the model",
        ),
        ({"blocks": {"my block": ["0", "2", "4"]}}, "block name 'my block' must be 1 to 128"),
        ({"chains": {"c": ["0"]}}, "chains are given without blocks; name the blocks too"),
        (
            {"blocks": {"a": ["0", "2", "4"]}, "chains": {"c": ["b"]}},
            "chain 'c': block 'b' does not exist",
        ),
        (
            {"blocks": {"a": ["0", "2", "4"]}, "chains": {"c": ["a"], "d": ["a"]}},
            "chain 'd': block 'a' is in two chains",
        ),
    ],
)
def test_blocks_that_are_no_partition_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        model_of(small_net, **how)


def tied() -> nn.Module:
    net = Tower()
    net.head = nn.Linear(6, 6)
    net.layers[0].out.weight = net.head.weight
    return net


def shared() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, layer)


def fails() -> nn.Module:
    raise RuntimeError("no weights file")


def with_a_note() -> nn.Module:
    class Noted(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"epoch": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    return nn.Sequential(Noted(2, 2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tied, "'layers.0.out.weight' and 'head.weight' are one and the same: untie them"),
        (shared, "'0.weight' and '1.weight' are one and the same"),
        (nn.ReLU, "task 't': the model has no tensors, there is nothing to train"),
        (lambda: nn.Linear(2, 2).bfloat16(), "'weight': dtype torch.bfloat16 is not supported"),
        (with_a_note, "state_dict entry '0._extra_state' is dict, not a tensor"),
        (lambda: 7, r"build_model\(\) returned int, expected torch.nn.Module"),
        (fails, r"build_model\(\) failed: no weights file"),
    ],
)
def test_models_that_cannot_be_used_are_refused(build: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        model_of(build)


# --- weights in and out ------------------------------------------------------------------------


@pytest.mark.parametrize("build", [small_net, TwoTowers])
def test_what_is_written_is_read(build: Callable[[], nn.Module]) -> None:
    model, rng = model_of(build), np.random.default_rng(0)
    for block in model.spec.blocks:
        arrays = {
            t.name: np.asarray(rng.standard_normal(t.shape) * 9, t.dtype) for t in block.tensors
        }
        for array in arrays.values():
            array.flags.writeable = False
        model.write(block.name, arrays)
        read = model.read(block.name)
        assert {n: (a.tobytes(), a.shape, str(a.dtype)) for n, a in read.items()} == {
            n: (a.tobytes(), a.shape, str(a.dtype)) for n, a in arrays.items()
        }
        for name, array in arrays.items():
            assert np.array_equal(model.module.state_dict()[name].numpy(), array)


def test_a_buffer_the_module_replaces_is_read_as_it_is_now() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.mean = 0.5 * self.mean + 0.5 * x.mean(0).detach()
            return self.layer(x)

    model = model_of(Average)
    model.run(torch.full((4, 1), 8.0))
    assert model.read("own")["mean"].tolist() == [4.0]
    model.write("own", {"mean": np.array([1.0], np.float32)})
    assert model.module.state_dict()["mean"].tolist() == [1.0]


def test_inputs_may_be_one_tensor_a_tuple_or_a_dict() -> None:
    towers = model_of(TwoTowers)
    towers.module.eval()
    audio, image = torch.randn(3, 4), torch.randn(3, 4)
    by_place, by_name = towers.run((audio, image)), towers.run({"image": image, "audio": audio})
    assert torch.equal(by_place, by_name)
    assert torch.equal(by_place, towers.module(audio, image))
    tower = model_of(Tower)
    tower.module.eval()
    assert torch.equal(tower.run(audio), tower.module(audio))


# --- freezing ----------------------------------------------------------------------------------


def saved_shapes(model: BlockModel, inputs: Any) -> list[tuple[int, ...]]:
    shapes = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.run(inputs).square().mean().backward()
    return shapes


@pytest.mark.parametrize("opened", [("4",), ("2", "4"), ("0",), ("0", "2", "4"), ("2",)])
def test_only_open_blocks_get_gradients(opened: tuple[str, ...]) -> None:
    model = model_of(small_net)
    parameters = model.open_only(opened)
    model.run(torch.randn(5, 4)).square().mean().backward()
    with_gradient = {n for n, p in model.module.named_parameters() if p.grad is not None}
    assert with_gradient == {
        t.name for b in opened for t in model.spec.block(b).tensors if t.kind == "parameter"
    }
    assert {id(p) for p in parameters} == {
        id(p) for n, p in model.module.named_parameters() if n in with_gradient
    }


def test_autograd_keeps_nothing_below_the_lowest_open_block() -> None:
    build = lambda: nn.Sequential(*(nn.Linear(n, n + 1) for n in range(7, 12)))  # noqa: E731
    model = model_of(build)
    for lowest in range(5):
        model.open_only(model.spec.names[lowest:])
        widths = {shape[-1] for shape in saved_shapes(model, torch.randn(3, 7)) if len(shape) == 2}
        assert min(widths) == 7 + lowest


def test_a_chain_beside_the_open_blocks_is_kept_out_of_autograd() -> None:
    model = model_of(TwoTowers)
    model.open_only(["image.head", "head"])
    inputs = (torch.randn(3, 4), torch.randn(3, 4))
    saved = saved_shapes(model, inputs)
    model.open_only(model.spec.names)
    assert len(saved) < len(saved_shapes(model, inputs)) / 2
    assert all(p.grad is not None for p in model.module.parameters())


def test_statistics_of_a_frozen_batch_norm_stay_and_of_an_open_one_move() -> None:
    model = model_of(small_net)
    before = {n: a.copy() for n, a in model.read("2").items()}
    model.open_only(["4"])
    model.run(torch.randn(16, 4) + 3)
    assert all(np.array_equal(a, before[n]) for n, a in model.read("2").items())
    model.open_only(["2", "4"])
    model.run(torch.randn(16, 4) + 3)
    assert model.read("2")["2.num_batches_tracked"] == 1
    assert not np.array_equal(model.read("2")["2.running_mean"], before["2.running_mean"])


def test_dropout_goes_with_the_block_it_is_in() -> None:
    model = model_of(Tower)
    tower = model.module
    assert isinstance(tower, Tower)
    model.open_only(["layers.1", "head"])
    assert [layer.drop.training for layer in tower.layers] == [False, True]  # type: ignore[union-attr]
    model.open_only(["head"])
    x = torch.randn(3, 4)
    assert torch.equal(model.run(x), model.run(x))
    model.open_only(model.spec.names)
    assert all(module.training for module in tower.modules())


# --- which block is at work ----------------------------------------------------------------------


def test_blocks_are_announced_as_they_begin() -> None:
    model, seen = model_of(Tower), list[str]()
    handles = watch_modules(model, seen.append)
    model.run(torch.randn(3, 4))
    in_order = [name for place, name in enumerate(seen) if seen[place - 1 : place] != [name]]
    assert in_order == ["embed", "layers.0", "layers.1", "head"]
    for handle in handles:
        handle.remove()
    seen.clear()
    model.run(torch.randn(3, 4))
    assert seen == []


def test_a_module_of_several_blocks_announces_none() -> None:
    model, seen = model_of(TwoTowers), list[str]()
    watch_modules(model, seen.append)
    model.run((torch.randn(3, 4), torch.randn(3, 4)))
    first = list(dict.fromkeys(seen))
    assert first == [name for name in model.spec.names if name in first]
    assert set(first) == set(model.spec.names)

"""Cost tables of models of every manner, and of those that cannot be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edge_sdk.cost import Line
from edge_sdk.errors import TaskError
from edge_sdk.trace import cost_table
from tests.test_trace import (
    PAIR_FLOPS,
    Pair,
    X,
    flops,
    model_of,
    named,
    peak_bytes,
    peeks,
    plain,
    samples_of,
    step_flops,
    table_of,
)

# --- models of every manner ----------------------------------------------------------------------


def branches(pair: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = pair.a(x)
    return pair.b(hidden.relu() if x.mean() > 0 else hidden)


def selects(pair: Any, x: torch.Tensor) -> torch.Tensor:
    return pair.b(pair.a(x)[(x.sum(1) > -1e9).nonzero()[:, 0]])


TENSOR = torch.ones(6)


def holds_a_tensor(pair: Any, x: torch.Tensor) -> torch.Tensor:
    return pair.b(pair.a(x) * TENSOR)


def in_place(pair: Any, x: torch.Tensor) -> torch.Tensor:
    hidden = pair.a(x).relu_()
    hidden += 1
    return pair.b(hidden)


@pytest.mark.parametrize(
    "between", [plain, peeks, branches, selects, holds_a_tensor, in_place], ids=lambda f: f.__name__
)
def test_models_that_look_at_their_data_are_watched_on_data(between: Any) -> None:
    table = table_of(lambda: Pair(between))
    assert flops(table) == PAIR_FLOPS
    assert [segment.block for segment in table.segments] == ["a", "b"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_samples_are_enough(count: int) -> None:
    for between in (plain, peeks):
        assert flops(table_of(lambda b=between: Pair(b), X[:count])) == PAIR_FLOPS  # type: ignore[misc]


def test_a_loss_may_look_at_values() -> None:
    def scaled(output: torch.Tensor, _targets: Any) -> torch.Tensor:
        return output.square().mean() / max(1e-3, output.detach().abs().mean().item())

    assert flops(table_of(lambda: Pair(plain), loss=scaled)) == PAIR_FLOPS


@pytest.mark.parametrize("labels", [lambda z: torch.arange(len(z)), lambda z: torch.arange(
    len(z), device=z.device)])  # fmt: skip
def test_a_contrastive_loss_costs_what_all_pairs_cost(labels: Any) -> None:
    def contrast(output: torch.Tensor, _targets: Any) -> torch.Tensor:
        z = functional.normalize(output, dim=1)
        return functional.cross_entropy(z @ z.T / 0.1, labels(z))

    table = table_of(lambda: Pair(plain), loss=contrast)
    assert flops(table)["a"] == PAIR_FLOPS["a"]
    assert flops(table)["b"][0] > PAIR_FLOPS["b"][0]


def test_dropout_keeps_a_mask_when_it_is_trained() -> None:
    table = table_of(lambda: nn.Sequential(nn.Linear(4, 80), nn.Dropout(0.5), nn.Linear(80, 3)))
    first, last = named(table, "activation_bytes_per_sample").values()
    assert 80 <= first <= 3 * 4 * 80
    assert table.segments[0].rise_frozen == (Line(0, 4 * 80),)
    kinds = {work.kind for work in table.segments[0].work_forward}
    assert "random" in kinds
    assert "random" not in {work.kind for work in table.segments[0].work_frozen}
    assert last < first * 2


class Quiet(nn.Module):
    """A block in which there is nothing to train: a table, or whole numbers."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.table = nn.Module()
        if whole:
            self.table.rows = nn.Parameter(torch.ones(5, 4, dtype=torch.int64), requires_grad=False)
        else:
            self.table.register_buffer("rows", torch.ones(5, 4))
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x + self.table.rows.sum(0)).relu())


@pytest.mark.parametrize("whole", [False, True])
def test_a_block_with_nothing_to_train(whole: bool) -> None:
    table = table_of(lambda: Quiet(whole), blocks={"table": ["table"], "a": ["a"], "b": ["b"]})
    found = flops(table)
    assert found["table"] == (0, 0)
    assert {name: found[name] for name in "ab"} == PAIR_FLOPS
    assert step_flops(table, "a") == 2 * PAIR_FLOPS["a"][0] + 2 * PAIR_FLOPS["b"][0]


def test_a_backbone_that_is_never_trained() -> None:
    def frozen_below(pair: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            hidden = pair.a(x)
        return pair.b(hidden)

    table = table_of(lambda: Pair(frozen_below))
    assert flops(table) == {"a": (48, 0), "b": (36, 36)}
    assert peak_bytes(table, 8, "b") > 0


def test_a_block_that_is_not_used() -> None:
    table = table_of(lambda: Pair(lambda pair, x: pair.a(x)))
    assert flops(table) == {"a": (48, 48), "b": (0, 0)}
    first = table_of(lambda: Pair(lambda pair, x: pair.b(torch.cat([x, x[:, :2]], 1))))
    assert flops(first) == {"a": (0, 0), "b": (36, 36)}


def test_checkpointing_written_by_the_user() -> None:
    def again(pair: Any, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = checkpoint(lambda z: pair.a(z).relu(), x, use_reentrant=False)
        return pair.b(hidden)

    found = flops(table_of(lambda: Pair(again)))
    assert found["b"] == PAIR_FLOPS["b"]
    assert sum(found["a"]) == 3 * 48


def test_doubles_take_twice_the_memory() -> None:
    build = lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))  # noqa: E731
    single = table_of(build)
    double = table_of(lambda: _Doubled(build()))
    assert sum(named(double, "size_bytes").values()) == 2 * sum(
        named(single, "size_bytes").values()
    )
    assert (
        double.segments[-1].kept_trained.per_sample
        == 2 * single.segments[-1].kept_trained.per_sample
    )


class _Doubled(nn.Sequential):
    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__(*inner.double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.double())


# --- models that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("between", "loss", "message"),
    [
        (lambda p, x: p.a(p.b(x)), None, "the model or its loss fails on its own data: mat1 and "),
        (plain, lambda o, t: o.view(7, 7).sum(), "its loss fails on its own data: shape '"),
        (plain, lambda o, _: o.sum().item(), r"loss\(\) returned float, not a tensor"),
        (plain, lambda o, _: o.square().mean(1), r"of shape \(2,\) and torch.float32; return one"),
        (plain, lambda o, _: o.detach().sum(), "the loss does not depend on any parameter; in "),
        (
            lambda p, x: torch.stack([p.b(p.a(row)) for row in x]),
            None,
            "does other things with 4 samples than with 2",
        ),
    ],
)
def test_what_fails_is_explained(between: Any, loss: Any, message: str) -> None:
    how = {} if loss is None else {"loss": loss}
    model = model_of(lambda: Pair(between), **how)
    with pytest.raises(TaskError, match=message) as caught:
        cost_table(model, samples_of(X))
    assert str(caught.value).startswith("task 't': ")
    assert not any(module._forward_pre_hooks for module in model.module.modules())
    assert not any(parameter.is_meta for parameter in model.module.parameters())


def test_shared_tensors_are_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(TaskError, match=r"'0.weight' and '2.weight' are one and the same: untie"):
        table_of(lambda: nn.Sequential(layer, nn.ReLU(), layer))

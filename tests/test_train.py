"""Local training: optimisers equal to torch's to the bit, micro-batches, samples, light imports."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.errors import TaskError
from edge_sdk.model import BlockModel
from edge_sdk.task import Task
from edge_sdk.train import Diverged, Optimizer, Samples, costs, evaluate, train
from edge_sdk.wire import Training


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def model_of(**how: Any) -> BlockModel:
    torch.manual_seed(1)
    given = {"build_model": net, "loss": nn.functional.cross_entropy, **how}
    return BlockModel(Task(name="t", train_data=lambda part, parts: ([], []), **given))


def samples_of(count: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((count, 4)).astype(np.float32)
    return Samples((inputs, (inputs.sum(1) > 0).astype(np.int64)), "test")


def weights(model: BlockModel) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in model.module.state_dict().items()}


def changed(model: BlockModel, before: dict[str, bytes]) -> set[str]:
    return {name for name, content in weights(model).items() if content != before[name]}


# --- optimisers --------------------------------------------------------------------------------


def torch_optimizer(parameters: list[nn.Parameter], how: Training) -> torch.optim.Optimizer:
    if how.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, how.learning_rate, how.momentum, weight_decay=how.weight_decay
        )
    kind = torch.optim.Adam if how.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, how.learning_rate, weight_decay=how.weight_decay)


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize(
    ("optimizer", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)]
)
def test_optimisers_equal_those_of_torch_to_the_bit(
    optimizer: Any, momentum: float, weight_decay: float
) -> None:
    how = Training(
        optimizer=optimizer, momentum=momentum, weight_decay=weight_decay, learning_rate=0.037
    )
    ours, theirs = model_of().module, model_of().module
    mine = Optimizer(list(ours.parameters()), how)
    reference = torch_optimizer(list(theirs.parameters()), how)
    inputs, targets = samples_of(16).take(torch.arange(16))
    for _ in range(5):
        for module in (ours, theirs):
            nn.functional.cross_entropy(module(inputs), targets).backward()
        mine.step()
        reference.step()
        reference.zero_grad()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), name
            assert a.grad is None


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Optimizer([unused, used], Training(optimizer="adamw", weight_decay=0.5))
    used.square().sum().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(2))
    assert not torch.equal(used, torch.ones(2))


# --- training ----------------------------------------------------------------------------------


def test_training_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    results = []
    for seed in (5, 5, 6):
        model = model_of(build_model=lambda: nn.Sequential(net(), nn.Dropout(0.3), nn.Linear(3, 3)))
        how = Training(batch_size=8, local_epochs=2)
        loss, steps = train(
            model, samples_of(20), model.spec.names, how, micro_batch=4, order_seed=seed
        )
        assert steps == 2 * 3
        results.append((loss, weights(model)))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_training_learns_and_the_loss_is_the_last_epochs_mean() -> None:
    model, samples = model_of(), samples_of(64)
    before, _ = evaluate(model, samples)
    how = Training(batch_size=16, local_epochs=20, learning_rate=0.1)
    loss, _ = train(model, samples, model.spec.names, how, micro_batch=16, order_seed=0)
    after, accuracy = evaluate(model, samples)
    assert after < loss < before / 2
    assert accuracy > 0.9


@pytest.mark.parametrize("blocks", [("2",), ("0",), ("0", "2")])
def test_only_the_planned_blocks_change(blocks: tuple[str, ...]) -> None:
    model = model_of()
    before = weights(model)
    train(model, samples_of(20), blocks, Training(batch_size=8), micro_batch=8, order_seed=1)
    expected = {t.name for name in blocks for t in model.spec.block(name).tensors}
    assert changed(model, before) == expected


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 100])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch: int) -> None:
    results = []
    for size in (8, micro_batch):
        model = model_of()
        how = Training(batch_size=8, momentum=0.0, learning_rate=0.5)
        loss, steps = train(
            model, samples_of(20), model.spec.names, how, micro_batch=size, order_seed=3
        )
        results.append((loss, steps, [p.detach().clone() for p in model.module.parameters()]))
    (loss, steps, whole), (micro_loss, micro_steps, parts) = results
    assert micro_steps == steps == 3
    assert micro_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_every_sample_is_seen_once_an_epoch() -> None:
    seen: list[float] = []

    class Watcher(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.extend(x[:, 0].tolist())
            return super().forward(x)

    model = model_of(build_model=lambda: Watcher(1, 2))
    samples = Samples((np.arange(23, dtype=np.float32)[:, None], np.zeros(23, np.int64)), "test")
    how = Training(batch_size=5, local_epochs=2, learning_rate=1e-6)
    train(model, samples, model.spec.names, how, micro_batch=2, order_seed=0)
    assert sorted(seen[:23]) == sorted(seen[23:]) == list(range(23))
    assert seen[:23] != seen[23:]


def test_training_pauses_before_every_step_and_may_be_stopped() -> None:
    model = model_of()
    calls = []

    def pause() -> None:
        calls.append(weights(model))
        if len(calls) == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(
            model,
            samples_of(40),
            model.spec.names,
            Training(batch_size=8),
            micro_batch=8,
            order_seed=0,
            pause=pause,
        )
    assert len({tuple(sorted(state.items())) for state in calls}) == 3
    assert weights(model) == calls[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training(value: float) -> None:
    model = model_of(loss=lambda output, targets: output.sum() * 0 + value)
    with pytest.raises(Diverged) as caught:
        train(model, samples_of(8), model.spec.names, Training(), micro_batch=8, order_seed=0)
    assert f"the loss is {value} at step 0; nothing is sent. Lower the learning" in str(
        caught.value
    )


def test_a_learning_rate_that_is_far_too_large_is_noticed() -> None:
    model = model_of(loss=lambda output, targets: output.square().mean().exp())
    how = Training(learning_rate=1000.0, batch_size=4, local_epochs=5)
    with pytest.raises(Diverged, match=r"at step [1-9]"):
        train(model, samples_of(20), model.spec.names, how, micro_batch=4, order_seed=0)


# --- evaluation --------------------------------------------------------------------------------


def test_evaluation_is_the_mean_over_all_samples_and_changes_nothing() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))

    model, samples = model_of(build_model=build), samples_of(50)
    before = weights(model)
    model.module.eval()
    with torch.no_grad():
        output = model.run(samples.inputs)
    loss = float(nn.functional.cross_entropy(output, samples.targets))
    right = float((output.argmax(1) == samples.targets).float().mean())
    model.module.train()
    for batch_size in (7, 50, 256):
        assert evaluate(model, samples, batch_size) == pytest.approx((loss, right), rel=1e-5)
    assert weights(model) == before


def test_targets_that_are_no_labels_have_no_accuracy() -> None:
    model = model_of(build_model=lambda: nn.Linear(4, 4), loss=nn.functional.mse_loss)
    inputs = np.zeros((6, 4), np.float32)
    loss, accuracy = evaluate(model, Samples((inputs, inputs), "test"))
    assert loss > 0
    assert math.isnan(accuracy)


# --- samples -----------------------------------------------------------------------------------


def test_numbers_become_float32_and_int64() -> None:
    samples = Samples(
        (
            {"a": np.zeros((3, 2)), "b": np.zeros(3, np.uint8), "c": torch.zeros(3).half()},
            (np.array([True, False, True]), [1, 2, 3]),
        ),
        "test",
    )
    assert {name: t.dtype for name, t in samples.inputs.items()} == {
        "a": torch.float32,
        "b": torch.int64,
        "c": torch.float32,
    }
    assert [t.dtype for t in samples.targets] == [torch.bool, torch.int64]
    inputs, targets = samples.take(torch.tensor([2, 0]))
    assert {len(t) for t in inputs.values()} == {2}
    assert targets[1].tolist() == [3, 1]


def test_the_first_samples_are_repeated_when_there_are_fewer() -> None:
    samples = Samples((np.arange(3), np.arange(3)), "test")
    assert samples.first(2)[0].tolist() == [0, 1]
    assert samples.first(5)[0].tolist() == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((np.zeros((0, 4)), np.zeros(0)), "data: there are no samples"),
        (
            (np.zeros((3, 4)), np.zeros(4)),
            r"data: inputs and targets have different numbers of sam",
        ),
        (((np.zeros(3), np.zeros(4)), np.zeros(3)), "different numbers of samples: {3, 4}"),
        (({"a": np.zeros(3), "b": np.zeros(2)}, np.zeros(3)), "different numbers of samples"),
        (np.zeros((2, 4)), r"data must return \(inputs, targets\), got ndarray"),
        ((1, 2, 3), r"data must return \(inputs, targets\), got tuple"),
        ((5, np.zeros(3)), "data: no arrays with samples along the first axis"),
        ((np.array(["a", "b"]), np.zeros(2)), "data: no arrays with samples along the first axis"),
        (([[1, 2], [3]], np.zeros(2)), "data: no arrays with samples along the first axis"),
    ],
)
def test_data_that_cannot_be_samples_is_refused(data: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Samples(data, "data")


def test_costs_are_those_of_the_first_samples() -> None:
    table = costs(model_of(), samples_of(1))
    assert [b.flops_forward_per_sample for b in table.blocks] == [2 * 4 * 8, 2 * 8 * 3]
    assert table.task == "t"


# --- what training loads -----------------------------------------------------------------------

TRAINS = """
import sys
import torch
from torch import nn
from edge_sdk.model import BlockModel
from edge_sdk.task import Task
from edge_sdk.train import Samples, costs, evaluate, train, warm_up
from edge_sdk.wire import Training

warm_up()
task = Task(name="t", build_model=lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)),
            loss=nn.functional.cross_entropy, train_data=lambda part, parts: None)
model, data = BlockModel(task), Samples((torch.randn(8, 4), torch.zeros(8).long()), "t")
costs(model, data)
for optimizer in ("sgd", "adam", "adamw"):
    train(model, data, model.spec.names, Training(optimizer=optimizer), micro_batch=4, order_seed=1)
evaluate(model, data)
print(sorted({"torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes", "onnxruntime"}
             & set(sys.modules)))
"""


def test_training_loads_no_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINS], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"

"""Local training: what changes and what does not, bad losses, evaluation, samples, imports."""

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
from edge_sdk.plan import Plan
from edge_sdk.task import Task
from edge_sdk.trace import cost_table
from edge_sdk.train import (
    Diverged,
    Samples,
    TrainResult,
    evaluate,
    train,
)
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


def plan_of(blocks: tuple[str, ...], batch_size: int = 8, **how: Any) -> Plan:
    given = {"micro_batch": batch_size, **how}
    return Plan(
        blocks=blocks,
        batch_size=batch_size,
        codec="balanced",
        peak_bytes=0,
        budget_bytes=0,
        train_s=0.0,
        round_s=0.0,
        upload_bytes=0,
        flops=0,
        **given,
    )


def carry_out(
    model: BlockModel, samples: Samples, how: Training, seed: int = 0, **plan: Any
) -> TrainResult:
    """Train with a plan of all blocks and the training's batch size, unless told otherwise."""
    blocks = plan.pop("blocks", model.spec.names)
    prefix, pause = plan.pop("prefix", None), plan.pop("pause", lambda: None)
    made = plan_of(blocks, how.batch_size, **plan)
    return train(model, samples, made, how, order_seed=seed, prefix=prefix, pause=pause)


def weights(model: BlockModel) -> dict[str, bytes]:
    return {n: t.numpy().tobytes() for n, t in model.module.state_dict().items()}


def changed(model: BlockModel, before: dict[str, bytes]) -> set[str]:
    return {name for name, content in weights(model).items() if content != before[name]}


# --- training ----------------------------------------------------------------------------------


def test_training_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    results = []
    for seed in (5, 5, 6):
        model = model_of(build_model=lambda: nn.Sequential(net(), nn.Dropout(0.3), nn.Linear(3, 3)))
        how = Training(batch_size=8, local_epochs=2)
        done = carry_out(model, samples_of(20), how, seed, micro_batch=4)
        assert (done.steps, done.num_examples) == (2 * 3, 20)
        results.append((done.loss, weights(model)))
    assert results[0] == results[1]
    assert results[0] != results[2]


def test_training_learns_and_the_loss_is_the_last_epochs_mean() -> None:
    model, samples = model_of(), samples_of(64)
    before, _ = evaluate(model, samples)
    how = Training(batch_size=16, local_epochs=20, learning_rate=0.1)
    loss = carry_out(model, samples, how).loss
    after, accuracy = evaluate(model, samples)
    assert after < loss < before / 2
    assert accuracy > 0.9


@pytest.mark.parametrize("blocks", [("2",), ("0",), ("0", "2")])
def test_only_the_planned_blocks_change(blocks: tuple[str, ...]) -> None:
    model = model_of()
    before = weights(model)
    carry_out(model, samples_of(20), Training(batch_size=8), blocks=blocks)
    expected = {t.name for name in blocks for t in model.spec.block(name).tensors}
    assert changed(model, before) == expected


@pytest.mark.parametrize("micro_batch", [1, 3, 4, 7, 100])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch: int) -> None:
    results = []
    for size in (8, micro_batch):
        model = model_of()
        how = Training(batch_size=8, momentum=0.0, learning_rate=0.5)
        done = carry_out(model, samples_of(20), how, micro_batch=size)
        results.append(
            (done.loss, done.steps, [p.detach().clone() for p in model.module.parameters()])
        )
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
    carry_out(model, samples, how, micro_batch=2)
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
        carry_out(model, samples_of(40), Training(batch_size=8), pause=pause)
    assert len({tuple(sorted(state.items())) for state in calls}) == 3
    assert weights(model) == calls[-1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training(value: float) -> None:
    model = model_of(loss=lambda output, targets: output.sum() * 0 + value)
    with pytest.raises(Diverged) as caught:
        carry_out(model, samples_of(8), Training())
    assert f"the loss is {value} at step 0; nothing is sent. Lower the learning" in str(
        caught.value
    )


def test_a_learning_rate_that_is_far_too_large_is_noticed() -> None:
    model = model_of(loss=lambda output, targets: output.square().mean().exp())
    how = Training(learning_rate=1000.0, batch_size=4, local_epochs=5)
    with pytest.raises(Diverged, match=r"at step [1-9]"):
        carry_out(model, samples_of(20), how)


# --- losses and models that cannot be trained --------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda o, t: o.square(),
            "loss() returned a tensor of shape (8, 3) and torch.float32; retu",
        ),
        (
            lambda o, t: o.argmax(),
            "loss() returned a tensor of shape () and torch.int64; return one",
        ),
        (lambda o, t: 0.5, "loss() returned float, not a tensor"),
        (
            lambda o, t: o.detach().sum(),
            "the loss does not depend on the trained blocks ['0', '2'];",
        ),
    ],
)
@pytest.mark.parametrize("early", [False, True])
def test_a_loss_that_cannot_be_trained_is_refused(loss: Any, message: str, early: bool) -> None:
    model = model_of(loss=loss)
    before = weights(model)
    with pytest.raises(TaskError) as caught:
        carry_out(model, samples_of(8), Training(batch_size=8), step_in_backward=early)
    assert f"task 't': {message}" in str(caught.value)
    assert weights(model) == before


def test_a_loss_of_one_element_is_a_number() -> None:
    model = model_of(loss=lambda output, _: output.square().mean().reshape(1))
    assert carry_out(model, samples_of(8), Training(batch_size=8)).steps == 1


def test_a_loss_that_passes_the_trained_blocks_by_is_refused() -> None:
    model = model_of(loss=lambda output, _: output.mean())
    model.module[0].forward = lambda x: torch.zeros(len(x), 8)
    with pytest.raises(TaskError, match="the loss does not depend on the trained blocks"):
        carry_out(model, samples_of(8), Training(batch_size=8), blocks=("0",))


@pytest.mark.parametrize("early", [False, True])
def test_weights_that_are_no_numbers_are_not_sent(early: bool) -> None:
    def loss(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return (output * 0).sum().sqrt()  # zero, with a gradient that is not a number

    model = model_of(loss=loss)
    with pytest.raises(
        Diverged, match=r"tensor '0.weight' is not finite after training; nothing is"
    ):
        carry_out(model, samples_of(8), Training(batch_size=8), step_in_backward=early)


def test_blocks_without_parameters_are_refused() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3))

    model = model_of(build_model=build)
    with pytest.raises(
        TaskError, match=r"blocks \['0'\] have no parameter that can be trained; put"
    ):
        carry_out(model, samples_of(8), Training(batch_size=8), blocks=("0",))
    assert carry_out(model, samples_of(8), Training(batch_size=8)).steps == 1


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
    table = cost_table(model_of(), samples_of(1))
    assert [b.flops_forward_per_sample for b in table.blocks] == [2 * 4 * 8, 2 * 8 * 3]
    assert table.task == "t"


# --- what training loads -----------------------------------------------------------------------

TRAINS = """
import sys
import torch
from torch import nn
from edge_sdk.model import BlockModel
from edge_sdk.plan import Plan
from edge_sdk.task import Task
from edge_sdk.trace import cost_table
from edge_sdk.trace import cost_table_apart
from edge_sdk.train import Samples, evaluate, train, warm_up
from edge_sdk.wire import Training

warm_up()
layer = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Tanh())
task = Task(name="t", build_model=lambda: nn.Sequential(layer, nn.BatchNorm1d(4), nn.Linear(4, 2)),
            loss=nn.functional.cross_entropy, train_data=lambda part, parts: None,
            augment=lambda inputs, generator: inputs + torch.rand(1, generator=generator))
model, data = BlockModel(task), Samples((torch.randn(8, 4), torch.zeros(8).long()), "t")
cost_table_apart(model, data)
for optimizer in ("sgd", "adam", "adamw"):
    for micro_batch, levers in ((4, False), (8, True)):
        plan = Plan(blocks=model.spec.names, batch_size=8, micro_batch=micro_batch,
                    codec="balanced", checkpoint=levers, step_in_backward=levers,
                    peak_bytes=0, budget_bytes=0, train_s=0, round_s=0, upload_bytes=0, flops=0)
        train(model, data, plan, Training(optimizer=optimizer), order_seed=1)
evaluate(model, data)
print(sorted({"torch._dynamo", "sympy", "torch.fx.experimental.symbolic_shapes", "onnxruntime"}
             & set(sys.modules)))
"""


def test_training_loads_no_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINS], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"

"""Training as a plan says: steps, levers, prefix, augmented views, batch statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.errors import ProtocolMisuse, TaskError
from edge_sdk.model import BlockModel
from edge_sdk.trace import cost_table
from edge_sdk.train import Samples, batch_statistics, view_of
from edge_sdk.wire import Training
from tests.test_train import carry_out, model_of, net, samples_of, weights

# --- what a plan says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, (1, 8)), (2, (2, 16)), (3, (3, 20)), (5, (5, 20)), (99, (6, 20))]
)
def test_a_plan_may_end_after_some_steps(steps: int, expected: tuple[int, int]) -> None:
    model, how = model_of(), Training(batch_size=8, local_epochs=2)
    done = carry_out(model, samples_of(20), how, steps=steps)
    assert (done.steps, done.num_examples) == expected
    again, calls = model_of(), []

    def pause() -> None:
        calls.append(weights(again))
        if len(calls) > steps:
            raise InterruptedError

    if steps < 6:
        with pytest.raises(InterruptedError):
            carry_out(again, samples_of(20), how, pause=pause)
        assert weights(model) == calls[-1]


def test_the_loss_is_the_mean_of_the_steps_of_the_last_epoch() -> None:
    how = Training(batch_size=8, local_epochs=2, learning_rate=1e-9)
    losses: list[tuple[float, int]] = []

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = nn.functional.cross_entropy(output, targets)
        losses.append((float(value.detach()), len(targets)))
        return value

    for steps, counted in ((2, [0, 1]), (4, [3]), (5, [3, 4]), (6, [3, 4, 5])):
        losses.clear()
        done = carry_out(model_of(loss=loss), samples_of(20), how, steps=steps)
        chosen = [losses[n] for n in counted]
        weighted = sum(value * size for value, size in chosen) / sum(size for _, size in chosen)
        assert done.loss == pytest.approx(weighted)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("blocks", [("0", "2"), ("2",), ("0",)])
def test_stepping_in_backward_changes_nothing(optimizer: Any, blocks: tuple[str, ...]) -> None:
    how = Training(optimizer=optimizer, weight_decay=0.01, batch_size=8, local_epochs=3)
    results = []
    for early in (False, True):
        model = model_of()
        done = carry_out(model, samples_of(20), how, blocks=blocks, step_in_backward=early)
        results.append((done, weights(model)))
        assert all(not p._post_accumulate_grad_hooks for p in model.module.parameters() if early)
    assert results[0] == results[1]


def test_stepping_in_backward_drops_each_gradient_at_once() -> None:
    alive = []

    class Last(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.register_hook(lambda _: alive.append([p.grad is not None for p in self.parameters()]))
            return super().forward(x)

    for early in (False, True):
        alive.clear()
        model = model_of(build_model=lambda: nn.Sequential(nn.Linear(4, 8), Last(8, 3), Last(3, 3)))
        carry_out(model, samples_of(8), Training(batch_size=8), step_in_backward=early)
        assert alive[1:] == [[not early] * 2]


def test_a_step_in_backward_of_micro_batches_is_our_own_fault() -> None:
    with pytest.raises(ProtocolMisuse, match="micro-batches of 4 of a batch of 8: a gradient is"):
        carry_out(
            model_of(), samples_of(8), Training(batch_size=8), micro_batch=4, step_in_backward=True
        )


@pytest.mark.parametrize("sizes", [{"micro_batch": 0}, {"steps": 0}, {"steps": -1}])
def test_a_plan_of_nothing_is_our_own_fault(sizes: dict[str, int]) -> None:
    with pytest.raises(ProtocolMisuse, match="each must be at least 1"):
        carry_out(model_of(), samples_of(8), Training(batch_size=8), **sizes)


def test_a_prefix_takes_the_place_of_the_frozen_blocks() -> None:
    class Remembered:
        """The first layer's output, computed once."""

        def __init__(self, model: BlockModel, samples: Samples) -> None:
            net = model.module
            with torch.no_grad():
                self.kept = net[1](net[0](samples.inputs))
            self.head, self.calls = net[2], []

        def output(self, index: torch.Tensor, view: int) -> Any:
            self.calls.append((index.tolist(), view))
            return self.head(self.kept[index])

    how, samples = Training(batch_size=8, local_epochs=2), samples_of(20)
    plain, cached = model_of(), model_of()
    prefix = Remembered(cached, samples)
    expected = carry_out(plain, samples, how, blocks=("2",), micro_batch=4)
    done = carry_out(cached, samples, how, blocks=("2",), micro_batch=4, prefix=prefix)
    # A layer's sums over 20 samples at once may be rounded otherwise than over 4.
    assert done.loss == pytest.approx(expected.loss, rel=1e-5)
    assert (done.steps, done.num_examples) == (expected.steps, expected.num_examples)
    for block in plain.spec.names:
        for name, array in plain.read(block).items():
            np.testing.assert_allclose(cached.read(block)[name], array, rtol=1e-4, atol=1e-6)
    assert [len(index) for index, _ in prefix.calls] == [4] * 10
    assert {view for _, view in prefix.calls} == {0}


def test_what_was_given_up_does_not_count_in_the_next_round() -> None:
    failing = [True]

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if failing[0] and 19 in targets:
            raise MemoryError
        return output.square().mean()

    samples = Samples((torch.randn(20, 4), torch.arange(20)), "test")
    model, how = model_of(loss=loss), Training(batch_size=20, learning_rate=1e-3)
    before = weights(model)
    with pytest.raises(MemoryError):
        carry_out(model, samples, how, micro_batch=1)
    assert weights(model) == before
    failing[0] = False
    fresh = model_of(loss=loss)
    assert carry_out(model, samples, how) == carry_out(fresh, samples, how)
    assert weights(model) == weights(fresh)


# --- augmentation ------------------------------------------------------------------------------


def noisy(inputs: Any, generator: torch.Generator) -> Any:
    assert len(inputs) == 1
    return inputs + torch.rand(inputs.shape, generator=generator)


def test_a_view_of_a_sample_is_always_the_same() -> None:
    samples, task = samples_of(300), model_of(augment=noisy, augment_views=3).task
    views = [view_of(task, samples, torch.arange(300), view) for view in range(3)]
    index = torch.tensor([250, 3, 3, 0])
    for view, whole in enumerate(views):
        torch.manual_seed(view)
        assert torch.equal(view_of(task, samples, index, view), whole[index])
    noise = torch.cat([view - samples.inputs for view in views])
    assert len({tuple(row) for row in noise.round(decimals=4).tolist()}) == 900
    assert noise.mean() == pytest.approx(0.5, abs=0.05)


def test_without_augmentation_every_view_is_the_sample() -> None:
    samples, index = samples_of(5), torch.tensor([4, 2])
    assert torch.equal(view_of(model_of().task, samples, index, 7), samples.inputs[index])


def test_epochs_go_through_the_views_in_turn() -> None:
    class Watcher:
        def __init__(self, model: BlockModel) -> None:
            self.model, self.views = model, []

        def output(self, index: torch.Tensor, view: int) -> Any:
            self.views.append(view)
            return self.model.run(torch.zeros(len(index), 4))

    for seed, expected in ((3, [0, 1, 2, 0]), (4, [1, 2, 0, 1])):
        model = model_of(augment=noisy, augment_views=3)
        prefix, how = Watcher(model), Training(batch_size=8, local_epochs=4)
        carry_out(model, samples_of(8), how, seed, prefix=prefix)
        assert prefix.views == expected


def test_training_sees_the_views() -> None:
    seen = []

    class Watcher(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x.clone())
            return super().forward(x)

    model = model_of(build_model=lambda: Watcher(4, 3), augment=noisy, augment_views=2)
    samples, how = samples_of(6), Training(batch_size=6, local_epochs=3)
    carry_out(model, samples, how, micro_batch=3)
    epochs = [torch.cat(seen[start : start + 2]).sort(0).values for start in (0, 2, 4)]
    assert torch.equal(epochs[0], epochs[2])
    for epoch, view in ((0, 0), (1, 1)):
        every = view_of(model.task, samples, torch.arange(6), view)
        assert torch.equal(epochs[epoch], every.sort(0).values)


def test_inputs_of_any_structure_are_augmented() -> None:
    def change(inputs: Any, generator: torch.Generator) -> Any:
        factor = float(torch.rand((), generator=generator))
        return {"a": inputs["a"] * factor, "b": (inputs["b"][0].numpy(),)}

    inputs = {"a": np.ones((4, 2)), "b": (np.arange(4),)}
    samples, task = Samples((inputs, np.zeros(4)), "t"), model_of(augment=change).task
    seen = view_of(task, samples, torch.tensor([2, 3]), 0)
    assert seen["a"].shape == (2, 2)
    assert len(set(seen["a"][:, 0].tolist())) == 2
    assert seen["b"][0].tolist() == [2, 3]


def test_costs_are_those_of_the_augmented_inputs() -> None:
    class Widest(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).mean(1)

    inputs = torch.zeros(4, 10, 4)
    data = Samples((inputs, torch.zeros(4, dtype=torch.long)), "t")
    build = {"build_model": lambda: nn.Sequential(Widest(4, 3), nn.Linear(3, 3))}
    whole = cost_table(model_of(**build), data)
    cropped = cost_table(model_of(augment=lambda x, _: x[:, :5], **build), data)
    assert [t.blocks[0].flops_forward_per_sample for t in (whole, cropped)] == [240, 120]


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        (lambda x, g: 1 / 0, "augment() failed on sample 3: ZeroDivisionError: division by zero"),
        (lambda x, g: x[0], "augment() must return, for every sample, inputs of one structure and"),
        (lambda x, g: x[:, : int(x[0, 0] > 0) + 1], "augment() must return, for every sample"),
        (lambda x, g: (x, x) if x[0, 0] > 0 else x, "augment() must return, for every sample"),
        (lambda x, g: {"a": x} if x[0, 0] > 0 else {}, "augment() must return, for every sample"),
        (lambda x, g: "big", "augment() failed on sample 3: TypeError: "),
    ],
)
def test_an_augmentation_that_fails_is_explained(augment: Any, message: str) -> None:
    samples = Samples((np.eye(4, dtype=np.float32) - 0.5, np.zeros(4)), "test")
    with pytest.raises(TaskError) as caught:
        view_of(model_of(augment=augment).task, samples, torch.tensor([3, 0]), 0)
    assert f"task 't': {message}" in str(caught.value)


# --- batch statistics --------------------------------------------------------------------------


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


class Wrapped(nn.Module):
    """A block with a normalisation that has no tensors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.out(x))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (normed, {"1": "1"}),
        (net, {}),
        (lambda: nn.Sequential(Wrapped(), nn.Linear(4, 3)), {"0": "0.norm"}),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3)), {}),
    ],
)
def test_blocks_with_batch_statistics(build: Any, expected: dict[str, str]) -> None:
    assert batch_statistics(model_of(build_model=build)) == expected


@pytest.mark.parametrize(
    ("count", "batch_size", "micro_batch", "message"),
    [
        (8, 1, 1, "the batch size is 1"),
        (8, 8, 1, "the micro-batch is 1"),
        (1, 8, 8, "the number of samples is 1"),
    ],
)
def test_one_sample_has_no_statistics(
    count: int, batch_size: int, micro_batch: int, message: str
) -> None:
    model, how = model_of(build_model=normed), Training(batch_size=batch_size)
    with pytest.raises(TaskError) as caught:
        carry_out(model, samples_of(count), how, micro_batch=micro_batch)
    assert str(caught.value) == (
        "task 't': block '1' cannot be trained: '1' takes its statistics over a batch and needs 2 "
        f"samples, {message}. Raise it, normalise with GroupNorm or LayerNorm, or leave the block "
        "frozen."
    )
    frozen = carry_out(model, samples_of(count), how, micro_batch=micro_batch, blocks=("3",))
    assert frozen.num_examples == count


@pytest.mark.parametrize(
    ("count", "batch_size", "micro_batch", "sizes"),
    [
        (9, 4, 4, [4, 3, 2]),
        (9, 8, 8, [7, 2]),
        (9, 8, 3, [3, 4 - 2, 2, 2]),
        (5, 2, 2, [2, 3]),
        (7, 7, 2, [2, 2, 3]),
        (7, 7, 3, [3, 2, 2]),
        (8, 4, 4, [4, 4]),
    ],
)
def test_a_sample_left_over_is_not_alone(
    count: int, batch_size: int, micro_batch: int, sizes: list[int]
) -> None:
    seen: list[int] = []

    class Watcher(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    build = lambda: nn.Sequential(nn.Linear(4, 6), Watcher(6), nn.Linear(6, 3))  # noqa: E731
    how = Training(batch_size=batch_size)
    done = carry_out(model_of(build_model=build), samples_of(count), how, micro_batch=micro_batch)
    assert seen == sizes
    assert done.num_examples == count
    seen.clear()
    carry_out(
        model_of(build_model=build),
        samples_of(count),
        how,
        micro_batch=micro_batch,
        blocks=("0", "2"),
    )
    assert sum(seen) == count

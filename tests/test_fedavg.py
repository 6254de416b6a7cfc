"""Full training of everybody is FedAvg: published versions against a few lines of plain torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from edge_sdk.task import Task, load_task
from edge_sdk.trainer import seed_of
from reference_server.demo import shipped_task
from tests.simulation import Running, command

BOARDS = (
    "raspberry-pi-5-8gb",
    "raspberry-pi-5-4gb",
    "jetson-orin-nano-8gb",
    "raspberry-pi-5-16gb",
)
SEED, ROUNDS = 11, 2
# Every device's change is rounded to this grid, by half a step at most, and so is off the mean of
# all; the new weight is rounded to float32 once, by half an ulp. The bound is twice that.
GRID = 2.0**-30

Weights = dict[str, torch.Tensor]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Devices train on one thread; another number of threads would round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def version(server: Path, number: int) -> Weights:
    """A published version, from its manifest and the block files it names."""
    manifest = json.loads((server / "versions" / f"{number}.json").read_text())
    weights: Weights = {}
    for block in manifest["blocks"]:
        weights |= safetensors.torch.load_file(server / "blocks" / f"{block['sha256']}.safetensors")
    return weights


def fedavg(task: Task, base: Weights, number: int) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """Plain FedAvg of one round in float64, and the number of samples it averages over."""
    how, total, mean = task.training, 0, {name: np.zeros(t.shape) for name, t in base.items()}
    for part in range(len(BOARDS)):
        inputs, targets = map(torch.from_numpy, task.train_data(part, len(BOARDS)))
        model = task.build_model()
        model.load_state_dict(base)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay
        )
        generator = torch.Generator().manual_seed(seed_of(SEED, number, part))
        for _ in range(how.local_epochs):
            order = torch.randperm(len(targets), generator=generator)
            for batch in torch.split(order, how.batch_size):
                optimizer.zero_grad()
                task.loss(model(inputs[batch]), targets[batch]).backward()
                optimizer.step()
        for name, tensor in model.state_dict().items():
            mean[name] += len(targets) * tensor.double().numpy()
        total += len(targets)
    return {name: tensor / total for name, tensor in mean.items()}, total


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("one_thread")
def test_full_training_of_everybody_is_fedavg(tmp_path: Path) -> None:
    run = command(
        "reference_server", "demo", "--strategy", "full", "--codec", "lossless", "--rounds", ROUNDS,
        "--seed", SEED, "--devices", ",".join(BOARDS), "--state", tmp_path / "s",
        "--json", tmp_path / "report.json",
    )  # fmt: skip
    with Running(run, tmp_path / "screen.txt") as demo:
        assert demo.finish(240) == 0, demo.log.read_text()
    report = json.loads((tmp_path / "report.json").read_text())
    everything = [block["name"] for block in report["model"]["blocks"]]
    task, moved = load_task(shipped_task()), 0.0
    for number in range(1, ROUNDS + 1):
        devices = report["rounds"][number - 1]["devices"]
        assert [(row["blocks"], row["verdict"]) for row in devices] == [
            (everything, "accepted") for _ in BOARDS
        ]
        base = version(tmp_path / "s" / "server", number - 1)
        published = version(tmp_path / "s" / "server", number)
        expected, samples = fedavg(task, base, number)
        assert samples == sum(row["num_examples"] for row in devices)
        for name, tensor in published.items():
            bound = GRID + np.spacing(np.abs(tensor.numpy()))
            off = np.abs(tensor.double().numpy() - expected[name])
            assert (off <= bound).all(), f"round {number}, {name}: off by {off.max()}"
            moved = max(moved, float((tensor - base[name]).abs().max()))
    assert moved > 1000 * GRID

"""The task of the device benchmark: an MLP 64-512-512-10 on the digits, one epoch a round."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk import Task, Training


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def digits() -> tuple[np.ndarray, np.ndarray]:
    home = Path(find_spec("sklearn").origin).parent
    table = np.loadtxt(home / "datasets/data/digits.csv.gz", delimiter=",", dtype="float32")
    return table[:, :64] / 16, table[:, 64].astype("int64")


def train_data(part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = digits()
    cut = int(len(inputs) * 0.8)
    return inputs[:cut][part::parts], labels[:cut][part::parts]


def test_data() -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = digits()
    cut = int(len(inputs) * 0.8)
    return inputs[cut:], labels[cut:]


def task() -> Task:
    return Task(
        name="digits-mlp",
        build_model=build_model,
        loss=nn.functional.cross_entropy,
        train_data=train_data,
        test_data=test_data,
        training=Training(learning_rate=0.05, momentum=0.9, batch_size=32),
    )

"""The task of the memory benchmark: a network of random kind and size, drawn from SEED below."""

import random

import numpy as np
import torch
from torch import nn

from edge_sdk import Task, Training

SEED = 0
# The second device has few: it only keeps rounds going.
SAMPLES = (384, 64)
SIDE, WORDS, WIDTH = 24, 24, 32


class Encoder(nn.Module):
    """A transformer over short sequences, and a head on the mean of its output."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Linear(WIDTH, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Of shape (batch, 10)."""
        words = self.embed(words)
        for layer in self.layers:
            words = layer(words)
        scores: torch.Tensor = self.head(words.mean(1))
        return scores


def drawn() -> tuple[str, nn.Module, tuple[int, ...]]:
    """Kind, network and shape of one sample."""
    rng = random.Random(SEED)
    torch.manual_seed(SEED)
    kind = rng.choice(["mlp", "cnn", "transformer"])
    depth = rng.randint(2, 5)
    if kind == "mlp":
        width = rng.choice([128, 256, 512, 768])
        layers: list[nn.Module] = [nn.Linear(256, width), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.ReLU()]
        return kind, nn.Sequential(*layers, nn.Linear(width, 10)), (256,)
    if kind == "cnn":
        width = rng.choice([8, 16, 32])
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 1):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, 10)]
        return kind, nn.Sequential(*layers), (3, SIDE, SIDE)
    return kind, Encoder(rng.choice([64, 128, 192]), depth), (WORDS, WIDTH)


def data(part: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([SEED, part])
    labels = rng.integers(0, 10, count)
    shape = drawn()[2]
    inputs = rng.standard_normal((count, *shape)).astype("float32")
    inputs.reshape(count, -1)[:, :10] += 3 * np.eye(10, dtype="float32")[labels]
    return inputs, labels


def task() -> Task:
    how = random.Random(SEED + 1)
    return Task(
        name="random-model",
        build_model=lambda: drawn()[1],
        loss=nn.functional.cross_entropy,
        train_data=lambda part, parts: data(part, SAMPLES[part]),
        training=Training(
            optimizer=how.choice(["sgd", "adam"]),
            learning_rate=1e-4,
            batch_size=how.choice([8, 16, 32, 64]),
            local_epochs=2,
        ),
    )

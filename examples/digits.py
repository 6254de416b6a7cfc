"""Handwritten digits (scikit-learn's, no download), split non-IID, on a small vision transformer."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk import Task, Training

WIDTH, DEPTH, HEADS, PATCH = 168, 6, 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (samples, patches, WIDTH)
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(3)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.place = nn.Parameter(0.02 * torch.randn(1, (8 // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # (samples, 1, 8, 8)
        x = self.embed(images).flatten(2).transpose(1, 2) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def share(begin: float, end: float) -> tuple[np.ndarray, np.ndarray]:
    home = Path(find_spec("sklearn").origin).parent  # importing scikit-learn would take 80 MiB
    table = np.loadtxt(home / "datasets/data/digits.csv.gz", delimiter=",", dtype="float32")
    order = np.random.default_rng(0).permutation(len(table))
    chosen = table[order[int(begin * len(order)) : int(end * len(order))]]
    return chosen[:, :64].reshape(-1, 1, 8, 8) / 16, chosen[:, 64].astype("int64")


def train_data(part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = share(0.4, 1.0)  # a Dirichlet split: every device sees its own mixture of digits
    mixture = np.random.default_rng(1).dirichlet(np.full(parts, 1.0), size=10).cumsum(1)
    owner = (np.random.default_rng(2).random((len(y), 1)) > mixture[y]).sum(1)
    return x[owner == part], y[owner == part]


def task() -> Task:
    adam = Training(optimizer="adamw", learning_rate=1e-3, weight_decay=0.01, batch_size=16)
    return Task(name="digits", build_model=VisionTransformer, loss=nn.functional.cross_entropy,
                train_data=train_data, test_data=lambda: share(0.0, 0.2), public_data=lambda: share(0.2, 0.4),
                training=adam, pretraining=adam, pretrain_epochs=4)  # fmt: skip

"""Handwritten digits (scikit-learn's, no download), split non-IID, on a small transformer."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk import Task, Training

WIDTH, DEPTH, HEADS = 168, 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        for last in (self.out, self.down):  # each block starts as the identity: it trains faster
            nn.init.zeros_(last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (samples, patches, WIDTH)
        parts = self.qkv(self.norm1(x)).unflatten(2, (3, HEADS, WIDTH // HEADS))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) / (WIDTH // HEADS) ** 0.5).softmax(3)
        x = x + self.out((weights @ value).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, kernel_size=6, stride=2)  # four overlapping patches
        self.place = nn.Parameter(0.02 * torch.randn(1, 4, WIDTH))
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
    rows = table[np.random.default_rng(0).permutation(len(table))]
    rows = rows[int(begin * len(rows)) : int(end * len(rows))]
    return rows[:, :64].reshape(-1, 1, 8, 8) / 16, rows[:, 64].astype("int64")


def train_data(part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = share(0.4, 1.0)  # a Dirichlet split: every device sees its own mixture of digits
    mixture = np.random.default_rng(1).dirichlet(np.full(parts, 3.0), size=10).cumsum(1)
    owner = (np.random.default_rng(2).random((len(y), 1)) > mixture[y]).sum(1)
    return x[owner == part], y[owner == part]


def task() -> Task:
    def how(rate: float) -> Training:
        return Training(optimizer="adamw", learning_rate=rate, weight_decay=0.01, batch_size=32)

    return Task(name="digits", build_model=VisionTransformer, loss=nn.functional.cross_entropy,
                train_data=train_data, test_data=lambda: share(0.0, 0.2),
                public_data=lambda: share(0.2, 0.4), training=how(2e-4), pretraining=how(7e-4),
                pretrain_epochs=2)  # fmt: skip

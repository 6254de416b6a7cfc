"""Handwritten digits (scikit-learn's, no download), split non-IID, on a small transformer."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edge_sdk import Task, Training

WIDTH, DEPTH, HEADS = 168, 6, 8


def block() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", 1e-5, True, True)
    for last in (layer.self_attn.out_proj, layer.linear2):
        nn.init.zeros_(last.weight)  # each block starts as the identity: it trains faster
    return layer


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, kernel_size=(6, 8), stride=2)  # two overlapping patches
        self.place = nn.Parameter(0.02 * torch.randn(1, 2, WIDTH))
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))
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
        return Training(optimizer="adamw", learning_rate=rate, batch_size=64, local_epochs=2)

    return Task(name="digits", build_model=VisionTransformer, loss=nn.functional.cross_entropy,
                train_data=train_data, test_data=lambda: share(0.0, 0.2),
                public_data=lambda: share(0.2, 0.4), training=how(3e-4),
                pretraining=how(1e-3))  # fmt: skip

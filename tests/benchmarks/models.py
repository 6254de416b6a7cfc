"""The models of the cost benchmarks: small ones of every common kind, and one of 19 million."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edge_sdk import Task, Training

SAMPLES = 192


class Attention(nn.Module):
    """One transformer block before normalisation."""

    causal = False

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, places, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, places, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(
            1, 2
        )
        x = x + self.out(mixed.reshape(batch, places, width))
        out: torch.Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Embedding, positions, blocks, mean, head."""

    def __init__(
        self, width: int, blocks: int, heads: int, places: int, features: int, classes: int = 10
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.positions = nn.Parameter(torch.zeros(1, places, width))
        self.blocks = nn.ModuleList(Attention(width, heads, 4 * width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(self.norm(x).mean(1))
        return out


class Residual(nn.Module):
    """Two convolutions with batch normalisation and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(inner)))


class ResNet(nn.Module):
    """A stem, residual blocks, mean, head."""

    def __init__(self, channels: int = 32, blocks: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(Residual(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x.mean((2, 3)))
        return out


class TwoModalities(nn.Module):
    """A transformer over one series, convolutions over another, joined by a head."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.series = nn.Sequential(
            nn.Linear(40, width), *[Attention(width, 4, 4 * width) for _ in range(4)]
        )
        self.sound = nn.Sequential(
            *[
                nn.Sequential(nn.Conv1d(c, width, 5, padding=2), nn.ReLU())
                for c in (6, width, width)
            ]
        )
        self.head = nn.Linear(2 * width, 6)

    def forward(self, series: torch.Tensor, sound: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([self.series(series).mean(1), self.sound(sound).mean(2)], 1)
        out: torch.Tensor = self.head(joined)
        return out


def mlp() -> nn.Module:
    """Five layers, three of them of 1,024."""
    widths = (784, 1024, 1024, 1024, 512)
    layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(512, 10))


class Recurrent(nn.Module):
    """Characters: an embedding, two LSTMs, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(90, 64)
        self.layers = nn.ModuleList(
            [nn.LSTM(64, 128, batch_first=True), nn.LSTM(128, 128, batch_first=True)]
        )
        self.head = nn.Linear(128, 90)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x, _ = layer(x)
        out: torch.Tensor = self.head(x[:, -1])
        return out


Build = tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], int]
# How to build it, the shapes of one sample's inputs, and the number of classes.
MODELS: dict[str, Build] = {
    "mlp": (mlp, ((784,),), 10),
    "resnet": (ResNet, ((3, 32, 32),), 10),
    "transformer": (lambda: Transformer(192, 6, 3, 65, 48), ((65, 48),), 10),
    "two-modalities": (TwoModalities, ((50, 40), (6, 128)), 6),
    "transformer-19m": (lambda: Transformer(512, 6, 8, 64, 48), ((64, 48),), 10),
    "recurrent": (Recurrent, ((40,),), 90),
    "vit-tiny": (lambda: Transformer(192, 12, 3, 197, 768), ((197, 768),), 10),
    "vit-tiny-65": (lambda: Transformer(192, 12, 3, 65, 48), ((65, 48),), 10),
}


def task_named(name: str, **training: Any) -> Task:
    """A task around one of ``MODELS``, on random samples."""
    build, shapes, classes = MODELS[name]

    def data(_part: int, _parts: int) -> tuple[Any, Any]:
        rng = np.random.default_rng(0)
        if name == "recurrent":
            return rng.integers(0, 90, (SAMPLES, *shapes[0])), rng.integers(0, classes, SAMPLES)
        inputs = [rng.standard_normal((SAMPLES, *shape), dtype=np.float32) for shape in shapes]
        labels = rng.integers(0, classes, SAMPLES)
        return (inputs[0] if len(inputs) == 1 else tuple(inputs)), labels

    return Task(
        name=name,
        build_model=build,
        loss=functional.cross_entropy,
        train_data=data,
        training=Training(**training),
    )

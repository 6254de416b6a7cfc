"""Models, data and weights for the tests of frozen prefixes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.codec import block_hash
from edge_sdk.hollow import unloaded
from edge_sdk.model import BlockModel
from edge_sdk.prefix import Prefixes
from edge_sdk.task import Task
from edge_sdk.train import Samples

COUNT = 24


def mlp() -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for a, b in ((12, 16), (16, 20), (20, 24)):
        layers += [nn.Linear(a, b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(24, 5))


def cnn() -> nn.Module:
    def stage(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]

    return nn.Sequential(
        *stage(1, 4), nn.MaxPool2d(2), *stage(4, 6), *stage(6, 8), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.drop(self.down(torch.relu(self.up(self.norm2(x)))))


class Vit(nn.Module):
    """Patches, a class token, positions added in place, a list of layers, norm and head."""

    def __init__(self, depth: int = 4, outputs: int = 5, width: int = 16) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(torch.randn(1, 5, width))
        self.embed = nn.Conv2d(1, width, 3, 3)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        x += self.pos
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])


class Words(nn.Module):
    """Tokens with padding that every layer has to know of, in torch's own encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.body(self.embed(tokens.T), src_key_padding_mask=tokens == 0)
        return self.head(x[0])


class Ear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.layers
        return second(torch.relu(first(x)))


class Two(nn.Module):
    """Two chains and a trunk; what the second one computes goes through a ReLU in place."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = Ear()
        self.image = Vit(2, 8)
        self.join, self.out = nn.Linear(16, 8), nn.Linear(8, 5)

    def forward(self, audio: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        heard = torch.relu_(self.audio(audio))
        return self.out(torch.relu(self.join(torch.cat([heard, self.image(image)], 1))))


def images(count: int = COUNT) -> Any:
    return torch.randn(count, 1, 6, 6)


def data_of(build: Callable[[], nn.Module], count: int = COUNT) -> Any:
    """Inputs that fit a model of this file."""
    torch.manual_seed(3)
    if build is mlp:
        return torch.randn(count, 3, 4)
    if build is Words:
        return torch.randint(0, 10, (count, 7)) * (
            torch.arange(7) < 4 + torch.randint(0, 4, (count, 1))
        )
    if build is Two:
        return {"image": images(count), "audio": torch.randn(count, 16)}
    return images(count)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Bench:
    """A model with samples, and the weights it has, as a device holds them in its block cache."""

    def __init__(
        self, build: Callable[[], Any], directory: Path, inputs: Any = None, **how: Any
    ) -> None:
        torch.manual_seed(1)
        loss = nn.functional.cross_entropy
        none: Callable[[int, int], Any] = lambda part, parts: ([], [])  # noqa: E731
        self.model = BlockModel(
            Task(name="t", build_model=build, loss=loss, train_data=none, **how)
        )
        inputs = data_of(build) if inputs is None else inputs
        count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        self.samples = Samples((inputs, torch.arange(count) % 5), "data")
        self.prefixes = Prefixes(self.model, self.samples, directory)
        self.stored: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        self.loads: list[str] = []
        self.store()

    def store(self) -> None:
        """The weights as they are now become those of the present version."""
        for name in self.model.spec.names:
            if name not in unloaded(self.model):
                self.stored[name] = {n: a.copy() for n, a in self.model.read(name).items()}

    @property
    def hashes(self) -> dict[str, str]:
        """Content hashes of the present version."""
        return {n: block_hash(self.model.spec.block(n), a) for n, a in self.stored.items()}

    def load(self, block: str) -> None:
        """Put the present version's weights into the model."""
        self.loads.append(block)
        self.model.write(block, self.stored[block])

    def open(self, prefix: Any, **how: Any) -> Any:
        """Open a prefix of the present version."""
        given = {"limit_bytes": 1 << 30, "batch_size": 8, "load": self.load, **how}
        return self.prefixes.open(prefix, self.hashes, **given)

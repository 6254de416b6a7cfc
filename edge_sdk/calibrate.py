"""Measure what kinds of work cost on this machine: the rates and overheads the cost model reads.

A child process of the probe, because it loads torch. It trains tiny models, most of one kind of
operator, watches what they do, and fits: seconds per operator call, per floating-point operation
and per byte moved, kind by kind. The memory each kind needs once beyond the model's own tensors
(library code, buffers of its kernels) is read from the process as it grows.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edge_sdk.cost import units
from edge_sdk.model import BlockModel
from edge_sdk.process import process_rss_bytes
from edge_sdk.task import Task
from edge_sdk.trainer import floor_bytes
from edge_sdk.watch import BACKWARD, FORWARD, watch_pass

Case = tuple[str, Callable[[], nn.Module], tuple[int, ...]]


class _Bare(nn.Module):
    """A function of one operator with a parameter before it, so that a gradient flows through."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], width: int = 1) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self._function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._function(x * self.scale)


class _Last(nn.Module):
    """The output sequence of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)[0]
        return out


class _Tokens(nn.Module):
    """Embedding of the sample's numbers taken as indices."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(count, width)
        self._count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.table((x.abs() * 1000).long() % self._count)
        return out


def _attend(x: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(x, x, x)


def _stack(*sizes: int) -> Callable[[], nn.Module]:
    pairs = list(itertools.pairwise(sizes))
    return lambda: nn.Sequential(*[nn.Linear(a, b) for a, b in pairs])


def _convolutions(width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before in (3, width, width):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


# The kind is that whose memory overhead a case shows; the order is that of first use in training.
CASES: tuple[Case, ...] = (
    ("matmul", _stack(*[32] * 9), (8, 32)),
    ("matmul", _stack(512, 512, 512), (128, 512)),
    ("matmul", _stack(256, 768, 256), (32, 16, 256)),
    ("matmul", _stack(1024, 1024), (4, 1024)),
    ("matmul", _stack(784, 1024, 1024, 512, 10), (32, 784)),
    ("matmul", lambda: _Bare(lambda x: x @ x.transpose(-1, -2)), (32, 64, 32)),
    ("elementwise", lambda: _Bare(lambda x: (x + 1.5) * x - x.relu()), (16, 64)),
    ("elementwise", lambda: _Bare(lambda x: (x + 1.5) * x - x.relu()), (64, 8192)),
    ("elementwise", lambda: _Bare(lambda x: x.transpose(1, 2).contiguous()), (16, 128, 256)),
    ("maths", lambda: _Bare(functional.gelu), (16, 64)),
    ("maths", lambda: _Bare(functional.gelu), (64, 4096)),
    ("norm", lambda: _Bare(lambda x: x.softmax(-1)), (256, 1024)),
    ("norm", lambda: nn.LayerNorm(64), (16, 64)),
    ("norm", lambda: nn.LayerNorm(256), (16, 64, 256)),
    ("norm", lambda: nn.BatchNorm2d(32), (16, 32, 32, 32)),
    ("attention", lambda: _Bare(_attend), (2, 2, 16, 16)),
    ("attention", lambda: _Bare(_attend), (8, 4, 64, 32)),
    ("attention", lambda: _Bare(_attend), (2, 4, 256, 32)),
    ("convolution", lambda: nn.Conv2d(64, 64, 1), (8, 64, 8, 8)),
    ("convolution", lambda: nn.Conv2d(8, 8, 3), (1, 8, 8, 8)),
    ("convolution", lambda: _convolutions(32), (8, 3, 32, 32)),
    ("convolution", lambda: _convolutions(16), (2, 3, 32, 32)),
    ("grouped", lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32), (8, 32, 16, 16)),
    ("window", lambda: _Bare(lambda x: functional.max_pool2d(x, 2)), (8, 16, 32, 32)),
    ("window", lambda: _Bare(lambda x: functional.avg_pool2d(x, 2)), (2, 8, 8, 8)),
    ("gather", lambda: _Tokens(1000, 64), (16, 64)),
    ("gather", lambda: _Tokens(50, 16), (4, 8)),
    ("random", lambda: _Bare(lambda x: functional.dropout(x, 0.1)), (64, 4096)),
    ("random", lambda: _Bare(lambda x: functional.dropout(x, 0.1)), (8, 64)),
    ("recurrent", lambda: _Last(nn.LSTM(32, 64, batch_first=True)), (8, 16, 32)),
    ("recurrent", lambda: _Last(nn.LSTM(64, 128, batch_first=True)), (16, 16, 64)),
    ("cells", lambda: _Last(nn.GRU(16, 32, batch_first=True)), (4, 16, 16)),
    ("cells", lambda: _Last(nn.GRU(64, 128, batch_first=True)), (1, 16, 64)),
    ("cells", lambda: _Last(nn.GRU(64, 128, batch_first=True)), (32, 16, 64)),
)
# What else says something of prices; the code these touch is little that others do not.
MORE_CASES: tuple[Case, ...] = (
    ("convolution", lambda: nn.Conv2d(2, 16, 3, padding=1), (16, 2, 32, 32)),
    ("convolution", lambda: nn.ConvTranspose2d(16, 8, 4, 2, 1), (8, 16, 16, 16)),
    ("grouped", lambda: nn.Conv2d(96, 96, 3, padding=1, groups=96), (4, 96, 32, 32)),
    ("gather", lambda: _Tokens(20_000, 64), (16, 64)),
)
# A pull towards nothing that keeps a fit sane where the cases say nothing about a price.
RIDGE = 1e-3


class _Trial:
    """One tiny model: how long a step takes, and what it does."""

    def __init__(self, case: Case) -> None:
        self.kind, build, shape = case
        rng = np.random.default_rng(0)
        self._inputs = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
        task = Task(
            name="calibration",
            build_model=build,
            loss=lambda out, _targets: out.square().mean(),
            train_data=lambda _part, _parts: (self._inputs, self._inputs),
            blocks=None,
        )
        self._model = BlockModel(task)
        self._model.open_only(self._model.spec.names)

    def features(self) -> dict[str, float]:
        """How many units of each price a step takes."""
        watch = watch_pass(self._model, self._model.spec.names, self._inputs, self._inputs)
        found: dict[str, float] = {}
        for (phase, _), rows in watch.work.items():
            if phase in (FORWARD, BACKWARD):
                for kind, counts in rows.items():
                    for key, amount in units(
                        kind, counts.operators, counts.flops, counts.moved_bytes
                    ):
                        found[key] = found.get(key, 0.0) + amount
        return found

    def step_s(self, limit_s: float) -> tuple[float, float, int]:
        """Seconds of a step, its spread, and how often it was measured.

        What else the machine does can only slow a step down: the lower quartile counts, and of one
        thread the time it ran.
        """
        clock_s = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
        self._step()
        times: list[float] = []
        end_s = time.perf_counter() + limit_s
        while len(times) < 3 or (time.perf_counter() < end_s and len(times) < 200):
            start_s = clock_s()
            self._step()
            times.append(clock_s() - start_s)
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
        return low, (high - low) / middle, len(times)

    def _step(self) -> None:
        loss = self._model.task.loss(self._model.run(self._inputs), None)
        loss.backward()
        for parameter in self._model.module.parameters():
            parameter.grad = None


def fit(rows: list[dict[str, float]], seconds: list[float]) -> dict[str, float]:
    """Non-negative seconds per unit that explain the measured seconds best, relatively.

    Coordinate descent on the squared relative error, with a small pull towards nothing.
    """
    keys = sorted({key for row in rows for key in row})
    matrix = np.array([[row.get(key, 0.0) for key in keys] for row in rows])
    matrix /= np.asarray(seconds)[:, None]
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-30)
    matrix /= scale
    gram, target = matrix.T @ matrix, matrix.T @ np.ones(len(seconds))
    gram[np.diag_indices_from(gram)] += RIDGE
    weights = np.zeros(len(keys))
    for _ in range(2000):
        for place in range(len(keys)):
            rest = target[place] - gram[place] @ weights + gram[place, place] * weights[place]
            weights[place] = max(0.0, rest / gram[place, place])
    return {key: float(w) for key, w in zip(keys, weights / scale, strict=True)}


def measure(seconds: float) -> Iterator[tuple[str, str, float, float, int]]:
    """Lines ``(table, key, value, spread, samples)`` of everything measured."""
    yield "floor", "torch_floor_bytes", float(floor_bytes()), 0.0, 1
    _Trial(CASES[0]).features()  # what watching itself loads is no cost of training
    rows, times, spreads, counts = [], [], [], []
    grown: dict[str, list[int]] = {}
    gc.freeze()  # what is loaded by now stays: collecting is quick from here on
    settled_bytes = _settled_bytes()
    for place, case in enumerate((*CASES, *MORE_CASES)):
        trial = _Trial(case)
        features = trial.features()
        fast_s, spread, count = trial.step_s(0.6 * seconds / len(CASES + MORE_CASES))
        del trial
        before_bytes, settled_bytes = settled_bytes, _settled_bytes()
        if place < len(CASES):
            grown.setdefault(case[0], []).append(settled_bytes - before_bytes)
        rows.append(features)
        times.append(fast_s)
        spreads.append(spread)
        counts.append(count)
    spread, samples = statistics.median(spreads), sum(counts)
    for key, price_s in fit(rows, times).items():
        if key.endswith("_s") and not key.endswith("_per_s"):
            yield "rates", key, max(price_s, 1e-9), spread, samples
        elif price_s > 0:
            yield "rates", key, 1 / price_s, spread, samples
    for kind, steps in grown.items():
        highest = max(0, *itertools.accumulate(steps))
        yield "overhead", f"{kind}_bytes", float(highest), 0.0, len(steps)


def _settled_bytes() -> int:
    """Resident memory once everything that can be given back is."""
    gc.collect()
    with suppress(AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    return process_rss_bytes()


def main() -> int:
    """Entry of the child process: JSON lines on standard output."""
    parser = argparse.ArgumentParser(prog="python -m edge_sdk.calibrate")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for line in measure(options.seconds):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

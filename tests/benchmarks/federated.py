"""Federated cases with natural clients, and FedAvg in one process through the real codec and sums.

A client is a person: a subject of HAPT, a role of the plays, a speaker of the digits. Each round
some clients train from the published version, encode the change of the blocks they trained, and the
server folds the bytes and publishes. Every byte counted is a byte of a real update message.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from edge_sdk import Task
from edge_sdk.blocks import levels
from edge_sdk.codec import encode_change
from edge_sdk.merge import BlockSum
from edge_sdk.model import BlockModel
from edge_sdk.wire import UpdateHeader, UpdateMetrics, encode_update
from tests.benchmarks.models import Attention

DATA_VARIABLE = "EDGE_SDK_DATA"
DEFAULT_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

Arrays = dict[str, "np.ndarray[Any, Any]"]
Pair = tuple[Any, torch.Tensor]


def data_file(name: str) -> Any:
    """The arrays of one real data set; ends the program where they are missing."""
    folder = Path(os.environ.get(DATA_VARIABLE, DEFAULT_DATA))
    path = folder / f"{name}.npz"
    if not path.is_file():
        raise SystemExit(
            f"{path}: no such file; set {DATA_VARIABLE} to the folder that holds {name}.npz"
        )
    return np.load(path)


@dataclass(frozen=True)
class Case:
    """One federated task.

    clients:   training data, a natural client each. per_round: how many train in a round.
    blocks:    names of the model's blocks, from the input to the output, and what is in them.
    learning_rate: of Adam in the first round; it falls like a cosine to the last.
    most_samples:  how many of its samples a client uses in a round.
    """

    name: str
    build: Callable[[], nn.Module]
    blocks: Mapping[str, Sequence[str]]
    clients: Sequence[Pair]
    test: Pair
    rounds: int
    per_round: int
    batch: int
    learning_rate: float
    most_samples: int = 1 << 30

    def model(self, seed: int) -> BlockModel:
        """A new model, its weights drawn from the seed."""
        torch.manual_seed(seed)
        loss = functional.cross_entropy
        task = Task(
            name=self.name, build_model=self.build, loss=loss, blocks=self.blocks,
            train_data=lambda part, parts: self.clients[part],
        )  # fmt: skip
        return BlockModel(task)


@dataclass
class Run:
    """What came out: accuracy after each round in per cent, and the bytes of all updates.

    float32_bytes: of the same messages with every changed element as it is in memory.
    """

    accuracy: list[float] = field(default_factory=list)
    upload_bytes: int = 0
    float32_bytes: int = 0
    change_elements: int = 0

    @property
    def final(self) -> float:
        """Mean accuracy of the last rounds, which is steadier than the last one."""
        return float(np.mean(self.accuracy[-FINAL_ROUNDS:]))


FINAL_ROUNDS = 3
Watch = Callable[[int, str, Arrays, Arrays], None]


def federated(
    case: Case, seed: int, codec: str, depths: Sequence[int] = (0,), watch: Watch | None = None,
    rounds: int = 0,
) -> Run:  # fmt: skip
    """FedAvg of ``case``. Client c trains the last ``depths[c % len]`` levels and the head; 0: all.

    watch: called with (round, block, base, new) for every change before it is encoded.
    """
    model, run, rounds = case.model(seed), Run(), rounds or case.rounds
    spec, rng = model.spec, np.random.default_rng(seed)
    rows = levels(spec)
    base: dict[str, Arrays] = {name: _copy(model.read(name)) for name in spec.names}
    for number in range(1, rounds + 1):
        rate = case.learning_rate * (1 + math.cos(math.pi * (number - 1) / rounds)) / 2
        sums = {name: BlockSum.zero(spec.block(name)) for name in spec.names}
        for client in rng.choice(len(case.clients), case.per_round, replace=False).tolist():
            depth = depths[client % len(depths)] or len(rows)
            blocks = [name for row in rows[-depth - 1 :] for name in row]
            for name in spec.names:
                model.write(name, base[name])
            samples = _train(case, model, blocks, client, seed * 1000 + number, rate)
            payloads = []
            for name in blocks:
                new = model.read(name)
                if watch is not None:
                    watch(number, name, base[name], new)
                payloads.append(encode_change(codec, spec.block(name), base[name], new, rng))
                sums[name].fold(codec, payloads[-1], samples)
                run.change_elements += sum(array.size for array in new.values())
            message_bytes = len(_message(number, codec, samples, blocks, payloads))
            run.upload_bytes += message_bytes
            run.float32_bytes += message_bytes - sum(map(len, payloads))
            run.float32_bytes += sum(spec.block(name).size_bytes for name in blocks)
        for name, total in sums.items():
            base[name] = total.publish(base[name], codec)
        for name in spec.names:
            model.write(name, base[name])
        run.accuracy.append(_accuracy(case, model))
    return run


def _copy(arrays: Mapping[str, Any]) -> Arrays:
    return {name: np.array(array) for name, array in arrays.items()}


def _take(inputs: Any, index: torch.Tensor) -> Any:
    return tuple(part[index] for part in inputs) if isinstance(inputs, tuple) else inputs[index]


def _train(
    case: Case, model: BlockModel, blocks: Sequence[str], client: int, seed: int, rate: float
) -> int:
    inputs, targets = case.clients[client]
    optimizer = torch.optim.Adam(model.open_only(blocks), lr=rate)
    generator = torch.Generator().manual_seed(seed * 1000 + client)
    order = torch.randperm(len(targets), generator=generator)[: case.most_samples]
    for index in torch.split(order, case.batch):
        optimizer.zero_grad()
        functional.cross_entropy(model.run(_take(inputs, index)), targets[index]).backward()
        optimizer.step()
    return len(order)


def _accuracy(case: Case, model: BlockModel) -> float:
    inputs, targets = case.test
    model.module.eval()
    with torch.no_grad():
        right = sum(
            int((model.run(_take(inputs, index)).argmax(1) == targets[index]).sum())
            for index in torch.split(torch.arange(len(targets)), 256)
        )
    return 100 * right / targets.numel()


def _message(
    number: int, codec: str, samples: int, blocks: Sequence[str], payloads: list[bytes]
) -> bytes:
    metrics = UpdateMetrics(
        loss=0.5, steps=20, train_s=12.5, train_cpu_s=11.5, plan_s=14.0, plan_peak_bytes=1 << 28,
        measured_peak_bytes=1 << 28, budget_bytes=1 << 29, plan_up_bytes=1 << 20, flops=1 << 34,
    )  # fmt: skip
    header = UpdateHeader(
        round=number, ticket=bytes(16), base_sha="0" * 64, codec=codec, num_examples=samples,
        blocks=tuple((b, len(p)) for b, p in zip(blocks, payloads, strict=True)), metrics=metrics,
    )  # fmt: skip
    return encode_update(header, payloads)


# --- HAPT: a waist-worn phone, 6 activities, a subject a client --------------------------------


class SensorNet(nn.Module):
    """Three 1-D convolutions over 128 samples of 6 channels, mean, head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (6, 32, 64, 96)
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, 5, padding=2, stride=2) for a, b in itertools.pairwise(widths)
        )
        self.hidden, self.head = nn.Linear(96 * 4, 128), nn.Linear(128, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv in self.convs:
            x = functional.relu(conv(x))
        x = functional.relu(self.hidden(functional.avg_pool1d(x, 4).flatten(1)))
        out: torch.Tensor = self.head(x)
        return out


def hapt() -> Case:
    """30 subjects, the official 9 of them for testing, never seen in training."""
    z = data_file("hapt")
    windows = z["win"][:, None] + np.arange(128)
    x = (z["sig"][:, windows].transpose(1, 0, 2) * z["scale"][:, None]).astype("f4")
    basic, test, subject = z["y"] < 6, z["is_test"], z["subject"]
    inputs, labels = torch.from_numpy(x), torch.from_numpy(z["y"].astype(np.int64))
    chosen = [np.flatnonzero(basic & ~test & (subject == s)) for s in np.unique(subject[~test])]
    held_out = np.flatnonzero(basic & test)
    return Case(
        name="hapt",
        build=SensorNet,
        blocks={"conv1": ["convs.0"], "conv2": ["convs.1"], "conv3": ["convs.2"],
                "hidden": ["hidden"], "head": ["head"]},
        clients=[(inputs[i], labels[i]) for i in chosen],
        test=(inputs[held_out], labels[held_out]),
        rounds=14, per_round=8, batch=16, learning_rate=4e-3,
    )  # fmt: skip


# --- plays: next character, a role a client ----------------------------------------------------

PLACES, WIDTH = 32, 64


class CharacterNet(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, symbols: int, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, PLACES, WIDTH))
        self.blocks = nn.ModuleList(CausalAttention(WIDTH, 4, 3 * WIDTH) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, symbols)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.positions
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(self.norm(x)).transpose(1, 2)
        return out


class CausalAttention(Attention):
    """A block that sees only what came before."""

    causal = True


def shakespeare() -> Case:
    """99 roles of at least 2000 characters; the last fifth of what they say is for testing."""
    z = data_file("shakespeare")
    start, role, test = z["start"], z["role"], z["is_test"]
    vocabulary, code = np.unique(z["chars"], return_inverse=True)
    speech = [code[a:b] for a, b in itertools.pairwise(start)]

    def said(wanted: int, part: bool) -> np.ndarray[Any, Any]:
        parts = [speech[i] for i in np.flatnonzero((role == wanted) & (test == part))]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    roles = np.flatnonzero(z["role_chars"] >= 2000).tolist()
    clients = [_windows(said(r, False)) for r in roles]
    held_out = [_windows(said(r, True)) for r in roles]
    rows = torch.cat([x for x, _ in held_out]), torch.cat([y for _, y in held_out])
    some = torch.arange(0, len(rows[0]), max(1, len(rows[0]) // 600))
    return Case(
        name="shakespeare",
        build=functools.partial(CharacterNet, len(vocabulary)),
        blocks={"stem": ["embed", "positions"], "body1": ["blocks.0"], "body2": ["blocks.1"],
                "head": ["norm", "head"]},
        clients=clients,
        test=(rows[0][some], rows[1][some]),
        rounds=20, per_round=8, batch=4, learning_rate=4e-3, most_samples=120,
    )  # fmt: skip


def _windows(text: np.ndarray[Any, Any]) -> Pair:
    count = (len(text) - 1) // PLACES
    if count <= 0:
        return torch.zeros(0, PLACES, dtype=torch.int64), torch.zeros(0, PLACES, dtype=torch.int64)
    cut = np.stack([text[i * PLACES : i * PLACES + PLACES + 1] for i in range(count)])
    rows = torch.from_numpy(cut.astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


# --- spoken digits with images: a speaker a client ---------------------------------------------

MELS, FRAMES = 40, 64


class DigitNet(nn.Module):
    """Two branches of convolutions, one hears and one sees, and a head over both."""

    def __init__(self) -> None:
        super().__init__()
        self.sound, self.image = _branch(), _branch()
        self.join, self.head = nn.Linear(2 * 48 * 4, 64), nn.Linear(64, 10)

    def forward(self, sound: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.sound(sound), self.image(image)], 1)
        out: torch.Tensor = self.head(functional.relu(self.join(both)))
        return out


def _branch() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


def digit_pairs() -> Case:
    """6 speakers; each hears itself say digits and sees images of them; other takes for testing."""
    pairs, images, clips = data_file("av_digits_pairs"), data_file("mnist_15k"), log_mels()
    test, audio, row = pairs["is_test"], pairs["audio"], pairs["image"]
    x = {False: images["x_train"], True: images["x_test"]}
    labels = torch.from_numpy(pairs["digit"].astype(np.int64))

    def chosen(index: np.ndarray[Any, Any], part: bool) -> Pair:
        seen = torch.from_numpy(x[part][row[index]][:, None].astype("f4") / 255)
        return (clips[torch.from_numpy(audio[index].astype(np.int64))], seen), labels[index]

    speakers = [np.flatnonzero(~test & (pairs["speaker"] == s)) for s in range(6)]
    return Case(
        name="digit-pairs",
        build=DigitNet,
        blocks={"sound": ["sound"], "image": ["image"], "join": ["join"], "head": ["head"]},
        clients=[chosen(index, False) for index in speakers],
        test=chosen(np.flatnonzero(test), True),
        rounds=14, per_round=6, batch=16, learning_rate=6e-3, most_samples=320,
    )  # fmt: skip


def log_mels() -> torch.Tensor:
    """Spoken digits as log-mel frames of mean 0 and deviation 1: [clips, 1, 40, 64]."""
    z = data_file("fsdd")
    pcm = (z["hi"].astype(np.int16) << 8) | z["lo"]
    start, window, bank = z["start"], np.hanning(200), mel_bank()
    out = np.zeros((len(start) - 1, 1, MELS, FRAMES), np.float32)
    for number, (a, b) in enumerate(itertools.pairwise(start)):
        clip = pcm[a:b].astype(np.float32) / max(1, int(np.abs(pcm[a:b]).max()))
        frames = np.lib.stride_tricks.sliding_window_view(clip, 200)[::80][:FRAMES]
        mel = np.log(np.abs(np.fft.rfft(frames * window, 256)) ** 2 @ bank.T + 1e-3)
        mel = (mel - mel.mean()) / mel.std()
        out[number, 0, :, : len(mel)] = mel.T
    return torch.from_numpy(out)


def mel_bank() -> np.ndarray[Any, Any]:
    """Triangles of 40 mel bands from 60 to 3800 Hz over 129 bins of 8 kHz: [bands, bins]."""
    mels = np.linspace(1127 * np.log1p(60 / 700), 1127 * np.log1p(3800 / 700), MELS + 2)
    edges = 700 * np.expm1(mels / 1127)
    bins = np.arange(129) * 8000 / 256
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    bank: np.ndarray[Any, Any] = np.maximum(0, np.minimum(rising, falling))
    return bank


CASES: Sequence[Callable[[], Case]] = (hapt, shakespeare, digit_pairs)


def digits_cnn() -> Case:
    """Handwritten digits without natural clients: 12 equal parts, for recording changes only."""
    z = data_file("mnist_15k")
    x = torch.from_numpy(z["x_train"][:, None].astype("f4") / 255)
    y = torch.from_numpy(z["y_train"].astype(np.int64))
    parts = torch.arange(len(y)).split(1000)
    return Case(
        name="digits-cnn",
        build=lambda: nn.Sequential(_branch(), nn.Linear(48 * 4, 128), nn.ReLU(),
                                    nn.Linear(128, 10)),
        blocks={"body": ["0"], "hidden": ["1"], "head": ["3"]},
        clients=[(x[i], y[i]) for i in parts],
        test=(torch.from_numpy(z["x_test"][:, None].astype("f4") / 255),
              torch.from_numpy(z["y_test"].astype(np.int64))),
        rounds=12, per_round=4, batch=32, learning_rate=1e-3,
    )  # fmt: skip


def recorded(case: Case, seed: int, rounds: Sequence[int]) -> list[tuple[int, str, Arrays, Arrays]]:
    """What one client made of each block in some rounds: (round, block, base, new)."""
    kept: dict[tuple[int, str], tuple[Arrays, Arrays]] = {}

    def watch(number: int, block: str, base: Arrays, new: Arrays) -> None:
        if number in rounds and (number, block) not in kept:
            kept[number, block] = _copy(base), _copy(new)

    federated(case, seed, "lossless", watch=watch, rounds=max(rounds))
    return [(*key, *arrays) for key, arrays in kept.items()]

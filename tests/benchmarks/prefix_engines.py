"""Where frozen blocks run cheapest: torch or ONNX Runtime, each time or kept, and kept where.

    python -m tests.benchmarks.prefix_engines [--quick] [--json FILE]

Every way is measured in a process of its own, forked from one that has torch: the time until it is
ready, the time to compute one sample's output ahead, the time of a training step, the peak of
memory above the start, the difference to torch. The time of a case, a model and a batch with a
number of samples each used a number of times, is put together from these; what training takes above
the frozen blocks is the same for every way. A case also says whether the task allows approximations
and where there is room to keep outputs. The planner's choice is
right when its time is at most a tenth above the best of those allowed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from edge_sdk.codec import block_hash
from edge_sdk.cost import CostTable, Levers
from edge_sdk.errors import MIB
from edge_sdk.measure import measure_storage
from edge_sdk.model import BlockModel
from edge_sdk.plan import FrozenPrefix, Plan
from edge_sdk.prefix import OpenPrefix, Prefixes
from edge_sdk.prefix_cut import find_cut
from edge_sdk.process import process_peak_bytes, process_rss_bytes, reset_peak
from edge_sdk.task import Task
from edge_sdk.trace import cost_table
from edge_sdk.train import Samples, train, warm_up
from edge_sdk.ways import FILL_BATCH, Costing
from edge_sdk.wire import Training
from tests.benchmarks.training_cases import Machine

SAMPLES = 64
CASE_SAMPLES = 512
USES = (1, 3, 10)
NOISE = 1.10
WAYS = tuple(
    FrozenPrefix(engine=engine, cache=cache, dtype=dtype)  # type: ignore[arg-type]
    for engine in ("torch", "onnx", "onnx_int8")
    for cache, dtype in (
        ("none", "float32"),
        ("memory", "float32"),
        ("disk", "float32"),
        ("disk", "float16"),
    )
)


class Layer(nn.Module):
    """One layer of a transformer, written with modules all runtimes know."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """64 patches of an image of 32 x 32, six layers of width 128."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 64, 128) / 10)
        self.embed = nn.Conv2d(3, 128, 4, 4)
        self.layers = nn.ModuleList(Layer(128) for _ in range(6))
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


def cnn() -> nn.Module:
    """Three stages of two convolutions; normalised so that a batch of 1 can be trained."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        for width in (before, after):
            layers += [nn.Conv2d(width, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """Four layers of 512."""
    sizes = (3072, 512, 512, 512)
    layers: list[nn.Module] = [nn.Flatten()]
    for place in range(3):
        layers += [nn.Linear(sizes[place], sizes[place + 1]), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


# Model: how it is built, and how many of its blocks are frozen.
MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "transformer": (Transformer, 5),
    "cnn": (cnn, 8),
    "mlp": (mlp, 3),
}


@dataclass(frozen=True)
class Case:
    """What the planner is asked: one device's round, ``room`` says what outputs may be kept in."""

    model: str
    batch: int
    uses: int
    lossy: bool
    room: str

    def allows(self, way: FrozenPrefix) -> bool:
        """Whether a plan may run the frozen blocks this way."""
        exact = way.engine != "onnx_int8" and way.dtype == "float32"
        rooms = {"memory": ("none", "memory", "disk"), "disk": ("none", "disk"), "none": ("none",)}
        return (exact or self.lossy) and way.cache in rooms[self.room]


@dataclass(frozen=True)
class Cost:
    """What one way was measured to cost; ``fill_s`` is of a sample, the next two of a batch."""

    setup_s: float
    fill_s: float
    prefix_s: float
    step_s: float
    peak_bytes: int
    difference: float
    refused: str = ""

    def seconds(self, case: Case, above_s: float) -> float:
        """The time of a case whose steps take ``above_s`` above the frozen blocks."""
        steps = CASE_SAMPLES / case.batch * case.uses
        return self.setup_s + CASE_SAMPLES * self.fill_s + steps * (self.prefix_s + above_s)


def picked(case: Case, machine: Machine, storage: dict[str, float]) -> FrozenPrefix:
    """How the planner would run the frozen blocks of a case (without the names of the blocks)."""
    model, _, blocks = build(case.model)
    trained = tuple(name for name in model.spec.names if name not in blocks)
    training = Training(batch_size=case.batch, local_epochs=case.uses)
    limits = msgspec.structs.replace(
        machine.limits(0),
        engines=("torch", "onnx", "onnx_int8"),
        storage_bytes=1 << 40,
        storage_write_bytes_per_s=storage["storage_write_bytes_per_s"],
        storage_read_bytes_per_s=storage["storage_read_bytes_per_s"],
    )
    costing = Costing(table_of(case.model, case.batch), training, limits, CASE_SAMPLES)
    ways = [
        way
        for way in costing.ways(trained)
        if case.allows(way.prefix) and way.levers._replace(cached=False) == Levers()
    ]
    return min(ways, key=lambda way: way.expected_s).prefix


@cache
def table_of(name: str, batch: int) -> CostTable:
    """The cost table of a model, traced for a batch."""
    model, samples, _ = build(name, batch)
    return cost_table(model, samples)


def build(name: str, batch: int = 16) -> tuple[BlockModel, Samples, tuple[str, ...]]:
    """A model, its samples, and its frozen blocks."""
    make, frozen = MODELS[name]
    torch.manual_seed(0)
    model = BlockModel(
        Task(
            name=name,
            build_model=make,
            loss=nn.functional.cross_entropy,
            train_data=lambda part, parts: ([], []),
            training=Training(batch_size=batch),
            lossy_prefix=True,
        )
    )
    data = torch.randn(SAMPLES, 3, 32, 32), torch.arange(SAMPLES) % 10
    return model, Samples(data, name), model.spec.names[:frozen]


def measure(name: str, batch: int, way: FrozenPrefix, directory: Path) -> Cost:
    """One way, measured in this process."""
    model, samples, blocks = build(name)
    stored = {b: {n: a.copy() for n, a in model.read(b).items()} for b in blocks}
    hashes = {b: block_hash(model.spec.block(b), stored[b]) for b in blocks}
    cut, _ = find_cut(model, blocks, samples.inputs_at, SAMPLES, batch)
    index = torch.arange(16)
    with torch.no_grad():
        wanted = cut.below(model, samples.inputs_at(index))
    reset_peak()
    before_bytes = process_rss_bytes()
    filled: list[float] = []
    started_s = time.perf_counter()
    prefix = Prefixes(model, samples, directory).open(
        FrozenPrefix(blocks=blocks, engine=way.engine, cache=way.cache, dtype=way.dtype),
        hashes,
        limit_bytes=1 << 30,
        batch_size=FILL_BATCH,
        load=lambda block: model.write(block, stored[block]),
        pause=lambda: filled.append(time.perf_counter()),
    )
    ended_s = time.perf_counter()
    setup_s = (filled[0] if filled else ended_s) - started_s
    fill_s = (ended_s - filled[0]) / SAMPLES if filled else 0.0
    got = wanted if prefix is None else prefix.rows(index, 0)
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True))

    def run_prefix(part: torch.Tensor) -> Any:
        if prefix is not None:
            return prefix.rows(part, 0)
        with torch.no_grad():
            return cut.below(model, samples.inputs_at(part))

    return Cost(
        setup_s=setup_s if prefix is not None else 0.0,
        fill_s=fill_s,
        prefix_s=batch_s(run_prefix, batch),
        step_s=steps_s(model, samples, prefix, blocks, batch),
        peak_bytes=max(0, process_peak_bytes(os.getpid()) - before_bytes),
        difference=difference,
    )


def batch_s(run: Callable[[torch.Tensor], Any], batch: int) -> float:
    """Time of running one batch; the lower quartile, for others use this machine."""
    times = []
    for place in range(12):
        index = (torch.arange(batch) * 5 + place * batch) % SAMPLES
        started_s = time.perf_counter()
        run(index)
        times.append(time.perf_counter() - started_s)
    return statistics.quantiles(times[2:], n=4)[0]


def steps_s(
    model: BlockModel,
    samples: Samples,
    prefix: OpenPrefix | None,
    blocks: tuple[str, ...],
    batch: int,
) -> float:
    """Time of a training step; the lower quartile."""
    plan = Plan(
        blocks=tuple(name for name in model.spec.names if name not in blocks),
        batch_size=batch, micro_batch=batch, codec="none", steps=max(8, 32 // batch),
        peak_bytes=0, budget_bytes=0, train_s=0, round_s=0, upload_bytes=0, flops=0,
    )  # fmt: skip
    marks: list[float] = []
    training = Training(learning_rate=1e-4, local_epochs=4)
    pause = lambda: marks.append(time.perf_counter())  # noqa: E731
    train(model, samples, plan, training, order_seed=1, prefix=prefix, pause=pause)
    marks.append(time.perf_counter())
    times = [after - before for before, after in itertools.pairwise(marks)]
    return statistics.quantiles(times[1:], n=4)[0]


def measured(name: str, batch: int, way: FrozenPrefix) -> Cost:
    """One way, measured in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def child(end: Connection) -> None:
        with tempfile.TemporaryDirectory() as directory:
            try:
                end.send(asdict(measure(name, batch, way, Path(directory))))
            except Exception as error:
                end.send({**asdict(Cost(0, 0, 0, 0, 0, 0)), "refused": str(error)})

    process = context.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    cost = Cost(**ours.recv())
    process.join()
    return cost


def label(way: FrozenPrefix) -> str:
    """A way in one word."""
    return f"{way.engine}/{way.cache}{'/float16' if way.dtype == 'float16' else ''}"


def judge(
    costs: dict[tuple[str, int, str], Cost], machine: Machine, storage: dict[str, float]
) -> list[dict[str, Any]]:
    """Every case with the measured best and the planner's choice."""
    rows = []
    for name, batch in dict.fromkeys((name, batch) for name, batch, _ in costs):
        here = {label(way): costs[name, batch, label(way)] for way in WAYS}
        kept = [here[label(way)] for way in WAYS if way.cache != "none"]
        above_s = statistics.median(c.step_s - c.prefix_s for c in kept if not c.refused)
        for uses in USES:
            for lossy in (False, True):
                for room in ("memory", "disk", "none"):
                    case = Case(name, batch, uses, lossy, room)
                    times_s = {
                        label(way): here[label(way)].seconds(case, above_s)
                        for way in WAYS
                        if case.allows(way) and not here[label(way)].refused
                    }
                    best = min(times_s, key=times_s.__getitem__)
                    chosen = label(picked(case, machine, storage))
                    chosen_s = times_s.get(chosen, float("inf"))
                    rows.append(
                        {
                            **asdict(case), "best": best, "best_s": times_s[best],
                            "picked": chosen, "picked_s": chosen_s,
                            "right": chosen_s <= NOISE * times_s[best],
                        }
                    )  # fmt: skip
    return rows


def summary(
    costs: dict[tuple[str, int, str], Cost], cases: list[dict[str, Any]]
) -> dict[str, float]:
    """The figures: the share of right choices, and the transformer at the largest batch."""
    right = [row for row in cases if row["right"]]
    figures = {"cases": float(len(cases)), "best_choice_share": len(right) / len(cases)}
    largest = max(batch for name, batch, _ in costs if name == "transformer")
    for way in WAYS:
        cost = costs["transformer", largest, label(way)]
        key = label(way).replace("/", "_")
        figures[f"prefix_ms_{key}"] = cost.prefix_s * 1e3
        figures[f"step_ms_{key}"] = cost.step_s * 1e3
        figures[f"peak_mb_{key}"] = cost.peak_bytes / MIB
        figures[f"difference_{key}"] = cost.difference
    return figures


def main() -> None:
    """Measure every way, judge the planner, print tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warm_up()
    machine = Machine.calibrated(2.0)
    with tempfile.TemporaryDirectory() as directory:
        measured_rates = measure_storage(Path(directory), 1.0)
    storage = {key: rate.per_s for key, rate in measured_rates.items()}
    models = ("transformer", "mlp") if arguments.quick else tuple(MODELS)
    batches = (16,) if arguments.quick else (1, 16)
    costs = {}
    head = ("model", "batch", "way", "setup s", "fill ms", "prefix ms", "step ms", "MiB", "differs")
    print("{:<12}{:>6}  {:<24}{:>8}{:>9}{:>11}{:>9}{:>7}{:>9}".format(*head))
    for name in models:
        for batch in batches:
            for way in WAYS:
                cost = costs[name, batch, label(way)] = measured(name, batch, way)
                print(
                    f"{name:<12}{batch:>6}  {label(way):<24}{cost.setup_s:>8.2f}"
                    f"{cost.fill_s * 1e3:>9.2f}{cost.prefix_s * 1e3:>11.3f}"
                    f"{cost.step_s * 1e3:>9.2f}{cost.peak_bytes / MIB:>7.0f}"
                    f"{cost.difference:>9.1e}  {cost.refused[:60]}"
                )
    cases = judge(costs, machine, storage)
    print(f"\n{'model':<12}{'batch':>6}{'uses':>6}  lossy  {'room':<8}{'best':<24}{'picked':<24}")
    for row in cases:
        print(
            f"{row['model']:<12}{row['batch']:>6}{row['uses']:>6}  {row['lossy']!s:<7}"
            f"{row['room']:<8}{row['best']:<24}{row['picked']:<24}"
            f"{row['best_s']:.2f} s, {row['picked_s']:.2f} s"
        )
    figures = summary(costs, cases)
    print(f"\nright in {figures['best_choice_share']:.0%} of {len(cases)} cases")
    ways = [
        {"model": name, "batch": batch, "way": way, **asdict(cost)}
        for (name, batch, way), cost in costs.items()
    ]
    result = {
        "name": "prefix_engines",
        "quick": arguments.quick,
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "threads": 1,
        },
        "figures": figures,
        "rows": [*ways, *cases],
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

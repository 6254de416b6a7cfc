"""Bits, error and speed of every codec on recorded changes, against what theory and others need.

    python -m tests.benchmarks.codec_pareto [--quick] [--json FILE]

Changes of a CNN (digits), a transformer (plays) and a sensor model (HAPT), recorded in an early and
a late round of federated training. A row is one model, round and codec: bits per parameter of the
whole payload, error over change (root mean square), and the gap: bits above the Gaussian
rate-distortion bound, half the log of variance over error, which is taken tensor by tensor. Beside
the four codecs stand float16 planes with zstd and int8 with a scale per tensor and zstd. Rates are
of a block of a million parameters whose change repeats the recorded ones, on one core, in MB of
float32 per processor second, the best of several tries; so is the rate of a plain copy of as much
memory.

`balanced_gap_bits` and bits per parameter are means over models and rounds, `_worst` the worst of
them; `encode_mb_per_s` and `fold_mb_per_s` are of the slower of `balanced` and `tiny`.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
import zstandard

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.codec import CODECS, encode_change
from edge_sdk.merge import BlockSum
from tests.benchmarks.bench import Row, run
from tests.benchmarks.federated import Arrays, Case, digits_cnn, hapt, recorded, shakespeare

ROUNDS, QUICK_ROUNDS = (2, 12), (1, 2)
RATE_ELEMENTS = 1_000_000
TRIES, QUICK_TRIES = 60, 15
CASES: tuple[Callable[[], Case], ...] = (digits_cnn, shakespeare, hapt)


class Change(NamedTuple):
    """A recorded change of one block."""

    block: Block
    base: Arrays
    new: Arrays

    def of(self, spec: TensorSpec) -> np.ndarray[Any, Any]:
        """By how much a tensor changed."""
        change: np.ndarray[Any, Any] = np.subtract(
            self.new[spec.name], self.base[spec.name], dtype=np.float64
        )
        return change


class Sent(NamedTuple):
    """What came of a change: bytes, and the sums that rows are made of."""

    payload_bytes: int
    square_error: float
    square: float
    bound_bits: float
    elements: int


def sent(change: Change, payload_bytes: int, decoded: Arrays) -> Sent:
    """Add up over a block's tensors."""
    error = square = bound = 0.0
    for spec in change.block.tensors:
        wanted = change.of(spec)
        mine = float(np.sum((decoded[spec.name] - wanted) ** 2))
        all_of_it = float(np.sum(wanted**2))
        error, square = error + mine, square + all_of_it
        if 0.0 < mine < all_of_it:
            bound += spec.elements * math.log2(all_of_it / mine) / 2
    elements = sum(spec.elements for spec in change.block.tensors)
    return Sent(payload_bytes, error, square, bound, elements)


def by_codec(codec: str, change: Change) -> Sent:
    """Through the codec and an exact sum."""
    payload = encode_change(codec, change.block, change.base, change.new, np.random.default_rng(1))
    total = BlockSum.zero(change.block)
    total.fold(codec, payload, 1)
    decoded = {name: units * 2.0**-30 for name, units in total.numerators().items()}
    return sent(change, len(payload), decoded)


def by_float16(change: Change) -> Sent:
    """Halves in byte planes, zstd level 1."""
    decoded = {s.name: change.of(s).astype(np.float16) for s in change.block.tensors}
    words = np.concatenate([part.reshape(-1) for part in decoded.values()])
    planes = words.view(np.uint8).reshape(-1, 2).T.tobytes()
    return sent(change, len(zstandard.ZstdCompressor(level=1).compress(planes)), decoded)


def by_int8(change: Change) -> Sent:
    """Bytes with a scale per tensor, zstd level 1."""
    decoded, content = {}, b""
    for spec in change.block.tensors:
        wanted = change.of(spec)
        scale = float(np.abs(wanted).max(initial=0.0)) / 127 or 1.0
        q = np.rint(wanted / scale).astype(np.int8)
        decoded[spec.name] = q * scale
        content += np.float32(scale).tobytes() + q.tobytes()
    return sent(change, len(zstandard.ZstdCompressor(level=1).compress(content)), decoded)


WAYS: dict[str, Callable[[Change], Sent]] = {
    **{codec: (lambda change, codec=codec: by_codec(codec, change)) for codec in CODECS},
    "float16 + zstd": by_float16,
    "int8 per tensor + zstd": by_int8,
}


def row_of(model: str, number: int, way: str, results: Iterable[Sent]) -> Row:
    """One line of the table."""
    parts = list(results)
    elements = sum(part.elements for part in parts)
    square = sum(part.square for part in parts)
    bits = 8 * sum(part.payload_bytes for part in parts) / elements
    bound = sum(part.bound_bits for part in parts) / elements
    return {
        "model": model,
        "round": number,
        "codec": way,
        "bits_per_param": bits,
        "error_over_change": math.sqrt(sum(part.square_error for part in parts) / square),
        "bound_bits": bound,
        "gap_bits": bits - bound,
    }


def rates(changes: list[Change], tries: int) -> tuple[list[Row], float]:
    """Encode and fold rates of each codec, and that of a copy, in MB of float32 per second.

    Over one large tensor of all recorded changes, each brought to the same rms: side by side as
    they are, the largest ones would be outliers of a tensor that no model has.
    """
    tensors = [change.of(spec).reshape(-1) for change in changes for spec in change.block.tensors]
    scaled = [1e-3 * t / rms for t in tensors if (rms := float(np.sqrt(np.mean(t * t)))) > 0.0]
    values = np.resize(np.concatenate(scaled), RATE_ELEMENTS).astype(np.float32)
    spec = TensorSpec(name="all", shape=(RATE_ELEMENTS,), dtype="float32")
    block = Block(name="large", tensors=(spec,))
    base = {"all": np.random.default_rng(0).standard_normal(RATE_ELEMENTS).astype(np.float32) / 20}
    new = {"all": base["all"] + values}
    size_mb, copied = values.nbytes / 1e6, np.empty_like(values)
    copy = size_mb / fastest(lambda: np.copyto(copied, values), 4 * tries)
    rows = []
    for codec in CODECS:
        total, rng = BlockSum.zero(block), np.random.default_rng(2)
        payload = encode_change(codec, block, base, new, rng)
        encode_s = fastest(lambda: encode_change(codec, block, base, new, rng), tries)  # noqa: B023
        fold_s = fastest(lambda: total.fold(codec, payload, 3), tries)  # noqa: B023
        rows.append({
            "codec": codec, "encode_mb_per_s": size_mb / encode_s,
            "fold_mb_per_s": size_mb / fold_s, "encode_over_copy": size_mb / encode_s / copy,
            "fold_over_copy": size_mb / fold_s / copy,
        })  # fmt: skip
    return rows, copy


def fastest(work: Callable[[], object], tries: int) -> float:
    """Processor seconds of the fastest of some tries: others only make it slower."""
    best_s = math.inf
    for _ in range(tries):
        start_s = time.thread_time()
        work()
        best_s = min(best_s, time.thread_time() - start_s)
    return best_s


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Figures, and a row for each model, round and codec; rates are rows of their own."""
    torch.set_num_threads(1)
    rounds = QUICK_ROUNDS if quick else ROUNDS
    rows, everything = [], []
    for make in CASES:
        case = make()
        spec: ModelSpec = case.model(0).spec
        found: dict[int, list[Change]] = {number: [] for number in rounds}
        for number, name, base, new in recorded(case, 0, rounds):
            found[number].append(Change(spec.block(name), base, new))
        for number, changes in found.items():
            everything += changes
            for way, send in WAYS.items():
                rows.append(row_of(case.name, number, way, map(send, changes)))
    speeds, copy = rates(everything, QUICK_TRIES if quick else TRIES)
    slow = [row for row in speeds if row["codec"] in ("balanced", "tiny")]
    gaps, bits = columns(rows, "balanced", "gap_bits"), columns(rows, "balanced", "bits_per_param")
    tiny = columns(rows, "tiny", "bits_per_param")
    figures = {
        "balanced_gap_bits": statistics.mean(gaps),
        "balanced_gap_bits_worst": max(gaps),
        "balanced_bits_per_param": statistics.mean(bits),
        "balanced_bits_per_param_worst": max(bits),
        "tiny_bits_per_param": statistics.mean(tiny),
        "tiny_bits_per_param_worst": max(tiny),
        "encode_mb_per_s": min(row["encode_mb_per_s"] for row in slow),
        "fold_mb_per_s": min(row["fold_mb_per_s"] for row in slow),
        "copy_mb_per_s": copy,
    }
    blank = dict.fromkeys(("encode_mb_per_s", "fold_mb_per_s"), "-")
    shown = [{**row, **blank} for row in rows]
    for speed in speeds:
        empty = dict.fromkeys(shown[0], "-")
        shown.append({**empty, "model": "a million parameters", **{k: speed[k] for k in blank},
                      "codec": speed["codec"]})  # fmt: skip
    return figures, shown


def columns(rows: list[Row], codec: str, key: str) -> list[float]:
    """One figure of one codec, of every model and round."""
    return [row[key] for row in rows if row["codec"] == codec]


if __name__ == "__main__":
    run("codec_pareto", __doc__, measure)

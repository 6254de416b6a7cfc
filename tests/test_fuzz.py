"""Ten minutes of coverage-guided fuzzing: every decoder of foreign bytes, for named errors only.

    pip install .[fuzz]
    pytest -m slow tests/test_fuzz.py        FUZZ=60 sets the seconds

Each decoder has tests of hostile input of its own; here libFuzzer looks for what nobody thought
of. A decoder may raise the error of its kind and nothing else, and has to end within two seconds,
which on a loaded machine stands for the 50 ms it is allowed on a quiet one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_sdk.blocks import Block, TensorSpec
from edge_sdk.codec import (
    CODECS,
    Array,
    decode_block,
    decode_block_delta,
    encode_block,
    encode_block_delta,
    encode_change,
)
from edge_sdk.errors import DamagedBlock, MalformedMessage, WrongUpdate
from edge_sdk.merge import BlockSum
from edge_sdk.wire import Presence, UpdateHeader, UpdateMetrics, decode, decode_update, encode
from edge_sdk.wire import encode_update as encode_whole
from reference_server.versions import Manifest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = int(os.environ.get("FUZZ", "600"))
LIMIT_S = 2
# Ours alone is instrumented: all of numpy would take minutes.
FUZZER = """
import sys
import atheris
with atheris.instrument_imports(include=["edge_sdk", "reference_server"]):
    from tests.test_fuzz import TARGETS
atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]][0])
atheris.Fuzz()
"""
BLOCK = Block(
    name="body",
    tensors=(
        TensorSpec(name="weight", shape=(20, 9), dtype="float32"),
        TensorSpec(name="bias", shape=(3,), dtype="float32"),
        TensorSpec(name="half", shape=(10,), dtype="float16"),
        TensorSpec(name="variance", shape=(9,), dtype="float64", kind="buffer"),
        TensorSpec(name="count", shape=(2,), dtype="int64", kind="buffer"),
        TensorSpec(name="mask", shape=(3,), dtype="bool", kind="buffer"),
    ),
)


def arrays(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {s.name: np.asarray(rng.random(s.shape) < 0.5, s.dtype) for s in BLOCK.tensors}


BASE, NEW = arrays(1), arrays(2)
METRICS = UpdateMetrics(
    loss=0.5, steps=1, train_s=1.0, train_cpu_s=1.0, plan_s=1.0, plan_peak_bytes=1,
    measured_peak_bytes=1, budget_bytes=1, plan_up_bytes=1, flops=1,
)  # fmt: skip
HEADER = UpdateHeader(
    round=1, ticket=bytes(16), base_sha="ab" * 32, codec="tiny", num_examples=3,
    blocks=(("body", 4),), metrics=METRICS,
)  # fmt: skip


def change(data: bytes) -> None:
    """The first byte chooses the codec."""
    total = BlockSum.zero(BLOCK)
    before = total.to_bytes()
    try:
        total.fold(CODECS[data[0] % len(CODECS)] if data else CODECS[0], data[1:], 3)
    except WrongUpdate:
        assert total.to_bytes() == before


def block(data: bytes) -> None:
    with suppress(DamagedBlock):
        decode_block(BLOCK, data)


def block_delta(data: bytes) -> None:
    with suppress(DamagedBlock):
        decode_block_delta(BLOCK, BASE, data)


def message(data: bytes) -> None:
    with suppress(MalformedMessage):
        decode(data)


def update(data: bytes) -> None:
    with suppress(MalformedMessage):
        decode_update(memoryview(data))


def manifest(data: bytes) -> None:
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        msgspec.json.decode(data, type=Manifest)


def changes() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [bytes([n]) + encode_change(c, BLOCK, BASE, NEW, rng) for n, c in enumerate(CODECS)]


# Every decoder with honest bytes to start from.
TARGETS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "change": (change, changes()),
    "block": (block, [encode_block(BLOCK, NEW)]),
    "block_delta": (block_delta, [encode_block_delta(BLOCK, BASE, NEW)]),
    "message": (message, [encode(Presence(state="ready", session=1))]),
    "update": (update, [encode_whole(HEADER, [b"rest"])]),
    "manifest": (manifest, [b'{"job":"j","version":0,"round":0,"blocks":[]}']),
}


@pytest.mark.parametrize("name", TARGETS)
def test_honest_bytes_and_every_truncation_pass_the_harness(name: str) -> None:
    target, seeds = TARGETS[name]
    for seed in seeds:
        for length in range(len(seed) + 1):
            target(seed[:length])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_make_a_decoder_fail_otherwise(name: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="pip install .[fuzz]")
    for number, seed in enumerate(TARGETS[name][1]):
        (tmp_path / f"seed{number}").write_bytes(seed)
    done = subprocess.run(
        [
            *(sys.executable, "-c", FUZZER, name, str(tmp_path), "-max_len=4096"),
            *(f"-max_total_time={max(1, SECONDS // len(TARGETS))}", f"-timeout={LIMIT_S}"),
            *("-rss_limit_mb=1024", "-print_final_stats=1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "stat::number_of_executed_units" in done.stderr, done.stderr[-4000:]

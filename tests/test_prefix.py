"""Training from kept outputs of frozen blocks: the same weights, never stale ones, less memory."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.hollow import restore, unloaded
from edge_sdk.plan import FrozenPrefix, Plan
from edge_sdk.prefix import OpenPrefix, fingerprint
from edge_sdk.prefix_cut import NoPrefix
from edge_sdk.train import train
from edge_sdk.wire import Training
from tests.prefix_models import (
    COUNT,
    Bench,
    Two,
    Vit,
    Words,
    cnn,
    images,
    mlp,
    one_thread,  # noqa: F401
)

ROOT = Path(__file__).resolve().parent.parent
LOW = ("embed", "layers.0", "layers.1")
CASES = [
    (mlp, ("1", "3")),
    (cnn, ("0", "1", "4", "5")),
    (Vit, LOW),
    (Words, ("embed", "body.layers.0", "body.layers.1")),
    (Two, ("audio.layers.0", "audio.layers.1", "image.embed", "image.layers.0")),
]


def how(cache: str = "disk", **other: Any) -> Any:
    return FrozenPrefix(blocks=other.pop("blocks", LOW), cache=cache, **other)  # type: ignore[arg-type]


def trained(
    bench: Bench, blocks: tuple[str, ...], prefix: OpenPrefix | None, checkpoint: bool = False
) -> Any:
    """Weights after training all blocks but the given ones for three epochs."""
    open_blocks = tuple(name for name in bench.model.spec.names if name not in blocks)
    restore(bench.model, open_blocks)
    for name in open_blocks if prefix is not None else bench.model.spec.names:
        bench.load(name)
    plan = Plan(
        blocks=open_blocks, batch_size=8, micro_batch=8, codec="none", peak_bytes=0,
        budget_bytes=0, train_s=0, round_s=0, upload_bytes=0, flops=0,
        checkpoint=checkpoint,
    )  # fmt: skip
    training = Training(optimizer="sgd", learning_rate=0.05, momentum=0.9, local_epochs=3)
    done = train(bench.model, bench.samples, plan, training, order_seed=5, prefix=prefix)
    arrays = [bench.model.read(name) for name in open_blocks]
    return done.loss, {n: a.tobytes() for part in arrays for n, a in part.items()}


@pytest.mark.parametrize(("build", "blocks"), CASES)
@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_training_from_kept_outputs_is_ordinary_training_to_the_bit(
    cache: str, build: Callable[[], nn.Module], blocks: tuple[str, ...], tmp_path: Path
) -> None:
    ordinary = trained(Bench(build, tmp_path), blocks, None)
    bench = Bench(build, tmp_path)
    prefix = bench.open(how(cache, blocks=blocks))
    assert unloaded(bench.model) == tuple(n for n in bench.model.spec.names if n in blocks)
    assert trained(bench, blocks, prefix) == ordinary


def test_kept_outputs_go_with_recomputed_activations(tmp_path: Path) -> None:
    ordinary = trained(Bench(Vit, tmp_path), LOW, None)
    bench = Bench(Vit, tmp_path)
    assert trained(bench, LOW, bench.open(how(), wanted=()), checkpoint=True) == ordinary


def test_without_blocks_or_without_anything_to_gain_there_is_no_prefix(tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    assert bench.open(how(blocks=())) is None
    assert bench.open(how("none")) is None
    assert bench.loads == []


def test_the_next_round_with_the_same_weights_loads_and_computes_nothing(tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    first = bench.open(how())
    assert bench.loads == list(LOW)
    assert bench.open(how()) is first
    assert bench.loads == list(LOW)


def test_what_is_kept_survives_a_restart(tmp_path: Path) -> None:
    wanted = trained(bench := Bench(Vit, tmp_path), LOW, bench.open(how()))
    bench.prefixes.close()
    batches: list[int] = []
    again = Bench(Vit, tmp_path)
    prefix = again.open(how(), pause=lambda: batches.append(1))
    assert batches == [], "nothing is computed again"
    assert trained(again, LOW, prefix) == wanted


def test_other_weights_below_the_cut_are_noticed_by_their_hash(tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    trained(bench, LOW, bench.open(how()))
    restore(bench.model, LOW)
    for name in bench.model.spec.names:
        bench.load(name)
    with torch.no_grad():
        bench.model.module.get_parameter("layers.0.up.weight").mul_(1.5)
    bench.store()
    ordinary = trained(bench, LOW, None)
    assert trained(bench, LOW, bench.open(how())) == ordinary
    assert len(list(tmp_path.iterdir())) == 1, "what is outdated is deleted"


def test_weights_left_over_from_other_training_are_not_used(tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    ordinary = trained(bench, LOW, None)
    bench.open(how("memory"), wanted=[(torch.arange(8), 0)])
    restore(bench.model, LOW)
    for parameter in bench.model.module.parameters():
        nn.init.ones_(parameter)
    assert trained(bench, LOW, bench.open(how("memory"))) == ordinary


def test_a_model_edited_between_restarts_is_noticed(tmp_path: Path) -> None:
    class Edited(Vit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 1.01)

    Edited.__name__ = "Vit"
    bench = Bench(Vit, tmp_path)
    bench.open(how())
    bench.prefixes.close()
    edited = Bench(Edited, tmp_path)
    assert repr(edited.model.module) == repr(bench.model.module)
    ordinary = trained(Bench(Edited, tmp_path / "other"), LOW, None)
    assert trained(edited, LOW, edited.open(how())) == ordinary


def test_other_samples_are_other_entries(tmp_path: Path) -> None:
    torch.manual_seed(9)
    fresh = images()
    Bench(Vit, tmp_path).open(how())
    bench = Bench(Vit, tmp_path, fresh)
    prefix = bench.open(how())
    assert trained(bench, LOW, prefix) == trained(Bench(Vit, tmp_path, fresh), LOW, None)
    assert len(list(tmp_path.iterdir())) == 2


def test_every_number_shape_and_name_counts_for_the_fingerprint() -> None:
    x = torch.arange(12).float().reshape(3, 4)
    changed = x.clone()
    changed[2, 3] += 1e-6
    several = [
        x, changed, x.reshape(4, 3), x.double(), (x,), (x, x), {"a": x}, {"b": x}, x[:, :0], x[:0],
    ]  # fmt: skip
    assert len({fingerprint(inputs) for inputs in several}) == len(several)
    assert fingerprint(x) == fingerprint(x.clone())


# --- augmentation --------------------------------------------------------------------------------


def noisy(inputs: Any, generator: torch.Generator) -> Any:
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator)


def test_every_view_is_kept(tmp_path: Path) -> None:
    augmented = {"augment": noisy, "augment_views": 3}
    ordinary = trained(Bench(Vit, tmp_path, **augmented), LOW, None)
    assert ordinary != trained(Bench(Vit, tmp_path), LOW, None)
    bench = Bench(Vit, tmp_path, **augmented)
    batches: list[int] = []
    prefix = bench.open(how(), pause=lambda: batches.append(1))
    assert len(batches) == 3 * COUNT / 8
    assert trained(bench, LOW, prefix) == ordinary


def test_only_wanted_views_and_samples_are_computed_ahead(tmp_path: Path) -> None:
    augmented = {"augment": noisy, "augment_views": 3}
    ordinary = trained(Bench(Vit, tmp_path, **augmented), LOW, None)
    bench = Bench(Vit, tmp_path, **augmented)
    batches: list[int] = []
    wanted = [(torch.arange(16), 1)]
    prefix = bench.open(how(), wanted=wanted, pause=lambda: batches.append(1))
    assert len(batches) == 2
    assert unloaded(bench.model) == LOW
    loads = len(bench.loads)
    assert trained(bench, LOW, prefix) == ordinary, "the others are computed when asked for"
    assert [name for name in bench.loads[loads:] if name in LOW] == list(LOW)
    assert unloaded(bench.model) == LOW, "now all are there"


def test_with_nothing_wanted_ahead_the_first_epoch_fills(tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    ordinary = trained(Bench(Vit, tmp_path), LOW, None)
    prefix = bench.open(how(), wanted=())
    assert unloaded(bench.model) == ()
    assert trained(bench, LOW, prefix) == ordinary
    assert [name for name in bench.loads if name in LOW] == list(LOW)
    assert unloaded(bench.model) == LOW


# --- refusals and damage -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "prefix", "message"),
    [
        ({"random_prefix": True}, how(), "random_prefix says its frozen blocks are random"),
        ({}, how(engine="onnx_int8"), "may not be approximate; say lossy_prefix=True"),
        ({}, how(dtype="float16"), "may not be approximate; say lossy_prefix=True"),
    ],
)
def test_what_the_task_forbids_is_refused(
    task: Any, prefix: FrozenPrefix, message: str, tmp_path: Path
) -> None:
    bench = Bench(Vit, tmp_path, **task)
    with pytest.raises(NoPrefix, match=message):
        bench.open(prefix)
    assert bench.loads == []


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_too_little_room_is_said_with_numbers(cache: str, tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    with pytest.raises(NoPrefix, match=r"of 24 samples takes 0\.0 MiB, 0\.0 MiB are allowed"):
        bench.open(how(cache), limit_bytes=4000)
    assert unloaded(bench.model) == ()
    assert bench.open(how(cache), limit_bytes=16_000) is not None


def test_rows_damaged_while_they_are_used_are_computed_again(tmp_path: Path) -> None:
    ordinary = trained(Bench(Vit, tmp_path), LOW, None)
    bench = Bench(Vit, tmp_path)
    prefix = bench.open(how())
    (path,) = tmp_path.glob("*/rows")
    with path.open("r+b") as file:
        for at in (0, 4000):
            file.seek(at)
            file.write(b"damage")
    loads = len(bench.loads)
    assert trained(bench, LOW, prefix) == ordinary
    assert "embed" in bench.loads[loads:]
    os.truncate(path, 5000)
    assert trained(bench, LOW, prefix) == ordinary


def test_giving_up_half_way_keeps_what_is_there(tmp_path: Path) -> None:
    ordinary = trained(Bench(Vit, tmp_path), LOW, None)
    bench = Bench(Vit, tmp_path)
    batches: list[int] = []

    def stop_at_third() -> None:
        batches.append(1)
        if len(batches) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.open(how(), pause=stop_at_third)
    prefix = bench.open(how(), pause=lambda: batches.append(1))
    assert len(batches) == 4, "the third batch was left"
    assert trained(bench, LOW, prefix) == ordinary


KILLED = """
import os, signal, sys
from pathlib import Path
import edge_sdk.prefix_cache as c
from tests.test_prefix import Bench, Vit, how
c.FLUSH_BYTES = 1
batches = []
def pause():
    batches.append(1)
    if len(batches) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
Bench(Vit, Path(sys.argv[1])).open(how(), pause=pause, batch_size=4)
"""


def test_a_killed_trainer_goes_on_where_it_was(tmp_path: Path) -> None:
    ordinary = trained(Bench(Vit, tmp_path / "no"), LOW, None)
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "5"], cwd=ROOT)
    assert child.returncode == -signal.SIGKILL
    bench = Bench(Vit, tmp_path)
    batches: list[int] = []
    prefix = bench.open(how(), pause=lambda: batches.append(1))
    assert len(batches) == 1, "16 of 24 samples were there"
    loss, _ = trained(bench, LOW, prefix)
    assert loss == pytest.approx(ordinary[0], rel=1e-5)


# --- engines -------------------------------------------------------------------------------------

has_onnx = pytest.mark.skipif(
    importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="onnx and onnxruntime are not installed",
)


@has_onnx
@pytest.mark.parametrize(("build", "blocks"), CASES)
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_onnx_computes_what_torch_does(
    cache: str, build: Callable[[], nn.Module], blocks: tuple[str, ...], tmp_path: Path
) -> None:
    ordinary = trained(Bench(build, tmp_path), blocks, None)
    bench = Bench(build, tmp_path)
    prefix = bench.open(how(cache, blocks=blocks, engine="onnx"))
    assert set(unloaded(bench.model)) == set(blocks)
    assert trained(bench, blocks, prefix)[0] == pytest.approx(ordinary[0], rel=1e-4)


@has_onnx
@pytest.mark.parametrize(
    "lossy", [{"engine": "onnx_int8"}, {"dtype": "float16"}, {"engine": "onnx", "cache": "memory"}]
)
def test_approximations_are_close(lossy: Any, tmp_path: Path) -> None:
    ordinary = trained(Bench(Vit, tmp_path), LOW, None)
    bench = Bench(Vit, tmp_path, lossy_prefix=True)
    assert trained(bench, LOW, bench.open(how(**lossy)))[0] == pytest.approx(ordinary[0], rel=0.02)


@has_onnx
def test_a_batch_size_baked_into_the_export_is_noticed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class Baked(Vit):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x)[:, 0])

    with pytest.raises(NoPrefix, match="cannot run in ONNX Runtime: inputs of shapes"):
        Bench(Baked, tmp_path).open(how("none", engine="onnx"))


def test_without_onnx_the_reason_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(NoPrefix, match="the package onnx is not installed; pip install onnx"):
        Bench(Vit, tmp_path).open(how(engine="onnx"))


# --- memory --------------------------------------------------------------------------------------

MEASURED = """
import json, sys, torch
from pathlib import Path
from torch import nn
from edge_sdk.process import process_rss_bytes
from tests.test_prefix import Bench, how
wide = lambda: nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(12)), nn.Linear(1024, 5))
torch.set_num_threads(1)
bench = Bench(wide, Path(sys.argv[1]), torch.randn(64, 1024))
bench.load = lambda block: None
blocks = tuple(map(str, range(12)))
prefix = bench.prefixes.open(how(blocks=blocks), bench.hashes, limit_bytes=1 << 30, batch_size=16,
    load=bench.load, wanted=())
prefix.output(torch.arange(8), 0)
bench.stored.clear()
before = process_rss_bytes()
prefix.prepare(16, [(torch.arange(64), 0)], lambda: None)
prefix.output(torch.arange(8), 0)
print(json.dumps([before, process_rss_bytes(), 'torch._dynamo' in sys.modules]))
"""


def test_memory_falls_by_the_weights_of_the_frozen_blocks(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        capture_output=True, text=True, check=True, cwd=ROOT,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"},
    )  # fmt: skip
    before, after, compiler = json.loads(done.stdout)
    weights = 12 * 1024 * 1024 * 4
    assert before - after > 0.9 * weights
    assert not compiler


def test_kept_outputs_are_arrays_of_their_own(tmp_path: Path) -> None:
    bench = Bench(Vit, tmp_path)
    prefix = bench.open(how("memory"))
    bench.model.module.eval()
    index = torch.arange(4)
    with torch.no_grad():
        first, second = prefix.output(index, 0), prefix.output(index, 0)
    assert np.array_equal(first.numpy(), second.numpy())

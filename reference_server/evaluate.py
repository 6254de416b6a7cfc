"""The server's own copy of the model: its initial weights, pre-training, and held-out accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import EdgeError, TaskError
from edge_sdk.model import Arrays, BlockModel
from edge_sdk.plan import Plan
from edge_sdk.task import load_task
from edge_sdk.train import Samples, evaluate, train
from edge_sdk.wire import Training
from reference_server.versions import Manifest, VersionStore


class Evaluator:
    """Builds the task's model and measures versions of it."""

    def __init__(self, task_path: Path, seed: int, threads: int = 1) -> None:
        # One thread unless asked: torch's threads wait by spinning, and where other processes
        # want the same cores, as simulated devices do, two threads are ten times slower than one.
        torch.set_num_threads(threads)
        self.task = load_task(task_path)
        torch.manual_seed(seed)
        self.model = BlockModel(self.task)
        self.seed = seed
        self._test = self._samples("test_data")
        self._loaded: dict[str, str] = {}

    @property
    def spec(self) -> ModelSpec:
        """The model as blocks."""
        return self.model.spec

    def pretrain(self, progress: Callable[[], None]) -> tuple[int, float]:
        """Train everything on the public data: samples used (0 when there are none), last loss.

        ``progress()`` is called before every step.
        """
        public, how = self._samples("public_data"), self.task.pretraining
        if public is None or how is None:
            return 0, 0.0
        with self._blaming("pre-training"):
            plan = _whole(self.spec.names, how)
            done = train(self.model, public, plan, how, order_seed=self.seed, pause=progress)
        self._loaded.clear()
        return done.num_examples, done.loss

    def weights(self, block: str) -> Arrays:
        """A block of the model as it is in memory."""
        return self.model.read(block)

    def measure(self, versions: VersionStore, manifest: Manifest) -> tuple[float, float] | None:
        """Loss and accuracy of a version on the held-out data; None when the task has none."""
        self.load(versions, manifest)
        if self._test is None:
            return None
        with self._blaming("the model or the loss, on test_data,"):
            return evaluate(self.model, self._test)

    def load(self, versions: VersionStore, manifest: Manifest) -> None:
        """Bring the model in memory to a version; only blocks that differ are read."""
        for entry in manifest.blocks:
            if self._loaded.get(entry.name) != entry.sha256:
                block = self.spec.block(entry.name)
                self.model.write(entry.name, versions.load_block(block, entry.sha256))
                self._loaded[entry.name] = entry.sha256

    def example(self, count: int) -> object:
        """Inputs of ``count`` held-out samples; TaskError when the task has no test data."""
        if self._test is None:
            raise TaskError(
                f"task {self.task.name!r} has no test_data: ONNX export needs example inputs"
            )
        return self._test.first(count)[0]

    def _samples(self, what: str) -> Samples | None:
        give = getattr(self.task, what)
        if give is None:
            return None
        with self._blaming(f"{what}()"):
            return Samples(give(), f"task {self.task.name!r}: {what}()")

    @contextmanager
    def _blaming(self, what: str) -> Iterator[None]:
        """What the user's own code raises becomes a TaskError that says where."""
        try:
            yield
        except EdgeError:
            raise
        except Exception as error:
            raise TaskError(
                f"task {self.task.name!r}: {what} failed: {type(error).__name__}: {error}"
            ) from error


def _whole(blocks: tuple[str, ...], how: Training) -> Plan:
    """Everything at once: what the server trains is bound by no budget, and sent nowhere."""
    return Plan(
        blocks=blocks,
        batch_size=how.batch_size,
        micro_batch=how.batch_size,
        codec="",
        peak_bytes=0,
        budget_bytes=0,
        train_s=0.0,
        round_s=0.0,
        upload_bytes=0,
        flops=0,
    )

"""The server's own copy of the model: its initial weights, pre-training, and held-out accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import TaskError
from edge_sdk.model import Arrays, BlockModel
from edge_sdk.task import load_task
from edge_sdk.train import Samples, evaluate, train
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
        public = self._samples("public_data")
        if public is None or self.task.pretrain_epochs < 1:
            return 0, 0.0
        how = self.task.pretraining
        epochs = self.task.pretrain_epochs
        loss, _ = train(
            self.model,
            public,
            self.spec.names,
            msgspec.structs.replace(how, local_epochs=epochs),
            micro_batch=how.batch_size,
            order_seed=self.seed,
            pause=progress,
        )
        self._loaded.clear()
        return public.count, loss

    def weights(self, block: str) -> Arrays:
        """A block of the model as it is in memory."""
        return self.model.read(block)

    def measure(self, versions: VersionStore, manifest: Manifest) -> tuple[float, float] | None:
        """Loss and accuracy of a version on the held-out data; None when the task has none."""
        self.load(versions, manifest)
        return None if self._test is None else evaluate(self.model, self._test)

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
        return None if give is None else Samples(give(), f"task {self.task.name!r}: {what}()")

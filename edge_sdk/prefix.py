"""Frozen blocks are run once for each sample; training goes on from what they computed.

``Prefixes`` lives as long as the model and the samples. ``open`` takes a plan's frozen prefix,
computes what is not kept yet and frees the weights of the frozen blocks; what it gives back runs
the rest of the model for any samples. What is kept is addressed by the hashes of the frozen blocks,
the data and the model, and compared with a fresh computation once in a process, so an edited task
is noticed too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edge_sdk.blocks import DTYPE_BYTES
from edge_sdk.errors import StateError, TaskError
from edge_sdk.hollow import restore, unload
from edge_sdk.model import BlockModel
from edge_sdk.plan import FrozenPrefix
from edge_sdk.prefix_cache import Column, DiskRows, Key, Layout, MemoryRows, NoRoom, PrefixCache
from edge_sdk.prefix_cut import CHECKED_SAMPLES, NoPrefix, find_cut
from edge_sdk.prefix_export import Compute, onnx_engine
from edge_sdk.train import Samples, view_of

# By which share of their norm kept outputs may differ from torch's in float32. For int8 that is a
# cosine of 0.99; beyond it the frozen blocks are not those the rest was trained with.
TOLERANCE = {"torch": 1e-3, "onnx": 1e-3, "onnx_int8": 0.15}
FLOAT16_TOLERANCE = 4e-3

HASHED_BYTES = 1 << 22

Array = np.ndarray[Any, Any]
Load = Callable[[str], None]
Pause = Callable[[], None]
Wanted = Iterable[tuple[torch.Tensor, int]]


class Prefixes:
    """The frozen prefixes of a model on this device's samples."""

    def __init__(self, model: BlockModel, samples: Samples, directory: Path) -> None:
        """``directory`` is where outputs are kept that are to be kept on disk."""
        self._model, self._samples = model, samples
        self._cache = PrefixCache(directory)
        self._fingerprint: str | None = None
        self._current: OpenPrefix | None = None

    def open(
        self,
        prefix: FrozenPrefix,
        hashes: Mapping[str, str],
        *,
        limit_bytes: int,
        batch_size: int,
        load: Load,
        wanted: Wanted | None = None,
        pause: Pause = lambda: None,
    ) -> OpenPrefix | None:
        """A prefix that is ready for the ``wanted`` samples and views; None when there is none.

        hashes:      content hash of every block of the prefix.
        limit_bytes: what kept outputs may take, in memory or on disk.
        batch_size:  samples computed at once. Outputs are those of the ordinary forward to the bit
                     when its batches have this size too and its kernels treat every place in a
                     batch alike, which those for very small matrices do not; else to rounding.
        load:        writes a block's weights into the model; called for blocks of the prefix, and
                     only when something has to be computed.
        wanted:      pairs of samples and view, all by default. Others are computed when they are
                     asked for.
        pause:       called before every batch computed here; may raise to stop.

        Afterwards the model has no weights of blocks that ``hollow.unloaded`` names. NoPrefix
        says why the blocks cannot be run apart.
        """
        if not prefix.blocks or (prefix.engine, prefix.cache) == ("torch", "none"):
            self.close()
            return None
        key = self._key(prefix, hashes)
        batch_size = min(batch_size, self._samples.count)
        opened = self._opened(key, prefix, limit_bytes, load, batch_size)
        try:
            opened.prepare(batch_size, self._all() if wanted is None else wanted, pause)
        except (NoRoom, StateError) as error:
            self.close()
            self._cache.clear(key)
            raise NoPrefix(f"what frozen blocks compute cannot be kept: {error}") from error
        except NoPrefix:
            self.close()
            raise
        return opened

    def _opened(
        self, key: Key, prefix: FrozenPrefix, limit_bytes: int, load: Load, batch_size: int
    ) -> OpenPrefix:
        """The open prefix when it is this one, else this one opened."""
        if self._current is not None and (self._current.key, self._current.how) == (key, prefix):
            self._current.expect_other_weights(load)
            return self._current
        self.close()
        self._check_task(prefix)
        opened = OpenPrefix(self._model, self._samples, key, prefix, load, batch_size)
        try:
            opened.keep(self._cache, limit_bytes)
        except (NoRoom, StateError) as error:
            raise NoPrefix(f"what frozen blocks compute cannot be kept: {error}") from error
        self._current = opened
        return opened

    def close(self) -> None:
        """Give up memory and open files; what is on disk stays."""
        if self._current is not None:
            self._current.close()
            self._current = None

    def _all(self) -> Wanted:
        index = torch.arange(self._samples.count)
        return [(index, view) for view in range(self._model.task.augment_views)]

    def _check_task(self, prefix: FrozenPrefix) -> None:
        task = self._model.task
        if task.random_prefix:
            raise NoPrefix(f"task {task.name!r}: random_prefix says its frozen blocks are random")
        lossy = prefix.engine == "onnx_int8" or prefix.dtype == "float16"
        if lossy and not task.lossy_prefix:
            raise NoPrefix(
                f"task {task.name!r}: what frozen blocks compute may not be approximate; say "
                "lossy_prefix=True to allow int8 and float16"
            )

    def _key(self, prefix: FrozenPrefix, hashes: Mapping[str, str]) -> Key:
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._samples.inputs)
        task = self._model.task
        return Key(
            task=task.name,
            blocks=tuple((name, hashes[name]) for name in prefix.blocks),
            model=hashlib.sha256(repr(self._model.module).encode()).hexdigest(),
            data=self._fingerprint,
            engine=prefix.engine,
            dtype=prefix.dtype,
            views=task.augment_views,
        )


class OpenPrefix:
    """One frozen prefix: what it kept, and how the rest runs from it."""

    def __init__(
        self,
        model: BlockModel,
        samples: Samples,
        key: Key,
        how: FrozenPrefix,
        load: Load,
        batch_size: int,
    ) -> None:
        self.key, self.how = key, how
        self._model, self._samples, self._load = model, samples, load
        self._batch_size = batch_size
        self._store: MemoryRows | DiskRows | None = None
        self._compute: Compute | None = None
        self._load_weights()
        with torch.random.fork_rng(devices=[]):
            self._cut, self._example = find_cut(
                model,
                how.blocks,
                lambda index: self._inputs(index, 0),
                samples.count,
                batch_size,
            )

    def output(self, index: torch.Tensor, view: int) -> Any:
        """The model's output for the samples at ``index``, with a gradient for trained blocks."""
        view %= self._model.task.augment_views
        rows = self.rows(index, view)
        return self._cut.above(self._model, rows, lambda: self._inputs(index, view))

    def rows(self, index: torch.Tensor, view: int) -> list[torch.Tensor]:
        """What frozen blocks compute of the samples at ``index``: kept, or computed now."""
        if self._store is None:
            return self._computed(self._inputs(index, view))
        places = self._places(index, view)
        for _ in range(2):
            missing = self._store.missing(places)
            if len(missing):
                self._fill(missing)
                if self._store.complete:
                    self._store.flush()
                    self._free()
            found = self._store.read(places)
            if found is not None:
                return _tensors(found)
        raise StateError(
            f"rows kept for task {self.key.task!r} are not what was written a moment ago: "
            "check the disk, or keep them in memory"
        )

    def keep(self, cache: PrefixCache, limit_bytes: int) -> None:
        """Open where outputs are kept; what is there already has to be what is computed now."""
        example, self._example = self._example, []
        if self.how.cache == "none":
            return
        layout = self._layout(example)
        if self.how.cache == "memory":
            self._store = MemoryRows(layout, limit_bytes)
            return
        self._store = cache.open(self.key, layout, limit_bytes)
        if not self._is_true(self._store):
            self._store.close()
            cache.clear(self.key)
            self._store = cache.open(self.key, layout, limit_bytes)

    def expect_other_weights(self, load: Load) -> None:
        """The model was used otherwise: before torch computes here, ``load`` has to be called."""
        self._load, self._has_weights = load, False
        if self.how.engine == "torch":
            self._compute = None

    def prepare(self, batch_size: int, wanted: Wanted, pause: Pause) -> None:
        """Compute what is wanted and not there; then free the weights of the frozen blocks."""
        self._batch_size = batch_size
        if self._store is None:
            self._engine()
            return
        asked = False
        for index, view in wanted:
            asked = True
            missing = self._store.missing(self._places(index, view))
            if len(missing):
                self._engine()
            for first in range(0, len(missing), batch_size):
                pause()
                self._fill(missing[first : first + batch_size])
        self._store.flush()
        if asked or self._store.complete:
            self._free()

    def close(self) -> None:
        """Give up what is held; what is on disk and flushed stays."""
        if self._store is not None:
            self._store.close()
        self._store = self._compute = None

    def _inputs(self, index: torch.Tensor, view: int) -> Any:
        return view_of(self._model.task, self._samples, index, view)

    def _places(self, index: torch.Tensor, view: int) -> Array:
        """Rows of samples in a view: all samples of one view after those of another."""
        place: Array = index.numpy() + view * self._samples.count
        return place

    def _layout(self, example: list[torch.Tensor]) -> Layout:
        columns = []
        for tensor in example:
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in DTYPE_BYTES:
                raise NoPrefix(f"frozen blocks compute {dtype}, which cannot be kept")
            kept = self.how.dtype if dtype == "float32" else dtype
            columns.append(Column(shape=tuple(tensor.shape[1:]), dtype=dtype, kept=kept))
        rows = self._samples.count * self._model.task.augment_views
        return Layout(rows=rows, columns=tuple(columns))

    def _is_true(self, rows: DiskRows) -> bool:
        """Whether some of the rows that are there are what torch computes of the samples now."""
        present = rows.present(min(CHECKED_SAMPLES, self._batch_size))
        views, samples = np.divmod(present, self._samples.count)
        for view in np.unique(views).tolist():
            index = torch.from_numpy(samples[views == view])
            kept = rows.read(present[views == view])
            if kept is not None and not self._agrees(_tensors(kept), self._inputs(index, view)):
                return False
        return True

    def _agrees(self, outputs: list[torch.Tensor], inputs: Any) -> bool:
        """Whether outputs for these inputs are torch's, as exactly as engine and dtype can."""
        tolerance = TOLERANCE[self.how.engine]
        if self.how.dtype == "float16":
            tolerance = max(tolerance, FLOAT16_TOLERANCE)
        with torch.no_grad():
            wanted = self._cut.below(self._model, inputs)
        return all(_distance(a, b) <= tolerance for a, b in zip(outputs, wanted, strict=True))

    def _fill(self, places: Array) -> None:
        """Compute and keep rows, those of one view at a time.

        Always in whole batches: the number of samples decides how kernels order their sums.
        """
        assert self._store is not None
        size = self._batch_size
        views, samples = np.divmod(places, self._samples.count)
        for view in np.unique(views).tolist():
            chosen = np.flatnonzero(views == view)
            for part in np.split(chosen, range(size, len(chosen), size)):
                index = np.resize(samples[part], size)
                outputs = self._computed(self._inputs(torch.from_numpy(index), view))
                self._store.write(places[part], [t[: len(part)].numpy() for t in outputs])

    def _computed(self, inputs: Any) -> list[torch.Tensor]:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return self._engine()(inputs)

    def _engine(self) -> Compute:
        """What computes outputs; made, with the weights loaded for it, when there is none."""
        if self._compute is None:
            if not self._has_weights:
                self._load_weights()
            if self.how.engine == "torch":
                self._compute = lambda inputs: self._cut.below(self._model, inputs)
            else:
                self._compute = self._onnx()
        return self._compute

    def _onnx(self) -> Compute:
        count = self._samples.count
        inputs, others = (self._inputs(torch.arange(n) % count, 0) for n in (2, 3))
        compute = onnx_engine(self._model, self._cut, inputs, int8=self.how.engine == "onnx_int8")
        # Another number of samples than was exported, so that one baked in is noticed.
        try:
            differs = not self._agrees(compute(others), others)
        except TaskError as error:
            raise NoPrefix(f"the frozen blocks cannot run in ONNX Runtime: {error}") from error
        if differs:
            raise NoPrefix(
                f"task {self._model.task.name!r}: in ONNX Runtime ({self.how.engine}) the frozen "
                "blocks compute something else than in torch"
            )
        self._unload_weights()
        return compute

    def _load_weights(self) -> None:
        restore(self._model, self.how.blocks)
        for block in self.how.blocks:
            self._load(block)
        self._has_weights = True

    def _unload_weights(self) -> None:
        unload(self._model, self._cut.tensors)
        self._has_weights = False

    def _free(self) -> None:
        """Everything needed is kept: let go of what computes it."""
        self._compute = None
        self._unload_weights()


def _distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was wanted."""
    if got.shape != wanted.shape:
        return math.inf
    size = float(wanted.double().norm())
    difference = float((got.double() - wanted.double()).norm())
    return difference / size if size else difference


def _tensors(arrays: list[Array]) -> list[torch.Tensor]:
    # In torch's own memory: its alignment decides how kernels order their sums.
    return [torch.from_numpy(array).clone() for array in arrays]


def fingerprint(inputs: Any) -> str:
    """SHA-256, hex, over all inputs of all samples."""
    digest = hashlib.sha256()
    _digest(inputs, digest.update)
    return digest.hexdigest()


def _digest(data: Any, update: Callable[[bytes], None]) -> None:
    if isinstance(data, Mapping):
        for name, value in data.items():
            update(f"{name}=".encode())
            _digest(value, update)
    elif isinstance(data, tuple):
        update(f"{len(data)}:".encode())
        for value in data:
            _digest(value, update)
    else:
        update(f"{data.dtype}{tuple(data.shape)}".encode())
        for part in torch.split(data, max(1, HASHED_BYTES * len(data) // max(1, data.nbytes))):
            update(part.contiguous().numpy().tobytes())

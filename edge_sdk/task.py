"""The user's task: how to build the model, its blocks, its loss and its data.

A task file is a Python file with a function ``task()`` that returns a ``Task``. It runs with the
rights of whoever starts the command, like any program; nothing of it ever travels.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk.errors import EdgeError, TaskError
from edge_sdk.wire import DEVICE_ID, Training

# Each view of each sample may be kept on the device.
MAX_VIEWS = 1024


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is learned, on which data.

    name:         label of the task, a-z, 0-9 and '-'.
    build_model:  returns the ``torch.nn.Module``; the same architecture on every machine.
    loss:         ``loss(output, targets)``, a scalar tensor, the mean over the samples.
    train_data:   ``train_data(part, parts)`` returns ``(inputs, targets)`` of this device, samples
                  along the first axis. Inputs: an array, or a tuple or dict of arrays passed to the
                  model as arguments. A device with its own data ignores ``part`` and ``parts``.
    test_data:    held-out ``(inputs, targets)`` for the server, or None.
    public_data:  ``(inputs, targets)`` the server may pre-train on, or None.
    blocks:       block name to the prefixes of ``state_dict`` keys in it, from the input to the
                  output, the head last; None finds the blocks in the usual model layouts.
    chains:       chain name to its block names, for models with several inputs; blocks in no chain
                  form the trunk that joins them.
    training:     optimiser, learning rate, batch size, local epochs.
    pretraining:  how the server trains on ``public_data`` before the first round; None: not at all.
    augment:      ``augment(inputs, generator)`` returns changed inputs, or None. It is called with
                  one sample at a time, a batch of 1, and a ``torch.Generator`` from which it draws
                  all its random numbers: seeded from the sample and the view, so that a view of a
                  sample is always the same. The results are joined along the first axis. Not used
                  for evaluation.
    augment_views: in how many views each sample is seen, one per epoch, in turn. The number is
                  fixed so that what frozen blocks compute of each view can be kept.
    random_prefix: frozen blocks compute something else each time, so it must not be kept.
    lossy_prefix: what frozen blocks compute may be approximate: int8 arithmetic, float16 storage.
    """

    name: str
    build_model: Callable[[], Any]
    loss: Callable[[Any, Any], Any]
    train_data: Callable[[int, int], tuple[Any, Any]]
    test_data: Callable[[], tuple[Any, Any]] | None = None
    public_data: Callable[[], tuple[Any, Any]] | None = None
    blocks: Mapping[str, Sequence[str]] | None = None
    chains: Mapping[str, Sequence[str]] | None = None
    training: Training = field(default_factory=Training)
    pretraining: Training | None = None
    augment: Callable[[Any, Any], Any] | None = None
    augment_views: int = 1
    random_prefix: bool = False
    lossy_prefix: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or re.match(DEVICE_ID, self.name) is None:
            raise TaskError(
                f"Task(name={self.name!r}): use 1 to 64 of the characters a-z, 0-9, '-'"
            )
        for attribute in ("build_model", "loss", "train_data"):
            if not callable(getattr(self, attribute)):
                raise TaskError(f"Task({attribute}=...) of {self.name!r} is not callable")
        if not isinstance(self.training, Training) or not isinstance(
            self.pretraining, Training | None
        ):
            raise TaskError(f"Task {self.name!r}: training and pretraining must be Training(...)")
        self._check_augmentation()

    def _check_augmentation(self) -> None:
        if self.augment is not None and not callable(self.augment):
            raise TaskError(f"Task(augment=...) of {self.name!r} is not callable")
        views = self.augment_views
        if type(views) is not int or not 1 <= views <= MAX_VIEWS:
            raise TaskError(
                f"Task(augment_views={views!r}) of {self.name!r}: "
                f"give a whole number from 1 to {MAX_VIEWS}"
            )
        if views > 1 and self.augment is None:
            raise TaskError(
                f"Task(augment_views={views}) of {self.name!r}: there is no augment to make views; "
                "add augment=..., or leave augment_views out"
            )
        for attribute in ("random_prefix", "lossy_prefix"):
            if type(getattr(self, attribute)) is not bool:
                raise TaskError(f"Task({attribute}=...) of {self.name!r}: say True or False")


def check_task_file(path: Path) -> None:
    """Fail before torch is loaded when there is no such file at all."""
    if not path.is_file():
        raise TaskError(f"task file {path}: no such file; give a Python file that defines task()")


def load_task(path: Path) -> Task:
    """The task of a task file; TaskError says what is wrong with the file and where."""
    check_task_file(path)
    module = _import(path)
    make = getattr(module, "task", None)
    if not callable(make):
        raise TaskError(f"task file {path}: defines no function task(); add `def task() -> Task:`")
    try:
        task = make()
    except (Exception, SystemExit) as error:
        raise TaskError(f"task file {path}: task() failed{_place(error, path)}") from error
    if not isinstance(task, Task):
        code = getattr(make, "__code__", None)
        where = f" at line {code.co_firstlineno}" if code is not None else ""
        raise TaskError(
            f"task file {path}: task(){where} returned {type(task).__name__}, "
            "expected edge_sdk.Task"
        )
    return task


def _import(path: Path) -> Any:
    name = f"edge_sdk_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task file {path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise TaskError(f"task file {path}: does not import{_place(error, path)}") from error
    return module


def _place(error: BaseException, path: Path) -> str:
    """The last line of the task file that took part, and what went wrong."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError):
        frames.append((str(error.filename), error.lineno))
    # Python runs a file by its absolute path, however it was named here.
    lines = [line for file, line in frames if Path(file).resolve() == path.resolve()]
    where = f" at line {lines[-1]}" if lines else ""
    what = "" if isinstance(error, EdgeError) else f"{type(error).__name__}: "
    return f"{where}: {what}{error}"

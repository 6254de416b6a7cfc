"""Activations inside a block are not kept: backward runs the block a second time to have them.

Written out because torch's own checkpointing loads torch's compiler: seconds and 80 MiB on every
device. While a block runs, what autograd would save is dropped and only its place remembered. When
a gradient arrives at its output the block runs again, from the same inputs, buffers and random
state, and the tensors are caught as they are saved for the second time. Both runs do the same
operations on the same values, so gradients are the same to the bit.

What a block changes in place, its own input or a buffer such as the statistics of a BatchNorm, is
found out in its first run and copied before every later one. Randomness that is not torch's, and
state that is no buffer, is not repeated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from edge_sdk.errors import TaskError
from edge_sdk.model import BlockModel

# These keep little more for backward than their input, which is kept anyway.
KEEP_ONLY_THEIR_INPUT = (
    nn.Linear,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
)

Place = tuple[Any, ...]


def block_modules(model: BlockModel) -> dict[str, str]:
    """Path of the module that is a block, for every block that is exactly one submodule.

    The outermost one, so that what has no tensors, such as an activation, is inside. A block whose
    tensors are spread over several modules, or that is the whole model, has none.
    """
    block_of = {t.name: b.name for b in model.spec.blocks for t in b.tensors}
    size_of = {b.name: len(b.tensors) for b in model.spec.blocks}
    found: dict[str, str] = {}
    for path, module in model.module.named_modules():
        inside = [block_of[key] for key in block_of if key.startswith(path + ".")]
        runs = type(module).forward is not nn.Module.forward
        if path and runs and len(set(inside)) == 1 and len(inside) == size_of[inside[0]]:
            found.setdefault(inside[0], path)
    return {name: found[name] for name in model.spec.names if name in found}


def recomputed_blocks(model: BlockModel) -> dict[str, str]:
    """Those of ``block_modules`` that are run again in backward under ``recomputing``."""
    return {
        name: path
        for name, path in block_modules(model).items()
        if not isinstance(model.module.get_submodule(path), KEEP_ONLY_THEIR_INPUT)
    }


@contextmanager
def recomputing(model: BlockModel) -> Iterator[None]:
    """Within, blocks that are one module keep only their input for backward."""
    with ExitStack() as stack:
        for name, path in recomputed_blocks(model).items():
            attributes = vars(model.module.get_submodule(path))
            stack.callback(_restore, attributes, attributes.get("forward"))
            attributes["forward"] = _Block(name, model.module.get_submodule(path))
        yield


def _restore(attributes: dict[str, Any], forward: Any) -> None:
    attributes.pop("forward")
    if forward is not None:
        attributes["forward"] = forward


class _Block:
    """Stands in for the forward of a block's module."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.forward: Callable[..., Any] = module.forward
        self._changing: set[Place] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        run = _Run(self, args, kwargs)
        before = {**run.inputs, **self.buffers()}
        versions = {place: tensor._version for place, tensor in before.items()}
        copies = {
            place: tensor.clone() if place in run.inputs else tensor.detach().clone()
            for place, tensor in before.items()
            if self._changing is None or place in self._changing
        }
        run.seal(copies)  # for a block that computes gradients before it is done
        with saved_tensors_hooks(run.drop, _fetch):
            output = self.forward(*args, **kwargs)
        after = {**run.inputs, **self.buffers()}
        changed = {
            place
            for place, tensor in after.items()
            if tensor is not before.get(place)
            or tensor._version != versions[place]
            or (self._changing is None and not torch.equal(tensor, copies[place]))
        }
        if self._changing is None:
            self._changing = changed
        if changed - copies.keys():
            raise TaskError(
                f"block {self.name!r}: its input or one of its buffers is changed in place in some "
                "runs only, so it cannot be recomputed; write x = x + y instead of x += y"
            )
        run.seal({place: copies[place] for place in self._changing})
        _rebuilt((), output, run.precede)
        return output

    def buffers(self) -> dict[Place, torch.Tensor]:
        """The block's buffers as they are now."""
        return {
            ("buffer", path, name): tensor
            for path, module in self.module.named_modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        }

    @contextmanager
    def with_buffers(self, copies: dict[Place, torch.Tensor]) -> Iterator[None]:
        """Within, the module has copies of its buffers as they were; what it does to them is lost.

        Only places of buffers in ``copies`` count.
        """
        homes = [
            (self.module.get_submodule(place[1])._buffers, place[2], tensor)
            for place, tensor in copies.items()
            if place[0] == "buffer"
        ]
        now = [home[name] for home, name, _ in homes]
        try:
            for home, name, tensor in homes:
                home[name] = tensor.clone()
            yield
        finally:
            for (home, name, _), latest in zip(homes, now, strict=True):
                home[name] = latest


class _Saved:
    """What autograd holds in place of one tensor; the tensor itself once the block ran again."""

    __slots__ = ("__weakref__", "kind", "run", "tensor", "version")

    def __init__(self, run: _Run, tensor: torch.Tensor) -> None:
        self.run = run
        self.kind = tensor.shape, tensor.dtype
        self.tensor: torch.Tensor | None = None
        self.version = 0


class _Run:
    """One run of a block: what is needed to do it again. Lives as long as what it saved."""

    def __init__(self, block: _Block, args: Any, kwargs: Any) -> None:
        self._block = block
        self.inputs: dict[Place, torch.Tensor] = {}
        self._call = _rebuilt(("input",), (args, kwargs), self._note)
        self._random = torch.get_rng_state()
        self._saved: list[weakref.ref[_Saved]] = []
        self._copies: dict[Place, torch.Tensor] = {}
        self._versions: dict[Place, int] = {}

    def _note(self, place: Place, tensor: torch.Tensor) -> torch.Tensor:
        self.inputs[place] = tensor
        return tensor

    def seal(self, copies: dict[Place, torch.Tensor]) -> None:
        """``copies`` are what the run changes, as that was before; the rest stays as it is now."""
        self._copies = copies
        self._versions = {place: tensor._version for place, tensor in self.inputs.items()}

    def precede(self, _: Place, output: torch.Tensor) -> None:
        """Have the block run again before a gradient enters it: then no parameter is stepped yet.

        Weakly, because an output lives until all of backward is done.
        """
        this = weakref.ref(self)

        def ahead(_: torch.Tensor) -> None:
            run = this()
            if run is not None:
                run.again()

        if output.requires_grad:
            output.register_hook(ahead)  # type: ignore[no-untyped-call]

    def drop(self, tensor: torch.Tensor) -> _Saved:
        """Autograd saves a tensor in the first run."""
        saved = _Saved(self, tensor)
        self._saved.append(weakref.ref(saved))
        return saved

    def again(self) -> None:
        """Run the block a second time, as far as needed, and fill in what was dropped."""
        filling = _Filling([ref() for ref in self._saved])
        if filling.complete:
            return
        for place, tensor in self.inputs.items():
            if place not in self._copies and tensor._version != self._versions[place]:
                raise TaskError(
                    f"block {self._block.name!r}: its input was changed in place after it ran, so "
                    "it cannot be recomputed; write x = x + y instead of x += y"
                )
        args, kwargs = _rebuilt(
            ("input",), self._call, lambda place, tensor: self._copies.get(place, tensor)
        )
        random = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            with (
                self._block.with_buffers(self._copies),
                torch.enable_grad(),
                saved_tensors_hooks(filling.catch, lambda tensor: tensor),
            ):
                self._block.forward(*args, **kwargs)
        except _Enough:
            pass
        finally:
            torch.set_rng_state(random)
        if not filling.complete:
            raise self.differs()

    def differs(self) -> TaskError:
        """The second run was not the first one again."""
        return TaskError(
            f"block {self._block.name!r}: run a second time, it did something else, so it cannot "
            "be recomputed; draw random numbers from torch and keep state in buffers"
        )


class _Enough(BaseException):  # no Exception: a module must not swallow it
    """All that was dropped is there again; the rest of the block need not run."""


class _Filling:
    """Catches, in the second run, what the first one saved, in the same order."""

    def __init__(self, wanted: list[_Saved | None]) -> None:
        self._wanted = wanted
        # The graph may have let go of some; the block has to run up to the last one needed.
        missing = [n for n, saved in enumerate(wanted, 1) if saved and saved.tensor is None]
        self._needed = max(missing, default=0)
        self._place = 0

    @property
    def complete(self) -> bool:
        """Whether everything needed is there."""
        return self._place >= self._needed

    def catch(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd saves a tensor in the second run."""
        saved = self._wanted[self._place] if self._place < len(self._wanted) else None
        self._place += 1
        tensor = tensor.detach()
        if saved is not None:
            if saved.kind != (tensor.shape, tensor.dtype):
                raise saved.run.differs()
            saved.tensor, saved.version = tensor, tensor._version
        if self.complete:
            raise _Enough
        return tensor


def _fetch(saved: _Saved) -> torch.Tensor:
    """Backward asks for a tensor."""
    if saved.tensor is None:
        saved.run.again()
    if saved.tensor is None:
        raise saved.run.differs()
    if saved.tensor._version != saved.version:
        raise TaskError(
            "a tensor needed for a gradient was changed in place before it was used: a parameter "
            "that is also used detached cannot be stepped in backward"
        )
    return saved.tensor


def _rebuilt(place: Place, data: Any, change: Callable[[Place, torch.Tensor], Any]) -> Any:
    """The same tuples, lists and dicts anew, with ``change(place, tensor)`` for each tensor."""
    if isinstance(data, torch.Tensor):
        return change(place, data)
    if type(data) is dict:
        return {key: _rebuilt((*place, key), value, change) for key, value in data.items()}
    if isinstance(data, tuple) or type(data) is list:
        items = [_rebuilt((*place, n), value, change) for n, value in enumerate(data)]
        named = hasattr(data, "_fields")
        return type(data)(*items) if named else type(data)(items)
    return data

"""Where frozen blocks are cut off a model, and how the rest runs from what they computed.

The rest is the model's own ``forward``, run as it is, with the modules of the frozen blocks
replaced. The last one of each chain returns what it computed before; those below it return hollow
tensors of the right shape, NaN everywhere. Had anything of the frozen blocks but the kept outputs a
way into the rest, its result would be NaN: one comparison with the ordinary ``forward`` proves a
cut. Meta tensors would do the same, but the first operation on one loads torch's compiler: seconds
and 70 MiB on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edge_sdk.blocks import TRUNK
from edge_sdk.errors import TaskError
from edge_sdk.hollow import Shape, emptied, is_plain, mapped, shapes
from edge_sdk.model import BlockModel

# Sums in another order differ by less, another function by more.
RELATIVE_TOLERANCE = 1e-3
CHECKED_SAMPLES = 16

Inputs = Callable[[torch.Tensor], Any]


class NoPrefix(TaskError):
    """The frozen blocks cannot be run apart; training has to run them every time."""


@dataclass(frozen=True)
class KeptOutput:
    """What module ``path`` returns: ``times`` entries a sample along ``axis``."""

    path: str
    axis: int
    times: int

    def rows(self, output: torch.Tensor) -> torch.Tensor:
        """The output with samples along the first axis."""
        if self.times > 1:
            shape = list(output.shape)
            shape[self.axis : self.axis + 1] = [-1, self.times]
            output = output.reshape(shape)
        return output.movedim(self.axis, 0).contiguous()

    def batch(self, rows: torch.Tensor) -> torch.Tensor:
        """What the module returned, from its rows."""
        output = rows.movedim(0, self.axis)
        if self.times > 1:
            output = output.flatten(self.axis, self.axis + 1)
        return output.contiguous()


@dataclass(frozen=True)
class Cut:
    """A cut through a model whose ``blocks`` are frozen.

    kept:     what is kept of each sample, one output a chain.
    stubs:    what the other replaced modules return, as shapes, by path.
    blind:    the shapes of the inputs when the rest does not need their values, else None.
    dense:    whether stubs return tensors that may be changed in place.
    training: which modules are in training mode while the frozen blocks run.
    tensors:  what can be unloaded once every needed output is kept.
    """

    blocks: tuple[str, ...]
    kept: tuple[KeptOutput, ...]
    stubs: Mapping[str, Any]
    blind: Any
    dense: bool
    training: Mapping[str, bool]
    tensors: tuple[str, ...]

    def below(self, model: BlockModel, inputs: Any) -> list[torch.Tensor]:
        """What is kept of a batch: one tensor an output, samples along the first axis."""
        watch = _Watch(model, [], [output.path for output in self.kept])
        watch.run(inputs, self.training)
        return [output.rows(watch.kept[output.path]) for output in self.kept]

    def above(self, model: BlockModel, rows: list[torch.Tensor], inputs: Callable[[], Any]) -> Any:
        """The model's output for the batch ``rows`` was kept of; ``rows`` may be overwritten."""
        count = len(rows[0])
        given = {o.path: o.batch(kept) for o, kept in zip(self.kept, rows, strict=True)}
        for path, shape in self.stubs.items():
            given[path] = mapped(shape, Shape, lambda s: self._stub(s.at(count)))
        with _replaced(model, given):
            if self.blind is None:
                return model.run(inputs())
            return model.run(mapped(self.blind, Shape, lambda s: s.at(count)))

    def _stub(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone(memory_format=torch.contiguous_format) if self.dense else tensor


@torch.no_grad()
def find_cut(
    model: BlockModel, blocks: tuple[str, ...], inputs: Inputs, count: int, batch_size: int
) -> tuple[Cut, list[torch.Tensor]]:
    """A proven cut, and what it keeps of the first samples out of ``count``.

    ``inputs(index)`` are the model's inputs, asked for at most ``batch_size`` samples, but two.
    NoPrefix when no way of cutting gives the ordinary forward's result, or the frozen blocks do not
    compute each sample by itself, always the same.
    """
    index = torch.arange(max(2, min(batch_size, CHECKED_SAMPLES))) % count
    parts = _parts(model, blocks)
    plain = _plain(model, [path for paths in parts.values() for path in paths])
    seen = _Watch(model, [*(p for paths in parts.values() for p in paths), *plain])
    wanted = seen.run(inputs(index), {})
    ends = _ends(model, parts, seen)
    training = _training(model, blocks)
    # One sample less, in another order: shapes tell what grows with the batch, values whether a
    # sample's output depends on its neighbours or on chance.
    first, again = _Watch(model, seen.once, ends), _Watch(model, seen.once, ends)
    first.run(inputs(index), training)
    again.run(inputs(index[:-1].flip(0)), training)
    kept = tuple(
        _kept_output(path, first.kept[path], again.kept[path], len(index)) for path in ends
    )
    rows = [output.rows(first.kept[output.path]) for output in kept]
    for output, large in zip(kept, rows, strict=True):
        if not same(output.rows(again.kept[output.path]), large[:-1].flip(0)):
            raise NoPrefix(
                f"task {model.task.name!r}: what module {output.path!r} computes of a sample "
                "depends on chance or on the other samples of its batch (dropout or batch "
                "statistics in the frozen part), so it cannot be kept"
            )
    stubs = {
        path: shapes(first.returned[path], again.returned[path], len(index))
        for path in first.returned
        if path in again.returned and path not in ends
    }
    gone = [path for path in (*stubs, *ends) if path not in plain]
    names = (t.name for block in blocks for t in model.spec.block(block).tensors)
    tensors = tuple(name for name in names if any(name.startswith(p + ".") for p in gone))
    cut = Cut(blocks, kept, stubs, None, False, training, tensors)
    blind = _blind(inputs, index)
    for way in _ways(cut, plain, blind):
        if _is_proven(way, model, [large.clone() for large in rows], inputs, index, wanted):
            return way, rows
    raise NoPrefix(
        f"task {model.task.name!r}: from the output of {', '.join(ends)} alone the rest of the "
        "model does not compute what the whole does: it reads something else of the frozen blocks"
    )


def _ways(cut: Cut, plain: Collection[str], blind: Any) -> Iterator[Cut]:
    """Ways to make the stubs, the cheapest to run first."""
    if blind is not None:
        yield replace(cut, blind=blind)
    yield cut
    # A module without tensors may also be read by the rest; what stubs return be changed in place.
    fewer = {path: shape for path, shape in cut.stubs.items() if path not in plain}
    yield replace(cut, stubs=fewer)
    yield replace(cut, stubs=fewer, dense=True)


def _is_proven(
    cut: Cut,
    model: BlockModel,
    rows: list[torch.Tensor],
    inputs: Inputs,
    index: torch.Tensor,
    wanted: Any,
) -> bool:
    try:
        with _modes(model, {}):
            return same(cut.above(model, rows, lambda: inputs(index)), wanted)
    except Exception:  # a model may fail in any way on what is hollow: then it is no way to cut it
        return False


def _blind(inputs: Inputs, index: torch.Tensor) -> Any:
    """Shapes of inputs that are all floats; None when others are among them.

    Whether a token or a mask counts does not show as NaN.
    """
    large, small = inputs(index), inputs(index[:-1])
    leaves: list[torch.Tensor] = []
    mapped(large, torch.Tensor, leaves.append)
    if not all(leaf.is_floating_point() for leaf in leaves):
        return None
    return shapes(large, small, len(index))


def _training(model: BlockModel, blocks: Collection[str]) -> dict[str, bool]:
    """Modes as they are in training, but for layers whose statistics that would change."""
    modes = [(module, module.training) for module in model.module.modules()]
    grads = [(p, p.requires_grad) for p in model.module.parameters()]
    model.open_only([name for name in model.spec.names if name not in blocks])
    found = {
        path: module.training and not isinstance(module, nn.modules.batchnorm._NormBase)
        for path, module in model.module.named_modules()
    }
    for module, mode in modes:
        module.training = mode
    for parameter, grad in grads:
        parameter.requires_grad_(grad)
    return found


@contextmanager
def _modes(model: BlockModel, training: Mapping[str, bool]) -> Iterator[None]:
    """Within, modules are in the given modes, those not named in evaluation mode."""
    changed = [
        (module, module.training)
        for path, module in model.module.named_modules()
        if module.training != training.get(path, False)
    ]
    for module, mode in changed:
        module.training = not mode
    try:
        yield
    finally:
        for module, mode in changed:
            module.training = mode


@contextmanager
def _replaced(model: BlockModel, given: Mapping[str, Any]) -> Iterator[None]:
    """Within, these modules return what is given instead of running."""
    attributes = [(vars(model.module.get_submodule(path)), value) for path, value in given.items()]
    before = [own.get("forward") for own, _ in attributes]
    for own, value in attributes:
        own["forward"] = lambda *_, _value=value, **__: _value
    try:
        yield
    finally:
        for (own, _), forward in zip(attributes, before, strict=True):
            del own["forward"]
            if forward is not None:
                own["forward"] = forward


class _Reached(BaseException):  # no Exception: a model must not swallow it
    """Every output to be kept is there; the rest of the model need not run."""


class _Watch:
    """Runs a model, notes which modules ran in which order, and keeps outputs.

    kept:     the outputs of the modules in ``keep``; when all are there the run ends.
    returned: what modules returned, hollow.
    """

    def __init__(
        self, model: BlockModel, paths: Collection[str], keep: Collection[str] = ()
    ) -> None:
        self._model, self._paths, self._keep = model, {*paths, *keep}, keep
        self._order: list[str] = []
        self.kept: dict[str, torch.Tensor] = {}
        self.returned: dict[str, Any] = {}

    @property
    def once(self) -> list[str]:
        """Modules that ran exactly once and returned nothing but tensors, in order."""
        return [p for p in self._order if self._order.count(p) == 1 and p in self.returned]

    def run(self, inputs: Any, training: Mapping[str, bool]) -> Any:
        """The output; None when everything to be kept was there before the end."""
        modules = [(path, self._model.module.get_submodule(path)) for path in self._paths]
        handles = [module.register_forward_hook(self._hook(path)) for path, module in modules]
        try:
            with _modes(self._model, training):
                return self._model.run(inputs)
        except _Reached:
            return None
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[[Any, Any, Any], None]:
        def after(_module: Any, _given: Any, output: Any) -> None:
            self._order.append(path)
            if is_plain(output):
                self.returned[path] = emptied(output)
            if path in self._keep:
                is_last = len(self.kept) + 1 == len(self._keep)
                # What runs until the last one is there may change this one in place.
                self.kept[path] = output if is_last else output.clone()
                if is_last:
                    raise _Reached

        return after


def _parts(model: BlockModel, blocks: Collection[str]) -> dict[str, list[str]]:
    """Per frozen block the outermost modules that hold nothing but tensors of it."""
    block_of = {t.name: b.name for b in model.spec.blocks for t in b.tensors}
    found: dict[str, list[str]] = {name: [] for name in blocks}
    taken: list[str] = []
    for path, module in _running(model):
        homes = {block_of[key] for key in block_of if key.startswith(path + ".")}
        if module.state_dict() and len(homes) == 1 and not _is_inside(path, taken):
            home = homes.pop()
            if home in found:
                found[home].append(path)
                taken.append(path)
    return found


def _plain(model: BlockModel, parts: Collection[str]) -> list[str]:
    """The outermost modules without tensors that are outside of ``parts``."""
    paths: list[str] = []
    for path, module in _running(model):
        if not module.state_dict() and not _is_inside(path, [*paths, *parts]):
            paths.append(path)
    return paths


def _running(model: BlockModel) -> Iterator[tuple[str, nn.Module]]:
    """Modules within the model that can be called, from the outside in."""
    for path, module in model.module.named_modules():
        if path and type(module).forward is not nn.Module.forward:
            yield path, module


def _is_inside(path: str, outer: Collection[str]) -> bool:
    return any(path.startswith(place + ".") for place in outer)


def _ends(model: BlockModel, parts: Mapping[str, list[str]], seen: _Watch) -> list[str]:
    """Per chain the part of its frozen blocks that ran last and returned one tensor."""
    chains: dict[str, set[str]] = {}
    for name, paths in parts.items():
        chains.setdefault(model.spec.block(name).chain, set()).update(paths)
    if TRUNK in chains and len(chains) > 1:  # it reads all the others
        chains = {TRUNK: chains[TRUNK]}
    last = []
    for chain, inside in chains.items():
        ran = [p for p in seen.once if p in inside and torch.is_tensor(seen.returned[p])]
        if not ran:
            raise NoPrefix(
                f"task {model.task.name!r}: no module of the frozen blocks of chain {chain!r} runs "
                "exactly once and returns one tensor, so there is no output to keep"
            )
        last.append(ran[-1])
    return last


def _kept_output(path: str, large: torch.Tensor, small: torch.Tensor, count: int) -> KeptOutput:
    sizes, fewer = tuple(large.shape), tuple(small.shape)
    grown = [axis for axis, (a, b) in enumerate(zip(sizes, fewer, strict=False)) if a != b]
    if len(sizes) == len(fewer) and len(grown) == 1:
        axis = grown[0]
        times = sizes[axis] - fewer[axis]
        if sizes[axis] == times * count:
            return KeptOutput(path, axis, times)
    raise NoPrefix(f"the output of module {path!r}, of shape {sizes}, has no axis of samples")


def same(got: Any, wanted: Any, tolerance: float = RELATIVE_TOLERANCE) -> bool:
    """Whether two outputs agree: numbers to a share of the largest, everything else exactly."""
    if isinstance(wanted, torch.Tensor):
        if not isinstance(got, torch.Tensor) or got.shape != wanted.shape:
            return False
        if not wanted.is_floating_point():
            return torch.equal(got, wanted)
        finite = wanted[wanted.isfinite()]
        largest = float(finite.abs().max()) if finite.numel() else 0.0
        return torch.allclose(got, wanted, rtol=tolerance, atol=tolerance * largest)
    if isinstance(wanted, Mapping):
        return isinstance(got, Mapping) and all(
            key in got and same(got[key], wanted[key], tolerance) for key in wanted
        )
    if isinstance(wanted, (tuple, list)):
        return len(got) == len(wanted) and all(
            same(a, b, tolerance) for a, b in zip(got, wanted, strict=True)
        )
    return wanted is None and got is None

"""Watch a training pass: every operator, every piece of memory, by the block at work.

The pass runs on tensors without memory (torch's ``meta`` device), so a model of any size can be
watched on any machine. A model that looks at values to decide what to do runs on real samples.
"""

from __future__ import annotations

import importlib
import sys
import types
import weakref
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edge_sdk.cost import Kind
from edge_sdk.errors import TaskError
from edge_sdk.fused import as_on_cpu, told_of_loops
from edge_sdk.model import BlockModel, watch_modules
from edge_sdk.operators import flops_of, kind_of

FORWARD, BACKWARD, LOWEST = "forward", "backward", "lowest"
_NO_NUMBER = 1 << 62
# What reading a byte costs, of writing one into new memory.
READ_SHARE = 0.25
# Memory that is only taken is touched by whoever fills it.
UNTOUCHED = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})


@dataclass(slots=True, eq=False)
class Store:
    """One piece of memory: where it was made and last read, and what keeps it for backward."""

    born: int
    size_bytes: int
    last_use: int
    savers: set[int] = field(default_factory=set)
    alive: bool = True
    gradient: bool = False
    frees_in_backward: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """Memory was taken (``sign`` 1) or given back (-1) while a segment ran."""

    backward: bool
    segment: int
    store: Store
    sign: int


@dataclass(slots=True)
class Counts:
    """Operators of one kind: how many, their floating-point operations, bytes read and written."""

    operators: float = 0.0
    flops: float = 0.0
    moved_bytes: float = 0.0

    def add(self, operators: float, flops: float, moved_bytes: float) -> None:
        """Count some more."""
        self.operators += operators
        self.flops += flops
        self.moved_bytes += moved_bytes


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """One pass. ``segments`` are the runs of operators of one block, in the order they ran."""

    def __init__(self, model: BlockModel, batch: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outside = {tensor.untyped_storage()._cdata for tensor in leaves(batch)}
        # Storages are known by their address, so those of the model must not be given back while
        # this lives, even when a module replaces its buffers.
        self._storages = [
            (tensor.untyped_storage(), name)
            for name in model.spec.names
            for tensor in model.tensors(name).values()
        ]
        self._block_of = {storage._cdata: name for storage, name in self._storages}
        self.segments = [model.spec.names[0]]
        self.inputs: list[set[int]] = [set()]
        self.stores: list[Store] = []
        self.events: list[Event] = []
        self.work: dict[tuple[str, int], dict[Kind, Counts]] = {}
        self.max_gradient_bytes: dict[int, int] = {}
        self._starts = [0]
        self._now, self._backward, self._closed = 0, False, False
        self._loops: list[range] = []
        self._looping = False
        self._known: dict[int, Store] = {}
        self._shares: dict[int, float] = {}

    def enter(self, block: str) -> None:
        """A module or a parameter of ``block`` is used: its segment begins if it is another one."""
        if self._backward or self.segments[self._now] == block:
            return
        if self._now == 0 and not self.work:
            self.segments[0] = block
            return
        self.segments.append(block)
        self.inputs.append(set())
        self._starts.append(torch._C._autograd._get_sequence_nr())
        self._now += 1

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd keeps ``tensor`` for backward."""
        store = self._known.get(tensor.untyped_storage()._cdata)
        if store is not None:
            store.savers.add(self._now)
        return tensor

    @contextmanager
    def loop(self) -> Iterator[None]:
        """What runs within, and its backward, is a loop of operators without Python between."""
        start, self._looping = torch._C._autograd._get_sequence_nr(), True
        try:
            yield
        finally:
            self._looping = False
            self._loops.append(range(start, torch._C._autograd._get_sequence_nr()))

    def turn_back(self, loss: torch.Tensor) -> None:
        """Forward is over."""
        self._backward = True
        for store in self.stores:
            store.frees_in_backward = store.alive
        self._shares = self._lowest_shares(loss)

    def close(self, parameters: Sequence[nn.Parameter]) -> None:
        """The pass is over: what is left are the gradients, and what the model itself keeps."""
        self._closed = True
        for parameter in parameters:
            if parameter.grad is not None:
                store = self._known.get(parameter.grad.untyped_storage()._cdata)
                if store is not None:
                    store.gradient = True
                    largest = self.max_gradient_bytes.get(store.born, 0)
                    self.max_gradient_bytes[store.born] = max(largest, store.size_bytes)

    def outline(self) -> list[tuple[bool, int, int]]:
        """What happened, without sizes."""
        return [(event.backward, event.segment, event.sign) for event in self.events]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [*leaves(args), *leaves(kwargs)]
        number = self._place(given)
        out = func(*args, **kwargs)
        made = list(leaves(out))
        for tensor in made:
            self._meet(tensor)
        if not func.is_view:
            self._count(number, func, args, kwargs, given, made, out)
        return out

    def _place(self, given: Sequence[torch.Tensor]) -> int:
        """Find the segment at work; the number of the autograd node in backward, else -1."""
        if self._backward:
            node = torch._C._current_autograd_node()
            number = -1 if node is None else int(node._sequence_nr())
            if 0 <= number < _NO_NUMBER:  # adding up a gradient has none: it stays where it was
                self._now = bisect_right(self._starts, number) - 1
            return number
        stores = [tensor.untyped_storage()._cdata for tensor in given]
        for key in stores:
            if key in self._block_of:
                self.enter(self._block_of[key])
        for key, tensor in zip(stores, given, strict=True):
            store = self._known.get(key)
            if store is not None:
                store.last_use = self._now
                if store.born < self._now and tensor.is_floating_point():
                    self.inputs[self._now].add(store.born)
        return -1

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._block_of or key in self._outside:
            return
        store = Store(self._now, storage.nbytes(), self._now)
        self._known[key] = store
        self.stores.append(store)
        self.events.append(Event(self._backward, self._now, store, 1))
        weakref.finalize(storage, self._lose, key, store)

    def _lose(self, key: int, store: Store) -> None:
        self._known.pop(key, None)
        if self._closed:  # a module kept it in a buffer until its next run
            return
        store.alive = False
        self.events.append(Event(self._backward, self._now, store, -1))

    def _count(
        self, number: int, func: Any, args: Any, kwargs: Any, given: Any, made: Any, out: Any
    ) -> None:
        name = func.overloadpacket.__name__
        if name in UNTOUCHED:
            return
        kind, flops = kind_of(name, args), flops_of(name, args, kwargs, out)
        if self._is_looped(number):
            kind = "cells"
        # A result costs its pages too, which the system has to clear first. Of a table, no more is
        # read than is found in it.
        read = made if kind == "gather" else given
        moved = sum(map(_size, made)) + READ_SHARE * sum(map(_size, read))
        phase = BACKWARD if self._backward else FORWARD
        self._row(phase, kind).add(1, flops, moved)
        if self._backward:
            share = self._shares.get(number, 1.0)
            if share == 0.5 and not flops:
                share = 1.0
            if share:
                self._row(LOWEST, kind).add(share, share * flops, share * moved)

    def _is_looped(self, number: int) -> bool:
        if self._backward and number >= 0:  # adding up a gradient goes with what made it
            self._looping = any(number in numbers for numbers in self._loops)
        return self._looping

    def _row(self, phase: str, kind: Kind) -> Counts:
        return self.work.setdefault((phase, self._now), {}).setdefault(kind, Counts())

    def _lowest_shares(self, loss: torch.Tensor) -> dict[int, float]:
        """What of each node's backward is left when its segment is the lowest trained one.

        Nodes that lead to no parameter of their own segment fall away. A product that leads to
        one, and to the segment below, computes one of its two gradients.
        """
        own: dict[int, bool] = {}
        shares: dict[int, float] = {}
        nodes = _graph(loss)
        for node in sorted(nodes, key=lambda n: int(n._sequence_nr())):
            number = int(node._sequence_nr())
            if number >= _NO_NUMBER:
                continue
            segment = bisect_right(self._starts, number) - 1
            leads = [
                self._is_own(below, segment, own)
                for below, _ in node.next_functions
                if below is not None
            ]
            own[number] = any(leads)
            shares[number] = 0.0 if not any(leads) else 1.0 if all(leads) else 0.5
        return shares

    def _is_own(self, node: Any, segment: int, own: Mapping[int, bool]) -> bool:
        number = int(node._sequence_nr())
        if number >= _NO_NUMBER:
            key = node.variable.untyped_storage()._cdata
            return self._block_of.get(key) == self.segments[segment]
        return bisect_right(self._starts, number) - 1 == segment and own.get(number, False)


def _graph(loss: torch.Tensor) -> list[Any]:
    """All nodes of autograd below a loss."""
    found: dict[Any, None] = {}
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting += [below for below, _ in node.next_functions]
    return list(found)


def watch_pass(model: BlockModel, trained: Sequence[str], inputs: Any, targets: Any) -> Watch:
    """Watch one pass with exactly ``trained`` open; forward only when there are none."""
    parameters = model.open_only(trained)
    watch = Watch(model, (inputs, targets))
    handles = watch_modules(model, watch.enter)
    saving = torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda tensor: tensor)
    try:
        with without_compiler(), told_of_loops(watch.loop), watch:
            with saving if trained else torch.no_grad():
                loss = model.task.loss(model.run(inputs), targets)
            if trained:
                _check_loss(model.task.name, loss)
                watch.turn_back(loss)
                loss.backward()
            watch.close(parameters)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
    return watch


def _check_loss(task: str, loss: Any) -> None:
    if not isinstance(loss, torch.Tensor):
        raise TaskError(f"task {task!r}: loss() returned {type(loss).__name__}, not a tensor")
    if loss.numel() != 1 or not loss.is_floating_point():
        raise TaskError(
            f"task {task!r}: loss() returned a tensor of shape {tuple(loss.shape)} and "
            f"{loss.dtype}; return one number, the mean over the samples"
        )
    if not loss.requires_grad:
        raise TaskError(
            f"task {task!r}: the loss does not depend on any parameter; in loss() and forward() "
            "use no detach(), item() or numpy()"
        )


@contextmanager
def left_as_it_was(model: BlockModel) -> Iterator[None]:
    """Whatever is run within, the model is open where it was and its attributes are what they were.

    Tensors that are changed in place stay changed.
    """
    modules = [(vars(module), dict(vars(module))) for module in model.module.modules()]
    parameters = [(p, p.requires_grad) for p in model.module.parameters()]
    try:
        yield
    finally:
        for attributes, before in modules:
            attributes.clear()
            attributes.update(before)
        for parameter, is_open in parameters:
            parameter.requires_grad_(is_open)


@contextmanager
def without_memory(model: BlockModel) -> Iterator[None]:
    """Within, the model's tensors are on the meta device; its weights are untouched."""
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = [
        (held, name, tensor)
        for module in model.module.modules()
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
        if tensor is not None
    ]
    try:
        for held, name, tensor in places:
            like = torch.empty_like(tensor, device="meta")
            held[name] = nn.Parameter(like, False) if isinstance(tensor, nn.Parameter) else like
        with as_on_cpu():
            yield
    finally:
        for held, name, tensor in places:
            held[name] = tensor


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within, torch does not load its compiler, which it does only to ask it to keep away.

    That import is 1.5 s and 80 MiB here, far more on the smallest boards.
    """
    name = "torch._dynamo"
    if name in sys.modules:
        yield
        return
    stub = _NoCompiler(name)
    sys.modules[name] = stub
    try:
        yield
    finally:
        if sys.modules.get(name) is stub:
            del sys.modules[name]


class _NoCompiler(types.ModuleType):
    """Stands in for torch's compiler until somebody wants more of it than to be left alone."""

    @staticmethod
    def disable(function: Any = None, *_args: Any, **_options: Any) -> Any:
        return function

    def __getattr__(self, attribute: str) -> Any:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), attribute)


def to_meta(data: Any) -> Any:
    """The same tensors without their memory."""
    if isinstance(data, Mapping):
        return {key: to_meta(value) for key, value in data.items()}
    if isinstance(data, tuple):
        return tuple(to_meta(value) for value in data)
    return torch.empty_like(data, device="meta")


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def leaves(data: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested arguments."""
    if isinstance(data, torch.Tensor):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from leaves(value)
    elif isinstance(data, (tuple, list)):
        for value in data:
            yield from leaves(value)

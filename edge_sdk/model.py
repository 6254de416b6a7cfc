"""A torch module seen as blocks: how it is cut, how weights get in and out.

Any module can be cut by naming ``state_dict`` prefixes. Without names the usual layouts are
recognised: ``nn.Sequential``; layers in a ``ModuleList`` (or nested ``Sequential``) with something
before and after; several such branches, each a chain, joined by a trunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_sdk.blocks import TRUNK, Block, ModelSpec, TensorSpec
from edge_sdk.errors import TaskError
from edge_sdk.task import Task

Groups = dict[str, list[str]]
Arrays = dict[str, "np.ndarray[Any, Any]"]
_DTYPES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.float64: "float64",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.uint8: "uint8",
    torch.bool: "bool",
}


class BlockModel:
    """A task's module together with its description as blocks."""

    def __init__(self, task: Task) -> None:
        self.task = task
        try:
            self.module: nn.Module = task.build_model()
        except Exception as error:
            raise TaskError(f"task {task.name!r}: build_model() failed: {error}") from error
        if not isinstance(self.module, nn.Module):
            raise TaskError(
                f"task {task.name!r}: build_model() returned {type(self.module).__name__}, "
                "expected torch.nn.Module"
            )
        self.groups, self.chain_of = cut(self.module, task)
        self.spec = _describe(self.module, self.groups, self.chain_of)

    def tensors(self, block: str) -> dict[str, torch.Tensor]:
        """The live tensors of a block, by name: looked up anew, a module may replace a buffer."""
        live = {}
        for spec in self.spec.block(block).tensors:
            owner, _, leaf = spec.name.rpartition(".")
            live[spec.name] = getattr(self.module.get_submodule(owner), leaf)
        return live

    def read(self, block: str) -> Arrays:
        """A block's weights as arrays that share the module's memory."""
        return {name: t.detach().cpu().numpy() for name, t in self.tensors(block).items()}

    def write(self, block: str, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Copy weights into the module."""
        with torch.no_grad():
            for name, tensor in self.tensors(block).items():
                tensor.copy_(torch.from_numpy(np.require(arrays[name], requirements="W")))

    def open_only(self, blocks: Sequence[str]) -> list[nn.Parameter]:
        """Make exactly these blocks trainable and return their parameters.

        Everything else is frozen and in evaluation mode, so that autograd records nothing below
        the lowest open block and normalisation statistics of frozen blocks stay as they are. A
        module without tensors, such as Dropout, goes with the module it is in.
        """
        names = {t.name for b in blocks for t in self.spec.block(b).tensors}
        trained = []
        for name, parameter in self.module.named_parameters():
            # An integer parameter travels with its block but has no gradient.
            parameter.requires_grad_(name in names and parameter.is_floating_point())
            if parameter.requires_grad:
                trained.append(parameter)
        keys = list(self.module.state_dict())
        is_open = {"": bool(names)}
        for prefix, module in self.module.named_modules():
            inside = [key for key in keys if key.startswith(prefix + ".")] if prefix else []
            default = is_open[prefix.rpartition(".")[0]]
            is_open[prefix] = any(key in names for key in inside) if inside else default
            module.training = is_open[prefix]
        return trained

    def run(self, inputs: Any) -> Any:
        """The model's output for a batch of inputs (a tensor, a tuple or a dict of tensors)."""
        if isinstance(inputs, Mapping):
            return self.module(**inputs)
        return self.module(*inputs) if isinstance(inputs, tuple) else self.module(inputs)


def cut(module: nn.Module, task: Task) -> tuple[Groups, dict[str, str]]:
    """Block name to state_dict keys, and to chain; TaskError when they are no partition."""
    keys = list(module.state_dict(keep_vars=True))
    if not keys:
        raise TaskError(f"task {task.name!r}: the model has no tensors, there is nothing to train")
    _refuse_shared(module)
    if task.blocks is not None:
        return _named(keys, task)
    if task.chains is not None:
        raise TaskError(f"task {task.name!r}: chains are given without blocks; name the blocks too")
    return _found(module)


def _refuse_shared(module: nn.Module) -> None:
    owner: dict[int, str] = {}
    for key, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise TaskError(f"state_dict entry {key!r} is {type(tensor).__name__}, not a tensor")
        if tensor.dtype not in _DTYPES:
            raise TaskError(f"tensor {key!r}: dtype {tensor.dtype} is not supported")
        first = owner.setdefault(id(tensor), key)
        if first != key:
            raise TaskError(f"tensors {first!r} and {key!r} are one and the same: untie them")


def _named(keys: list[str], task: Task) -> tuple[Groups, dict[str, str]]:
    blocks = dict(task.blocks or {})
    groups: Groups = {name: [] for name in blocks}
    for key in keys:
        homes = [
            name
            for name, prefixes in blocks.items()
            if any(key == p or key.startswith(p + ".") for p in prefixes)
        ]
        if len(homes) != 1:
            fault = f"lies in blocks {homes}" if homes else "lies in no block"
            raise TaskError(f"task {task.name!r}: tensor {key!r} {fault}; every tensor needs one")
        groups[homes[0]].append(key)
    empty = [name for name, members in groups.items() if not members]
    if empty:
        raise TaskError(f"task {task.name!r}: blocks {empty} match no tensor of the model")
    return groups, _chains(task, groups)


def _chains(task: Task, groups: Groups) -> dict[str, str]:
    if task.chains is None:
        return dict.fromkeys(groups, "main")
    chain_of = dict.fromkeys(groups, TRUNK)
    for chain, members in task.chains.items():
        for name in members:
            if chain_of.get(name) != TRUNK:
                fault = "is in two chains" if name in groups else "does not exist"
                raise TaskError(f"task {task.name!r}: chain {chain!r}: block {name!r} {fault}")
            chain_of[name] = chain
    return chain_of


def _found(module: nn.Module) -> tuple[Groups, dict[str, str]]:
    branches = [
        name for name, child in module.named_children() if not _is_list(child) and _stacks(child)
    ]
    if isinstance(module, nn.Sequential) or len(branches) < 2:
        groups = _chain(module, "")
        return groups, dict.fromkeys(groups, "main")
    groups, chain_of = {}, {}
    for name in branches:
        part = _chain(module.get_submodule(name), name + ".")
        groups.update(part)
        chain_of.update(dict.fromkeys(part, name))
    rest = [k for k in module.state_dict() if k.split(".")[0] not in branches]
    if rest:
        groups["head"] = rest
        chain_of["head"] = TRUNK
    return groups, chain_of


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _stacks(module: nn.Module) -> list[str]:
    """Paths of the lists of layers in a module: its children, or those of its one such child."""
    lists = [
        name
        for name, child in module.named_children()
        if _is_list(child) and sum(1 for layer in child.children() if layer.state_dict()) > 1
    ]
    if lists:
        return lists
    deeper = [
        [f"{name}.{path}" for path in _stacks(child)]
        for name, child in module.named_children()
        if not _is_list(child)
    ]
    found = [paths for paths in deeper if paths]
    return found[0] if len(found) == 1 else []


def _chain(module: nn.Module, prefix: str) -> Groups:
    keys = list(module.state_dict())
    stacks = [] if _is_list(module) else [path + "." for path in _stacks(module)]
    stack_of = [next((s for s in stacks if key.startswith(s)), "") for key in keys]
    inside = [place for place, stack in enumerate(stack_of) if stack]
    groups: Groups = {}
    for place, (key, stack) in enumerate(zip(keys, stack_of, strict=True)):
        child, _, rest = key[len(stack) :].partition(".")
        name = stack + (child if rest else "own")
        if inside and not inside[0] <= place <= inside[-1]:
            name = "embed" if place < inside[0] else "head"
        groups.setdefault(prefix + name, []).append(prefix + key)
    return groups


def _describe(module: nn.Module, groups: Groups, chain_of: dict[str, str]) -> ModelSpec:
    parameters = {name for name, _ in module.named_parameters()}
    state = module.state_dict(keep_vars=True)
    blocks = tuple(
        Block(
            name=name,
            chain=chain_of[name],
            tensors=tuple(
                TensorSpec(
                    name=key,
                    shape=tuple(state[key].shape),
                    dtype=_DTYPES[state[key].dtype],  # type: ignore[arg-type]
                    kind="parameter" if key in parameters else "buffer",
                )
                for key in keys
            ),
        )
        for name, keys in groups.items()
    )
    return ModelSpec(blocks=blocks)


def _own_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    dot = prefix + "." if prefix else ""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield dot + name, tensor


def watch_modules(model: BlockModel, enter: Callable[[str], None]) -> list[Any]:
    """Call ``enter(block)`` whenever a module with tensors of that block is about to run."""
    block_of = {t.name: b.name for b in model.spec.blocks for t in b.tensors}
    handles = []
    for prefix, module in model.module.named_modules():
        inside = [block_of[k] for k in block_of if k.startswith(prefix + ".")] if prefix else []
        own = [block_of[n] for n, _ in _own_tensors(module, prefix)]
        homes = set(own or inside)
        if prefix and len(homes) == 1:
            home = homes.pop()
            handles.append(module.register_forward_pre_hook(lambda *_, home=home: enter(home)))
    return handles

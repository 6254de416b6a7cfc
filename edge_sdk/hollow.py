"""Tensors that have a shape but take no memory: weights not needed now, outputs nobody reads.

Every number of one is the same, NaN where the type has it, so that who reads one shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edge_sdk.model import BlockModel


def hollow(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor of this shape over the memory of one number."""
    nothing = math.nan if dtype.is_floating_point else 0
    return torch.full((), nothing, dtype=dtype).expand(shape)


def is_hollow(tensor: torch.Tensor) -> bool:
    """Whether a tensor of several numbers has the memory of one."""
    return tensor.numel() > 1 and tensor.untyped_storage().nbytes() <= tensor.element_size()


def unload(model: BlockModel, tensors: Collection[str]) -> None:
    """Free the memory of these tensors of a model. Until ``restore``, torch refuses to write them.

    Parameters stay the same objects.
    """
    for name in tensors:
        owner, _, leaf = name.rpartition(".")
        tensor = getattr(model.module.get_submodule(owner), leaf)
        if tensor.numel() > 1:
            tensor.data = hollow(tuple(tensor.shape), tensor.dtype)


def restore(model: BlockModel, blocks: Collection[str]) -> None:
    """Give unloaded tensors memory again; their content is undefined until it is written."""
    for block in blocks:
        for tensor in model.tensors(block).values():
            if is_hollow(tensor):
                tensor.data = torch.empty(tensor.shape, dtype=tensor.dtype)


def unloaded(model: BlockModel) -> tuple[str, ...]:
    """Blocks that have to be restored and written before anybody trains or reads them."""
    return tuple(
        name for name in model.spec.names if any(map(is_hollow, model.tensors(name).values()))
    )


@dataclass(frozen=True)
class Shape:
    """A tensor's shape at any number of samples."""

    fixed: tuple[int, ...]
    per_sample: tuple[int, ...]
    dtype: torch.dtype

    def at(self, count: int) -> torch.Tensor:
        """A hollow tensor for ``count`` samples."""
        sizes = (f + p * count for f, p in zip(self.fixed, self.per_sample, strict=True))
        return hollow(tuple(sizes), self.dtype)


def shapes(large: Any, small: Any, count: int) -> Any:
    """Data of ``count`` samples and of one less, with a ``Shape`` in the place of each tensor."""
    if isinstance(large, torch.Tensor):
        growth = tuple(a - b for a, b in zip(large.shape, small.shape, strict=True))
        fixed = tuple(a - g * count for a, g in zip(large.shape, growth, strict=True))
        return Shape(fixed, growth, large.dtype)
    if isinstance(large, Mapping):
        return {key: shapes(large[key], small[key], count) for key in large}
    if isinstance(large, (tuple, list)):
        return type(large)(shapes(a, b, count) for a, b in zip(large, small, strict=True))
    return large


def emptied(data: Any) -> Any:
    """The same data with hollow tensors."""
    return mapped(data, torch.Tensor, lambda tensor: hollow(tuple(tensor.shape), tensor.dtype))


def is_plain(data: Any) -> bool:
    """Whether there is nothing but tensors and None in tuples, lists and dicts."""
    if type(data) in (tuple, list):
        return all(map(is_plain, data))
    if type(data) is dict:
        return all(map(is_plain, data.values()))
    return data is None or isinstance(data, torch.Tensor)


def mapped(data: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """The same tuples, lists and dicts with everything of a kind changed."""
    if isinstance(data, kind):
        return change(data)
    if isinstance(data, Mapping):
        return {key: mapped(value, kind, change) for key, value in data.items()}
    if isinstance(data, (tuple, list)):
        return type(data)(mapped(value, kind, change) for value in data)
    return data

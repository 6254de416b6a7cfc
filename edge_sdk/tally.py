"""Count the floating-point operations that torch does while a block of code runs."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from edge_sdk.operators import flops_of


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """``flops`` counts what ran while this was entered, backward too; a multiply-add is two."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func.overloadpacket.__name__, args, kwargs or {}, out)
        return out

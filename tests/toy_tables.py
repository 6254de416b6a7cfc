"""Cost tables made by hand: chains of blocks, one segment each, with the laws of real ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec
from hypothesis import strategies as st

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.cost import BlockCost, CostTable, Crossing, Line, Segment, Work
from edge_sdk.ways import Costing, Cut, Limits
from edge_sdk.wire import Training


class Row(NamedTuple):
    """One block: sizes in bytes a sample, floating-point operations a sample.

    kept:    by its own backward when it is trained; ``passed`` when only a gradient passes.
    out:     what it hands to the next block, which keeps it when it is trained.
    scratch: what it needs beside while it runs.
    """

    params: int = 100_000
    kept: int = 50_000
    passed: int = 20_000
    out: int = 10_000
    scratch: int = 5_000
    flops: int = 1_000_000


def work(flops: int, operators: float = 2.0) -> tuple[Work, ...]:
    """Products of that many operations a sample."""
    return (
        Work(
            kind="matmul",
            operators=operators,
            flops_fixed=0,
            flops_per_sample=flops,
            moved_bytes_fixed=0,
            moved_bytes_per_sample=flops // 10,
        ),
    )


def table_of(*rows: Row, **changes: Any) -> CostTable:
    """Blocks b0, b1, ... from the input to the output."""
    blocks, segments = [], []
    for place, row in enumerate(rows):
        tensor = TensorSpec(name=f"b{place}.w", shape=(row.params,), dtype="float32")
        blocks.append(Block(name=f"b{place}", tensors=(tensor,)))
        segments.append(_segment(place, row))
    spec = ModelSpec(blocks=tuple(blocks))
    table = CostTable(
        task="toy",
        spec=spec,
        blocks=tuple(
            BlockCost(
                name=block.name,
                params=row.params,
                size_bytes=4 * row.params,
                elements=row.params,
                activation_bytes_per_sample=row.kept,
                flops_forward_per_sample=row.flops,
                flops_backward_per_sample=2 * row.flops,
                output_bytes_per_sample=row.out,
            )
            for block, row in zip(blocks, rows, strict=True)
        ),
        segments=tuple(segments),
        crossings=tuple(
            Crossing(
                born=place,
                last_use=place + 1,
                size=Line(0, row.out),
                savers_trained=(place + 1,),
                savers_passed=(),
            )
            for place, row in enumerate(rows[:-1])
        ),
        batch_bytes_per_sample=1000,
        recomputable=spec.names[:-1],
        cuttable=spec.names,
    )
    return msgspec.structs.replace(table, **changes)


def _segment(place: int, row: Row) -> Segment:
    rise = row.out + row.scratch
    return Segment(
        block=f"b{place}",
        inputs=(place - 1,) if place else (),
        kept_trained=Line(0, row.kept),
        kept_passed=Line(0, row.passed),
        rise_frozen=(Line(0, rise),),
        rise_trained=(Line(0, rise + row.kept),),
        rise_passed=(Line(0, rise + row.passed),),
        back_trained=(Line(4 * row.params, row.scratch),),
        back_accumulated=(Line(0, row.scratch),),
        back_passed=(Line(0, row.scratch),),
        carry=Line(0, row.out),
        work_forward=work(row.flops),
        work_frozen=work(row.flops),
        work_trained=work(2 * row.flops, 4.0),
        work_lowest=work(row.flops),
        work_passed=work(row.flops),
    )


def limits_with(**changes: Any) -> Limits:
    """A machine with plenty of everything; 1 GFLOP/s, 1 MB/s both ways."""
    plenty = Limits(
        memory_bytes=1 << 45,
        bound_by="the profile",
        floor_bytes=80 << 20,
        flops_per_s=1e9,
        uplink_bytes_per_s=1e6,
        downlink_bytes_per_s=1e6,
        storage_bytes=1 << 45,
        deadline_s=1e7,
    )
    return msgspec.structs.replace(plenty, **changes)


def cut_of(table: CostTable, *trained: str) -> Cut:
    """The frozen prefix of some trained blocks."""
    return Costing(table, Training(), limits_with(), 9).cut(trained)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    """Any block; what passes a gradient keeps no more than what is trained."""
    kept = draw(st.integers(0, 10**6))
    return Row(
        params=draw(st.integers(1, 10**6)),
        kept=kept,
        passed=draw(st.integers(0, kept)),
        out=draw(st.integers(1, 10**6)),
        scratch=draw(st.integers(0, 10**6)),
        flops=draw(st.integers(0, 10**7)),
    )


def tables(most: int = 6) -> st.SearchStrategy[CostTable]:
    """Chains of 2 to ``most`` blocks, with any of the properties that decide how they can run."""
    flags = st.fixed_dictionaries(
        {
            "random_prefix": st.booleans(),
            "lossy_prefix": st.booleans(),
            "batch_statistics": st.sampled_from([(), ("b0",), ("b0", "b1")]),
            "views": st.integers(1, 3),
        }
    )
    chains = st.lists(rows(), min_size=2, max_size=most)
    return st.builds(lambda chain, flag: table_of(*chain, **flag), chains, flags)

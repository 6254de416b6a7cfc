"""Plans: the choice against brute force, the law of budgets, and what is said about the rest."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.cost import BlockCost, CostTable, Estimate, estimate
from edge_sdk.errors import MIB, NothingFits
from edge_sdk.plan import DEADLINE_SHARE, Limits, Plan, choose
from edge_sdk.wire import Training

Candidates = list[tuple[str, ...]]

NAMES = tuple(f"b{place}" for place in range(5))
SUFFIXES: Candidates = [NAMES[start:] for start in range(len(NAMES))]
TRAINING = Training(batch_size=12)


def table_of(rows: list[tuple[int, int, int]]) -> CostTable:
    """Rows of (params, activation bytes a sample, forward FLOPs a sample)."""
    specs, costs = [], []
    for name, (params, held, flops) in zip(NAMES, rows, strict=False):
        tensor = TensorSpec(name=f"{name}.w", shape=(params,), dtype="float32")
        specs.append(Block(name=name, tensors=(tensor,)))
        costs.append(
            BlockCost(
                name=name,
                params=params,
                size_bytes=4 * params,
                elements=params,
                activation_bytes_per_sample=held,
                transient_bytes_per_sample=held // 3,
                flops_forward_per_sample=flops,
            )
        )
    return CostTable(task="toy", spec=ModelSpec(blocks=tuple(specs)), blocks=tuple(costs))


TABLE = table_of([(200_000, 400_000, 10**6)] * 5)
ROOMY = Limits(
    memory_bytes=1 << 40,
    bound_by="the profile",
    floor_bytes=80 * MIB,
    flops_per_s=1e9,
    uplink_bytes_per_s=1e6,
    downlink_bytes_per_s=1e6,
    deadline_s=1e6,
)


def chosen(limits: Limits, table: CostTable = TABLE, candidates: Candidates = SUFFIXES) -> Plan:
    return choose(
        table, candidates, TRAINING, limits, num_examples=100, codec="int8", bits_per_param=5.2
    )


def limits_with(**changes: Any) -> Limits:
    return msgspec.structs.replace(ROOMY, **changes)


def cost_of(
    blocks: tuple[str, ...], micro_batch: int, limits: Limits, table: CostTable = TABLE
) -> Estimate:
    return estimate(
        table,
        blocks,
        TRAINING,
        micro_batch=micro_batch,
        num_examples=100,
        floor_bytes=limits.floor_bytes,
        flops_per_s=limits.flops_per_s,
        bits_per_param=5.2,
    )


def fits(table: CostTable, blocks: tuple[str, ...], micro_batch: int, limits: Limits) -> bool:
    got = cost_of(blocks, micro_batch, limits, table)
    moving_s = got.upload_bytes / limits.uplink_bytes_per_s
    moving_s += limits.fetch_bytes / limits.downlink_bytes_per_s
    in_time = got.train_s + moving_s <= DEADLINE_SHARE * limits.deadline_s
    return got.peak_bytes <= limits.memory_bytes and in_time


rows = st.lists(
    st.tuples(st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**7)),
    min_size=5,
    max_size=5,
)
any_limits = st.builds(
    Limits,
    memory_bytes=st.integers(90 * MIB, 200 * MIB),
    bound_by=st.just("the profile"),
    floor_bytes=st.just(80 * MIB),
    flops_per_s=st.floats(1e6, 1e9),
    uplink_bytes_per_s=st.floats(1e3, 1e7),
    downlink_bytes_per_s=st.floats(1e3, 1e7),
    deadline_s=st.floats(1.0, 1e4),
    fetch_bytes=st.integers(0, 10**6),
)
any_candidates = st.permutations(
    [blocks for n in (1, 2, 3) for blocks in itertools.combinations(NAMES, n)]
).map(lambda blocks: blocks[:8])


@settings(max_examples=150, deadline=None)
@given(rows=rows, limits=any_limits, candidates=any_candidates)
def test_the_choice_is_that_of_brute_force(
    rows: list[tuple[int, int, int]], limits: Limits, candidates: Candidates
) -> None:
    table = table_of(rows)
    fitting = [
        (blocks, micro_batch)
        for blocks in candidates
        for micro_batch in (12, 6, 3, 1)
        if fits(table, blocks, micro_batch, limits)
    ]
    if not fitting:
        with pytest.raises(NothingFits):
            chosen(limits, table, candidates)
        return
    plan = chosen(limits, table, candidates)
    assert (plan.blocks, plan.micro_batch) == fitting[0]
    assert plan.peak_bytes <= plan.budget_bytes == limits.memory_bytes
    assert plan.round_s <= DEADLINE_SHARE * limits.deadline_s
    assert plan.batch_size == 12
    assert plan == chosen(limits, table, candidates)
    better = candidates[: candidates.index(plan.blocks)]
    assert [left.blocks for left in plan.left_out] == better
    assert all("MiB" in left.reason or " s of the round" in left.reason for left in plan.left_out)


@settings(max_examples=100, deadline=None)
@given(
    rows=rows,
    limits=any_limits,
    field=st.sampled_from(
        ["memory_bytes", "flops_per_s", "uplink_bytes_per_s", "downlink_bytes_per_s", "deadline_s"]
    ),
    factor=st.floats(1.0, 100.0),
)
def test_a_larger_budget_never_leads_to_a_later_candidate(
    rows: list[tuple[int, int, int]], limits: Limits, field: str, factor: float
) -> None:
    table = table_of(rows)
    value = getattr(limits, field)
    larger = msgspec.structs.replace(limits, **{field: type(value)(value * factor)})
    try:
        before = chosen(limits, table)
    except NothingFits:
        return
    after = chosen(larger, table)
    assert SUFFIXES.index(after.blocks) <= SUFFIXES.index(before.blocks)
    if after.blocks == before.blocks:
        assert after.micro_batch >= before.micro_batch


def test_with_room_for_everything_everything_is_trained_in_whole_batches() -> None:
    plan = chosen(ROOMY)
    assert (plan.blocks, plan.micro_batch, plan.left_out) == (NAMES, 12, ())
    assert plan.upload_bytes == round(5 * 200_000 * 5.2 / 8)
    assert plan.flops == 100 * 3 * 5 * 10**6
    assert plan.train_s == pytest.approx(1.5)
    assert plan.round_s == pytest.approx(1.5 + 0.65)


def test_memory_makes_the_micro_batch_smaller_before_blocks_are_left_out() -> None:
    whole = chosen(ROOMY)
    tighter = chosen(limits_with(memory_bytes=whole.peak_bytes - 1))
    assert (tighter.blocks, tighter.micro_batch) == (NAMES, 6)
    assert (tighter.flops, tighter.train_s) == (whole.flops, whole.train_s)


def test_what_was_left_out_for_memory_is_explained() -> None:
    memory_bytes = cost_of(NAMES, 1, ROOMY).peak_bytes - 1
    plan = chosen(limits_with(memory_bytes=memory_bytes, bound_by="the cgroup limit"))
    assert plan.blocks != NAMES
    left = plan.left_out[0]
    assert left.blocks == NAMES
    assert left.reason.startswith("needs ")
    assert left.reason.endswith(
        " MiB at the smallest micro-batch, "
        f"{memory_bytes / MIB:.0f} MiB allowed by the cgroup limit"
    )


def test_what_was_left_out_for_time_is_explained() -> None:
    plan = chosen(limits_with(deadline_s=2.0))
    assert plan.left_out[0].reason == "takes 2.15 s, 1.50 s of the round's deadline are usable"
    assert plan.round_s <= 1.5


def test_blocks_still_to_be_fetched_take_their_time() -> None:
    with pytest.raises(NothingFits, match=r"takes \d+\.\d\d s, 7\.50 s of the round's deadline"):
        chosen(limits_with(deadline_s=10.0, fetch_bytes=10_000_000))


def test_nothing_fits_says_what_the_cheapest_plan_needs_and_what_to_do() -> None:
    with pytest.raises(NothingFits) as caught:
        chosen(limits_with(memory_bytes=50 * MIB))
    text = str(caught.value)
    assert text.startswith("cheapest plan (b4) needs ")
    assert "MiB at the smallest micro-batch, 50 MiB allowed by the profile" in text
    assert "Lower the batch size, raise the deadline, or raise the device's budget" in text


def test_an_offer_that_opens_nothing_is_sat_out() -> None:
    with pytest.raises(NothingFits, match="the offer opens no block to this device"):
        chosen(ROOMY, candidates=[])

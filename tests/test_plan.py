"""Plans: the choice against brute force, the law of budgets, and what is said about the rest."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.cost import CostTable
from edge_sdk.errors import MIB, NothingFits
from edge_sdk.figures import LIMITS
from edge_sdk.plan import DEADLINE_SHARE, Plan, choose
from edge_sdk.ways import Costing, FrozenPrefix, Limits, Way
from edge_sdk.wire import Training
from tests.toy_tables import Row, limits_with, table_of, tables

Candidates = list[tuple[str, ...]]

ROOT = Path(__file__).resolve().parent.parent
NUM_EXAMPLES = 100
TRAINING = Training(batch_size=12, local_epochs=2)
TABLE = table_of(*[Row(params=200_000, kept=400_000, out=64_000)] * 5)
NAMES = TABLE.spec.names


def suffixes(table: CostTable) -> Candidates:
    return [table.spec.names[start:] for start in range(len(table.spec.names))]


def chosen(
    limits: Limits, table: CostTable = TABLE, candidates: Candidates | None = None,
    training: Training = TRAINING, num_examples: int = NUM_EXAMPLES,
) -> Plan:  # fmt: skip
    return choose(
        table,
        suffixes(table) if candidates is None else candidates,
        training,
        limits,
        num_examples=num_examples,
        codec="balanced",
        bits_per_param=5.2,
    )


def usable_s(table: CostTable, blocks: tuple[str, ...], limits: Limits) -> float:
    elements = sum(block.elements for block in table.blocks if block.name in blocks)
    moving_s = round(elements * 5.2 / 8) / limits.uplink_bytes_per_s
    moving_s += limits.fetch_bytes / limits.downlink_bytes_per_s
    return DEADLINE_SHARE * limits.deadline_s - moving_s


def small_ways(table: CostTable, blocks: tuple[str, ...], limits: Limits) -> list[Way]:
    ways = Costing(table, TRAINING, limits, NUM_EXAMPLES).ways(blocks)
    return [way for way in ways if way.peak_bytes <= limits.memory_bytes]


def affordable(way: Way, left_s: float) -> int:
    """All 18 steps, or as many as there is time for."""
    if way.train_s <= left_s:
        return 18
    return max(0, min(18, math.floor((left_s - way.once_s) / way.step_s + 1e-9)))


def best_by_force(
    table: CostTable, candidates: Candidates, limits: Limits
) -> tuple[tuple[str, ...], float, int] | None:
    """Blocks, steps and peak of the best plan, from all candidates in all ways."""
    for blocks in candidates:
        left_s = usable_s(table, blocks, limits)
        fitting = [way for way in small_ways(table, blocks, limits) if way.train_s <= left_s]
        if fitting:
            best = min(fitting, key=lambda way: (way.expected_s, way.peak_bytes))
            return blocks, 18, best.peak_bytes
    blocks = candidates[-1]
    left_s = usable_s(table, blocks, limits)
    ways = [way for way in small_ways(table, blocks, limits) if way.prefix.cache == "none"]
    found = [(affordable(way, left_s), -way.peak_bytes) for way in ways]
    steps, peak = max(found, default=(0, 0))
    return (blocks, steps, -peak) if steps else None


any_limits = st.builds(
    limits_with,
    memory_bytes=st.integers(90 * MIB, 200 * MIB),
    flops_per_s=st.floats(1e6, 1e9),
    uplink_bytes_per_s=st.floats(1e3, 1e7),
    deadline_s=st.floats(1.0, 1e4),
    fetch_bytes=st.integers(0, 10**6),
    storage_bytes=st.integers(0, 10**8),
    engines=st.sampled_from([("torch",), ("torch", "onnx", "onnx_int8")]),
    unchanged_rounds=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9)),
    filled_prefix=st.sampled_from([(), NAMES[:1], NAMES[:3]]),
)
budgets = st.sampled_from(
    ["memory_bytes", "flops_per_s", "uplink_bytes_per_s", "downlink_bytes_per_s", "deadline_s",
     "storage_bytes"]
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(table=tables(), limits=any_limits, data=st.data())
def test_the_choice_is_that_of_brute_force(
    table: CostTable, limits: Limits, data: st.DataObject
) -> None:
    subsets = [s for n in (1, 2, 3) for s in itertools.combinations(table.spec.names, n)]
    drawn = st.permutations(subsets).map(lambda some: some[:6])
    candidates = data.draw(st.one_of(st.just(suffixes(table)), drawn))
    best = best_by_force(table, candidates, limits)
    if best is None:
        with pytest.raises(NothingFits):
            chosen(limits, table, candidates)
        return
    plan = chosen(limits, table, candidates)
    assert (plan.blocks, plan.steps or 18, plan.peak_bytes) == best
    assert plan == chosen(limits, table, candidates)
    check_within(plan, limits, table, candidates)


def check_within(plan: Plan, limits: Limits, table: CostTable, candidates: Candidates) -> None:
    """Nothing is promised that is beyond a limit or the task's leave."""
    assert plan.peak_bytes <= plan.budget_bytes == limits.memory_bytes
    assert plan.round_s <= DEADLINE_SHARE * limits.deadline_s * (1 + 1e-9)
    assert plan.steps is None or (plan.blocks == candidates[-1] and 1 <= plan.steps < 18)
    assert plan.steps is None or plan.prefix.cache == "none"
    assert plan.micro_batch == plan.batch_size == 12 or not plan.step_in_backward
    assert plan.micro_batch > 1 or not set(plan.blocks) & set(table.batch_statistics)
    prefix = plan.prefix
    if table.random_prefix:
        assert (prefix.engine, prefix.cache) == ("torch", "none")
    if not table.lossy_prefix:
        assert prefix.engine != "onnx_int8"
        assert prefix.dtype == "float32"
    assert prefix.engine in limits.engines


@settings(max_examples=120, deadline=None)
@given(table=tables(5), limits=any_limits, field=budgets, factor=st.floats(1.0, 100.0))
def test_a_larger_budget_never_trains_less(
    table: CostTable, limits: Limits, field: str, factor: float
) -> None:
    value = getattr(limits, field)
    larger = msgspec.structs.replace(limits, **{field: type(value)(value * factor)})
    try:
        before = chosen(limits, table)
    except NothingFits:
        return
    after = chosen(larger, table)
    places = suffixes(table)
    assert places.index(after.blocks) <= places.index(before.blocks)
    if after.blocks == before.blocks:
        assert (after.steps or 18) >= (before.steps or 18)


# --- by hand -------------------------------------------------------------------------------------


def test_with_room_for_everything_everything_is_trained_in_whole_batches() -> None:
    plan = chosen(limits_with())
    assert (plan.blocks, plan.micro_batch, plan.steps, plan.left_out) == (NAMES, 12, None, ())
    assert (plan.checkpoint, plan.prefix) == (False, FrozenPrefix())
    assert plan.upload_bytes == round(5 * 200_000 * 5.2 / 8)
    assert plan.flops == 2 * 100 * (2 + 4 * 3) * 10**6
    assert plan.round_s == pytest.approx(plan.train_s + 0.65)


def test_memory_is_made_room_for_before_blocks_are_left_out() -> None:
    whole = chosen(limits_with())
    tighter = chosen(limits_with(memory_bytes=whole.peak_bytes - 1))
    assert tighter.blocks == NAMES
    assert tighter.micro_batch == 6
    assert tighter.train_s > whole.train_s


def test_of_equally_quick_ways_the_one_with_least_memory_is_taken() -> None:
    heavy = table_of(*[Row(params=3_000_000)] * 3)
    assert chosen(limits_with(), heavy).step_in_backward


def test_a_dear_prefix_is_kept() -> None:
    often = Training(batch_size=12, local_epochs=20)

    def prefix_of(table: CostTable, **limits: Any) -> FrozenPrefix:
        return chosen(limits_with(**limits), table, [NAMES[4:]], often).prefix

    table = table_of(*[Row(flops=10**8, out=100)] * 4, Row())
    assert prefix_of(table) == FrozenPrefix(blocks=NAMES[:4], cache="memory")
    # Too large for memory: on disk; nowhere: not kept.
    large = table_of(*[Row(flops=10**8, out=100)] * 3, Row(flops=10**8, out=3_000_000), Row())
    quick = {"storage_read_bytes_per_s": 1e9, "storage_write_bytes_per_s": 1e9}
    assert prefix_of(large, memory_bytes=280 * MIB, **quick).cache == "disk"
    assert prefix_of(large, memory_bytes=280 * MIB, **quick, storage_bytes=100).cache == "none"
    assert prefix_of(msgspec.structs.replace(table, random_prefix=True)).cache == "none"


def test_a_prefix_is_kept_when_it_has_stood_still() -> None:
    table = table_of(*[Row(flops=10**7, out=1000)] * 4, Row())
    quick = {"rates": {"operator_s": 1e-9}, "storage_write_bytes_per_s": 1e9}
    training = Training(batch_size=12, local_epochs=1)
    new = chosen(limits_with(**quick), table, [NAMES[4:]], training)
    still = dict.fromkeys(NAMES[:4], 50)
    old = chosen(limits_with(**quick, unchanged_rounds=still), table, [NAMES[4:]], training)
    assert (new.prefix.cache, old.prefix.cache) == ("none", "memory")


def test_what_was_left_out_for_memory_is_explained() -> None:
    least = min(way.peak_bytes for way in Costing(TABLE, TRAINING, limits_with(), 100).ways(NAMES))
    plan = chosen(limits_with(memory_bytes=least - 1, bound_by="the cgroup limit"))
    assert plan.blocks == NAMES[1:]
    (left,) = plan.left_out
    assert left.blocks == NAMES
    assert left.reason == (
        f"needs {least / MIB:.0f} MiB at the least, {(least - 1) / MIB:.0f} MiB allowed by "
        "the cgroup limit"
    )


def test_batch_statistics_of_one_sample_are_explained() -> None:
    normed = msgspec.structs.replace(TABLE, batch_statistics=(NAMES[0], NAMES[-1]))
    why = (
        f"takes statistics over a batch in block '{NAMES[-1]}', and a batch has 1 sample; raise "
        "the batch size and the number of samples to 2 or more, or normalise with GroupNorm or "
        "LayerNorm"
    )
    one = Training(batch_size=1)
    with pytest.raises(NothingFits) as caught:
        chosen(limits_with(), normed, [NAMES[-2:], NAMES[-1:]], one)
    assert str(caught.value) == f"cheapest plan ({NAMES[-1]}) {why}."
    plan = chosen(limits_with(), normed, [NAMES[-1:], NAMES[-2:-1]], one)
    assert (plan.blocks, plan.micro_batch) == (NAMES[-2:-1], 1)
    assert [left.reason for left in plan.left_out] == [why]


def test_what_was_left_out_for_time_is_explained() -> None:
    plan = chosen(limits_with(deadline_s=3.5, flops_per_s=1e9))
    nearest = NAMES[NAMES.index(plan.blocks[0]) - 1 :]
    assert [left.blocks for left in plan.left_out] == [NAMES, nearest]
    for left in plan.left_out:
        said = re.fullmatch(
            r"takes (\d+\.\d\d) s, 2\.6[23] s of the round's deadline are usable", left.reason
        )
        assert said is not None
        assert float(said[1]) > 2.62
    assert plan.round_s <= 3.5 * DEADLINE_SHARE


def test_only_the_last_candidate_takes_fewer_steps() -> None:
    hurried = limits_with(deadline_s=1.0)
    plan = chosen(hurried)
    assert plan.blocks == NAMES[4:]
    assert plan.steps is not None
    assert 1 <= plan.steps < 18
    assert plan.round_s <= 0.75
    more = chosen(limits_with(deadline_s=1.05))
    assert (more.steps or 18) >= plan.steps
    assert plan.flops == round(2 * 100 * (4 + 2) * 10**6 * plan.steps / 18)


def test_few_samples_are_one_whole_batch() -> None:
    plan = chosen(limits_with(), training=Training(batch_size=64), num_examples=10)
    assert (plan.batch_size, plan.micro_batch) == (64, 64)


def test_blocks_still_to_be_fetched_take_their_time() -> None:
    with pytest.raises(NothingFits, match=r"takes \d+\.\d\d s, 7\.50 s of the round's deadline"):
        chosen(limits_with(deadline_s=10.0, fetch_bytes=10_000_000))


def test_nothing_fits_says_what_the_cheapest_plan_needs_and_what_to_do() -> None:
    with pytest.raises(NothingFits) as caught:
        chosen(limits_with(memory_bytes=50 * MIB))
    text = str(caught.value)
    assert re.match(
        r"cheapest plan \(b4\) needs \d+ MiB at the least, 50 MiB allowed by the ", text
    )
    assert "Lower the batch size, raise the deadline, or raise the device's budget" in text


def test_an_offer_that_opens_nothing_is_sat_out() -> None:
    with pytest.raises(NothingFits, match="the offer opens no block to this device"):
        chosen(limits_with(), candidates=[])


def test_candidates_that_hold_no_others_are_all_looked_at() -> None:
    table = table_of(*[Row(kept=n * 10**6) for n in (9, 1, 8, 2, 7)])
    alone = [(name,) for name in NAMES]
    memory_bytes = 1 + min(
        way.peak_bytes for way in Costing(table, TRAINING, limits_with(), 100).ways(("b1",))
    )
    assert chosen(limits_with(memory_bytes=memory_bytes), table, alone).blocks in (("b0",), ("b1",))


# --- absurd figures ------------------------------------------------------------------------------

RATES = [field for field in LIMITS if field.endswith("_per_s")]


@pytest.mark.parametrize("field", [*RATES, "storage_bytes", "memory_bytes"])
@pytest.mark.parametrize("value", ["low", "high", 1e300, 1e-300])
def test_absurd_limits_give_a_plan_or_none(field: str, value: str | float) -> None:
    if isinstance(value, str):
        value = getattr(LIMITS[field], value)
    whole = field in ("storage_bytes", "memory_bytes")
    limits = limits_with(**{field: int(value) if whole else float(value)})
    with suppress(NothingFits):
        assert chosen(limits).peak_bytes <= limits.memory_bytes


@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.sampled_from([1.0, 1e300, 1e13]), min_size=6, max_size=6),
       rate=st.sampled_from([1e-300, 1e300]))  # fmt: skip
def test_absurd_machines_give_a_plan_or_none(values: list[float], rate: float) -> None:
    keys = ("operator_s", "matmul_flops_per_s", "matmul_bytes_per_s", "elementwise_bytes_per_s")
    limits = limits_with(**dict(zip(RATES, values, strict=True)), rates=dict.fromkeys(keys, rate))
    with suppress(NothingFits):
        assert chosen(limits).peak_bytes <= limits.memory_bytes


def test_planning_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, edge_sdk.offers, edge_sdk.plan\n"
        "sys.exit(' '.join({'torch', 'numpy'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")

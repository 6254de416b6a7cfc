"""Memory and time of a training step, against sums done by hand, and laws of every table."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.blocks import TensorSpec
from edge_sdk.cost import (
    CODEC_FIGURES,
    ENCODE_BYTES_PER_ELEMENT,
    OVERHEAD_BYTES,
    CostTable,
    Line,
    bits_per_param,
    duration,
    overhead_bytes,
    price_list,
    states,
    update_work,
    upper_hull,
)
from edge_sdk.errors import ConfigError
from edge_sdk.step import STEP_TEMPORARY_BYTES, Outline, Paces, Sizes, Step
from edge_sdk.wire import Training
from tests.toy_tables import Row, cut_of, table_of, tables

SGD = Training(optimizer="sgd", momentum=0.9)
PLAIN = Training(optimizer="sgd", momentum=0.0)
ADAM = Training(optimizer="adam")
MIB = 1 << 20

TOY = table_of(
    Row(params=MIB, kept=7 * MIB, passed=2 * MIB, out=20 * MIB, scratch=4 * MIB, flops=11),
    Row(params=MIB // 2, kept=3 * MIB, passed=MIB, out=0, scratch=6 * MIB, flops=13),
    batch_bytes_per_sample=MIB,
)


def step_of(table: CostTable, *trained: str, training: Training = PLAIN, **how: Any) -> Step:
    return Step(Outline(table), trained, training, **how)


def peak_mib(
    *trained: str, table: CostTable = TOY, training: Training = PLAIN, **how: Any
) -> float:
    levers = {name: how.pop(name) for name in ("accumulate", "step_in_backward") if name in how}
    step = step_of(table, *trained, training=training, **how)
    return step.peak_bytes(Sizes(Outline(table), 10), **levers) / MIB


# --- memory by hand: 4 + 2 MiB of weights, 10 of the batch, everything else ten times a sample ----


def test_both_trained() -> None:
    # Backward of b1: both keep theirs and what passed between; then scratch and a gradient.
    assert peak_mib("b0", "b1") == (6 + 10) + (70 + 200 + 30) + (60 + 2)


def test_only_the_upper_one_trained() -> None:
    assert peak_mib("b1") == (6 + 10) + (200 + 30) + (60 + 2)
    assert states(TOY, {"b1"}) == ["frozen", "lowest"]


def test_only_the_lower_one_trained_has_a_gradient_pass_through_the_upper_one() -> None:
    # Forward of b1: it keeps less, and not its input.
    assert peak_mib("b0") == (6 + 10) + (70 + 200) + (10 + 60)
    assert states(TOY, {"b0"}) == ["lowest", "passed"]


@pytest.mark.parametrize(("training", "copies"), [(PLAIN, 0), (SGD, 1), (ADAM, 2)])
@pytest.mark.parametrize(("trained", "weights"), [(("b1",), 2), (("b0", "b1"), 6)])
def test_optimizer_states_are_as_large_as_what_is_trained(
    training: Training, copies: int, trained: tuple[str, ...], weights: int
) -> None:
    assert peak_mib(*trained, training=training) - peak_mib(*trained) == copies * weights


def test_accumulated_gradients_are_there_from_the_beginning() -> None:
    assert peak_mib("b0", "b1", accumulate=True) == (6 + 10 + 6) + (70 + 200 + 30) + (60 + 2)


def test_stepping_in_backward_leaves_one_gradient_at_a_time() -> None:
    heavy = table_of(*[Row(params=4 * MIB, kept=MIB, out=MIB, scratch=MIB)] * 10)
    names = heavy.spec.names
    kept = 10 * 10 + 9 * 10
    last = 160 + kept + (10 + 10 + 16)  # backward of b9, then less is kept than gradients grow
    batch = 10_000 / MIB
    assert peak_mib(*names, table=heavy, step_in_backward=True) == pytest.approx(last + batch)
    assert peak_mib(*names, table=heavy, accumulate=True) == pytest.approx(160 + last + batch)


def test_a_recomputed_block_keeps_nothing_and_runs_again() -> None:
    # Again: what b0 rises by in forward, on top of the gradient in flight and that of b1.
    assert peak_mib("b0", "b1", checkpoint=True) == (6 + 10) + 2 + 200 + (200 + 40 + 70)
    many = table_of(*[Row(kept=MIB, out=1000, scratch=1000)] * 10)
    assert peak_mib(*many.spec.names, table=many) > 100
    assert peak_mib(*many.spec.names, table=many, checkpoint=True) < 25


def test_a_skipped_prefix_leaves_its_weights_and_brings_its_output() -> None:
    assert peak_mib("b1", skipped=("b0",)) == (2 + 10) + (200 + 30) + (60 + 2)


def test_a_step_and_encoding_count_where_they_need_most() -> None:
    light = table_of(*[Row(params=MIB, kept=0, passed=0, out=1, scratch=0)] * 2)
    floor = 2 * 4 * MIB
    sizes = Sizes(Outline(light), 1)
    encode = floor + ENCODE_BYTES_PER_ELEMENT * MIB
    assert step_of(light, "b1").peak_bytes(sizes) == encode
    stepping = floor + 3 * 8 * MIB + 1000 + STEP_TEMPORARY_BYTES
    assert step_of(light, "b0", "b1", training=ADAM).peak_bytes(sizes) == stepping


def test_gradients_have_the_type_of_their_parameter() -> None:
    def doubled(dtype: Any, kind: Any) -> CostTable:
        block = TOY.spec.blocks[1]
        tensor = TensorSpec(name="b1.w", shape=(MIB // 2,), dtype=dtype, kind=kind)
        changed = msgspec.structs.replace(block, tensors=(tensor,))
        spec = msgspec.structs.replace(TOY.spec, blocks=(TOY.spec.blocks[0], changed))
        return msgspec.structs.replace(TOY, spec=spec)

    def states_mib(table: CostTable) -> float:
        return peak_mib("b1", table=table, training=ADAM) - peak_mib("b1", table=table)

    assert states_mib(doubled("float64", "parameter")) == 2 * 4
    assert states_mib(doubled("int64", "parameter")) == 0
    assert states_mib(doubled("float32", "buffer")) == 0


# --- time and operations -------------------------------------------------------------------------


def test_operations_by_what_is_trained() -> None:
    def flops(*trained: str, **how: Any) -> int:
        return step_of(TOY, *trained, **how).flops_per_sample()

    assert flops("b0", "b1") == (11 + 11) + 3 * 13
    assert flops("b1") == 11 + (13 + 13)
    assert flops("b0") == (11 + 11) + (13 + 13)  # the trap: frozen, but a gradient passes
    assert flops("b1", skipped=("b0",)) == 13 + 13
    assert flops("b0", "b1", checkpoint=True) == flops("b0", "b1") + 11


def test_seconds_are_operators_operations_and_bytes_at_their_prices() -> None:
    rates = {"operator_s": 1e-3, "matmul_flops_per_s": 1e6, "matmul_bytes_per_s": 1e5}
    paces = Paces(TOY, price_list(1e9, 1e9, rates))
    found = step_of(TOY, "b1").duration(paces)
    assert found.fixed_s == pytest.approx((2 + 2 + 2) * 1e-3)
    assert found.per_sample_s == pytest.approx((11 + 13 + 13) * 1e-6 + (1 + 1 + 1) * 1e-5)


def test_paces_are_durations() -> None:
    table = table_of(Row(), Row())
    prices = price_list(3e9, 4e9, {})
    expected = duration(table.segments[0].work_trained, prices)
    assert Paces(table, prices).backward["trained"][0] == pytest.approx(expected)


def test_measured_rates_count_before_rules_of_thumb() -> None:
    plain = price_list(1e9, 1e10, {})
    assert plain["elementwise_bytes_per_s"] == pytest.approx(1e-10)
    measured = {"operator_s": 2e-6, "norm_bytes_per_s": 5e8, "unheard_of_s": 1.0}
    found = price_list(1e9, 1e10, measured)
    assert found.keys() == plain.keys()
    changed = {key for key in plain if found[key] != plain[key]}
    assert changed == {"operator_s", "norm_bytes_per_s"}
    assert (found["operator_s"], found["norm_bytes_per_s"]) == (2e-6, 2e-9)


def test_updates_by_optimizer() -> None:
    def moved(training: Training, *trained: str) -> tuple[float, int]:
        found = update_work(TOY, trained, training)
        return found.operators, found.moved_bytes_fixed

    assert moved(PLAIN, "b1") == (1, 3 * MIB // 2)
    assert moved(SGD, "b1") == (3, 8 * MIB // 2)
    assert moved(ADAM, "b0", "b1") == (14, 19 * MIB * 3 // 2)


def test_overhead_is_that_of_the_kinds_in_use() -> None:
    assert overhead_bytes(TOY, {}) == OVERHEAD_BYTES["step"] + OVERHEAD_BYTES.get("matmul", 0)
    assert overhead_bytes(TOY, {"step_bytes": 5, "matmul_bytes": 7, "norm_bytes": 9}) == 12


def test_unknown_codecs_are_refused() -> None:
    for codec, figures in CODEC_FIGURES.items():
        assert bits_per_param(codec) == figures.bits_per_param
    with pytest.raises(
        ConfigError, match="codec 'zip' is unknown; known are lossless, fp16, balanced, tiny"
    ):
        bits_per_param("zip")


# --- tables --------------------------------------------------------------------------------------


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="its blocks are not those of its model; make it anew"):
        msgspec.structs.replace(TOY, blocks=TOY.blocks[::-1])


def test_a_stored_table_comes_back() -> None:
    stored = msgspec.json.encode(TOY)
    assert msgspec.json.decode(stored, type=CostTable) == TOY
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(TOY), type=CostTable) == TOY
    with pytest.raises(msgspec.ValidationError, match="params"):
        msgspec.json.decode(stored.replace(b'"params":1048576', b'"params":-1'), type=CostTable)


def test_the_hull_keeps_what_is_largest_somewhere() -> None:
    lines = [Line(10, 0), Line(5, 1), Line(0, 2), Line(0, 0), Line(4, 1), Line(7, 1)]
    assert upper_hull(lines) == (Line(10, 0), Line(7, 1), Line(0, 2))


@given(st.lists(st.builds(Line, st.integers(0, 1000), st.integers(0, 50)), max_size=8))
def test_the_hull_is_as_high_as_all_lines(lines: list[Line]) -> None:
    hull = upper_hull(lines)
    for micro_batch in (1, 2, 3, 10, 1000):
        assert max((line.at(micro_batch) for line in hull), default=0) == max(
            (line.at(micro_batch) for line in lines), default=0
        )


def test_a_chain_beside_the_trained_one_is_a_prefix() -> None:
    chain = table_of(Row(), Row(), Row(), Row())
    # b0 and b1 are two inputs, both read by b2.
    apart = [*chain.segments]
    apart[1] = msgspec.structs.replace(apart[1], inputs=())
    apart[2] = msgspec.structs.replace(apart[2], inputs=(0, 1))
    table = msgspec.structs.replace(chain, segments=tuple(apart))
    assert states(table, {"b1"}) == ["frozen", "lowest", "passed", "passed"]
    assert cut_of(table, "b1").blocks == ("b0",)
    assert cut_of(table, "b3").blocks == ("b0", "b1", "b2")
    assert cut_of(table, "b0", "b1").blocks == ()


# --- laws ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    table=tables(),
    training=st.sampled_from([PLAIN, SGD, ADAM]),
    checkpoint=st.booleans(),
    start=st.integers(0, 4),
    accumulate=st.booleans(),
)
def test_more_samples_and_more_blocks_never_cost_less(
    table: CostTable, training: Training, checkpoint: bool, start: int, accumulate: bool
) -> None:
    names, outline = table.spec.names, Outline(table)
    start = min(start, len(names) - 2)
    paces = Paces(table, price_list(1e9, 1e9, {}))
    more, less = (
        Step(outline, names[n:], training, checkpoint=checkpoint) for n in (start, start + 1)
    )
    of = [[s.peak_bytes(Sizes(outline, m), accumulate=accumulate) for m in (1, 2, 7, 64)]
          for s in (more, less)]  # fmt: skip
    assert of[0] == sorted(of[0])
    assert all(a >= b for a, b in zip(*of, strict=True))
    for field in ("fixed_s", "per_sample_s"):
        after, before = (getattr(s.duration(paces), field) for s in (more, less))
        assert after >= before - 1e-12
    assert more.flops_per_sample() >= less.flops_per_sample()


@settings(max_examples=60, deadline=None)
@given(table=tables(), training=st.sampled_from([PLAIN, ADAM]), start=st.integers(0, 5),
       micro_batch=st.integers(1, 64))  # fmt: skip
def test_what_levers_may_cost(
    table: CostTable, training: Training, start: int, micro_batch: int
) -> None:
    names, outline = table.spec.names, Outline(table)
    trained = names[min(start, len(names) - 1) :]
    sizes = Sizes(outline, micro_batch)
    plain = Step(outline, trained, training)
    peak = plain.peak_bytes(sizes)
    gradients = sum(outline.gradients[name] for name in trained)
    assert plain.peak_bytes(sizes, step_in_backward=True) <= peak
    assert peak - gradients <= plain.peak_bytes(sizes, accumulate=True) <= peak + gradients
    skipped = cut_of(table, *trained).blocks
    weights = sum(outline.weights[name] for name in skipped)
    cached = Step(outline, trained, training, skipped=skipped).peak_bytes(sizes)
    assert peak - weights - max(sizes.rise["frozen"]) - sum(sizes.crossings) <= cached <= peak

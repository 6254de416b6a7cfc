"""What training costs, against sums done by hand, and laws that hold for every table."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.blocks import Block, ModelSpec, TensorSpec
from edge_sdk.cost import (
    ENCODE_BYTES_PER_ELEMENT,
    LIVE_TRANSIENTS,
    STEP_OVERHEAD_BYTES,
    BlockCost,
    CostTable,
    Estimate,
    estimate,
)
from edge_sdk.errors import ConfigError
from edge_sdk.wire import Training

SGD = Training(optimizer="sgd", momentum=0.9)
PLAIN = Training(optimizer="sgd", momentum=0.0)
ADAM = Training(optimizer="adam")


def table_of(*rows: tuple[int, int, int, int]) -> CostTable:
    """Rows of (params, activation bytes, transient bytes, forward FLOPs), the last two a sample."""
    blocks = tuple(
        Block(
            name=f"b{place}",
            tensors=(TensorSpec(name=f"t{place}", shape=(row[0],), dtype="float32"),),
        )
        for place, row in enumerate(rows)
    )
    costs = tuple(
        BlockCost(
            name=block.name,
            params=row[0],
            size_bytes=4 * row[0],
            elements=row[0],
            activation_bytes_per_sample=row[1],
            transient_bytes_per_sample=row[2],
            flops_forward_per_sample=row[3],
        )
        for block, row in zip(blocks, rows, strict=True)
    )
    return CostTable(task="toy", spec=ModelSpec(blocks=blocks), blocks=costs)


TABLE = table_of((1000, 7000, 500, 11), (2000, 5000, 900, 13), (300, 2000, 100, 17))


def cost(*trained: str, training: Training = SGD, micro_batch: int = 100) -> Estimate:
    return estimate(
        TABLE,
        trained,
        training,
        micro_batch=micro_batch,
        num_examples=10,
        floor_bytes=1 << 20,
        flops_per_s=100.0,
        bits_per_param=12.0,
    )


def test_the_sum_done_by_hand() -> None:
    got = cost("b1", "b2", training=msgspec.structs.replace(SGD, local_epochs=3))
    held = 4 * 3300 + 2 * 4 * 2300  # all weights; gradient and velocity of what is trained
    step = 100 * (5000 + 2000 + LIVE_TRANSIENTS * 900)
    flops = (11 + 3 * 13 + 3 * 17) * 10 * 3
    assert got.peak_bytes == (1 << 20) + held + step + STEP_OVERHEAD_BYTES
    assert got.flops == flops
    assert got.train_s == pytest.approx(flops / 100)
    assert got.upload_bytes == 2300 * 12 // 8


def test_activations_are_kept_from_the_lowest_trained_block_upwards() -> None:
    kept = {name: cost(name, training=PLAIN).peak_bytes - 4 * TABLE.spec.block(name).params
            for name in TABLE.spec.names}  # fmt: skip
    assert kept["b0"] - kept["b1"] == 100 * 7000
    assert kept["b1"] - kept["b2"] == 100 * 5000


def test_a_frozen_block_above_a_trained_one_passes_a_gradient_through() -> None:
    assert cost("b0").flops == 10 * (3 * 11 + 2 * 13 + 2 * 17)
    assert cost("b2").flops == 10 * (11 + 13 + 3 * 17)


@pytest.mark.parametrize(("training", "states"), [(PLAIN, 0), (SGD, 1), (ADAM, 2)])
def test_optimizer_states_are_counted(training: Training, states: int) -> None:
    assert cost("b1", training=training).peak_bytes - cost("b1", training=PLAIN).peak_bytes == (
        states * 4 * 2000
    )


def test_encoding_counts_where_it_needs_more_than_a_step() -> None:
    small = cost("b1", training=PLAIN, micro_batch=1)
    encode = ENCODE_BYTES_PER_ELEMENT * 2000
    assert small.peak_bytes == (1 << 20) + 4 * 3300 + 4 * 2000 + encode + STEP_OVERHEAD_BYTES


def test_a_table_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="its blocks are not those of its model; make it anew"):
        CostTable(task="toy", spec=TABLE.spec, blocks=TABLE.blocks[::-1])


def test_a_stored_table_comes_back() -> None:
    stored = msgspec.json.encode(TABLE)
    assert msgspec.json.decode(stored, type=CostTable) == TABLE
    with pytest.raises(msgspec.ValidationError, match="params"):
        msgspec.json.decode(stored.replace(b'"params":1000', b'"params":-1'), type=CostTable)


rows = st.tuples(*[st.integers(0, 10**6)] * 4).map(lambda row: (row[0] + 1, *row[1:]))


@given(
    rows=st.lists(rows, min_size=2, max_size=6),
    batch=st.integers(1, 256),
    training=st.sampled_from([PLAIN, SGD, ADAM]),
    data=st.data(),
)
def test_training_more_never_costs_less(
    rows: list[tuple[int, int, int, int]], batch: int, training: Training, data: st.DataObject
) -> None:
    table = table_of(*rows)
    more = data.draw(st.sets(st.sampled_from(table.spec.names), min_size=1))
    less = data.draw(st.sets(st.sampled_from(sorted(more)), min_size=1))

    def of(trained: set[str], micro_batch: int = batch) -> Estimate:
        return estimate(
            table,
            trained,
            training,
            micro_batch=micro_batch,
            num_examples=50,
            floor_bytes=0,
            flops_per_s=1e9,
            bits_per_param=5.2,
        )

    for field in Estimate.__struct_fields__:
        assert getattr(of(less), field) <= getattr(of(more), field)
    assert of(more, max(1, batch // 2)).peak_bytes <= of(more).peak_bytes
    assert of(more, max(1, batch // 2)).flops == of(more).flops

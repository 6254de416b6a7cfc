"""Both halves of a round in lockstep, on a toy model without torch: the laws all of them keep."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edge_sdk.blocks import TRUNK, Block, ModelSpec, TensorSpec
from edge_sdk.codec import CODECS
from edge_sdk.errors import ConfigError, WrongUpdate
from edge_sdk.merge import BlockSum
from edge_sdk.plan import Plan
from edge_sdk.strategies import STRATEGIES, lockstep, strategy_named
from edge_sdk.strategies.last_blocks import DeviceRound, ServerRound
from edge_sdk.wire import (
    BlockEntry,
    Offer,
    Receipt,
    Training,
    UpdateHeader,
    UpdateMetrics,
    decode_update,
    encode_update,
)

Arrays = dict[str, NDArray[Any]]
Model = dict[str, Arrays]

NAMES = ("embed", "body.0", "body.1", "head")
LARGEST_CHANGE = 2.0**-7  # float32 holds such a change exactly on the grid of 2**-30


def block(name: str, chain: str = "main") -> Block:
    return Block(
        name=name,
        chain=chain,
        tensors=(
            TensorSpec(name=f"{name}.weight", shape=(3, 4), dtype="float32"),
            TensorSpec(name=f"{name}.steps", shape=(), dtype="int64", kind="buffer"),
        ),
    )


SPEC = ModelSpec(blocks=tuple(block(name) for name in NAMES))
METRICS = UpdateMetrics(
    loss=0.5,
    steps=3,
    train_s=1.0,
    train_cpu_s=1.0,
    plan_s=1.0,
    plan_peak_bytes=1,
    measured_peak_bytes=1,
    budget_bytes=1,
    plan_up_bytes=1,
    flops=1,
)
OFFER = Offer(
    round=4,
    ticket=bytes(16),
    version=3,
    base_sha="ab" * 32,
    blocks=tuple(
        BlockEntry(name=name, sha256="cd" * 32, size_bytes=1, raw_bytes=1) for name in NAMES
    ),
    strategy="last_blocks",
    open_blocks=NAMES,
    codec="lossless",
    deadline_s=60.0,
    training=Training(),
)


def initial() -> Model:
    rng = np.random.default_rng(0)
    return {
        name: {
            f"{name}.weight": rng.standard_normal((3, 4)).astype(np.float32),
            f"{name}.steps": np.array(100, np.int64),
        }
        for name in NAMES
    }


class ToyModel:
    """A device whose training adds a small seeded change to every element."""

    def __init__(self, seed: int, samples: int, base: Model) -> None:
        self._base, self._samples = base, samples
        self._rng = np.random.default_rng(seed)
        self.weights = {name: dict(arrays) for name, arrays in base.items()}

    def train(self, plan: Plan) -> int:
        for name in plan.blocks:
            weight, steps = f"{name}.weight", f"{name}.steps"
            change = self._rng.uniform(-LARGEST_CHANGE, LARGEST_CHANGE, (3, 4))
            self.weights[name][weight] = (self._base[name][weight] + change).astype(np.float32)
            self.weights[name][steps] = self._base[name][steps] + self._samples
        return self._samples

    def metrics(self) -> UpdateMetrics:
        return METRICS

    def base(self, block: str) -> Mapping[str, NDArray[Any]]:
        return self._base[block]

    def read(self, block: str) -> Mapping[str, NDArray[Any]]:
        return self.weights[block]


class MemorySums:
    """The sums of a round, through the bytes they are stored as."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def load(self, block: str) -> BlockSum:
        spec = SPEC.block(block)
        blob = self.blobs.get(block)
        return BlockSum.zero(spec) if blob is None else BlockSum.from_bytes(spec, blob)

    def save(self, block: str, total: BlockSum) -> None:
        self.blobs[block] = total.to_bytes()


Part = tuple[int, int, tuple[str, ...]]  # seed, samples, blocks trained


def plan_of(blocks: tuple[str, ...], codec: str) -> Plan:
    return Plan(
        blocks=blocks,
        batch_size=8,
        micro_batch=8,
        codec=codec,
        peak_bytes=1,
        budget_bytes=1,
        train_s=1.0,
        round_s=1.0,
        upload_bytes=1,
        flops=1,
    )


def device(part: Part, codec: str = "lossless") -> tuple[ToyModel, DeviceRound]:
    seed, samples, blocks = part
    toy = ToyModel(seed, samples, initial())
    half = strategy_named("last_blocks").device_round
    return toy, half(OFFER, SPEC, plan_of(blocks, codec), toy, np.random.default_rng(seed))


def server(codec: str = "lossless", open_blocks: Sequence[str] = NAMES) -> ServerRound:
    return strategy_named("last_blocks").server_round(SPEC, open_blocks, codec, MemorySums())


def run_round(
    parts: Sequence[Part], codec: str = "lossless"
) -> tuple[dict[str, Arrays], list[Model]]:
    """What the server publishes, and what each device had in memory."""
    half, devices = server(codec), [device(part, codec) for part in parts]
    receipts = lockstep((generator for _, generator in devices), half)
    assert [receipt.verdict for receipt in receipts] == ["accepted"] * len(parts)
    return dict(half.close(lambda name: initial()[name])), [toy.weights for toy, _ in devices]


def raw(model: Mapping[str, Arrays]) -> dict[str, bytes]:
    return {name: a.tobytes() for arrays in model.values() for name, a in arrays.items()}


some_blocks = st.sampled_from([NAMES[start:] for start in range(4)] + [("embed", "head")])
some_parts = st.lists(
    st.tuples(st.integers(0, 2**31), st.integers(1, 5000), some_blocks), min_size=1, max_size=6
)


# --- the laws ----------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(parts=some_parts)
def test_everyone_trains_everything_is_federated_averaging(parts: list[Part]) -> None:
    published, trained = run_round([(seed, samples, NAMES) for seed, samples, _ in parts])
    weights = [samples for _, samples, _ in parts]
    assert tuple(published) == NAMES
    for name in NAMES:
        tensor = f"{name}.weight"
        stack = np.stack([model[name][tensor].astype(np.float64) for model in trained])
        mean = np.average(stack, axis=0, weights=weights)
        new = published[name][tensor]
        assert new.dtype == np.float32
        assert np.all(np.abs(new - mean) <= 2.0**-30 + np.spacing(np.abs(new)))
        steps = np.average([model[name][f"{name}.steps"] for model in trained], weights=weights)
        assert abs(published[name][f"{name}.steps"] - steps) <= 0.5 + 1e-9


@settings(max_examples=25, deadline=None)
@given(parts=some_parts, codec=st.sampled_from(CODECS))
def test_each_block_is_averaged_over_the_devices_that_trained_it(
    parts: list[Part], codec: str
) -> None:
    published, trained = run_round(parts, codec)
    assert set(published) == {name for _, _, blocks in parts for name in blocks}
    for name, arrays in published.items():
        mine = [place for place, (_, _, blocks) in enumerate(parts) if name in blocks]
        mean = np.average(
            np.stack([trained[place][name][f"{name}.weight"].astype(np.float64) for place in mine]),
            axis=0,
            weights=[parts[place][1] for place in mine],
        )
        error = {"lossless": 2.0**-29, "fp16": 2.0**-17}.get(codec, 5 * LARGEST_CHANGE)
        np.testing.assert_allclose(arrays[f"{name}.weight"], mean, rtol=2.0**-23, atol=error)


def test_what_nobody_trained_is_not_published() -> None:
    half = server()
    lockstep([device((1, 10, ("head",)))[1]], half)
    asked: list[str] = []

    def base(name: str) -> Arrays:
        asked.append(name)
        return initial()[name]

    assert list(dict(half.close(base))) == asked == ["head"]
    assert dict(server().close(base)) == {}


@settings(max_examples=20, deadline=None)
@given(parts=some_parts, codec=st.sampled_from(CODECS), data=st.data())
def test_any_order_gives_the_same_bytes(parts: list[Part], codec: str, data: st.DataObject) -> None:
    published, _ = run_round(parts, codec)
    shuffled, _ = run_round(data.draw(st.permutations(parts)), codec)
    assert raw(shuffled) == raw(published)


class IdleModel(ToyModel):
    """A device that trains without effect."""

    def train(self, plan: Plan) -> int:
        return self._samples


@pytest.mark.parametrize("codec", CODECS)
def test_a_device_that_changed_nothing_leaves_every_bit(codec: str) -> None:
    idle, rng = IdleModel(1, 10, initial()), np.random.default_rng(0)
    half = server(codec)
    plan = plan_of(NAMES, codec)
    lockstep([strategy_named("full").device_round(OFFER, SPEC, plan, idle, rng)], half)
    assert raw(dict(half.close(lambda name: initial()[name]))) == raw(initial())


# --- one update --------------------------------------------------------------------------------


def test_the_device_half_yields_one_update_that_answers_the_offer() -> None:
    _, generator = device((1, 12, ("body.1", "head")))
    header, parts = decode_update(memoryview(next(generator).to_bytes()))
    assert (header.round, header.ticket, header.base_sha) == (4, bytes(16), "ab" * 32)
    assert (header.codec, header.num_examples, header.metrics) == ("lossless", 12, METRICS)
    assert [name for name, _ in header.blocks] == ["body.1", "head"] == [name for name, _ in parts]
    with pytest.raises(StopIteration):
        generator.send(Receipt(round=4, sha256="0" * 64, verdict="accepted"))


def header_with(**changes: Any) -> UpdateHeader:
    header, _ = decode_update(memoryview(next(device((1, 12, ("body.1", "head")))[1]).to_bytes()))
    return msgspec.structs.replace(header, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (("head", 1), ("head", 1))}, r"names a block twice: \['head', 'head'\]"),
        ({"blocks": (("embed", 1),)}, r"block 'embed' is not open in this round: \['head'\]"),
        ({"blocks": (("other", 1),)}, r"block 'other' is not open"),
        (
            {"blocks": (("head", 1),), "codec": "tiny"},
            "codec 'tiny', the offer asked for 'lossless'",
        ),
    ],
)
def test_an_update_that_was_not_offered_is_refused(changes: dict[str, Any], message: str) -> None:
    half = server(open_blocks=("head",))
    with pytest.raises(WrongUpdate, match=message):
        half.check(header_with(**changes))
    assert dict(half.close(lambda name: initial()[name])) == {}


def test_bytes_that_are_no_change_leave_the_sum_as_it_was() -> None:
    half = server()
    lockstep([device((1, 10, ("head",)))[1]], half)
    before = raw(dict(half.close(lambda name: initial()[name])))
    header = header_with(blocks=(("head", 5),))
    body = encode_update(header, [b"wrong"])
    with pytest.raises(WrongUpdate, match="block 'head': payload of 5 bytes"):
        half.receive(*decode_update(memoryview(body)))
    assert raw(dict(half.close(lambda name: initial()[name]))) == before


def test_more_samples_than_a_sum_holds_are_refused() -> None:
    half = server()
    _, generator = device((1, 1 << 26, ("head",)))
    with pytest.raises(WrongUpdate, match="a weight of 67108864 samples"):
        lockstep([generator], half)


# --- candidates --------------------------------------------------------------------------------


def test_the_last_blocks_come_most_first_and_always_have_the_head() -> None:
    candidates = STRATEGIES["last_blocks"].candidates(SPEC, NAMES)
    assert candidates == [NAMES, NAMES[1:], NAMES[2:], NAMES[3:]]


def test_chains_open_level_by_level() -> None:
    places = [("a0", "a"), ("a1", "a"), ("a2", "a"), ("b0", "b"), ("b1", "b"), ("head", TRUNK)]
    spec = ModelSpec(blocks=tuple(block(name, chain) for name, chain in places))
    assert STRATEGIES["last_blocks"].candidates(spec, spec.names) == [
        ("a0", "a1", "b0", "a2", "b1", "head"),
        ("a1", "b0", "a2", "b1", "head"),
        ("a2", "b1", "head"),
        ("head",),
    ]


def test_only_open_blocks_are_candidates_and_none_twice() -> None:
    for chosen in itertools.chain.from_iterable(
        itertools.combinations(NAMES, size) for size in range(1, 5)
    ):
        candidates = STRATEGIES["last_blocks"].candidates(SPEC, chosen)
        assert candidates == [chosen[start:] for start in range(len(chosen))]
        assert STRATEGIES["full"].candidates(SPEC, chosen) == [chosen]


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_offer_of_unknown_blocks_has_no_candidate(name: str) -> None:
    assert STRATEGIES[name].candidates(SPEC, ("other",)) == []


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'best' is unknown; known are full, "):
        strategy_named("best")

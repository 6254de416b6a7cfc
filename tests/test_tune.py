"""Which plans are measured to correct a profile, and what the correction is; no process needed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from edge_sdk.errors import MIB, NothingFits
from edge_sdk.profile import Correction
from edge_sdk.tune import Measured, Trial, correction_from, engine_steps, trials
from edge_sdk.wire import Training
from tests.toy_tables import Row, limits_with, table_of

TABLE = table_of(*[Row(params=200_000, kept=400_000, out=64_000)] * 4)
CANDIDATES = [TABLE.spec.names[start:] for start in range(4)]
TRAINING = Training(batch_size=16)


def found(**changes: Any) -> dict[str, Trial]:
    rows = trials(TABLE, CANDIDATES, TRAINING, limits_with(**changes), 100)
    return {row.what: row for row in rows}


def test_unlike_plans_are_measured() -> None:
    rows = found(engines=("torch", "onnx"))
    assert list(rows) == [
        "largest", "smallest", "activations computed again", "frozen blocks kept",
        "frozen blocks in torch", "frozen blocks in onnx",
    ]  # fmt: skip
    assert rows["largest"].plan.blocks == TABLE.spec.names
    assert rows["largest"].plan.micro_batch == 16
    assert rows["smallest"].plan.blocks == ("b3",)
    assert rows["smallest"].plan.micro_batch == 4
    assert rows["activations computed again"].plan.checkpoint
    kept = rows["frozen blocks kept"]
    assert kept.plan.prefix.blocks == ("b0",)
    assert (kept.plan.prefix.cache, kept.once_s > 0) == ("memory", True)
    assert not rows["frozen blocks in onnx"].judged
    assert all(row.judged for what, row in rows.items() if what != "frozen blocks in onnx")


def test_no_plan_is_above_the_limit() -> None:
    largest = found()["largest"].plan.peak_bytes
    for row in found(memory_bytes=largest - 1).values():
        assert row.plan.peak_bytes < largest


def test_nothing_fits_says_what_torch_takes() -> None:
    with pytest.raises(NothingFits, match=r"81 MiB, allowed by the profile.*torch takes 80 MiB"):
        found(memory_bytes=81 * MIB)


def measured(memory: float, seconds: float, **changes: Any) -> Measured:
    """A plan that took so many times what was predicted."""
    row = Measured(
        what="some",
        plan=found()["largest"].plan,
        judged=True,
        predicted_bytes=100 * MIB,
        measured_bytes=round(memory * 100 * MIB),
        predicted_step_s=0.1,
        measured_step_s=seconds * 0.1,
        steps=10,
    )
    return msgspec.structs.replace(row, **changes)


def test_memory_is_corrected_by_the_worst_and_time_by_the_median() -> None:
    rows = [measured(0.9, 0.5), measured(1.2, 2.0), measured(1.1, 9.0)]
    assert correction_from(rows) == Correction(memory=1.2, time=2.0, samples=3)


def test_memory_is_never_believed_to_be_much_less() -> None:
    assert correction_from([measured(0.3, 1.0)]).memory == 0.8


def test_corrections_stay_within_what_a_profile_may_say() -> None:
    assert correction_from([measured(50, 500)]) == Correction(memory=4.0, time=10.0, samples=1)
    assert correction_from([measured(1, 1e-4)]).time == 0.1


def test_what_is_tiny_says_nothing() -> None:
    tiny = measured(3.0, 3.0, predicted_bytes=MIB, predicted_step_s=1e-4, measured_step_s=3e-4)
    assert correction_from([tiny]) == Correction(memory=1.0, time=1.0, samples=0)


def test_other_engines_and_what_was_not_measured_do_not_count() -> None:
    other = measured(3.0, 3.0, judged=False)
    late = measured(0, 0, steps=0, problem="no time was left")
    assert correction_from([measured(1.1, 1.5), other, late]) == Correction(
        memory=1.1, time=1.5, samples=1
    )


def test_a_plan_killed_for_memory_needs_at_least_what_it_had() -> None:
    killed = measured(1.6, 0, steps=0, problem="the trainer was killed for memory")
    assert correction_from([measured(1.1, 1.5), killed]).memory == 1.6


def test_engines_are_compared_at_the_same_work() -> None:
    rows = found(engines=("torch", "onnx"))
    torch_s, onnx_s = rows["frozen blocks in torch"].plan, rows["frozen blocks in onnx"].plan
    slow, fast = measured(1, 4, plan=torch_s), measured(1, 1, plan=onnx_s, judged=False)
    assert list(engine_steps([slow, fast])) == ["onnx", "torch"]
    assert engine_steps([slow]) == {}
    other = msgspec.structs.replace(onnx_s, micro_batch=4)
    assert engine_steps([slow, measured(1, 1, plan=other, judged=False)]) == {}

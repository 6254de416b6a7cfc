"""The device's state machine, every phase with every event; and when a question is repeated."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ProtocolMisuse
from edge_sdk.session import RULES, Effect, Event, Phase, Retry, transition

# Rows: phases. Columns: what happens; "-" cannot happen. Written out, not derived from RULES.
EXPECTED = """
          OFFERED                       FETCHED         PLAN_FAILED   TRAINED              DAMAGED         KILLED                  SPOOLED              RECEIPT             DONE
IDLE      FETCHING:FETCH                -               -             -                    -               IDLE:                   SENDING:SEND_UPDATE  -                   IDLE:
FETCHING  FETCHING:FETCH                TRAINING:TRAIN  IDLE:DECLINE  -                    -               FETCHING:               -                    -                   IDLE:
TRAINING  FETCHING:STOP_TRAINER,FETCH   -               IDLE:DECLINE  SENDING:SEND_UPDATE  FETCHING:FETCH  TRAINING:RETRAIN_LOWER  -                    -                   IDLE:STOP_TRAINER
SENDING   -                             -               -             -                    -               SENDING:                -                    IDLE:FORGET_UPDATE  SENDING:
"""  # noqa: E501


def expected() -> dict[tuple[Phase, Event], str]:
    header, *lines = EXPECTED.strip().splitlines()
    events = [Event[name] for name in header.split()]
    cells = {}
    for line in lines:
        phase, *row = line.split()
        cells.update({(Phase[phase], e): cell for e, cell in zip(events, row, strict=True)})
    return cells


@pytest.mark.parametrize("event", Event, ids=lambda event: event.name)
@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.name)
def test_every_phase_with_every_event(phase: Phase, event: Event) -> None:
    cell = expected()[phase, event]
    if cell == "-":
        with pytest.raises(ProtocolMisuse, match=f"{event.name} .* in phase {phase.name}"):
            transition(phase, event)
        return
    after, _, effects = cell.partition(":")
    named = tuple(Effect[name] for name in effects.split(",") if name)
    assert transition(phase, event) == (Phase[after], named)


def test_the_table_reaches_every_phase_and_uses_every_effect() -> None:
    reached, unseen = {Phase.IDLE}, [Phase.IDLE]
    while unseen:
        phase = unseen.pop()
        after = {new for (old, _), (new, _) in RULES.items() if old is phase}
        unseen += after - reached
        reached |= after
    assert reached == set(Phase)
    assert {effect for _, effects in RULES.values() for effect in effects} == set(Effect)


@given(st.lists(st.sampled_from(Event), max_size=60))
def test_an_update_leaves_the_spool_only_by_its_receipt(events: list[Event]) -> None:
    phase, spooled = Phase.IDLE, 0
    for event in events:
        if (phase, event) not in RULES:
            continue
        before = phase
        phase, effects = transition(phase, event)
        if Effect.SEND_UPDATE in effects:
            spooled += 1
        if Effect.FORGET_UPDATE in effects:
            assert event is Event.RECEIPT
            spooled -= 1
        assert spooled == (phase is Phase.SENDING)
        if before is Phase.TRAINING and event is Event.OFFERED:
            assert effects.index(Effect.STOP_TRAINER) < effects.index(Effect.FETCH)


@given(seed=st.integers(), now_s=st.floats(0, 1e6), tries=st.integers(1, 50))
def test_waits_double_up_to_the_cap_with_jitter(seed: int, now_s: float, tries: int) -> None:
    retry = Retry(random.Random(seed), first_s=0.5, cap_s=60.0)
    for number in range(tries):
        retry.arm(now_s)
        wait_s = min(60.0, 0.5 * 2**number)
        assert retry.due_s is not None
        assert now_s + wait_s / 2 <= retry.due_s <= now_s + wait_s
        assert not retry.is_due(retry.due_s - wait_s / 4)
        assert retry.is_due(retry.due_s)
        now_s = retry.due_s


def test_two_devices_do_not_repeat_themselves_at_the_same_moment() -> None:
    due = set()
    for seed in range(100):
        retry = Retry(random.Random(seed))
        retry.arm(0.0)
        due.add(retry.due_s)
    assert len(due) > 90


def test_an_answer_ends_the_repeating_and_the_next_wait_is_short_again() -> None:
    retry = Retry(random.Random(1))
    assert not retry.is_due(1e9)
    for _ in range(8):
        retry.arm(0.0)
    retry.answered()
    assert retry.due_s is None
    assert not retry.is_due(1e9)
    retry.arm(10.0)
    assert retry.due_s is not None
    assert 10.25 <= retry.due_s <= 10.5


def test_progress_makes_the_next_wait_short_again() -> None:
    retry = Retry(random.Random(2))
    for _ in range(8):
        retry.arm(0.0)
    retry.restart(100.0)
    assert retry.due_s is not None
    assert 100.25 <= retry.due_s <= 100.5


def test_a_thousand_repeats_do_not_overflow() -> None:
    retry = Retry(random.Random(3), cap_s=60.0)
    for _ in range(1000):
        retry.arm(0.0)
    assert retry.due_s is not None
    assert retry.due_s <= 60.0

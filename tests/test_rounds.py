"""The round's table of transitions, and that every open round ends in bounded time."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.errors import ConfigError, ProtocolMisuse
from edge_sdk.wire import Verdict
from reference_server.rounds import (
    RULES,
    Action,
    Effect,
    Event,
    Phase,
    RoundPolicy,
    RoundView,
    deadline_s,
    decide,
    opened_at_s,
    transition,
)

POLICY = RoundPolicy(
    min_devices=2, want_devices=3, deadline_s=100, extend_s=50, max_extensions=2, grace_s=10
)
ABCD = frozenset("abcd")


def view(
    accepted: str = "",
    *,
    offered: frozenset[str] = ABCD,
    rejected: str = "",
    declined: str = "",
    lost: str = "",
    last_answer_s: float | None = None,
    extensions: int = 0,
) -> RoundView:
    """A round opened at second 1000."""
    verdicts: dict[str, Verdict] = dict.fromkeys(accepted, "accepted")
    verdicts.update(dict.fromkeys(rejected, "rejected"))
    return RoundView(
        offered=offered,
        opened_at_s=1000,
        verdicts=verdicts,
        declined=frozenset(declined),
        lost=frozenset(lost),
        last_answer_s=last_answer_s,
        extensions=extensions,
    )


@pytest.mark.parametrize(("phase", "event"), list(product(Phase, Event)))
def test_every_phase_meets_every_event(phase: Phase, event: Event) -> None:
    if (phase, event) in RULES:
        assert transition(phase, event) == RULES[phase, event]
    else:
        with pytest.raises(ProtocolMisuse, match=f"{phase.name} cannot be {event.name}"):
            transition(phase, event)


def test_nothing_is_counted_again_once_closing() -> None:
    reached, frontier = set(), {Phase.CLOSING}
    while frontier:
        reached |= frontier
        frontier = {to for (phase, _), (to, _) in RULES.items() if phase in frontier} - reached
    assert Phase.OPEN not in reached


def test_only_final_phases_have_no_way_out() -> None:
    with_way_out = {phase for phase, _ in RULES}
    assert set(Phase) - with_way_out == {Phase.ARCHIVED, Phase.ABANDONED}


def test_whoever_abandons_counted_updates_voids_them() -> None:
    for (phase, event), (_, effect) in RULES.items():
        if event is Event.ABANDONED:
            assert effect is (None if phase is Phase.PLANNED else Effect.VOID)


def test_closes_as_soon_as_everybody_answered() -> None:
    decision = decide(view("ab", rejected="c", declined="d"), POLICY, 1001)
    assert decision.action is Action.CLOSE
    assert decision.reason == "all 4 offered devices answered"


def test_waits_for_devices_at_work_until_the_deadline() -> None:
    decision = decide(view("ab"), POLICY, 1001)
    assert (decision.action, decision.until_s) == (Action.WAIT, 1100)


def test_everybody_answered_and_none_was_accepted_ends_at_once() -> None:
    decision = decide(view("", rejected="abc", declined="d"), POLICY, 1001)
    assert decision.action is Action.ABANDON
    assert "none was accepted" in decision.reason


def test_everybody_answered_without_a_quorum_waits_for_newcomers_then_ends() -> None:
    answered = view("a", rejected="bc", declined="d")
    assert decide(answered, POLICY, 1001).action is Action.WAIT
    decision = decide(answered, POLICY, 1100)
    assert decision.action is Action.ABANDON
    assert decision.reason == "deadline: 1 accepted of the 2 needed, at most 1 possible"


def test_a_round_nobody_was_offered_does_not_close_at_once() -> None:
    empty = view(offered=frozenset())
    assert decide(empty, POLICY, 1001).action is Action.WAIT
    assert decide(empty, POLICY, 1100).action is Action.ABANDON


def test_enough_devices_give_the_others_the_grace_time() -> None:
    enough = view("abc", last_answer_s=1020)
    assert decide(enough, POLICY, 1029).until_s == 1030
    assert decide(enough, POLICY, 1030).action is Action.CLOSE
    late = view("abc", last_answer_s=1099)
    assert decide(late, POLICY, 1099).until_s == 1100


def test_closes_at_the_deadline_with_a_quorum() -> None:
    assert decide(view("ab"), POLICY, 1099.9).action is Action.WAIT
    assert decide(view("ab"), POLICY, 1100).action is Action.CLOSE


def test_extends_while_a_quorum_is_possible_and_closes_with_it() -> None:
    assert decide(view("a"), POLICY, 1100).action is Action.EXTEND
    extended = view("a", extensions=1)
    assert decide(extended, POLICY, 1100).until_s == 1150
    assert decide(view("ab", extensions=1), POLICY, 1101).action is Action.CLOSE
    assert decide(view("a", extensions=2), POLICY, 1200).action is Action.ABANDON


def test_a_lost_device_is_waited_for_until_the_deadline_only() -> None:
    lost = view("a", rejected="b", declined="c", lost="d")
    assert decide(lost, POLICY, 1050).action is Action.WAIT
    assert decide(lost, POLICY, 1100).action is Action.ABANDON
    quorum = view("ab", declined="c", lost="d")
    assert decide(quorum, POLICY, 1050).action is Action.WAIT
    assert decide(quorum, POLICY, 1100).action is Action.CLOSE


def test_a_lost_device_that_had_answered_counts() -> None:
    assert decide(view("abcd", lost="abcd"), POLICY, 1001).action is Action.CLOSE


def test_a_restarted_server_gives_the_time_that_was_left() -> None:
    opened = opened_at_s(POLICY, extensions=1, remaining_s=20, now_s=5.0)
    restarted = RoundView(offered=ABCD, opened_at_s=opened, extensions=1)
    assert deadline_s(restarted, POLICY) == 25.0
    assert opened_at_s(POLICY, 0, remaining_s=1e9, now_s=5.0) == 5.0
    assert opened_at_s(POLICY, 0, remaining_s=-3.0, now_s=5.0) == -95.0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"min_devices": 0}, "1 <= min_devices <= want_devices, got 0 and"),
        ({"min_devices": 5, "want_devices": 4}, "got 5 and 4"),
        ({"deadline_s": math.inf}, "deadline_s must be finite and > 0, got inf"),
        ({"extend_s": 0.0}, "extend_s must be finite and > 0, got 0.0"),
        ({"grace_s": math.nan}, "grace_s and max_extensions must be >= 0, got nan"),
        ({"max_extensions": -1}, "must be >= 0, got 30.0 and -1"),
    ],
)
def test_an_impossible_policy_is_refused(change: dict[str, float], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RoundPolicy(**change)  # type: ignore[arg-type]
    assert text in str(caught.value)


policies = st.builds(
    RoundPolicy,
    min_devices=st.integers(1, 4),
    want_devices=st.integers(4, 8),
    deadline_s=st.floats(0.5, 1e4),
    extend_s=st.floats(0.5, 1e4),
    max_extensions=st.integers(0, 4),
    grace_s=st.floats(0, 1e4),
)
happenings = st.lists(
    st.tuples(
        st.floats(0, 5e4),
        st.sampled_from("abcdef"),
        st.sampled_from(["accepted", "rejected", "declined", "lost", "back", "offered"]),
    ),
    max_size=20,
)


@given(policy=policies, happens=happenings, opened=st.floats(0, 1e6))
def test_every_open_round_ends_by_its_longest_time(
    policy: RoundPolicy, happens: list[tuple[float, str, str]], opened: float
) -> None:
    now, extensions, queue = opened, 0, sorted(happens)
    offered, declined, lost = set("abc"), set[str](), set[str]()
    verdicts: dict[str, Verdict] = {}
    last: float | None = None
    while True:
        seen = RoundView(
            offered=frozenset(offered),
            opened_at_s=opened,
            verdicts=verdicts,
            declined=frozenset(declined),
            lost=frozenset(lost),
            last_answer_s=last,
            extensions=extensions,
        )
        decision = decide(seen, policy, now)
        if decision.action is Action.EXTEND:
            extensions += 1
            assert extensions <= policy.max_extensions
        elif decision.action is Action.WAIT:
            assert now < decision.until_s <= opened + policy.longest_s
            if queue and opened + queue[0][0] < decision.until_s:
                after_s, device, what = queue.pop(0)
                now = max(now, opened + after_s)
                offered.add(device)
                if what in ("accepted", "rejected") and device not in verdicts:
                    verdicts[device] = "accepted" if what == "accepted" else "rejected"
                    last = now
                elif what == "declined":
                    declined.add(device)
                    last = now
                elif what == "lost":
                    lost.add(device)
                elif what == "back":
                    lost.discard(device)
            else:
                now = decision.until_s
        else:
            assert (decision.action is Action.CLOSE) == (seen.accepted >= policy.min_devices)
            assert now <= opened + policy.longest_s
            return

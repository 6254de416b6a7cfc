"""Who is enrolled and who may be offered a round."""

from __future__ import annotations

import pytest

from edge_sdk.errors import ConfigError, Refused
from edge_sdk.wire import Hello
from reference_server.fleet import TAKEOVER_WINDOW_S, TAKEOVERS, Fleet, Presence

SPEC = "5" * 64


def hello(session: int = 1, spec: str = SPEC) -> Hello:
    return Hello(
        session=session,
        sdk="1.0",
        profile="raspberry-pi-4",
        memory_bytes=1 << 30,
        flops_per_s=1e9,
        spec_digest=spec,
        num_examples=100,
    )


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet(SPEC)
    for name in ("cam-2", "cam-1", "cam-3"):
        fleet.hello(name, hello(), 10.0)
    return fleet


def test_greeting_enrols_and_repeating_it_renews(fleet: Fleet) -> None:
    assert len(fleet) == 3
    again = fleet.hello("cam-1", hello(), 20.0)
    assert (len(fleet), again.sessions) == (3, 1)
    assert (again.first_heard_s, again.last_heard_s) == (10.0, 20.0)
    assert again.facts.profile == "raspberry-pi-4"


@pytest.mark.parametrize("name", ["", "Cam-1", "a/b", "a" * 65, "cam_1", "cam-1\n"])
def test_a_name_that_fits_no_topic_is_refused(fleet: Fleet, name: str) -> None:
    with pytest.raises(Refused, match="must be 1 to 64 of the characters"):
        fleet.hello(name, hello(), 0.0)


def test_another_model_is_refused_by_name(fleet: Fleet) -> None:
    with pytest.raises(Refused, match="builds model 666666666666, this job trains 555555555555"):
        fleet.hello("cam-4", hello(spec="6" * 64), 0.0)
    assert fleet.get("cam-4") is None


def test_a_full_fleet_refuses_newcomers_and_knows_its_own() -> None:
    fleet = Fleet(SPEC, max_devices=2)
    fleet.hello("a", hello(), 0.0)
    fleet.hello("b", hello(), 0.0)
    with pytest.raises(Refused, match="c: the fleet is full, 2 of at most 2 devices"):
        fleet.hello("c", hello(), 0.0)
    fleet.hello("a", hello(session=2), 1.0)
    fleet.forget("b")
    fleet.hello("c", hello(), 1.0)
    assert [known.device for known in fleet] == ["a", "c"]


def test_a_fleet_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_devices must be at least 1, got 0"):
        Fleet(SPEC, max_devices=0)


def test_eligible_are_present_devices_not_asked_yet(fleet: Fleet) -> None:
    assert fleet.eligible(1, 11.0) == ["cam-1", "cam-2", "cam-3"]
    fleet.offered("cam-2", 1)
    fleet.offered("unknown", 1)
    fleet.presence("cam-3", Presence.SLEEPING, 1, 11.0)
    fleet.presence("cam-1", Presence.TRAINING, 1, 11.0)
    assert fleet.eligible(1, 12.0) == ["cam-1"]
    assert fleet.eligible(2, 12.0) == ["cam-1", "cam-2"]


def test_a_lost_device_comes_back_with_any_sign_of_life(fleet: Fleet) -> None:
    assert fleet.presence("cam-1", Presence.LOST, 1, 30.0)
    assert fleet.lost() == {"cam-1"}
    known = fleet.get("cam-1")
    assert known is not None
    assert known.last_heard_s == 10.0  # the broker spoke, not the device
    fleet.heard("cam-1", 40.0)
    fleet.heard("unknown", 40.0)
    assert fleet.lost() == frozenset()
    assert known.last_heard_s == 40.0
    fleet.presence("cam-1", Presence.LOST, 1, 50.0)
    fleet.hello("cam-1", hello(), 60.0)
    assert fleet.lost() == frozenset()


def test_the_will_of_an_earlier_session_says_nothing(fleet: Fleet) -> None:
    fleet.hello("cam-1", hello(session=2), 20.0)
    assert not fleet.presence("cam-1", Presence.LOST, 1, 21.0)
    assert not fleet.presence("unknown", Presence.LOST, 1, 21.0)
    assert fleet.lost() == frozenset()
    assert fleet.presence("cam-1", Presence.LOST, 2, 22.0)


def test_one_id_on_two_machines_gets_no_work(fleet: Fleet) -> None:
    for turn in range(TAKEOVERS):
        assert "cam-1" in fleet.eligible(1, 20.0 + turn)
        fleet.hello("cam-1", hello(session=2 + turn % 2), 20.0 + turn)
    assert fleet.eligible(1, 25.0) == ["cam-2", "cam-3"]
    assert "cam-1" in fleet.eligible(1, 21.0 + TAKEOVER_WINDOW_S)


def test_counts_name_every_presence(fleet: Fleet) -> None:
    fleet.presence("cam-2", Presence.SLEEPING, 1, 11.0)
    assert fleet.count() == {"ready": 2, "training": 0, "sleeping": 1, "lost": 0}

"""What brokers allow: sizes of pieces, and a pace that a strict counter never finds too fast."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_sdk.brokers import (
    BROKERS,
    KIB,
    PUBLISH_OVERHEAD_BYTES,
    TOPIC_ALLOWANCE_BYTES,
    BrokerProfile,
    Pace,
    broker_profile,
)
from edge_sdk.errors import ConfigError
from edge_sdk.wire import MAX_PIECE_BYTES, PIECE_OVERHEAD_BYTES, Topics

ROOM_BYTES = PUBLISH_OVERHEAD_BYTES + TOPIC_ALLOWANCE_BYTES


@pytest.mark.parametrize("name", BROKERS)
@pytest.mark.parametrize("announced_bytes", [None, 1 << 20, 40_000])
def test_a_piece_and_its_longest_topic_fit_the_packet(
    name: str, announced_bytes: int | None
) -> None:
    profile = broker_profile(name)
    size_bytes = profile.piece_bytes(MAX_PIECE_BYTES, announced_bytes)
    topic = Topics("j" * 64).data("d" * 64)
    packet_bytes = PUBLISH_OVERHEAD_BYTES + len(topic) + PIECE_OVERHEAD_BYTES + size_bytes
    for limit_bytes in (profile.packet_bytes, announced_bytes):
        assert not limit_bytes or packet_bytes <= limit_bytes


def test_the_tighter_of_both_limits_counts() -> None:
    profile = BrokerProfile(name="x", packet_bytes=50_000)
    assert profile.piece_bytes(1 << 20) == 50_000 - ROOM_BYTES
    assert profile.piece_bytes(1 << 20, 30_000) == 30_000 - ROOM_BYTES
    assert profile.piece_bytes(1 << 20, 90_000) == 50_000 - ROOM_BYTES
    assert profile.piece_bytes(1000, 30_000) == 1000


def test_a_broker_that_says_nothing_gets_what_all_take() -> None:
    assert BROKERS["generic"].piece_bytes(1 << 20) < 64 * KIB


def test_next_to_no_packet_is_an_error_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"packets of at most 300 bytes.*max_packet_size"):
        BROKERS["generic"].piece_bytes(1000, 300)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ConfigError, match="'mosquito' is unknown; known are generic, mosquitto"):
        broker_profile("mosquito")


def publish_times(profile: BrokerProfile, count: int, size_bytes: int) -> list[float]:
    """When a sender that obeys its pace publishes."""
    pace, now_s, times = Pace(profile), 100.0, []
    for _ in range(count):
        now_s += pace.wait_s(now_s)
        pace.spend(size_bytes, now_s)
        times.append(now_s)
    return times


@pytest.mark.parametrize("size_bytes", [100, 20_000, 120_000, 400_000])
@pytest.mark.parametrize("name", ["aws-iot-core", "emqx-serverless", "azure-event-grid"])
def test_no_second_has_more_than_is_allowed(name: str, size_bytes: int) -> None:
    profile = BROKERS[name]
    times = publish_times(profile, 400, size_bytes)
    for start, first_s in enumerate(times):
        # A microsecond less: where sums of floats stand for one.
        inside = sum(t - first_s < 1.0 - 1e-6 for t in times[start : start + 200])
        assert inside <= profile.publishes_per_s
        if profile.bytes_per_s and inside > 1:  # one larger than the rate has to go at some time
            assert inside * size_bytes <= profile.bytes_per_s + size_bytes
    took_s = times[-1] - times[0]
    rates = (profile.publishes_per_s, profile.bytes_per_s / size_bytes or float("inf"))
    assert 400 / took_s > 0.8 * min(rates), "and not much less than it could"


def test_without_limits_there_is_no_wait() -> None:
    assert set(publish_times(BROKERS["generic"], 1000, 1 << 20)) == {100.0}


def test_what_had_to_go_before_its_time_is_paid_for_later() -> None:
    pace = Pace(BROKERS["emqx-serverless"])
    for _ in range(20):
        pace.spend(100, 0.0)
    assert pace.wait_s(0.0) == pytest.approx(20 / 9.0)


def test_a_clock_that_stands_still_fills_nothing() -> None:
    profile = replace(BROKERS["generic"], publishes_per_s=2.0)
    pace = Pace(profile)
    pace.spend(1, 5.0)
    assert pace.wait_s(5.0) > 0
    assert pace.wait_s(4.0) > 0, "nor does one that goes back"

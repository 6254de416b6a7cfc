"""Pieces that were asked for, on their way to a real broker: each once, in turns, and as it may."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from edge_sdk.brokers import BROKERS
from edge_sdk.errors import StateError
from edge_sdk.feed import Feed
from edge_sdk.link import SEND_WINDOW_BYTES, Arrived, LinkUp
from edge_sdk.mqtt import Link
from tests.brokers import OpenBroker

DONE_S = 10.0
PIECE_BYTES = 40_000
_number = itertools.count()


class Pipe:
    """A feed whose pieces come back to the same link, so that their order can be seen."""

    def __init__(self, broker: OpenBroker, profile: str = "generic") -> None:
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.topic = f"feed/{next(_number)}"
        limits = BROKERS[profile]
        self.link = Link(broker.url, f"feed-{next(_number)}", self.inbox, limits=limits)
        self.link.subscribe(f"{self.topic}/+")
        self.feed = Feed(self.link)
        self.arrived: list[tuple[str, int]] = []

    def __enter__(self) -> Pipe:
        self.link.start()
        while not isinstance(self.inbox.get(timeout=DONE_S), LinkUp):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def make(self, receiver: str) -> Callable[[int], tuple[str, bytes]]:
        def piece(index: int) -> tuple[str, bytes]:
            return f"{self.topic}/{receiver}", index.to_bytes(4, "big") + bytes(PIECE_BYTES)

        return piece

    def order(self, receiver: str, indexes: Iterable[int], content: str = "a") -> None:
        self.feed.order(receiver, content, indexes, self.make(receiver))

    def run(self, count: int) -> list[tuple[str, int]]:
        """Pump, as a main loop does, until so many have come back."""
        deadline_s = time.monotonic() + DONE_S
        self.feed.pump()
        while len(self.arrived) < count:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"{len(self.arrived)} of {count} came back"
            pause_s = self.feed.due_in_s()
            try:
                event = self.inbox.get(timeout=left_s if pause_s is None else min(left_s, pause_s))
            except queue.Empty:
                event = None
            if isinstance(event, Arrived):
                receiver = event.topic.rpartition("/")[2]
                self.arrived.append((receiver, int.from_bytes(event.payload[:4], "big")))
            self.feed.pump()
        return self.arrived


@pytest.fixture
def pipe(mosquitto: OpenBroker) -> Iterator[Pipe]:
    with Pipe(mosquitto) as made:
        yield made


def test_all_that_was_asked_for_arrives_once_and_in_order(pipe: Pipe) -> None:
    pipe.order("r", range(100))
    assert pipe.run(100) == [("r", index) for index in range(100)]
    assert (pipe.feed.handed_pieces, pipe.feed.idle) == (100, True)


def test_receivers_take_turns(pipe: Pipe) -> None:
    pipe.order("large", range(60))
    pipe.order("small", range(3))
    pipe.run(63)
    small = [place for place, (receiver, _) in enumerate(pipe.arrived) if receiver == "small"]
    assert small == [1, 3, 5]


def test_no_more_than_a_window_is_in_memory(pipe: Pipe) -> None:
    read = []

    def make(index: int) -> tuple[str, bytes]:
        read.append(index)
        assert pipe.link.pending_bytes <= SEND_WINDOW_BYTES
        return pipe.make("r")(index)

    pipe.feed.order("r", "a", range(200), make)
    pipe.feed.pump()
    assert len(read) < 10, "the others are read when there is room for them"
    pipe.run(200)
    assert read == list(range(200))


def test_what_waits_or_is_under_way_is_not_sent_twice(pipe: Pipe) -> None:
    pipe.order("r", range(20))
    pipe.feed.pump()
    pipe.order("r", range(10, 30))
    pipe.order("r", range(30))
    pipe.run(30)
    assert sorted(index for _, index in pipe.arrived)[:30] == list(range(30))
    assert pipe.feed.handed_pieces - 30 <= 3, "but for what the broker had acknowledged meanwhile"


def test_other_content_takes_the_place_of_the_old(pipe: Pipe) -> None:
    pipe.order("r", range(50), "old")
    pipe.feed.pump()
    handed = pipe.feed.handed_pieces
    pipe.order("r", [1000, 1001], "new")
    pipe.run(handed + 2)
    assert [index for _, index in pipe.arrived] == [*range(handed), 1000, 1001]


def test_a_piece_that_cannot_be_read_ends_that_order_alone(pipe: Pipe) -> None:
    def lost(index: int) -> tuple[str, bytes]:
        raise StateError(f"cannot read piece {index}: gone; check the disk")

    pipe.feed.order("broken", "a", range(5), lost)
    pipe.order("r", range(5))
    assert pipe.run(5) == [("r", index) for index in range(5)]
    assert pipe.feed.idle


def test_a_piece_larger_than_the_broker_takes_ends_that_order_alone(pipe: Pipe) -> None:
    def huge(index: int) -> tuple[str, bytes]:
        return pipe.topic, bytes(2 << 20)

    pipe.feed.order("huge", "a", range(5), huge)
    pipe.order("r", range(5))
    assert pipe.run(5) == [("r", index) for index in range(5)]


def test_nothing_is_sent_on_after_a_new_connection(pipe: Pipe) -> None:
    pipe.order("r", range(50))
    pipe.feed.reconnected()
    assert pipe.feed.idle
    pipe.feed.pump()
    assert pipe.feed.handed_pieces == 0


def test_nothing_is_handed_over_while_offline(mosquitto: OpenBroker) -> None:
    pipe = Pipe(mosquitto)
    pipe.order("r", range(5))
    pipe.feed.pump()
    assert (pipe.feed.handed_pieces, pipe.feed.due_in_s()) == (0, None)
    with pipe:
        assert pipe.run(5) == [("r", index) for index in range(5)]


def test_a_slow_broker_is_given_time(mosquitto: OpenBroker) -> None:
    with Pipe(mosquitto, "emqx-serverless") as pipe:
        started_s = time.monotonic()
        pipe.order("r", range(12))
        pipe.run(12)
        assert time.monotonic() - started_s > (12 - 2) / 10

"""How much a link lets be under way, and by what it knows that a line is dead."""

from __future__ import annotations

import queue
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.link import (
    LEAST_SEND_WINDOW_BYTES,
    SEND_WINDOW_BYTES,
    STRETCH,
    STRETCH_S,
    Arrived,
    LinkDown,
    LinkUp,
    Vigil,
    Window,
)
from edge_sdk.mqtt import Link
from reference_server.broker import find_mosquitto
from tests.brokers import OpenBroker
from tests.tunnel import Tunnel

PIECE_BYTES = 60 * 1024
DONE_S = 15.0


class Line:
    """A line with a rate and a delay, as a window sees it: what is acknowledged when."""

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._per_s, self._delay_s = bytes_per_s, delay_s
        self.drained = 0
        self.window = Window(self._drain)
        self._under_way: list[tuple[float, int]] = []
        self._free_s = self.now_s = 0.0
        self._mid = 0
        self.most_bytes = 0

    def _drain(self) -> None:
        self.drained += 1

    def fill(self) -> None:
        while self.window.has_room:
            self._mid += 1
            self.window.reserve(PIECE_BYTES, self.now_s)
            self.window.name(self._mid, PIECE_BYTES, self.now_s)
            self._free_s = max(self._free_s, self.now_s) + PIECE_BYTES / self._per_s
            self._under_way.append((self._free_s + self._delay_s, self._mid))

    def run(self, pieces: int) -> float:
        """Send so many; bytes a second."""
        started_s = self.now_s
        for _ in range(pieces):
            self.fill()
            self.most_bytes = max(self.most_bytes, self.window.size_bytes)
            self.now_s, mid = self._under_way.pop(0)
            self.window.acknowledge(mid, self.now_s)
        return pieces * PIECE_BYTES / (self.now_s - started_s)


@pytest.mark.parametrize("bytes_per_s", [20e3, 125e3, 1e6, 10e6])
@pytest.mark.parametrize("delay_s", [0.005, 0.2])
def test_a_line_is_filled_and_not_more(bytes_per_s: float, delay_s: float) -> None:
    line = Line(bytes_per_s, delay_s)
    line.run(50)
    line.most_bytes = 0
    reached = line.run(200)
    # What the largest window can reach on a line that is long and fast.
    possible = min(bytes_per_s, (SEND_WINDOW_BYTES + PIECE_BYTES) / (delay_s + 0.006))
    assert reached > 0.9 * possible
    assert line.most_bytes <= SEND_WINDOW_BYTES + PIECE_BYTES
    useful_s = STRETCH * (PIECE_BYTES / bytes_per_s + delay_s) + STRETCH_S
    assert line.most_bytes <= useful_s * bytes_per_s + 2 * PIECE_BYTES


def test_small_messages_say_nothing_about_the_line() -> None:
    window = Window()
    window.reserve(100, 0.0)
    window.name(1, 100, 0.0)
    window.acknowledge(1, 0.001)
    line = Line(125e3, 0.2)
    line.window = window
    line.run(20)
    assert line.window.size_bytes <= SEND_WINDOW_BYTES


def test_drained_is_said_once_when_there_is_room_again() -> None:
    line = Line(1e6, 0.01)
    line.fill()
    assert not line.window.has_room
    line.run(1)
    assert line.drained == 1


def test_a_new_connection_starts_carefully() -> None:
    line = Line(10e6, 0.005)
    line.run(50)
    line.window.clear()
    line.fill()
    assert line.window.size_bytes <= LEAST_SEND_WINDOW_BYTES + PIECE_BYTES


def test_a_late_look_at_an_old_sign_of_life_is_none() -> None:
    vigil = Vigil(10, 100.0)
    vigil.heard(110.0)
    vigil.heard(105.0)
    assert vigil.dead_in_s(110.0) == pytest.approx(15.0)


@pytest.mark.usefixtures("needs_tunnel")
def test_a_full_socket_on_a_dark_line_is_noticed_in_time(tmp_path: Path) -> None:
    """The kernel takes a little more in the dark; that is no sign of life."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with Tunnel(rate_bytes_per_s=1e6, delay_s=0.02, queue_bytes=20_000) as tunnel:
        config = tmp_path / "mosquitto.conf"
        config.write_text(f"listener 1883 {tunnel.device_ip}\nallow_anonymous true\nuser root\n")
        far = subprocess.Popen(
            tunnel.command(str(find_mosquitto()), "-c", config), stderr=subprocess.DEVNULL
        )
        url = f"mqtt://{tunnel.device_ip}"
        near = Link(url, "near", inbox, keepalive_s=2, rng=random.Random(1))
        near.start()
        try:
            while not isinstance(inbox.get(timeout=DONE_S), LinkUp):
                pass
            tunnel.dark(True)
            dark_s = time.monotonic()
            for _ in range(64):
                near.publish("t/x", bytes(PIECE_BYTES))
            event = inbox.get(timeout=DONE_S)
            assert isinstance(event, LinkDown)
            assert "no sign of life" in event.reason
            assert 2.0 < time.monotonic() - dark_s < 5.0
        finally:
            near.close()
            far.kill()
            far.wait()


def test_a_broker_keeps_what_comes_for_a_session(mosquitto: OpenBroker) -> None:
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def reader() -> Link:
        link = Link(mosquitto.url, "keeper", inbox, session_s=60)
        link.subscribe("kept/+")
        link.start()
        while not isinstance(inbox.get(timeout=DONE_S), LinkUp):
            pass
        return link

    reader().close()
    sender = Link(mosquitto.url, "sender", queue.SimpleQueue())
    sender.start()
    deadline_s = time.monotonic() + DONE_S
    while not sender.publish("kept/1", b"meanwhile") and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert sender.wait_below(0, DONE_S)
    sender.close()
    again = reader()
    try:
        assert inbox.get(timeout=DONE_S) == Arrived("kept/1", b"meanwhile")
    finally:
        again.close()

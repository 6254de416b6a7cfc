"""The rate of the link, measured through real brokers."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from edge_sdk.echo import measure_link
from edge_sdk.errors import ConfigError
from edge_sdk.link import Arrived, LinkEvent, LinkUp, parse_address
from edge_sdk.mqtt import Link
from reference_server.broker import BrokerProcess


def pump(source: socket.socket, sink: socket.socket, bytes_per_s: float) -> None:
    """Forward at a rate, with little in flight, as a thin line does."""
    with suppress(OSError):
        while data := source.recv(2048):
            sink.sendall(data)
            time.sleep(len(data) / bytes_per_s)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def thin_line(port: int, up_bytes_per_s: float, down_bytes_per_s: float) -> Iterator[str]:
    """The address of a line to a broker with these rates, for one connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    ends: list[socket.socket] = []

    def serve() -> None:
        with suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.socket()
                far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
                far.connect(("127.0.0.1", port))
                ends.extend((near, far))
                for line in ((near, far, up_bytes_per_s), (far, near, down_bytes_per_s)):
                    threading.Thread(target=pump, args=line, daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"mqtt://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)
    for end in ends:
        end.close()


@pytest.mark.parametrize(("up", "down"), [(1.5e5, 6e5), (6e5, 1.5e5)])
def test_each_direction_is_measured_by_itself(
    broker: BrokerProcess, up: float, down: float
) -> None:
    port = parse_address(broker.url).port
    with thin_line(port, up, down) as url:
        found = measure_link(url, 3.0)
    assert found.up is not None
    assert found.down is not None
    assert 0.5 * up < found.up.per_s < 1.6 * up
    assert 0.5 * down < found.down.per_s < 1.6 * down


def test_a_dead_line_takes_no_longer_than_it_may() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel answers, nobody reads
        start_s = time.monotonic()
        found = measure_link(f"mqtt://127.0.0.1:{silent.getsockname()[1]}", 0.5)
        assert time.monotonic() - start_s < 1.5
    assert (found.up, found.down) == (None, None)
    assert found.reason == "no connection to the broker in time"


def test_both_directions_are_measured_and_nothing_is_left(
    broker: BrokerProcess, inbox: queue.SimpleQueue[LinkEvent]
) -> None:
    found = measure_link(broker.url, 3.0)
    assert found.reason == ""
    for rate in (found.up, found.down):
        assert rate is not None
        assert rate.per_s > 1e5
        assert rate.samples > 1
        assert rate.spread >= 0
    link = Link(broker.url, "after", inbox)
    link.subscribe("edge/#")
    link.start()
    try:
        assert isinstance(inbox.get(timeout=5), LinkUp)
        assert link.publish("edge/last", b"x")
        event = inbox.get(timeout=5)
        assert isinstance(event, Arrived)
        assert event.topic == "edge/last", "a retained message was left behind"
    finally:
        link.close()


def test_nobody_there_is_a_reason(no_broker: str) -> None:
    found = measure_link("mqtt://127.0.0.1:1", 1.0)
    assert (found.up, found.down) == (None, None)
    assert "nobody listens there" in found.reason
    assert "no MQTT broker" in measure_link(no_broker, 1.0).reason


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="names no broker"):
        measure_link("http://x", 1.0)

"""The tools that make links and brokers bad: each does what it says, and nothing without."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from reference_server.broker import BrokerProcess, Kind
from tests.brokers import OpenBroker
from tests.limited_broker import (
    AWS_IOT_CORE,
    AZURE_EVENT_GRID,
    EMQX,
    EMQX_SERVERLESS,
    LimitedBroker,
    Limits,
    OverRate,
    connack_body,
)
from tests.raw_mqtt import Client, Swarm, connect_packet, fan_in
from tests.relay import BUFFER_BYTES, Relay, eventually
from tests.tunnel import NAMESPACES, Traffic, Tunnel, tunnel_reason

needs_tunnel = pytest.mark.usefixtures("needs_tunnel")

ROOT = Path(__file__).resolve().parent.parent
RELAY_RATE_BYTES_PER_S = 500_000
SEND_TCP = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as sock:
    sock.sendall(bytes(range(256)) * (int(sys.argv[3]) // 256))
    sock.shutdown(socket.SHUT_WR)
    sock.recv(1)
"""
SEND_UDP = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((sys.argv[1], int(sys.argv[2])))
for number in range(int(sys.argv[3])):
    sock.send(number.to_bytes(2, "big") + bytes(int(sys.argv[4])))
"""
PUBLISH_MQTT = """
import sys
from tests.raw_mqtt import Swarm
with Swarm(int(sys.argv[2]), host=sys.argv[1]) as swarm:
    client = swarm.connect("far")
    client.publish("far", bytes(100_000))
    assert swarm.run(lambda: swarm.pending == 0)
"""
KILLED = """
import os, signal
from tests.tunnel import Tunnel
tunnel = Tunnel().__enter__()
print(tunnel.namespace, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@contextmanager
def sink() -> Iterator[tuple[int, list[float], bytearray]]:
    """A port, and when which bytes arrived there from the first client."""
    times_s: list[float] = []
    received = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def take() -> None:
        with listener.accept()[0] as connection, suppress(ConnectionResetError):
            while data := connection.recv(1 << 16):
                received.extend(data)
                times_s.append(time.monotonic())

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    yield listener.getsockname()[1], times_s, received
    thread.join(10)
    listener.close()


def relayed_s(payload_bytes: int, **settings: float) -> tuple[float, float]:
    """Seconds until the first and the last byte came through a relay, each of them right."""
    payload = os.urandom(payload_bytes)
    with sink() as (port, times_s, received), Relay(port, **settings) as relay:  # type: ignore[arg-type]
        start_s = time.monotonic()
        with socket.create_connection(("127.0.0.1", relay.port)) as sender:
            sender.sendall(payload)
        eventually(lambda: len(received) == payload_bytes, 10)
        assert received == payload
    return times_s[0] - start_s, times_s[-1] - start_s


def test_a_relay_without_settings_neither_delays_nor_limits() -> None:
    assert relayed_s(300_000)[1] < 0.2


def test_a_relay_delays_without_limiting() -> None:
    first_s, last_s = relayed_s(5_000_000, delay_s=0.2)
    assert 0.2 <= first_s < 0.4
    assert last_s < first_s + 1.0, "the delay is paid once, not by each chunk"


def test_a_relay_limits_the_rate() -> None:
    first_s, last_s = relayed_s(300_000, rate_bytes_per_s=RELAY_RATE_BYTES_PER_S)
    assert first_s < 0.1
    assert 0.55 <= last_s < 0.9


@pytest.mark.parametrize("delay_s", [0.0, 0.05])
@pytest.mark.parametrize("rate_bytes_per_s", [RELAY_RATE_BYTES_PER_S, None])
def test_who_sends_too_fast_has_to_wait(rate_bytes_per_s: float | None, delay_s: float) -> None:
    with (
        sink() as (port, _, _),
        Relay(port, rate_bytes_per_s=rate_bytes_per_s, delay_s=delay_s) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as sender,
    ):
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        sender.settimeout(0.3)
        taken_bytes, until_s = 0, time.monotonic() + 0.3
        with suppress(socket.timeout):
            while time.monotonic() < until_s and taken_bytes < 10_000_000:
                taken_bytes += sender.send(bytes(1 << 14))
        relay.cut()
    if rate_bytes_per_s is None:
        assert taken_bytes >= 10_000_000
    else:  # what passed, and the buffers on the way
        assert taken_bytes < 0.6 * rate_bytes_per_s + 8 * BUFFER_BYTES


def test_an_outage_ends_by_itself_and_loses_nothing() -> None:
    with (
        sink() as (port, times_s, received),
        Relay(port) as relay,
        socket.create_connection(("127.0.0.1", relay.port)) as sender,
    ):
        sender.sendall(b"before")
        eventually(lambda: received == b"before")
        relay.stall_for(0.3)
        assert relay.wait_until(lambda r: r.stalled)
        start_s = time.monotonic()
        sender.sendall(b" after")
        eventually(lambda: received == b"before after")
        assert times_s[-1] - start_s >= 0.25
        assert relay.open_connections == 1
        sender.close()


def send_tcp(tunnel: Tunnel, size_bytes: int, during: Callable[[], None] = lambda: None) -> float:
    """Seconds for so many bytes from the namespace to here."""
    with socket.create_server((tunnel.server_ip, 0)) as listener:
        words = (SEND_TCP, tunnel.server_ip, listener.getsockname()[1], size_bytes)
        sender = subprocess.Popen(tunnel.command(sys.executable, "-c", *map(str, words)))
        listener.settimeout(10)
        received = bytearray()
        with listener.accept()[0] as connection:
            start_s = time.monotonic()
            during()
            while data := connection.recv(1 << 16):
                received += data
            duration_s = time.monotonic() - start_s
        assert sender.wait(10) == 0
    assert received == bytes(range(256)) * (size_bytes // 256)
    return duration_s


def send_udp(tunnel: Tunnel, count: int, size_bytes: int = 100) -> list[int]:
    """Which of the datagrams, numbered from 0, came from the namespace to here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((tunnel.server_ip, 0))
        before = tunnel.traffic().up
        fire_udp(tunnel, receiver.getsockname()[1], count, size_bytes)
        eventually(lambda: _landed(tunnel.traffic()) >= count + _landed(Traffic(up=before)))
        receiver.setblocking(False)
        numbers: list[int] = []
        while True:
            try:
                numbers.append(int.from_bytes(receiver.recv(2048)[:2], "big"))
            except BlockingIOError:
                return numbers


def fire_udp(tunnel: Tunnel, port: int, count: int, size_bytes: int) -> None:
    """Put them on the line, and do not wait for what becomes of them."""
    words = (SEND_UDP, tunnel.server_ip, port, count, size_bytes)
    subprocess.run(tunnel.command(sys.executable, "-c", *map(str, words)), check=True)


def _landed(traffic: Traffic) -> int:
    up = traffic.up
    return up.arrived_packets + up.lost_packets + up.overflowed_packets + up.dark_packets


@needs_tunnel
def test_a_tunnel_is_as_slow_and_as_far_as_it_was_told() -> None:
    with Tunnel(rate_bytes_per_s=500_000, delay_s=0.05) as link:
        assert 1.0 <= send_tcp(link, 512_000) < 1.6
        up = link.traffic().up
        assert up.payload_bytes >= 512_000
        assert up.sent_bytes > up.payload_bytes + 20 * up.sent_packets
        assert up.lost_packets == up.dark_packets == 0
    with Tunnel(rate_bytes_per_s=50e6, delay_s=0.0) as link:
        assert send_tcp(link, 512_000) < 0.5


@needs_tunnel
def test_the_seed_decides_which_packets_are_lost() -> None:
    arrived = []
    for seed in (1, 1, 2):
        with Tunnel(rate_bytes_per_s=10e6, delay_s=0.0, loss=0.2, seed=seed) as link:
            arrived.append(send_udp(link, 200))
            assert link.traffic().up.lost_packets == 200 - len(arrived[-1])
    assert arrived[0] == arrived[1] != arrived[2]
    assert 130 <= len(arrived[0]) <= 190
    with Tunnel(rate_bytes_per_s=10e6, delay_s=0.0) as link:
        assert send_udp(link, 200) == list(range(200))


@needs_tunnel
def test_what_the_queue_cannot_hold_is_lost() -> None:
    with Tunnel(rate_bytes_per_s=200_000, delay_s=0.0, queue_bytes=64_000) as link:
        arrived = send_udp(link, 200, size_bytes=1000)
        assert link.traffic().up.overflowed_packets == 200 - len(arrived)
    assert 60 <= len(arrived) < 100
    assert arrived[:60] == list(range(60))


@needs_tunnel
def test_a_dark_tunnel_carries_nothing_until_it_is_lit() -> None:
    with Tunnel(rate_bytes_per_s=10e6, delay_s=0.0) as link:
        link.dark(True)
        assert send_udp(link, 20) == []
        assert link.traffic().up.dark_packets == 20
        link.dark(False)
        assert send_udp(link, 20) == list(range(20))


@needs_tunnel
def test_the_dark_takes_what_is_sent_and_what_is_under_way() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        Tunnel(rate_bytes_per_s=10e6, delay_s=0.6) as link,
    ):
        receiver.bind((link.server_ip, 0))
        port = receiver.getsockname()[1]
        fire_udp(link, port, 20, 100)
        link.dark(True)
        fire_udp(link, port, 10, 100)
        eventually(lambda: link.traffic().up.dark_packets == 30)
        fire_udp(link, port, 10, 100)
        link.dark(False)
        fire_udp(link, port, 7, 100)
        eventually(lambda: _landed(link.traffic()) == 47)
        assert (link.traffic().up.dark_packets, link.traffic().up.arrived_packets) == (40, 7)


@needs_tunnel
def test_tcp_survives_a_dark_second() -> None:
    with Tunnel(rate_bytes_per_s=500_000, delay_s=0.01) as link:
        assert 1.4 <= send_tcp(link, 256_000, during=lambda: link.dark_for(1.0)) < 5
        traffic = link.traffic()
    assert traffic.up.dark_packets > 0
    assert traffic.up.payload_bytes > 256_000, "what went into the dark was sent again"


@needs_tunnel
def test_a_broker_at_the_near_end_of_a_tunnel(broker_kind: Kind, tmp_path: Path) -> None:
    with Tunnel(rate_bytes_per_s=1e6, delay_s=0.02) as link:
        broker = OpenBroker(broker_kind, tmp_path, bind=link.server_ip)
        broker.start()
        try:
            with Swarm(broker.port, host=link.server_ip) as swarm:
                reader = swarm.connect("near")
                reader.subscribe("far")
                assert swarm.run(lambda: reader.subscriptions == 1)
                words = (PUBLISH_MQTT, link.server_ip, broker.port)
                command = link.command(sys.executable, "-c", *map(str, words))
                subprocess.run(command, cwd=ROOT, check=True)
                assert swarm.run(lambda: reader.payload_bytes == 100_000)
            assert link.traffic().up.payload_bytes >= 100_000
        finally:
            broker.stop()


@needs_tunnel
def test_a_tunnel_leaves_nothing_behind() -> None:
    with Tunnel() as link:
        name = link.namespace
        assert (NAMESPACES / name).exists()
        assert Path("/sys/class/net", name).exists()
    assert not (NAMESPACES / name).exists()
    assert not Path("/sys/class/net", name).exists()


@needs_tunnel
def test_the_next_tunnel_removes_what_a_killed_one_left() -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    name = killed.stdout.strip()
    assert killed.returncode == -signal.SIGKILL
    assert (NAMESPACES / name).exists()
    with Tunnel():
        assert not (NAMESPACES / name).exists()
    eventually(lambda: not Path("/sys/class/net", name).exists())


def test_where_no_tunnel_is_possible_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reason = tunnel_reason.__wrapped__()
    assert reason == "a network namespace needs root, this is user 1000"


@pytest.mark.parametrize("level", [4, 5])
def test_raw_clients_carry_messages_unchanged(mosquitto: OpenBroker, level: int) -> None:
    sent = [os.urandom(size) for size in (0, 1, 127, 128, 70_000, 300_000)]
    received: list[bytes] = []

    def keep(client: Client, topic: bytes, payload: memoryview) -> None:
        assert topic == b"raw/a"
        received.append(bytes(payload))

    with Swarm(mosquitto.port, level=level, window=2) as swarm:
        reader, counter = swarm.connect("reader", keep), swarm.connect("counter")
        for client in (reader, counter):
            client.subscribe("raw/#")
        assert swarm.run(lambda: reader.subscriptions == counter.subscriptions == 1)
        writer = swarm.connect("writer")
        for payload in sent:
            writer.publish("raw/a", payload)
        total_bytes = sum(map(len, sent))
        assert swarm.run(lambda: swarm.pending == 0 and len(received) == len(sent))
        assert swarm.run(lambda: counter.payload_bytes == total_bytes)
        assert (counter.messages, reader.payload_bytes) == (len(sent), total_bytes)
        assert writer.acknowledged == len(sent)
    assert received == sent


@pytest.mark.parametrize(("window", "violations"), [(4, 0), (40, 1)])
def test_the_window_bounds_what_is_unacknowledged(
    mosquitto: OpenBroker, window: int, violations: int
) -> None:
    with (
        LimitedBroker(mosquitto.port, Limits(unacknowledged=4)) as broker,
        Swarm(broker.port, window=window) as swarm,
    ):
        sender = swarm.connect("sender")
        for _ in range(200):
            sender.publish("raw/window", bytes(1000))
        assert swarm.run(lambda: sender.closed or swarm.pending == 0)
        assert broker.violations["unacknowledged"] == violations
        assert sender.closed == bool(violations)


def test_the_fan_in_counts_every_byte(mosquitto: OpenBroker) -> None:
    figures = fan_in(mosquitto.port, senders=20, bytes_each=300_000)
    assert figures.payload_bytes == 6_000_000
    assert figures.messages == 100
    assert figures.mb_per_s > 1


def test_the_fan_in_fails_where_the_broker_loses(tmp_path: Path, mosquitto: OpenBroker) -> None:
    lines = ("max_queued_messages 1", "max_inflight_messages 1")
    broker = OpenBroker("mosquitto", tmp_path, *lines)
    broker.start()
    try:
        with pytest.raises(TimeoutError, match="sent 6000000 bytes"):
            fan_in(broker.port, senders=20, bytes_each=300_000, timeout_s=1.0)
    finally:
        broker.stop()


def publishes(
    swarm: Swarm, client: Client, topic: str, payload: bytes, *, retain: bool = False, qos: int = 1
) -> bool:
    """Whether the broker took it."""
    before = client.acknowledged
    client.publish(topic, payload, retain=retain, qos=qos)
    swarm.run(lambda: client.closed or client.acknowledged > before)
    return not client.closed


@pytest.mark.parametrize("level", [4, 5])
@pytest.mark.parametrize(
    ("limits", "name", "reason", "allowed", "refused"),
    [
        (AWS_IOT_CORE, "packet_bytes", 0x95, ("a", 131_000), ("a", 131_072)),
        (EMQX, "packet_bytes", 0x95, ("a", 1_000_000), ("a", 1 << 20)),
        (AWS_IOT_CORE, "topic_slashes", 0x90, ("1/2/3/4/5/6/7/8", 1), ("1/2/3/4/5/6/7/8/9", 1)),
        (AZURE_EVENT_GRID, "retained_bytes", 0x97, ("keep", 65_536), ("keep", 65_537)),
    ],
)
def test_a_publish_over_a_limit_ends_the_connection(
    mosquitto: OpenBroker,
    level: int,
    limits: Limits,
    name: str,
    reason: int,
    allowed: tuple[str, int],
    refused: tuple[str, int],
) -> None:
    with (
        LimitedBroker(mosquitto.port, limits) as broker,
        Swarm(broker.port, level=level) as swarm,
    ):
        client = swarm.connect("client")
        retain = name == "retained_bytes"
        topic, size_bytes = allowed
        assert publishes(swarm, client, topic, bytes(size_bytes), retain=retain)
        assert not broker.violations
        topic, size_bytes = refused
        assert not publishes(swarm, client, topic, bytes(size_bytes), retain=retain)
        assert broker.violations == {name: 1}
        assert client.refused_code == (reason if level == 5 else 0)
        if retain:
            assert publishes(swarm, swarm.connect("again"), "keep", b"", retain=True)


@pytest.mark.parametrize("level", [4, 5])
def test_a_qos_over_the_limit_ends_the_connection(mosquitto: OpenBroker, level: int) -> None:
    with (
        LimitedBroker(mosquitto.port, AWS_IOT_CORE) as broker,
        Swarm(broker.port, level=level) as s,
    ):
        assert not publishes(s, s.connect("client"), "a", b"x", qos=2)
        assert broker.violations == {"qos": 1}


def test_subscriptions_are_counted_by_connection_and_by_packet(mosquitto: OpenBroker) -> None:
    with (
        LimitedBroker(mosquitto.port, AWS_IOT_CORE) as broker,
        Swarm(broker.port, level=5) as swarm,
    ):
        frugal, greedy, hasty = (swarm.connect(name) for name in ("frugal", "greedy", "hasty"))
        for client, count in ((frugal, 50), (greedy, 51)):
            for number in range(count):
                client.subscribe(f"s/{number}")
        frugal.subscribe("s/0")
        hasty.subscribe(*[f"s/{number}" for number in range(9)])
        assert swarm.run(lambda: greedy.closed and hasty.closed and frugal.subscriptions == 51)
        assert broker.violations == {"subscriptions": 1, "filters_per_subscribe": 1}
        assert not frugal.closed


def over_the_rate(mosquitto: OpenBroker, over_rate: OverRate) -> tuple[bool, int, float]:
    """Whether 30 publishes at 20 a second closed the connection, PUBACKs, and seconds."""
    limits = replace(EMQX_SERVERLESS, publishes_per_s=20, over_rate=over_rate)
    with LimitedBroker(mosquitto.port, limits) as broker, Swarm(broker.port, window=50) as swarm:
        client, start_s = swarm.connect("client"), time.monotonic()
        for _ in range(20):
            client.publish("rate", b"x")
        assert swarm.run(lambda: swarm.pending == 0)
        assert not broker.violations, "one second's worth may come at once"
        for _ in range(10):
            client.publish("rate", b"x")
        swarm.run(lambda: client.closed or swarm.pending == 0, 1.0)
        assert broker.violations["publishes_per_s"] > 0
        return client.closed, client.acknowledged, time.monotonic() - start_s


def test_a_rate_is_enforced_as_the_service_does(mosquitto: OpenBroker) -> None:
    closed, acknowledged, _ = over_the_rate(mosquitto, "close")
    assert closed
    assert acknowledged < 30
    closed, acknowledged, _ = over_the_rate(mosquitto, "discard")
    assert not closed
    assert acknowledged < 30
    closed, acknowledged, duration_s = over_the_rate(mosquitto, "pause")
    assert not closed
    assert acknowledged == 30
    assert 0.4 <= duration_s < 1.0


def test_a_byte_rate_lets_a_second_through_and_no_more(mosquitto: OpenBroker) -> None:
    with (
        LimitedBroker(mosquitto.port, replace(AWS_IOT_CORE, over_rate="close")) as broker,
        Swarm(broker.port) as swarm,
    ):
        client = swarm.connect("client")
        for _ in range(5):
            assert publishes(swarm, client, "a", bytes(100_000))
        assert not broker.violations
        assert not publishes(swarm, client, "a", bytes(120_000))
        assert broker.violations == {"bytes_per_s": 1}


def connack(port: int) -> bytes:
    """The body of the answer to a CONNECT of MQTT 5."""
    with socket.create_connection(("127.0.0.1", port), 5) as sock:
        sock.sendall(connect_packet(b"asks", 5))
        data = sock.recv(1 << 10)
    assert data[0] == 0x20
    assert data[1] == len(data) - 2
    return data[2:]


def test_connack_announces_the_limits(mosquitto: OpenBroker) -> None:
    plain = connack(mosquitto.port)
    with LimitedBroker(mosquitto.port, Limits()) as broker:
        assert connack(broker.port) == plain
        broker.limits.packet_bytes = 50_000
        broker.limits.qos = 1
        limited = connack(broker.port)
    assert b"\x27" + (50_000).to_bytes(4, "big") in limited
    assert b"\x24\x01" in limited
    assert limited == connack_body(plain, Limits(packet_bytes=50_000, qos=1))
    again = connack_body(limited, Limits(packet_bytes=60_000))
    assert sorted(again) == sorted(limited), "a limit was raised"


def test_a_limit_lowered_while_running(mosquitto: OpenBroker) -> None:
    with LimitedBroker(mosquitto.port, EMQX) as broker, Swarm(broker.port) as swarm:
        client = swarm.connect("client")
        assert publishes(swarm, client, "a", bytes(60_000))
        broker.limits.packet_bytes = 50_000
        broker.drop_connections()
        assert swarm.run(lambda: client.closed)
        assert not publishes(swarm, swarm.connect("client"), "a", bytes(60_000))
        assert publishes(swarm, swarm.connect("client"), "a", bytes(49_000))
        assert broker.violations == {"packet_bytes": 1}
        assert EMQX.packet_bytes == 1 << 20, "a preset is not changed by its user"


@pytest.mark.parametrize("code", [1, 0x84])
def test_a_broker_without_mqtt_5(mosquitto: OpenBroker, code: int) -> None:
    limits = Limits(refuse_mqtt_5=code)  # type: ignore[arg-type]
    with LimitedBroker(mosquitto.port, limits) as broker:
        with Swarm(broker.port, level=5) as swarm:
            client = swarm.connect("modern")
            assert swarm.run(lambda: client.closed)
            assert client.refused_code == code
        with Swarm(broker.port, level=4) as swarm:
            assert publishes(swarm, swarm.connect("old"), "a", b"x")


@pytest.mark.parametrize("broker_kind", ["amqtt"], indirect=True)
def test_a_brokers_own_refusal_passes_unchanged(broker: BrokerProcess) -> None:
    with LimitedBroker(broker.port, EMQX) as limited, Swarm(limited.port, level=5) as swarm:
        client = swarm.connect("modern")
        assert swarm.run(lambda: client.closed)
        assert client.refused_code == 1


def test_a_brokers_settings_are_replaced_not_repeated(
    tmp_path: Path, mosquitto: OpenBroker
) -> None:
    broker = OpenBroker("mosquitto", tmp_path, "max_packet_size 2000")
    broker.start()
    try:
        config = (tmp_path / "mosquitto.conf").read_text()
        assert [line for line in config.splitlines() if "packet" in line] == [
            "max_packet_size 2000"
        ]
        with Swarm(broker.port) as swarm:
            client = swarm.connect("client")
            assert publishes(swarm, client, "a", bytes(1000))
            assert not publishes(swarm, client, "a", bytes(3000))
    finally:
        broker.stop()
    with Swarm(mosquitto.port) as swarm:
        assert publishes(swarm, swarm.connect("client"), "a", bytes(3000))

"""The link against real brokers, and against things that are none."""

from __future__ import annotations

import contextlib
import http.server
import itertools
import os
import queue
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from paho.mqtt.client import topic_matches_sub

from edge_sdk import link
from edge_sdk.errors import BrokerRefused, BrokerUnreachable, ConfigError, ProtocolMisuse
from edge_sdk.link import (
    Arrived,
    LinkDown,
    LinkEvent,
    LinkUp,
    TakenOver,
    Vigil,
    matches,
    parse_address,
)
from edge_sdk.mqtt import Link, connect_once
from reference_server.broker import BrokerProcess, _answers, choose, find_mosquitto
from tests.relay import Relay, eventually

Inbox = queue.SimpleQueue[LinkEvent]
E = TypeVar("E", bound=LinkEvent)
PIECE_BYTES = 60 * 1024
_number = itertools.count()


class Eager(random.Random):
    """Draws the shortest waits, so that a test need not sit them out."""

    def uniform(self, a: float, b: float) -> float:
        return min(b, a + 0.05)


def expect(inbox: Inbox, kind: type[E], timeout_s: float = 10.0) -> E:
    """The next event of that kind; queue.Empty when none comes."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        event = inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))
        if isinstance(event, kind):
            return event


@contextlib.contextmanager
def linked(url: str, inbox: Inbox, *topics: str, **options: object) -> Iterator[Link]:
    """A started link that is up."""
    client_id = str(options.pop("client_id", f"client-{next(_number)}"))
    subject = Link(url, client_id, inbox, rng=Eager(), **options)  # type: ignore[arg-type]
    for topic in topics:
        subject.subscribe(topic)
    subject.start()
    try:
        expect(inbox, LinkUp)
        yield subject
    finally:
        subject.close()


@pytest.fixture
def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_megabyte_in_pieces_comes_back_unchanged(broker: BrokerProcess, inbox: Inbox) -> None:
    whole = random.Random(1).randbytes(1_000_000)
    pieces = [whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES)]
    with linked(broker.url, inbox, "t/big/+") as subject:
        for index, piece in enumerate(pieces):
            assert subject.wait_below(2 * PIECE_BYTES, 5)
            assert subject.publish(f"t/big/{index}", piece)
        arrived = [expect(inbox, Arrived) for _ in pieces]
        assert subject.wait_below(0, 5)
        assert subject.pending == subject.pending_bytes == 0
    assert [event.topic for event in arrived] == [f"t/big/{i}" for i in range(len(pieces))]
    assert b"".join(event.payload for event in arrived) == whole


def test_newest_protocol_the_broker_speaks(
    broker: BrokerProcess, broker_kind: str, inbox: Inbox
) -> None:
    with linked(broker.url, inbox) as subject:
        if broker_kind == "mosquitto":
            assert (subject.protocol, subject.max_packet_bytes) == ("5", 1 << 20)
        else:
            assert (subject.protocol, subject.max_packet_bytes) == ("3.1.1", None)
        assert connect_once(broker.url).protocol == subject.protocol


def test_retained_messages_come_after_the_link_is_up(broker: BrokerProcess, inbox: Inbox) -> None:
    with linked(broker.url, inbox) as subject:
        assert subject.publish("t/head", b"kept", retain=True)
        assert subject.wait_below(0, 5)
    newcomer: Inbox = queue.SimpleQueue()
    late = Link(broker.url, "late", newcomer)
    late.subscribe("t/head")
    late.start()
    events = [newcomer.get(timeout=5), newcomer.get(timeout=5)]
    late.close()
    assert isinstance(events[0], LinkUp)
    assert events[1] == Arrived("t/head", b"kept")


def test_nothing_arrives_that_was_not_subscribed(broker: BrokerProcess, inbox: Inbox) -> None:
    with linked(broker.url, inbox) as subject:
        subject.publish("t/others", b"theirs", retain=True)
        with linked(broker.url, queue.SimpleQueue(), "t/others"):
            pass  # amqtt pushes it to everybody once somebody subscribed
        other: Inbox = queue.SimpleQueue()
        with linked(broker.url, other, "t/mine"):
            subject.publish("t/mine", b"mine")
            assert expect(other, Arrived) == Arrived("t/mine", b"mine")


def test_a_killed_broker_is_survived(broker: BrokerProcess, inbox: Inbox) -> None:
    with linked(broker.url, inbox, "t/a") as subject:
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        assert "broker" in expect(inbox, LinkDown).reason
        assert not subject.connected
        assert subject.publish("t/a", b"offline") is False
        assert subject.pending == 0
        eventually(lambda: broker.poll() is not None)
        assert broker.ensure_running()
        expect(inbox, LinkUp)
        subject.subscribe("t/b")
        assert subject.publish("t/a", b"old subscription")
        assert expect(inbox, Arrived).payload == b"old subscription"
        assert subject.publish("t/b", b"new subscription")
        assert expect(inbox, Arrived).payload == b"new subscription"


def test_counted_bytes_are_those_on_the_wire(broker: BrokerProcess, inbox: Inbox) -> None:
    with Relay(broker.port) as relay:

        def equal(_: Relay) -> bool:
            return (relay.up_bytes, relay.down_bytes) == (
                subject.sent_bytes,
                subject.received_bytes,
            )

        with linked(relay.url, inbox, "t/x") as subject:
            for round_bytes in (10, 200_000):
                assert subject.publish("t/x", bytes(round_bytes))
                expect(inbox, Arrived)
                assert subject.publish("t/unheard", b"")  # its PUBACK comes after all else
                eventually(lambda: subject.pending == 0)
                assert relay.wait_until(equal)
                relay.cut()
                assert "reset" in expect(inbox, LinkDown).reason
                expect(inbox, LinkUp)
        assert relay.wait_until(lambda r: r.open_connections == 0)
        assert equal(relay), (relay.up_bytes, subject.sent_bytes, relay.down_bytes)
        assert subject.sent_bytes > 200_000
        assert relay.cuts == 2


def test_a_cut_inside_a_packet_loses_that_packet_only(broker: BrokerProcess, inbox: Inbox) -> None:
    with Relay(broker.port) as relay, linked(relay.url, inbox, "t/x") as subject:
        relay.cut_after_up_bytes(30_000)
        assert subject.publish("t/x", bytes(PIECE_BYTES))
        expect(inbox, LinkDown)
        assert subject.wait_below(0, 1), "a lost connection has nothing pending"
        expect(inbox, LinkUp)
        assert subject.publish("t/x", b"again")
        assert expect(inbox, Arrived).payload == b"again"


def test_a_refusing_network_is_retried(broker: BrokerProcess, inbox: Inbox) -> None:
    with Relay(broker.port) as relay, linked(relay.url, inbox):
        relay.refuse()
        expect(inbox, LinkDown)
        assert "nobody listens" in expect(inbox, LinkDown).reason
        relay.accept()
        expect(inbox, LinkUp)


def test_a_dead_link_is_noticed_while_idle_and_while_sending(
    broker: BrokerProcess, inbox: Inbox
) -> None:
    with Relay(broker.port) as relay, linked(relay.url, inbox, keepalive_s=1) as subject:
        relay.stall()
        assert "no sign of life" in expect(inbox, LinkDown, 4).reason
        relay.flow()
        expect(inbox, LinkUp)
        relay.stall()
        for _ in range(20):  # more than the kernel's buffers would hide
            subject.publish("t/x", bytes(500_000))
        assert "no sign of life" in expect(inbox, LinkDown, 4).reason
        relay.flow()
        expect(inbox, LinkUp)


def test_an_idle_link_only_pings(broker: BrokerProcess, inbox: Inbox) -> None:
    with linked(broker.url, inbox, keepalive_s=1) as subject:
        sent_bytes, received_bytes = subject.sent_bytes, subject.received_bytes
        with pytest.raises(queue.Empty):
            inbox.get(timeout=2.5)
        assert subject.sent_bytes - sent_bytes == subject.received_bytes - received_bytes == 2 * 2


@pytest.mark.slow
def test_an_idle_minute_costs_a_few_bytes(broker: BrokerProcess, inbox: Inbox) -> None:
    idle_s = 25
    with linked(broker.url, inbox) as subject:
        before_bytes = subject.sent_bytes + subject.received_bytes
        with pytest.raises(queue.Empty):
            inbox.get(timeout=idle_s)
        idle_bytes = subject.sent_bytes + subject.received_bytes - before_bytes
    assert 0 < idle_bytes <= 60 * idle_s / 60


def test_the_last_will_is_published_when_the_process_dies(
    broker: BrokerProcess, inbox: Inbox
) -> None:
    script = (
        "import queue, sys; from edge_sdk.mqtt import Link; inbox = queue.SimpleQueue();"
        "link = Link(sys.argv[1], 'mortal', inbox, will=('t/presence', b'lost')); link.start();"
        "print(inbox.get(), flush=True); inbox.get()"
    )
    with linked(broker.url, inbox, "t/presence"):
        with subprocess.Popen(
            [sys.executable, "-c", script, broker.url], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert "LinkUp" in process.stdout.readline()
            process.kill()
        assert expect(inbox, Arrived) == Arrived("t/presence", b"lost")


def test_a_graceful_close_sends_the_rest_and_no_will(broker: BrokerProcess, inbox: Inbox) -> None:
    with linked(broker.url, inbox, "t/#"):
        leaving: Inbox = queue.SimpleQueue()
        with linked(broker.url, leaving, will=("t/will", b"lost")) as subject:
            subject.publish("t/last", bytes(300_000))
        assert not subject.connected
        assert expect(inbox, Arrived) == Arrived("t/last", bytes(300_000))
        with pytest.raises(queue.Empty):
            inbox.get(timeout=0.3)


@pytest.mark.parametrize("broker_kind", ["mosquitto"], indirect=True)
def test_two_processes_with_one_identity_are_found_out(broker: BrokerProcess, inbox: Inbox) -> None:
    # amqtt never throws the older client out, so there is nothing to notice there.
    with linked(broker.url, inbox, client_id="twin"), linked(broker.url, inbox, client_id="twin"):
        event = expect(inbox, TakenOver, 20)
    assert event.client_id == "twin"
    assert "another process uses the client id 'twin'" in event.reason
    assert "Stop one of the two" in event.reason


def test_a_packet_over_the_limit_is_our_own_mistake(broker: BrokerProcess, inbox: Inbox) -> None:
    with (
        linked(broker.url, inbox) as subject,
        pytest.raises(ProtocolMisuse, match=r"packet of 1048591 bytes.* at most 1048576.*pieces"),
    ):
        subject.publish("t/big", bytes(1 << 20))


def test_closing_while_offline_is_quick(free_port: int, inbox: Inbox) -> None:
    subject = Link(f"mqtt://127.0.0.1:{free_port}", "lonely", inbox)
    subject.start()
    assert "nobody listens there" in expect(inbox, LinkDown).reason
    started_s = time.monotonic()
    subject.close()
    assert time.monotonic() - started_s < 1
    assert subject.protocol is None


def test_a_reason_is_reported_once(free_port: int, inbox: Inbox) -> None:
    subject = Link(f"mqtt://127.0.0.1:{free_port}", "lonely", inbox, rng=Eager())
    subject.start()
    expect(inbox, LinkDown)
    with pytest.raises(queue.Empty):
        inbox.get(timeout=0.5)
    subject.close()


def test_nobody_listens(free_port: int) -> None:
    with pytest.raises(BrokerUnreachable, match=rf"127.0.0.1:{free_port}: nobody listens.*start"):
        connect_once(f"mqtt://127.0.0.1:{free_port}")


def test_a_name_that_does_not_resolve() -> None:
    with pytest.raises(BrokerUnreachable, match=r"no-such-host.invalid:1883: the name"):
        connect_once("mqtt://no-such-host.invalid")


def test_a_web_server_is_no_broker() -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.raises(BrokerUnreachable, match="no MQTT broker this program can talk to"):
            connect_once(f"mqtt://127.0.0.1:{server.server_port}", 2)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP/1.1 400 Bad"),
        (b"\x20\xff\xff\xff\x7f" + bytes(64), "268435455 bytes in one, limit 1048576"),
        (b"\x20\x02\x00", "no answer in"),
        (b"\x20\x07\x00\x00\x04\xff\xff\xff\xff", "broke the rules of MQTT"),
        (b"", "no answer in"),
    ],
)
def test_hostile_answers_are_named(answer: bytes, seen: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        accepted: list[socket.socket] = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    accepted.append(connection)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(BrokerUnreachable) as caught:
            connect_once(f"mqtt://127.0.0.1:{port}", 0.6)
        listener.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()
    assert str(caught.value).startswith(f"127.0.0.1:{port}: something listens there")
    assert seen in str(caught.value)


@pytest.mark.parametrize("broker_kind", ["mosquitto"], indirect=True)
def test_bad_credentials_are_refused(broker_kind: str, tmp_path: Path) -> None:
    passwd = shutil.which("mosquitto_passwd")
    if passwd is None:
        pytest.skip("mosquitto_passwd is not installed")
    subprocess.run([passwd, "-b", "-c", tmp_path / "broker.passwd", "ann", "s3c/ret"], check=True)
    broker = choose(broker_kind, tmp_path, bind="0.0.0.0")
    broker.start()
    try:
        at = broker.url.removeprefix("mqtt://")
        assert connect_once(f"mqtt://ann:s3c%2Fret@{at}").protocol == "5"
        with pytest.raises(BrokerRefused, match=f"{at}: .*Not authorized.*user name") as caught:
            connect_once(f"mqtt://ann:wrong@{at}")
        assert "wrong" not in str(caught.value)
    finally:
        broker.stop()


def test_plain_mqtt_where_tls_is_wanted(broker: BrokerProcess) -> None:
    with pytest.raises(BrokerUnreachable, match="use mqtt:// for a broker without TLS"):
        connect_once(broker.url.replace("mqtt://", "mqtts://"), 3)


@pytest.fixture
def tls_port(tmp_path: Path, free_port: int) -> Iterator[int]:
    """A mosquitto behind a certificate of its own CA, written to ca.pem."""
    openssl, mosquitto = shutil.which("openssl"), find_mosquitto()
    if openssl is None or mosquitto is None:
        pytest.skip("needs openssl and mosquitto")
    subprocess.run(
        [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "ca.pem"],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    config = tmp_path / "tls.conf"
    config.write_text(
        f"listener {free_port} 127.0.0.1\nallow_anonymous true\nuser root\n"
        f"certfile {tmp_path}/ca.pem\nkeyfile {tmp_path}/key.pem\n"
    )
    with subprocess.Popen([mosquitto, "-c", config], stderr=subprocess.DEVNULL) as process:
        eventually(lambda: _answers("127.0.0.1", free_port))
        yield free_port
        process.terminate()


def test_tls(tls_port: int, tmp_path: Path, inbox: Inbox) -> None:
    url = f"mqtts://localhost:{tls_port}"
    with pytest.raises(BrokerUnreachable, match=r"certificate there is not trusted.*clock"):
        connect_once(url)
    with linked(url, inbox, "t/x", ca_file=str(tmp_path / "ca.pem")) as subject:
        assert subject.publish("t/x", bytes(300_000))
        assert len(expect(inbox, Arrived).payload) == 300_000
    with pytest.raises(ConfigError, match=r"none\.pem: no CA certificates"):
        Link(url, "c", inbox, ca_file=str(tmp_path / "none.pem"))


@pytest.mark.parametrize(
    "url", ["localhost:1883", "http://host", "mqtt://", "mqtt://h:99999", "mqtt://h/path", ""]
)
def test_what_is_no_broker_address(url: str) -> None:
    with pytest.raises(ConfigError, match="broker address"):
        parse_address(url)


def test_an_address_hides_its_credentials() -> None:
    address = parse_address("mqtts://ann:p%40ss@[::1]")
    assert (address.host, address.port, address.tls) == ("::1", 8883, True)
    assert (address.username, address.password) == ("ann", "p@ss")
    assert "p@ss" not in repr(address) + str(address)
    assert str(address) == "[::1]:8883"


@pytest.mark.parametrize(
    ("topic_filter", "topic", "fits"),
    [
        ("a/b", "a/b", True), ("a/b", "a/c", False), ("a/+", "a/b", True), ("a/+", "a/b/c", False),
        ("a/+", "a", False), ("+/b", "a/b", True), ("a/+/c", "a/b/c", True), ("a/#", "a/b/c", True),
        ("a/#", "a", True), ("a/#", "b/c", False), ("#", "a/b", True), ("a/+/#", "a/b/c/d", True),
        ("a/+/#", "a", False), ("a/b", "a/b/c", False),
    ],
)  # fmt: skip
def test_what_a_filter_names(topic_filter: str, topic: str, fits: bool) -> None:
    assert matches(topic_filter, topic) is fits
    assert topic_matches_sub(topic_filter, topic) is fits, "as paho understands it"


def test_backoff_grows_to_its_cap_and_is_spread() -> None:
    rng = random.Random(3)
    waits_s = [link.backoff_s(failures, rng) for failures in range(200)]
    assert all(0 <= wait_s <= link.BACKOFF_CAP_S for wait_s in waits_s)
    assert waits_s[0] <= link.BACKOFF_FIRST_S
    assert max(waits_s) > 0.9 * link.BACKOFF_CAP_S
    assert min(waits_s[10:]) < 0.1 * link.BACKOFF_CAP_S


def test_a_vigil_pings_once_per_silence_and_then_gives_up() -> None:
    vigil = Vigil(10, 0.0)
    assert (vigil.ping_in_s(4.0), vigil.dead_in_s(4.0)) == (6.0, 11.0)
    vigil.sent(8.0)  # a write alone proves nothing: still ask after ten seconds of silence
    assert vigil.ping_in_s(10.0) == 0
    vigil.asked()
    vigil.sent(10.0)
    assert vigil.ping_in_s(12.0) == 8.0
    assert vigil.dead_in_s(15.0) == 0
    vigil.heard(12.0)
    assert (vigil.ping_in_s(12.0), vigil.dead_in_s(12.0)) == (8.0, 15.0)


def test_only_a_series_of_short_lives_ended_by_the_broker_is_a_take_over() -> None:
    def after(*ends: tuple[float, bool]) -> bool:
        comeback = link.Comeback(random.Random(0))
        for lived_s, by_broker in ends:
            comeback.ended(lived_s, by_broker)
        return comeback.taken_over

    assert after(*[(0.1, True)] * link.TAKEOVER_LIMIT)
    assert not after(*[(0.1, True)] * (link.TAKEOVER_LIMIT - 1))
    assert not after(*[(0.1, False)] * 20)
    assert not after(*[(link.SHORT_LIFE_S, True)] * 20)
    assert not after(*([(0.1, True)] * 4 + [(0.1, False)]) * 3)


def test_importing_it_loads_no_heavy_library() -> None:
    script = "import sys, edge_sdk.mqtt; print([m for m in ('numpy', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_tls_contexts_check_certificates() -> None:
    setup = link.make_setup("mqtts://host", "c")
    assert setup.tls is not None
    assert setup.tls.verify_mode == ssl.CERT_REQUIRED
    assert setup.tls.check_hostname

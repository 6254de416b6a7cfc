"""Two hundred devices that upload at once, against what a bare subscriber gets through the broker.

    python -m tests.benchmarks.upload_fan_in [--quick] [--json FILE]

One mosquitto. Raw publishes to a raw subscriber, then updates of the same size from as many senders
to `reference-server run`. Goodput is from the first announcement to when the server has told the
last sender that nothing is missing, the pieces being on its disk; the receipt, which says that an
update was checked, decoded, added to the sums and committed, follows. Meanwhile another device
greets the server every few milliseconds: its answer is the control round trip.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from edge_sdk.blocks import ModelSpec
from edge_sdk.codec import encode_change
from edge_sdk.model import BlockModel
from edge_sdk.process import process_cpu_s, process_peak_bytes, process_rss_bytes
from edge_sdk.task import load_task
from edge_sdk.wire import (
    MAX_PIECE_BYTES,
    PIECE_OVERHEAD_BYTES,
    Hello,
    Message,
    Offer,
    Open,
    Receipt,
    Topics,
    UpdateHeader,
    UpdateMetrics,
    Want,
    Welcome,
    decode,
    encode,
    encode_piece,
    encode_update,
)
from tests.benchmarks.bench import Row, run
from tests.brokers import OpenBroker
from tests.raw_mqtt import Client, Swarm, fan_in
from tests.simulation import write_task

JOB, CODEC = "fanin", "lossless"
WIDTH = 560  # 356,290 parameters: a lossless update of a megabyte
GREETING_EVERY_S = 0.01
LIMIT_S = 120.0
METRICS = UpdateMetrics(
    loss=1.0, steps=1, train_s=1.0, train_cpu_s=1.0, plan_s=1.0, plan_peak_bytes=1,
    measured_peak_bytes=1, budget_bytes=2, plan_up_bytes=1, flops=1,
)  # fmt: skip


@dataclass
class Sender:
    """A device that has trained: it announces its update and sends what is wanted of it."""

    client: Client
    topics: Topics
    spec: ModelSpec
    payloads: list[bytes]
    name: str
    offer: Offer | None = None
    body: bytes = b""
    sha256: str = ""
    pieces: list[bytes] = field(default_factory=list)
    sent: int = 0
    verdict: str = ""
    delivered_s: float = 0.0
    answered_s: float = 0.0
    greeted: list[float] = field(default_factory=list)
    # When an answer came, and how long it took.
    round_trips: list[tuple[float, float]] = field(default_factory=list)

    def say(self, message: Message) -> None:
        """Tell the server something."""
        self.client.publish(self.topics.up(self.name), encode(message))

    def greet(self) -> None:
        """Say hello, and note when."""
        self.greeted.append(time.monotonic())
        self.say(
            Hello(
                session=len(self.greeted), sdk="x", profile="generic-x86", memory_bytes=1,
                flops_per_s=1.0, spec_digest=self.spec.digest(), num_examples=1,
            )
        )  # fmt: skip

    def heard(self, payload: bytes) -> None:
        """The server said something."""
        message = decode(payload)
        if isinstance(message, Welcome):
            now_s = time.monotonic()
            self.round_trips.append((now_s, now_s - self.greeted[message.session - 1]))
        elif isinstance(message, Offer):
            self.offer = message
        elif isinstance(message, Want):
            self._send(message)
            if self.sent >= len(self.body) and not message.ranges:
                self.delivered_s = time.monotonic()
        elif isinstance(message, Receipt):
            self.verdict, self.answered_s = message.verdict, time.monotonic()

    def prepare(self) -> None:
        """The update, under the offer's ticket."""
        offer = self.offer
        assert offer is not None
        sizes = zip(self.spec.names, map(len, self.payloads), strict=True)
        header = UpdateHeader(
            round=offer.round, ticket=offer.ticket, base_sha=offer.base_sha, codec=CODEC,
            num_examples=1, blocks=tuple(sizes), metrics=METRICS,
        )  # fmt: skip
        self.body = encode_update(header, self.payloads)
        self.sha256 = hashlib.sha256(self.body).hexdigest()
        # Each device has a processor of its own; what they spend here is not what is measured.
        starts = range(0, len(self.body), MAX_PIECE_BYTES)
        cut = [self.body[start : start + MAX_PIECE_BYTES] for start in starts]
        self.pieces = [encode_piece(self.sha256, n, len(cut), data) for n, data in enumerate(cut)]

    def announce(self) -> None:
        """Begin to deliver it."""
        assert self.offer is not None
        self.say(
            Open(
                round=self.offer.round, ticket=self.offer.ticket, sha256=self.sha256,
                size_bytes=len(self.body), piece_bytes=MAX_PIECE_BYTES,
            )
        )  # fmt: skip

    def _send(self, want: Want) -> None:
        for first, stop in want.ranges:
            for index in range(first, stop):
                piece = self._piece(index, want.piece_bytes)
                self.sent += len(piece) - PIECE_OVERHEAD_BYTES
                self.client.publish(self.topics.data(self.name), piece)

    def _piece(self, index: int, size: int) -> bytes:
        if size == MAX_PIECE_BYTES:
            return self.pieces[index]
        data = self.body[index * size : (index + 1) * size]
        return encode_piece(self.sha256, index, -(-len(self.body) // size), data)


def payloads(spec: ModelSpec) -> list[bytes]:
    """A change of every block, like one of training: normal, of a thousandth."""
    rng = np.random.default_rng(0)
    changes = []
    for block in spec.blocks:
        still = {s.name: np.zeros(s.shape, s.dtype) for s in block.tensors}
        moved = {
            s.name: rng.normal(0, 1e-3, s.shape).astype(s.dtype) if s.is_float else still[s.name]
            for s in block.tensors
        }
        changes.append(encode_change(CODEC, block, still, moved, rng))
    return changes


@contextmanager
def serving(task: Path, url: str, devices: int, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The server, with a round for so many devices."""
    words = [
        *("reference_server", "run", "--task", task, "--broker", url, "--job", JOB),
        *("--broker-profile", "mosquitto", "--devices", devices, "--codec", CODEC),
        *("--rounds", 1, "--deadline-s", 600, "--strategy", "full", "--state", home / "server"),
    ]
    with (home / "server.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, words)], stdout=log, stderr=log
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait()


class OtherDevice:
    """A device in a process of its own, which once told to greets the server all the time."""

    def __init__(self, port: int, spec: ModelSpec) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_greet, args=(port, spec, theirs), daemon=True)

    def __enter__(self) -> OtherDevice:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def begin(self) -> None:
        """Greet from now on."""
        self._ours.send("greet")

    def round_trips_s(self, since_s: float) -> list[float]:
        """Stop, and tell how long answers took that came since then."""
        self._ours.send("enough")
        return [took_s for at_s, took_s in self._ours.recv() if at_s >= since_s]


def _greet(port: int, spec: ModelSpec, parent: Connection) -> None:
    with Swarm(port) as swarm:
        device = connect(swarm, "other", spec, [])
        wait(swarm, lambda: device.client.subscriptions == 1)
        parent.recv()
        wait(swarm, parent.poll, each=device.greet)
        parent.send(device.round_trips)


def connect(swarm: Swarm, name: str, spec: ModelSpec, changes: list[bytes]) -> Sender:
    """A device of the swarm that listens to the server."""
    hear: list[Callable[[bytes], None]] = []
    client = swarm.connect(name, lambda _client, _topic, payload: hear[0](bytes(payload)))
    topics = Topics(JOB)
    client.subscribe(topics.down(name))
    device = Sender(client, topics, spec, changes, name)
    hear.append(device.heard)
    return device


def upload(broker: OpenBroker, senders: int, home: Path) -> Row:
    """All senders at once to a real server."""
    task = write_task(home, width=WIDTH)
    spec = BlockModel(load_task(task)).spec
    with (
        OtherDevice(broker.port, spec) as other,
        serving(task, broker.url, senders + 1, home) as server,
        Swarm(broker.port, window=8) as swarm,
    ):
        changes = payloads(spec)
        crowd = [connect(swarm, f"sender-{n}", spec, changes) for n in range(senders)]
        wait(swarm, lambda: all(s.client.subscriptions == 1 for s in crowd))
        wait(swarm, lambda: greeted(home), every_s=1.0)
        other.begin()
        for sender in crowd:
            sender.greet()
        wait(swarm, lambda: all(s.offer is not None for s in crowd))
        for sender in crowd:
            sender.prepare()
        Path(f"/proc/{server.pid}/clear_refs").write_text("5")
        idle_bytes, cpu_s = process_rss_bytes(server.pid), process_cpu_s(server.pid)
        start_s = time.monotonic()
        for sender in crowd:
            sender.announce()
        wait(swarm, lambda: all(s.verdict for s in crowd))
        round_trips_s = other.round_trips_s(start_s)
        sent_bytes = sum(len(s.body) for s in crowd)
        seconds = max(s.delivered_s for s in crowd) - start_s
        counted_s = max(s.answered_s for s in crowd) - start_s
        return {
            "way": "updates",
            "senders": senders,
            "mb": sent_bytes / 1e6,
            "seconds": seconds,
            "mb_per_s": sent_bytes / 1e6 / seconds,
            "counted_mb_per_s": sent_bytes / 1e6 / counted_s,
            "lost": senders - sum(s.verdict == "accepted" for s in crowd),
            "server_cpu_s": process_cpu_s(server.pid) - cpu_s,
            "server_rss_added_mb": (process_peak_bytes(server.pid) - idle_bytes) / 1e6,
            "control_p95_ms": 1e3 * statistics.quantiles(round_trips_s, n=20)[-1],
            "round_trips": len(round_trips_s),
        }


def greeted(home: Path) -> bool:
    """Whether the server has opened for its devices."""
    return b"waiting" in (home / "server.txt").read_bytes()


def wait(
    swarm: Swarm,
    until: Callable[[], bool],
    *,
    each: Callable[[], None] = lambda: None,
    every_s: float = GREETING_EVERY_S,
) -> None:
    """Move bytes until that holds, with a call every so often; TimeoutError when it takes long."""
    deadline_s = time.monotonic() + LIMIT_S
    while not swarm.run(until, every_s):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"not within {LIMIT_S:.0f} s; see the server's output")
        each()


def raw(broker: OpenBroker, senders: int, bytes_each: int) -> Row:
    """The same bytes from raw senders to a raw subscriber."""
    seen = fan_in(broker.port, senders=senders, bytes_each=bytes_each)
    return {
        "way": "raw to a raw subscriber",
        "senders": senders,
        "mb": seen.payload_bytes / 1e6,
        "seconds": seen.seconds,
        "mb_per_s": seen.mb_per_s,
    }


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Raw, updates, raw, updates, raw: the medians count."""
    senders, turns = (200, 2) if quick else (200, 5)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as place:
        broker = OpenBroker("mosquitto", Path(place) / "broker")
        broker.start()
        try:
            for turn in range(turns):
                home = Path(place) / str(turn)
                home.mkdir()
                row = upload(broker, senders, home)
                rows += [raw(broker, senders, int(1e6 * row["mb"] / senders)), row]
        finally:
            broker.stop()
    blank = dict.fromkeys(rows[1], "")
    raws, ours = rows[::2], rows[1::2]

    def middle(part: list[Row], key: str) -> float:
        return statistics.median(row[key] for row in part)

    figures = {
        "lost": float(sum(row["lost"] for row in ours)),
        "server_rss_added_mb": max(row["server_rss_added_mb"] for row in ours),
        "goodput_over_raw": middle(ours, "mb_per_s") / middle(raws, "mb_per_s"),
        "control_p95_ms": middle(ours, "control_p95_ms"),
        "goodput_mb_per_s": middle(ours, "mb_per_s"),
        "counted_mb_per_s": middle(ours, "counted_mb_per_s"),
        "raw_mb_per_s": middle(raws, "mb_per_s"),
    }
    return figures, [{**blank, **row} for row in rows]


if __name__ == "__main__":
    run("upload_fan_in", __doc__, measure)

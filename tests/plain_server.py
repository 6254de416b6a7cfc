"""A server that does nothing but move bytes: the real parts of one, without training and rounds.

    python -m tests.plain_server --url URL --state DIR --blocks N --size-bytes N [--profile NAME]

One round is open from its first start to the end; a start after a kill goes on with it. On standard
input it takes ``publish N`` (a version in which the last N blocks are new) and ``report``; it
answers each with a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import queue
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edge_sdk.blocks import ModelSpec
from edge_sdk.brokers import BROKERS, BrokerProfile, broker_profile
from edge_sdk.errors import PeerError
from edge_sdk.link import Arrived, LinkDown, LinkUp
from edge_sdk.strategies import strategy_named
from edge_sdk.wire import Hello, Offer, Open, Piece, Receipt, Training, Want, decode
from reference_server.counting import Counted, Counting, CountingFailed, RoundTerms
from reference_server.downlink import Downlink, Inbox
from reference_server.ingest import Ingest
from reference_server.ledger import Ledger
from reference_server.trust import Tickets
from reference_server.versions import Manifest, VersionStore
from tests.brokers import OpenBroker
from tests.parcels import CODEC, JOB, ROUND, model, weights
from tests.relay import eventually

ROUND_S = 3600.0
READY_S = 30.0


class PlainServer:
    """All calls come from the thread that runs it, but ``ask`` and ``stop``."""

    def __init__(self, url: str, state: Path, spec: ModelSpec, broker: BrokerProfile) -> None:
        self.spec, self.inbox, rng = spec, Inbox(), random.Random()
        self.versions = VersionStore(state)
        self.manifest = self._first_version()
        self.ledger = Ledger.open(state)
        self.tickets = Tickets.load_or_create(state)
        self.base_sha = self._open_round()
        self._running = True
        self.dropped: list[str] = []
        self.verdicts: dict[str, str] = {}
        self.counting = Counting(JOB, spec, strategy_named("full"), self.ledger, self.inbox.put)
        self.ingest = Ingest(
            JOB, spec, self.ledger, self.tickets, state / "incoming", self.counting, rng
        )
        self._judged = set(self.ledger.answers(JOB, ROUND).verdicts)
        self.ingest.judged = self._judged
        boot = secrets.token_hex(8)
        self.down = Downlink(url, JOB, self.inbox, self.versions, state, broker, rng, boot)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PlainServer:
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._thread is not None
        self.stop()
        self._thread.join()

    def run(self) -> None:
        """Serve until ``stop``."""
        self.down.start()
        self.down.place(self.manifest)
        try:
            while self._running:
                self._handle(self._next())
                while not self.inbox.empty():
                    self._handle(self.inbox.get())
                for device, want in self.ingest.due(time.monotonic()):
                    self.down.say(device, want)
                self.down.tend()
        finally:
            self.counting.close()
            self.down.close()
            self.ledger.close()

    def stop(self) -> None:
        """End ``run``; from any thread."""
        self.inbox.put(self._end)

    def ask(self, question: Callable[[], Any]) -> Any:
        """Run this in the server's thread and return what it gives."""
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.inbox.put(lambda: answer.put(question()))
        return answer.get(timeout=30)

    def publish(self, changed: int, scale: float = 1.0) -> None:
        """Make a version current whose last blocks are new; with scale 0 they are zeros."""
        old = self.manifest
        kept = len(old.blocks) - changed
        seed = 100 * (old.version + 1)
        new = [
            self.versions.put_block(block, weights(block, seed + number, scale))
            for number, block in enumerate(self.spec.blocks)
            if number >= kept
        ]
        self.manifest = Manifest(
            job=JOB, version=old.version + 1, round=0, parent_sha=old.model_sha256,
            created_s=time.time(), blocks=(*old.blocks[:kept], *new),
        )  # fmt: skip
        self.versions.write_manifest(self.manifest)
        self.down.place(self.manifest)

    def offer(self, device: str) -> Offer:
        """What a device is told of the current version."""
        return Offer(
            round=self.manifest.version + 1,
            ticket=self.tickets.issue(JOB, ROUND, device, self.base_sha),
            version=self.manifest.version, base_sha=self.base_sha, blocks=self.manifest.blocks,
            slots=self.down.slots(), strategy="full", open_blocks=self.spec.names, codec=CODEC,
            deadline_s=ROUND_S, training=Training(), piece_bytes=self.down.piece_bytes,
        )  # fmt: skip

    def report(self) -> dict[str, Any]:
        """Bytes on its sockets, and how it stands."""
        return {
            "sent_bytes": self.down.sent_bytes,
            "version": self.manifest.version,
            "ready": self.down.ready,
            "model_bytes": sum(entry.size_bytes for entry in self.manifest.blocks),
            "verdicts": self.verdicts,
        }

    def _end(self) -> None:
        self._running = False

    def _first_version(self) -> Manifest:
        latest = self.versions.latest()
        if latest is not None:
            return self.versions.load_manifest(latest)
        entries = tuple(
            self.versions.put_block(block, weights(block, number))
            for number, block in enumerate(self.spec.blocks)
        )
        manifest = Manifest(
            job=JOB, version=0, round=0, parent_sha="", created_s=time.time(), blocks=entries
        )
        self.versions.write_manifest(manifest)
        return manifest

    def _open_round(self) -> str:
        """The base of the one round, which may be open since an earlier start."""
        ledger, base_sha = self.ledger, self.versions.load_manifest(0).model_sha256
        ledger.open_job(JOB, self.spec.digest(), {})
        ledger.record_base(JOB, base_sha)
        if ledger.current_round(JOB) is None:
            ledger.plan_round(JOB, base_version=0, base_sha=base_sha)
            ledger.open_round(JOB, ROUND, ROUND_S)
        return base_sha

    def _next(self) -> Any:
        now_s = time.monotonic()
        asked_s, pause_s = self.ingest.next_due_s(), self.down.due_in_s()
        waits = [10.0]
        waits += [] if asked_s is None else [asked_s - now_s]
        waits += [] if pause_s is None else [pause_s]
        try:
            return self.inbox.get(timeout=max(0.0, min(waits)))
        except queue.Empty:
            return None

    def _handle(self, event: Any) -> None:
        if isinstance(event, Arrived):
            try:
                self._arrived(event)
            except PeerError as error:
                self.dropped.append(str(error))
        elif isinstance(event, Counted):
            self._say(event.arrival.device, self.ingest.counted(event, time.monotonic()))
        elif isinstance(event, CountingFailed):
            raise event.error
        elif isinstance(event, LinkUp):
            self.down.reconnected()
            self.ingest.terms = RoundTerms(
                round=ROUND, base_sha=self.base_sha, codec=CODEC, open_blocks=self.spec.names,
                piece_bytes=self.down.update_piece_bytes,
            )  # fmt: skip
        elif isinstance(event, LinkDown):
            self.down.lost()
        elif callable(event):
            event()

    def _arrived(self, event: Arrived) -> None:
        if self.down.heard_itself(event):
            return
        device = self.down.topics.device_of(event.topic)
        message, now_s = decode(event.payload), time.monotonic()
        if isinstance(message, Hello):
            self.down.say(device, self.offer(device))
        elif isinstance(message, Open):
            self._say(device, self.ingest.open(device, message, now_s))
        elif isinstance(message, Piece):
            self._say(device, self.ingest.piece(device, message, now_s))
        elif isinstance(message, Want):
            self._serve(device, message)
        self.down.tend()

    def _serve(self, device: str, want: Want) -> None:
        if not self.down.serve(device, want):
            self.down.say(device, self.offer(device))

    def _say(self, device: str, answer: Receipt | Want | None) -> None:
        if answer is None:
            return
        if isinstance(answer, Receipt):
            self._judged.add(device)
            self.verdicts[device] = f"{answer.verdict} {answer.reason}".strip()
        self.down.say(device, answer)


@contextmanager
def serving(
    broker: OpenBroker, home: Path, spec: ModelSpec, url: str | None = None, profile: str = ""
) -> Iterator[PlainServer]:
    """A server in a thread, ready for devices; ``url`` where it is not the broker's own."""
    limits = BROKERS[profile or broker.kind]
    with PlainServer(url or broker.url, home / "server", spec, limits) as server:
        eventually(lambda: server.ask(lambda: server.down.ready), READY_S)
        yield server


def command(url: str, state: Path, blocks: int, size_bytes: int, profile: str) -> list[str]:
    """The command line of one."""
    sizes = ("--blocks", str(blocks), "--size-bytes", str(size_bytes))
    places = ("--url", url, "--state", str(state), "--profile", profile)
    return [sys.executable, "-m", "tests.plain_server", *places, *sizes]


def ask(server: subprocess.Popen[bytes], order: str) -> dict[str, Any]:
    """Give a server's process an order, and its answer."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(order.encode() + b"\n")
    server.stdin.flush()
    answer: dict[str, Any] = json.loads(server.stdout.readline())
    return answer


def wait_until_ready(server: subprocess.Popen[bytes]) -> None:
    """Until it is connected and its blocks are where they should be."""
    eventually(lambda: bool(ask(server, "report")["ready"]), READY_S)


def obey(server: PlainServer) -> None:
    """Carry out what comes on standard input, until it ends."""
    for line in sys.stdin:
        word, _, number = line.partition(" ")
        if word == "publish":
            server.ask(partial(server.publish, int(number)))
        sys.stdout.write(json.dumps(server.ask(server.report)) + "\n")
        sys.stdout.flush()
    server.stop()


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(prog="tests.plain_server")
    parser.add_argument("--url", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--size-bytes", type=int, required=True)
    parser.add_argument("--profile", default="generic")
    mine = parser.parse_args()
    logging.basicConfig(format="%(asctime)s server: %(message)s", level=logging.WARNING)
    spec = model(mine.blocks, mine.size_bytes)
    server = PlainServer(mine.url, mine.state, spec, broker_profile(mine.profile))
    threading.Thread(target=obey, args=(server,), daemon=True).start()
    server.run()


if __name__ == "__main__":
    main()

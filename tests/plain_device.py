"""A device that does nothing but move bytes: the real parts of one, without a trainer.

    python -m tests.plain_device --url URL --device ID --state DIR --notes FILE

It delivers what lies in its spool and ends. Every piece it hands to its link is counted in the file
``--notes`` at once, so that a kill loses none.
"""

from __future__ import annotations

import argparse
import logging
import mmap
import os
import queue
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from edge_sdk.brokers import broker_profile
from edge_sdk.errors import MalformedMessage
from edge_sdk.fetch import Fetch
from edge_sdk.link import Arrived, LinkDown, LinkUp
from edge_sdk.mqtt import Link
from edge_sdk.outbox import Outbox
from edge_sdk.session import Retry
from edge_sdk.store import BlockCache, Spool
from edge_sdk.wire import (
    DEFAULT_PIECE_BYTES,
    PIECE_OVERHEAD_BYTES,
    Head,
    Hello,
    Offer,
    Piece,
    Receipt,
    Topics,
    Want,
    decode,
    encode,
)

JOB = "parcels"
# What a kill may leave uncounted of the bytes on the socket.
NOTE_EVERY_S = 0.02
_NOTES = struct.Struct("<5Q")


class Notes:
    """Counters in a file that outlive a kill."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(handle, _NOTES.size)
        self._map = mmap.mmap(handle, _NOTES.size)
        self._one_writer = threading.Lock()
        os.close(handle)

    def add(self, *counts: int) -> None:
        """Add to each of them, in their order."""
        with self._one_writer:
            old = _NOTES.unpack(self._map)
            more = (*counts, *[0] * (len(old) - len(counts)))
            self._map[:] = _NOTES.pack(*(a + b for a, b in zip(old, more, strict=True)))


class Noted(NamedTuple):
    """Of all lives so far: pieces handed to the link, and bytes on the socket."""

    starts: int
    pieces: int
    piece_bytes: int
    sent_bytes: int
    received_bytes: int


def read_notes(path: Path) -> Noted:
    """What was noted; zeros when nothing was."""
    written = path.read_bytes() if path.exists() else b""
    return Noted(*_NOTES.unpack(written.ljust(_NOTES.size, b"\0")))


class NotingLink(Link):
    """A link whose pieces and bytes are noted as they go."""

    notes: Notes
    data_topic: str
    noted = (0, 0)

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> bool:
        """As a link does."""
        accepted = super().publish(topic, payload, retain=retain)
        if accepted and topic == self.data_topic:
            self.notes.add(0, 1, len(payload) - PIECE_OVERHEAD_BYTES)
        return accepted

    def note_bytes(self) -> None:
        """Bring the counted bytes up to date; from one thread."""
        now = (self.sent_bytes, self.received_bytes)
        self.notes.add(0, 0, 0, now[0] - self.noted[0], now[1] - self.noted[1])
        self.noted = now


class PlainDevice:
    """One device, in the thread that calls ``run``."""

    def __init__(
        self,
        url: str,
        device: str,
        state: Path,
        *,
        notes: Path | None = None,
        profile: str = "generic",
        piece_bytes: int = DEFAULT_PIECE_BYTES,
    ) -> None:
        self.device, self.topics = device, Topics(JOB)
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        rng = random.Random()
        self.link = NotingLink(url, device, self.inbox, rng=rng, limits=broker_profile(profile))
        self.link.notes = Notes(notes or state / "notes")
        self.link.notes.add(1)
        self.link.data_topic = self.topics.data(device)
        self._blocks = state / "blocks"
        self.cache, self.spool = BlockCache(self._blocks), Spool(state / "spool")
        clock = time.monotonic
        self.fetch = Fetch(self.cache, self.link, self.topics, device, rng, clock)
        self.outbox = Outbox(self.spool, self.link, self.topics, device, rng, clock, piece_bytes)
        self.hello = Retry(rng, 2.0)
        self.fetches = False
        self.version = -1
        self.receipts: list[Receipt] = []
        self.reconnections = 0
        self._boot = ""

    def start(self) -> None:
        """Connect."""
        self.link.subscribe(self.topics.down(self.device))
        self.link.subscribe(self.topics.head)
        self.link.start()

    def deliver(self) -> None:
        """Begin with what lies in the spool."""
        entries = self.spool.entries()
        if entries:
            self.outbox.deliver(entries[0])

    def run(self, done: Callable[[], bool], limit_s: float = 600.0) -> bool:
        """Take part until this holds; False when it does not in time."""
        deadline_s = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > deadline_s:
                return False
            self.step(min(0.5, deadline_s - time.monotonic()))
        return True

    def step(self, limit_s: float) -> None:
        """Handle what comes next, as the agent does."""
        now_s = time.monotonic()
        times = (self.hello.due_s, self.outbox.due_s(), self.fetch.due_s())
        waits = [limit_s, *(t - now_s for t in times if t is not None)]
        try:
            self._handle(self.inbox.get(timeout=max(0.0, min(waits))))
            while not self.inbox.empty():
                self._handle(self.inbox.get())
        except queue.Empty:
            pass
        if self.hello.is_due(time.monotonic()):
            self._greet()
        self.outbox.pump()
        self.fetch.repeat()

    def close(self) -> None:
        """Leave."""
        self.link.close()

    def has_blocks(self) -> bool:
        """Whether all that was wanted of the version it knows of is here."""
        return self.version >= 0 and not self.fetch.active

    def cache_bytes(self) -> int:
        """Bytes of all blocks that are here."""
        return sum(path.stat().st_size for path in self._blocks.glob("*.block"))

    def _handle(self, event: Any) -> None:
        if isinstance(event, LinkDown):
            logging.info("link down: %s", event.reason)
        elif isinstance(event, LinkUp):
            logging.info("link up")
            self.reconnections += 1
            self._greet()
            self.outbox.reconnected()
            self.fetch.reconnected()
        elif isinstance(event, Arrived):
            try:
                self._heard(decode(event.payload))
            except MalformedMessage as error:
                logging.warning("dropped: %s", error)

    def _heard(self, message: Any) -> None:
        if isinstance(message, Want):
            self.outbox.wanted(message)
        elif isinstance(message, Receipt):
            if self.outbox.answered(message):
                self.outbox.forget()
                self.receipts.append(message)
        elif isinstance(message, Piece):
            self.fetch.take(message)
        elif isinstance(message, Head):
            if message.boot != self._boot:
                self._boot = message.boot
                self.outbox.announce()
            if message.version != self.version:
                self._greet()
        elif isinstance(message, Offer):
            self._offered(message)

    def _offered(self, offer: Offer) -> None:
        self.hello.answered()
        self.version = offer.version
        self.fetch.begin(offer)

    def _greet(self) -> None:
        if not self.fetches:
            return
        hello = Hello(
            session=1, sdk="x", profile="x", memory_bytes=1, flops_per_s=1.0,
            spec_digest="0" * 64, num_examples=1,
        )  # fmt: skip
        self.link.publish(self.topics.up(self.device), encode(hello))
        self.hello.arm(time.monotonic())


@contextmanager
def connected(
    url: str, home: Path, device: str = "dev", fetches: bool = False, profile: str = "generic"
) -> Iterator[PlainDevice]:
    """A device on its way to deliver what is in its spool, or to fetch the model."""
    subject = PlainDevice(url, device, home / device, profile=profile)
    subject.fetches = fetches
    subject.start()
    subject.deliver()
    try:
        yield subject
    finally:
        subject.close()


def command(url: str, device: str, state: Path, profile: str = "generic") -> list[str]:
    """The command line of one."""
    places = ("--url", url, "--state", str(state), "--notes", str(state / "notes"))
    who = ("--device", device, "--profile", profile)
    return [sys.executable, "-m", "tests.plain_device", *places, *who]


def main() -> None:
    """Deliver, and end."""
    parser = argparse.ArgumentParser(prog="tests.plain_device")
    parser.add_argument("--url", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--profile", default="generic")
    mine = parser.parse_args()
    logging.basicConfig(
        format=f"%(asctime)s.%(msecs)03d {mine.device}: %(message)s", level=logging.INFO
    )
    device = PlainDevice(mine.url, mine.device, mine.state, notes=mine.notes, profile=mine.profile)
    left = threading.Event()

    def note() -> None:
        while not left.wait(NOTE_EVERY_S):
            device.link.note_bytes()

    noting = threading.Thread(target=note, daemon=True)
    noting.start()
    device.start()
    device.deliver()
    device.run(lambda: device.outbox.entry is None)
    for receipt in device.receipts:
        sys.stdout.write(f"{receipt.verdict} {receipt.sha256} {receipt.reason}\n")
        sys.stdout.flush()
    device.close()
    left.set()
    noting.join()
    device.link.note_bytes()


if __name__ == "__main__":
    main()

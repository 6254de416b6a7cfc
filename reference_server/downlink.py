"""What the server says: two connections, and the blocks of the current version on their way down.

Control messages have one connection, the pieces of updates another, so that nobody waits behind
somebody else's upload. Blocks go into the broker's slots where it retains well, and piece by piece
to whoever asks; the differences to what devices hold go only to whoever asks, so they are offered
where that is little beside what the slots save. The head is said last, when everything it stands
for is there.
"""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_sdk.brokers import BrokerProfile
from edge_sdk.errors import MalformedMessage
from edge_sdk.feed import Feed
from edge_sdk.link import Arrived, LinkEvent, TakenOver
from edge_sdk.mqtt import Link
from edge_sdk.pieces import piece_range
from edge_sdk.store import read_piece
from edge_sdk.wire import (
    DEFAULT_PIECE_BYTES,
    MAX_CONTROL_BYTES,
    MAX_PIECE_BYTES,
    Delta,
    Head,
    Message,
    Offer,
    Topics,
    Want,
    decode,
    encode,
    encode_piece,
)
from reference_server.broadcast import Broadcast
from reference_server.versions import Manifest, VersionStore

# One answer to a Want: what a device may have waiting here, whatever it asks for.
MAX_PIECES_PER_WANT = 64
# Pieces that were asked for before the server died are not asked for again if the broker kept them.
DATA_SESSION_S = 3600
# Of a block that lies in a slot, so many times its size may be asked for as differences.
MAX_DELTAS_OVER_BLOCK = 8


class Downlink:
    """The server's side of one job's topics. All calls come from one thread."""

    def __init__(
        self,
        url: str,
        job: str,
        inbox: Inbox,
        versions: VersionStore,
        state_dir: Path,
        broker: BrokerProfile,
        rng: random.Random,
        boot: str,
    ) -> None:
        """``boot``: this incarnation of the server; events of the connections go to ``inbox``."""
        name = f"server-{job}"[:58]
        self.topics = Topics(job)
        self._link = Link(url, name, inbox, rng=rng, limits=broker)
        self._data_link = Link(
            url,
            f"{name}-data",
            _OnlyWhatArrives(inbox),
            rng=rng,
            limits=broker,
            session_s=DATA_SESSION_S,
        )
        self._versions, self._boot = versions, boot
        self._feed = Feed(self._link)
        layout = state_dir / "layout.json"
        self._broadcast = Broadcast(layout, self._link, self.topics, versions, broker)
        self._manifest: Manifest | None = None
        self._deltas: Mapping[Path, Delta] = {}
        self._up = self._head_due = False

    def start(self) -> None:
        """Begin to connect, in the background."""
        for topic_filter in (
            self.topics.all_up,
            self.topics.all_presence,
            self.topics.head,
            self.topics.echo,
        ):
            self._link.subscribe(topic_filter)
        self._data_link.subscribe(self.topics.all_data)
        self._link.start()
        self._data_link.start()

    def close(self) -> None:
        """Leave the broker; may be called twice."""
        self._data_link.close()
        self._link.close()

    @property
    def connected(self) -> bool:
        """Whether what is said goes out."""
        return self._link.connected

    @property
    def ready(self) -> bool:
        """Whether devices can be told of the current version and would be heard."""
        connected = self._up and self._link.connected and self._data_link.connected
        return connected and self._broadcast.ready

    @property
    def piece_bytes(self) -> int:
        """Size of the pieces of blocks: what every device's link can bear, whatever the broker."""
        return self._link.piece_bytes(DEFAULT_PIECE_BYTES)

    @property
    def sent_bytes(self) -> int:
        """Bytes written to both sockets so far."""
        return self._link.sent_bytes + self._data_link.sent_bytes

    @property
    def update_piece_bytes(self) -> int:
        """Size of the largest pieces of an update that can arrive here."""
        return self._data_link.piece_bytes(MAX_PIECE_BYTES)

    def say(self, device: str, message: Message) -> None:
        """Tell one device something."""
        self._link.publish(self.topics.down(device), encode(message))

    def offer(self, device: str, devices: int, offer: Offer) -> None:
        """Offer a round to one device of so many, with the differences that it may use."""
        full = msgspec.structs.replace(offer, deltas=self._worth_it(devices))
        payload = encode(full)
        if len(payload) > MAX_CONTROL_BYTES:
            payload = encode(offer)
        self._link.publish(self.topics.down(device), payload)

    def place(self, manifest: Manifest) -> None:
        """Make this the current version: its blocks into the broker, then the head."""
        self._manifest = manifest
        self._deltas = self._versions.deltas(manifest.blocks)
        self._broadcast.place(manifest.blocks, self.piece_bytes)
        self._head_due = True
        self.tend()

    def slots(self) -> tuple[int, ...]:
        """Of each block of the current version, the slot that holds it; -1: none does."""
        return self._broadcast.slots()

    def reconnected(self) -> None:
        """A new connection: what the broker takes, and still has, may be something else."""
        self._up = True
        self._feed.reconnected()
        if self._manifest is not None:
            self._broadcast.place(self._manifest.blocks, self.piece_bytes)
        self._broadcast.connected()
        self._head_due = True

    def lost(self) -> None:
        """The connection is gone; ``reconnected`` tells of the next one."""
        self._up = False
        self._broadcast.lost()

    def heard_itself(self, event: Arrived) -> bool:
        """Whether a message was one of the server's own, and no device's."""
        if event.topic == self.topics.echo:
            self._broadcast.heard_echo()
        elif event.topic == self.topics.head:
            head = decode(event.payload)
            if isinstance(head, Head):
                self._broadcast.heard_head(head.layout)
        else:
            return False
        return True

    def serve(self, device: str, want: Want) -> bool:
        """Send a device these pieces of a block or difference of the current version.

        False: they are larger than the broker takes. MalformedMessage: there is no such content.
        """
        path, size_bytes = self._content(want.sha256)
        if want.piece_bytes > self._link.piece_bytes(want.piece_bytes):
            return False
        total = -(-size_bytes // want.piece_bytes)
        wanted = (index for first, stop in want.ranges for index in range(first, min(stop, total)))

        def make(index: int) -> tuple[str, bytes]:
            start, stop = piece_range(index, size_bytes, want.piece_bytes)
            data = read_piece(path, start, stop - start)
            return self.topics.down(device), encode_piece(want.sha256, index, total, data)

        content = f"{want.sha256}/{want.piece_bytes}"
        self._feed.order(device, content, islice(wanted, MAX_PIECES_PER_WANT), make)
        return True

    def tend(self) -> None:
        """Send on; call it after every event and at ``due_in_s``."""
        self._feed.pump()
        self._broadcast.pump()
        if self._head_due and self._manifest is not None and self.ready:
            self._head_due = False
            self._say_head("running")

    def due_in_s(self) -> float | None:
        """Seconds until ``tend`` is to be called; None: not before a connection says something."""
        pauses = (self._feed.due_in_s(), self._broadcast.due_in_s())
        return min((pause for pause in pauses if pause is not None), default=None)

    def finish(self) -> None:
        """The job is over: nothing of it stays in the broker but the word that it is."""
        self._broadcast.clear()
        self._say_head("done")

    def _worth_it(self, devices: int) -> tuple[Delta, ...]:
        """The differences that cost little although each device asks for its own."""
        if self._manifest is None:
            return ()
        blocks, slots = self._manifest.blocks, self.slots()
        return tuple(
            delta
            for delta in self._deltas.values()
            if slots[delta.block] < 0
            or devices * delta.size_bytes <= MAX_DELTAS_OVER_BLOCK * blocks[delta.block].size_bytes
        )

    def _content(self, sha256: str) -> tuple[Path, int]:
        for entry in self._manifest.blocks if self._manifest is not None else ():
            if entry.sha256 == sha256:
                return self._versions.wire_path(sha256), entry.size_bytes
        for path, delta in self._deltas.items():
            if delta.sha256 == sha256:
                return path, delta.size_bytes
        raise MalformedMessage(f"{sha256} is wanted, which is nothing of the latest version")

    def _say_head(self, state: Literal["running", "done"]) -> None:
        assert self._manifest is not None
        head = Head(
            boot=self._boot,
            version=self._manifest.version,
            state=state,
            layout=self._broadcast.digest,
        )
        self._link.publish(self.topics.head, encode(head), retain=True)


class Inbox:
    """What happened, in its order, but whatever can wait after what cannot; one thread takes it."""

    def __init__(self) -> None:
        self._ready = threading.Semaphore(0)
        self._first: deque[Any] = deque()
        self._later: deque[Any] = deque()

    def put(self, event: Any, /) -> None:
        """Something somebody waits for an answer to."""
        self._first.append(event)
        self._ready.release()

    def put_later(self, event: Any) -> None:
        """Something of many that can wait."""
        self._later.append(event)
        self._ready.release()

    def get(self, timeout: float | None = None) -> Any:
        """The next; queue.Empty when there is none in time."""
        if not self._ready.acquire(timeout=timeout):
            raise queue.Empty
        return (self._first or self._later).popleft()

    def empty(self) -> bool:
        """Whether nothing waits."""
        return not self._first and not self._later


class _OnlyWhatArrives:
    """The inbox of the connection for pieces: whether it is up is for the other one to tell."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def put(self, event: LinkEvent, /) -> None:
        """Pass on what matters."""
        if isinstance(event, (Arrived, TakenOver)):
            self._inbox.put_later(event)

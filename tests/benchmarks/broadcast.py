"""A model of 5 MB on its way down: 50 devices, each of which lacks 3 of its 10 blocks.

The server is a process of its own and counts what it writes to its sockets, the devices count what
they read from theirs. Rows, one after another on mosquitto: all devices at once for the first
version; 50 more that come when nothing is sent any more; the next version, in which 3 blocks are
new, for all of them. On the embedded broker, which retains badly, every device asks for its pieces.

Keys: server_sends_over_model (first row: what the server sent over the model), received_over_needed
(the most of all rows: what the devices received over what they lacked).
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from edge_sdk.store import BlockCache
from reference_server.broker import Kind
from reference_server.versions import VersionStore
from tests import plain_server
from tests.benchmarks.bench import Row, run
from tests.brokers import OpenBroker
from tests.parcels import model, weights
from tests.plain_device import PlainDevice

BLOCKS, MODEL_BYTES, LACKING = 10, 5_200_000, 3
LIMIT_S = 120.0


class Field:
    """A broker, a server in a process of its own, and devices in this one."""

    def __init__(self, kind: Kind, home: Path) -> None:
        self._kind, self._home = kind, home
        self._spec = model(BLOCKS, MODEL_BYTES)
        store = VersionStore(home / "server")
        self._blocks = [
            store.put_block(block, weights(block, number))
            for number, block in enumerate(self._spec.blocks)
        ]
        self._wires = {e.sha256: store.wire_path(e.sha256).read_bytes() for e in self._blocks}
        self._broker = OpenBroker(kind, home / "broker")
        self.devices: list[PlainDevice] = []

    def __enter__(self) -> Field:
        self._broker.start()
        serving = plain_server.command(
            self._broker.url, self._home / "server", BLOCKS, MODEL_BYTES, self._kind
        )
        self._server = subprocess.Popen(serving, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        plain_server.wait_until_ready(self._server)
        return self

    def __exit__(self, *_: object) -> None:
        for device in self.devices:
            device.close()
        self._server.kill()
        self._server.wait()
        self._broker.stop()

    def sent_bytes(self, order: str = "report") -> int:
        """What the server has written to its sockets, after it carried out an order."""
        return int(plain_server.ask(self._server, order)["sent_bytes"])

    def join(self, count: int) -> Callable[[], None]:
        """Add devices that lack different blocks; what they do when they start."""
        first = len(self.devices)
        for number in range(first, first + count):
            state = self._home / f"d{number}"
            cache = BlockCache(state / "blocks")
            lacking = {(number + step) % BLOCKS for step in (0, 3, 7)}
            assert len(lacking) == LACKING
            for index, entry in enumerate(self._blocks):
                if index not in lacking:
                    cache.put(entry.sha256, self._wires[entry.sha256])
            device = PlainDevice(self._broker.url, f"d{number}", state, profile=self._kind)
            device.fetches = True
            self.devices.append(device)
        return lambda: [device.start() for device in self.devices[first:]] and None

    def row(self, name: str, act: Callable[[], object], version: int, since_bytes: int) -> Row:
        """Let every device fetch what it lacks of a version; what that cost."""
        before = [device.link.received_bytes for device in self.devices]
        had = [device.cache_bytes() for device in self.devices]
        act()
        threads = [
            threading.Thread(target=_fetch, args=(device, version)) for device in self.devices
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(d.version == version and d.has_blocks() for d in self.devices)
        received = sum(d.link.received_bytes for d in self.devices) - sum(before)
        needed = sum(device.cache_bytes() for device in self.devices) - sum(had)
        model_bytes = sum(entry.size_bytes for entry in self._blocks)
        return {
            "broker": self._kind,
            "case": name,
            "devices": len(self.devices),
            "server_sends_over_model": (self.sent_bytes() - since_bytes) / model_bytes,
            "received_over_needed": received / needed,
            "needed_mb": needed / 1e6,
        }


def _fetch(device: PlainDevice, version: int) -> None:
    device.run(lambda: device.version == version and device.has_blocks(), LIMIT_S)


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """All on mosquitto; on the embedded broker one row more, unless quick."""
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        with Field("mosquitto", home / "m") as field:
            rows = [field.row("first version", field.join(50), 0, 0)]
            sent = field.sent_bytes()
            rows.append(field.row("late joiners", field.join(10 if quick else 50), 0, sent))
            sent = field.sent_bytes()
            publish = f"publish {LACKING}"
            rows.append(field.row("next version", lambda: field.sent_bytes(publish), 1, sent))
        if not quick:
            with Field("amqtt", home / "a") as field:
                rows.append(field.row("asked for", field.join(50), 0, 0))
    return {
        "server_sends_over_model": rows[0]["server_sends_over_model"],
        "received_over_needed": max(row["received_over_needed"] for row in rows),
    }, rows


if __name__ == "__main__":
    run("broadcast", __doc__, measure)

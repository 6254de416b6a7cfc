"""An upload over a bad line: 1 Mbit/s, 200 ms there and back, 2 % of the packets lost.

After a third the line goes dark for 20 s, after two thirds the device is killed (SIGKILL) and comes
back at once. Real TCP over a tunnel (root), a real server; a row for each broker, both at the same
time, the figures are the worse of the two. The time runs from the start of the device to its
receipt, the bytes are those of all its lives.

Keys: bytes_over_payload (bytes on the device's socket, MQTT included), time_over_ideal (seconds
without the 20 dark ones, over the payload's at the line's rate), tcp_bytes_over_payload and
ip_bytes_over_payload (with what TCP sent again, and its headers), wall_s.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reference_server.broker import Kind
from tests import plain_device, plain_server
from tests.benchmarks.bench import Row, run
from tests.brokers import OpenBroker
from tests.parcels import base_of, fill_spool, model
from tests.plain_device import read_notes
from tests.tunnel import Tunnel

RATE_BYTES_PER_S, DELAY_S, LOSS, SEED = 125_000, 0.1, 0.02, 3
DARK_S = 20.0
LIMIT_S = 240.0
POLL_S = 0.02
BROKERS: tuple[Kind, ...] = ("mosquitto", "amqtt")


class Upload:
    """One device and its update on the far side of a tunnel."""

    def __init__(self, kind: Kind, home: Path, size_bytes: int) -> None:
        self._kind, self._home, self._size_bytes = kind, home, size_bytes
        spec = model(1, size_bytes)
        spool = home / "device" / "spool"
        self._entry = fill_spool(spool, spec, home / "server", "far", base_of(spec))
        self._receipts = home / "device" / "receipts.txt"

    def play(self) -> Row:
        """To the receipt; what it cost."""
        with Tunnel(
            rate_bytes_per_s=RATE_BYTES_PER_S, delay_s=DELAY_S, loss=LOSS, seed=SEED
        ) as tunnel:
            broker = OpenBroker(self._kind, self._home / "broker", bind=tunnel.server_ip)
            broker.start()
            serving = plain_server.command(
                broker.url, self._home / "server", 1, self._size_bytes, self._kind
            )
            server = subprocess.Popen(serving, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            try:
                plain_server.wait_until_ready(server)
                wall_s = self._upload(tunnel, broker.url)
            finally:
                server.kill()
                server.wait()
                broker.stop()
            return self._row(wall_s, tunnel)

    def _upload(self, tunnel: Tunnel, url: str) -> float:
        start = tunnel.command(*plain_device.command(url, "far", self._home / "device"))
        started_s = time.monotonic()
        device = self._start(start)
        try:
            self._wait_for(1 / 3)
            tunnel.dark_for(DARK_S)
            self._wait_for(2 / 3)
            device.kill()
            device.wait()
            device = self._start(start)
            self._wait_for(None)
            wall_s = time.monotonic() - started_s
            device.wait(LIMIT_S)
        finally:
            device.kill()
            device.wait()
        return wall_s

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._receipts.open("ab") as receipts, (self._home / "log.txt").open("ab") as log:
            return subprocess.Popen(command, stdout=receipts, stderr=log)

    def _wait_for(self, share: float | None) -> None:
        """Until so much of the update has been sent; None: until the receipt is here."""
        deadline_s = time.monotonic() + LIMIT_S
        notes = self._home / "device" / "notes"
        while time.monotonic() < deadline_s:
            if share is None and self._receipts.read_bytes():
                return
            if share is not None and read_notes(notes).sent_bytes >= share * self._entry.size_bytes:
                return
            time.sleep(POLL_S)
        raise TimeoutError(f"{self._kind}: not {share or 'done'} in {LIMIT_S} s")

    def _row(self, wall_s: float, tunnel: Tunnel) -> Row:
        payload_bytes, up = self._entry.size_bytes, tunnel.traffic().up
        assert f"accepted {self._entry.sha256}" in self._receipts.read_text()
        noted = read_notes(self._home / "device" / "notes")
        ideal_s = payload_bytes / RATE_BYTES_PER_S
        return {
            "broker": self._kind,
            "payload_bytes": payload_bytes,
            "starts": noted.starts,
            "pieces": noted.pieces,
            "wall_s": wall_s,
            "time_over_ideal": (wall_s - DARK_S) / ideal_s,
            "bytes_over_payload": noted.sent_bytes / payload_bytes,
            "tcp_bytes_over_payload": up.payload_bytes / payload_bytes,
            "ip_bytes_over_payload": up.sent_bytes / payload_bytes,
        }


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Both brokers at once, each on a line of its own."""
    size_bytes = 2_500_000 if quick else 5_000_000
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor() as pool:
        homes = {kind: Path(directory) / kind for kind in BROKERS}
        uploads = [Upload(kind, home, size_bytes) for kind, home in homes.items()]
        rows = list(pool.map(Upload.play, uploads))
    worst = ("bytes_over_payload", "time_over_ideal", "tcp_bytes_over_payload",
             "ip_bytes_over_payload", "wall_s")  # fmt: skip
    return {key: max(row[key] for row in rows) for key in worst}, rows


if __name__ == "__main__":
    run("link", __doc__, measure)

"""Transfers while everything is killed: each applied exactly once, and how much is sent twice.

Devices, six at once, each with an update of its own in its spool, a server and a broker, each in a
process of its own that is started again at once. Kills (SIGKILL) fall at seeded points of the way
from the first piece to the last; a broker lives for some seconds before it is killed again, for one
that ends every connection at once looks like a fight over a client id. The devices share a line of
4 MB/s. The oracle is the ledger: its audit with the devices' receipts, and sums equal, byte for
byte, to those of each update once.

Keys: transfers, applied, double (how often an update was added to the sums beyond once), sums_equal
(1: yes), pieces_over_min (bytes of pieces handed to links over the updates' bytes), kills, wall_s.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
import time
from pathlib import Path

from edge_sdk.link import SHORT_LIFE_S
from edge_sdk.store import Spool, SpoolEntry
from reference_server.broker import find_mosquitto
from reference_server.ledger import Ledger
from tests import plain_device, plain_server
from tests.benchmarks.bench import Row, run
from tests.brokers import OpenBroker
from tests.parcels import JOB, ROUND, base_of, fill_spool, model, sums
from tests.plain_device import read_notes
from tests.relay import Relay

SEED = 7
AT_ONCE = 6
LINE_BYTES_PER_S, LINE_DELAY_S = 4e6, 0.01
LIMIT_S = 600.0
POLL_S = 0.02


class Child:
    """A process that is started again whenever it was killed."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._command, self._log = command, log
        self.process = self._start()

    def revive(self) -> int | None:
        """Its exit code when it ended by itself; started again when it was killed."""
        code = self.process.poll()
        if code is not None and code < 0:
            self.process = self._start()
            return None
        return code

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=log, stderr=log)


class Chaos:
    """The processes of one run, and who is to be killed when."""

    def __init__(self, home: Path, transfers: int, kills: int, size_bytes: int) -> None:
        self._rng = random.Random(SEED)
        self.home, self.spec = home, model(1, size_bytes)
        base_sha = base_of(self.spec)
        self.entries: dict[str, SpoolEntry] = {}
        self.bodies: list[bytes] = []
        for number in range(transfers):
            device = f"d{number:02}"
            spool = home / device / "spool"
            entry = fill_spool(spool, self.spec, home / "server", device, base_sha, seed=number + 1)
            self.entries[device] = entry
            self.bodies.append(Spool(spool).read_piece(entry, 0, entry.size_bytes))
        self.min_bytes = sum(map(len, self.bodies))
        self._points = sorted(self._rng.uniform(0.0, 0.97) for _ in range(kills))
        self.killed = {"device": 0, "server": 0, "broker": 0}
        self.broker = OpenBroker("mosquitto", home / "broker")
        self._broker_since_s = time.monotonic()
        self._size_bytes = size_bytes

    def play(self) -> None:
        """Until every device has its receipt."""
        self.broker.start()
        with Relay(
            self.broker.port, rate_bytes_per_s=LINE_BYTES_PER_S, delay_s=LINE_DELAY_S
        ) as relay:
            serving = plain_server.command(
                self.broker.url, self.home / "server", 1, self._size_bytes, "mosquitto"
            )
            server = Child(serving, self.home / "server.txt")
            try:
                self._drive(relay.url, server)
            finally:
                server.kill()
                self.broker.stop()

    def _drive(self, url: str, server: Child) -> None:
        waiting, at_work = list(self.entries), dict[str, Child]()
        deadline_s = time.monotonic() + LIMIT_S
        while waiting or at_work:
            assert time.monotonic() < deadline_s, f"not done: {sorted(at_work)} of {self.home}"
            while waiting and len(at_work) < AT_ONCE:
                device = waiting.pop(0)
                start = plain_device.command(url, device, self.home / device)
                at_work[device] = Child(start, self.home / device / "receipts.txt")
            for device, child in list(at_work.items()):
                code = child.revive()
                if code is not None:
                    assert code == 0, f"{device} ended with {code}, see {self.home / device}"
                    del at_work[device]
            assert server.revive() is None, f"the server ended, see {self.home / 'server.txt'}"
            self.broker.ensure_running()
            if self._points and self._progress() >= self._points[0]:
                del self._points[0]
                self._kill(server, at_work)
            time.sleep(POLL_S)

    def _progress(self) -> float:
        """Bytes sent over bytes to send, each update's at most once."""
        notes = {d: read_notes(self.home / d / "notes").piece_bytes for d in self.entries}
        done = sum(min(notes[d], entry.size_bytes) for d, entry in self.entries.items())
        return done / self.min_bytes

    def _kill(self, server: Child, at_work: dict[str, Child]) -> None:
        young = time.monotonic() - self._broker_since_s < 1.2 * SHORT_LIFE_S
        victim = self._rng.choice([*self.killed][: 2 if young else 3])
        if victim == "device" and at_work:
            at_work[self._rng.choice(sorted(at_work))].kill()
        elif victim == "broker":
            self.broker.kill()
            self._broker_since_s = time.monotonic()
        else:
            victim = "server"
            server.kill()
        self.killed[victim] += 1

    def figures(self) -> dict[str, float]:
        """What became of it."""
        receipts = [
            (ROUND, device)
            for device, entry in self.entries.items()
            if f"accepted {entry.sha256}" in (self.home / device / "receipts.txt").read_text()
        ]
        with Ledger.open(self.home / "server") as ledger:
            checks = ledger.audit(JOB, receipts)
            uploads = {u.device: u for u in ledger.uploads(JOB, ROUND) if u.verdict == "accepted"}
            counted = list(ledger.partials(JOB, ROUND))
        assert all(check.ok for check in checks), [check for check in checks if not check.ok]
        expected = sums(self.spec, self.bodies)
        equal = all(part.num == expected[part.block].to_bytes() for part in counted)
        sent = [read_notes(self.home / device / "notes") for device in self.entries]
        return {
            "transfers": len(self.entries),
            "applied": len(uploads.keys() & {device for _, device in receipts}),
            "double": sum(part.devices for part in counted) - len(uploads),
            "sums_equal": float(equal and len(counted) == 1),
            "pieces_over_min": sum(note.piece_bytes for note in sent) / self.min_bytes,
            "kills": sum(self.killed.values()),
        }


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """One run; a row says who was killed how often."""
    assert find_mosquitto() is not None, "mosquitto is not installed: apt install mosquitto"
    transfers, kills, size_bytes = (12, 20, 4_000_000) if quick else (60, 100, 4_000_000)
    with tempfile.TemporaryDirectory() as directory:
        chaos = Chaos(Path(directory), transfers, kills, size_bytes)
        started_s = time.monotonic()
        chaos.play()
        wall_s = time.monotonic() - started_s
        figures = {**chaos.figures(), "wall_s": wall_s}
    return figures, [{"killed": name, "times": times} for name, times in chaos.killed.items()]


if __name__ == "__main__":
    run("chaos_transfer", __doc__, measure)

"""Memory that sending takes: an update of 50 MB, in a process like the agent's.

Spool, link and outbox are the real ones, the broker is mosquitto, the server counts the update. The
process first sends a small update, as one that has been up for a while has. What is compared is its
resident memory then with the highest until the large one has its receipt.

Keys: agent_rss_added_mb (the worse of both piece sizes), rss_before_mb, update_mb.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from edge_sdk.wire import DEFAULT_PIECE_BYTES, MAX_PIECE_BYTES
from tests import plain_server
from tests.benchmarks.bench import Row, run
from tests.brokers import OpenBroker
from tests.parcels import base_of, fill_spool, model

BLOCKS, SIZE_BYTES = 32, 52_000_000
LIMIT_S = 120.0

SENDER = """
import json, sys, time
from pathlib import Path
from tests.plain_device import PlainDevice

url, home, piece_bytes, small, large = sys.argv[1:]


def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def send(name):
    device = PlainDevice(url, name, Path(home) / name, piece_bytes=int(piece_bytes))
    device.start()
    device.deliver()
    assert device.run(lambda: device.receipts, 120.0), f"no receipt for {name}"
    assert device.receipts[0].verdict == "accepted", device.receipts
    device.close()


send(small)
before = kib("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
started = time.monotonic()
send(large)
json.dump({"before": before, "peak": kib("VmHWM"), "s": time.monotonic() - started}, sys.stdout)
"""


def measure(quick: bool) -> tuple[dict[str, float], list[Row]]:
    """Small and large pieces; quick is the same."""
    spec = model(BLOCKS, SIZE_BYTES)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        broker = OpenBroker("mosquitto", home / "broker")
        broker.start()
        base_sha = base_of(spec)
        serving = plain_server.command(broker.url, home / "server", BLOCKS, SIZE_BYTES, "mosquitto")
        server = subprocess.Popen(serving, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            plain_server.wait_until_ready(server)
            for piece_bytes in (DEFAULT_PIECE_BYTES, MAX_PIECE_BYTES):
                names = [f"small-{piece_bytes}", f"large-{piece_bytes}"]
                entries = [
                    fill_spool(home / name / "spool", spec, home / "server", name, base_sha, last=n)
                    for name, n in zip(names, (1, BLOCKS), strict=True)
                ]
                sizes = [entry.size_bytes for entry in entries]
                rows.append(_sent(broker.url, home, piece_bytes, names, sizes))
        finally:
            server.kill()
            server.wait()
            broker.stop()
    return {
        "agent_rss_added_mb": max(row["added_mb"] for row in rows),
        "rss_before_mb": max(row["before_mb"] for row in rows),
        "update_mb": min(row["update_mb"] for row in rows),
    }, rows


def _sent(url: str, home: Path, piece_bytes: int, names: list[str], sizes: list[int]) -> Row:
    start = [sys.executable, "-c", SENDER, url, str(home), str(piece_bytes), *names]
    done = subprocess.run(start, stdout=subprocess.PIPE, check=True, timeout=LIMIT_S)
    seen = json.loads(done.stdout)
    return {
        "piece_bytes": piece_bytes,
        "small_mb": sizes[0] / 1e6,
        "update_mb": sizes[1] / 1e6,
        "before_mb": seen["before"] * 1024 / 1e6,
        "added_mb": (seen["peak"] - seen["before"]) * 1024 / 1e6,
        "seconds": seen["s"],
    }


if __name__ == "__main__":
    run("sender_memory", __doc__, measure)

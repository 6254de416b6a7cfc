"""What one device costs when it idles and when it takes part: bytes, memory, processor time.

    python -m tests.benchmarks.device_cost [--quick] [--json FILE]

A real broker, server and two `edge-sdk run` processes; the first device speaks through a relay that
counts every byte of its socket. Its task is an MLP of 64-512-512-10 on the digits, one local epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from edge_sdk.process import process_cpu_s, process_rss_bytes
from reference_server.broker import BrokerProcess, choose
from tests.relay import Relay, eventually

TASK = Path(__file__).with_name("digits_mlp.py")
START_LIMIT_S = 60.0


@contextmanager
def running(*arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One of our programs, ended when the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=20)


def device(part: int, url: str, home: Path) -> list[str]:
    """Arguments of one device."""
    return [
        *("edge_sdk", "run", "--task", str(TASK), "--broker", url, "--job", "bench"),
        *("--device", f"device-{part}", "--profile", "generic-x86", "--threads", "1"),
        *("--part", str(part), "--parts", "2", "--state", str(home / f"device-{part}")),
    ]


def server(broker: BrokerProcess, rounds: int, devices: int, home: Path) -> list[str]:
    """Arguments of the server."""
    return [
        *("reference_server", "run", "--task", str(TASK), "--broker", broker.url, "--job", "bench"),
        *("--strategy", "full", "--rounds", str(rounds), "--devices", str(devices)),
        *("--state", str(home / "server"), "--json", str(home / "report.json")),
    ]


def measure_idle(broker: BrokerProcess, home: Path, seconds: float) -> dict[str, Any]:
    """Bytes and memory of a connected device that waits for a fleet that never completes."""
    with ExitStack() as stack:
        stack.enter_context(running(*server(broker, 1, 99, home), log=home / "server.log"))
        relay = stack.enter_context(Relay(broker.port))
        agent = stack.enter_context(running(*device(0, relay.url, home), log=home / "device.log"))
        joined = lambda: b"joined" in (home / "server.log").read_bytes()  # noqa: E731
        eventually(joined, START_LIMIT_S)
        time.sleep(3)  # what follows the greeting, presence and so on, is not idling
        before, cpu_s, start_s = (
            relay.up_bytes + relay.down_bytes,
            process_cpu_s(agent.pid),
            time.monotonic(),
        )
        time.sleep(seconds)
        minutes = (time.monotonic() - start_s) / 60
        return {
            "idle_bytes_per_min": (relay.up_bytes + relay.down_bytes - before) / minutes,
            "idle_cpu_s_per_min": (process_cpu_s(agent.pid) - cpu_s) / minutes,
            "agent_rss_mb": process_rss_bytes(agent.pid) / 1e6,
        }


def measure_rounds(broker: BrokerProcess, home: Path, rounds: int) -> list[dict[str, Any]]:
    """Per device and warm round: processor seconds in all, in training steps, and bytes."""
    with ExitStack() as stack:
        serving = stack.enter_context(
            running(*server(broker, rounds, 2, home), log=home / "server.log")
        )
        for part in (0, 1):
            log = home / f"device-{part}.log"
            stack.enter_context(running(*device(part, broker.url, home), log=log))
        serving.wait(timeout=START_LIMIT_S + 30 * rounds)
    report = json.loads((home / "report.json").read_text())
    return [
        {
            "round": entry["round"],
            "device": row["id"],
            "cpu_s": row["cpu_s"],
            "train_cpu_s": row["train_cpu_s"],
            "overhead_cpu_s": row["cpu_s"] - row["train_cpu_s"],
            "up_bytes": row["up_bytes"],
            "down_bytes": row["down_bytes"],
        }
        for entry in report["rounds"][1:]  # the first round also starts the processes
        for row in entry["devices"]
    ]


def main() -> None:
    """Measure on every broker that is installed, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        broker = choose("auto", home / "broker")
        assert isinstance(broker, BrokerProcess)
        broker.start()
        try:
            (home / "idle").mkdir()
            (home / "rounds").mkdir()
            idle = measure_idle(broker, home / "idle", 20 if arguments.quick else 120)
            rows = measure_rounds(broker, home / "rounds", 4 if arguments.quick else 12)
        finally:
            broker.stop()
    figures = {
        **idle,
        "overhead_cpu_s": statistics.median(row["overhead_cpu_s"] for row in rows),
        "train_cpu_s": statistics.median(row["train_cpu_s"] for row in rows),
        "up_bytes_per_round": statistics.median(row["up_bytes"] for row in rows),
        "down_bytes_per_round": statistics.median(row["down_bytes"] for row in rows),
    }
    for key, value in figures.items():
        print(f"{key:<24}{value:>14.3f}")
    result = {
        "name": "device_cost",
        "quick": arguments.quick,
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "load": os.getloadavg()[0],
            "broker": f"{broker.kind} {broker.version}",
        },
        "figures": figures,
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

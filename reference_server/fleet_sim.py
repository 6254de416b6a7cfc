"""Many devices on one machine, each the real agent over real MQTT, restarted when it dies.

The only thing the devices share is a nursery: one process that has imported torch and forks a
trainer whenever an agent asks, so that four devices do not import torch four times. A trainer from
the nursery is a process of its own like any other; it can be killed like any other.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from edge_sdk.errors import StateError
from edge_sdk.trainer import MALLOC, serve

# Simulated devices give way to the server and the broker, with whom real ones share no processor.
GIVE_WAY = ("nice", "-n", "5")
# A device that dies at once is started again, but not in a spin.
RESTART_WAIT_S = 0.5
MAX_RESTART_WAIT_S = 10.0
MAX_RESTARTS = 20


class Nursery:
    """Handle on the process that forks trainers."""

    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "nursery.sock")
        if len(self.socket.encode()) > 100:
            raise StateError(f"{self.socket}: too long for a Unix socket; use a shorter --state")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its socket takes connections at once, trainers follow when torch is loaded."""
        Path(self.socket).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.socket)
        listener.listen(64)
        self._process = subprocess.Popen(
            [*GIVE_WAY, sys.executable, "-m", "reference_server.fleet_sim", str(listener.fileno())],
            stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()],
            env={**os.environ, **MALLOC},
        )
        listener.close()

    def ensure_running(self) -> None:
        """Start it again if it died."""
        if self._process is not None and self._process.poll() is not None:
            self.start()

    def stop(self) -> None:
        """End it; its trainers leave when their agents do."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        Path(self.socket).unlink(missing_ok=True)


@dataclass
class SimulatedDevice:
    """One ``edge-sdk run`` process and how often it had to be started."""

    device: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    next_start_s: float = 0.0

    def start(self) -> None:
        """Start the agent; what it prints goes to its log."""
        self.starts += 1
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def look_after(self, now_s: float) -> str | None:
        """Restart it when it died; a sentence about that, or None."""
        process = self.process
        if process is None:
            if now_s >= self.next_start_s and self.starts <= MAX_RESTARTS:
                self.start()
            return None
        code = process.poll()
        if code is None or code == 0:
            return None
        wait_s = min(MAX_RESTART_WAIT_S, RESTART_WAIT_S * 2 ** (self.starts - 1))
        self.process, self.next_start_s = None, now_s + wait_s
        if code == 2 or self.starts > MAX_RESTARTS:
            self.starts = MAX_RESTARTS + 1
            return f"{self.device} gave up (exit code {code}): {self._last_words()}"
        return f"{self.device} died (exit code {code}), starting it again"

    def stop(self) -> None:
        """End the agent."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:500] if lines else "it said nothing"


@dataclass
class SimulatedFleet:
    """Devices of given profiles on this machine, each with its own part of the data."""

    url: str
    job: str
    task_path: Path
    directory: Path
    profiles: list[str]
    nursery: str
    devices: list[SimulatedDevice] = field(default_factory=list)

    def start(self) -> None:
        """Start every device."""
        for part, (device, profile) in enumerate(zip(self.names(), self.profiles, strict=True)):
            home = self.directory / device
            home.mkdir(parents=True, exist_ok=True)
            self.devices.append(
                SimulatedDevice(
                    device, self._command(device, profile, part, home), home / "log.txt"
                )
            )
        for simulated in self.devices:
            simulated.start()

    def look_after(self) -> list[str]:
        """Restart what died; what happened, in words."""
        now_s = time.monotonic()
        news = [simulated.look_after(now_s) for simulated in self.devices]
        return [line for line in news if line is not None]

    def all_gave_up(self) -> bool:
        """Whether no device will be started again."""
        return all(d.process is None and d.starts > MAX_RESTARTS for d in self.devices)

    def stop(self) -> None:
        """End every device."""
        for simulated in self.devices:
            simulated.stop()

    def names(self) -> list[str]:
        """Device ids: the profile's name, numbered where a profile occurs more than once."""
        names = []
        for place, profile in enumerate(self.profiles):
            stem = Path(profile).stem[:56]
            count = [Path(p).stem for p in self.profiles[: place + 1]].count(Path(profile).stem)
            names.append(stem if count == 1 else f"{stem}-{count}")
        return names

    def _command(self, device: str, profile: str, part: int, home: Path) -> list[str]:
        return [
            *(*GIVE_WAY, sys.executable, "-m", "edge_sdk", "run"),
            *("--task", str(self.task_path), "--broker", self.url, "--job", self.job),
            *("--device", device, "--profile", profile, "--state", str(home)),
            *("--part", str(part), "--parts", str(len(self.profiles))),
            *("--threads", "1", "--keep-trying", "--nursery", self.nursery),
        ]


def main() -> int:
    """The nursery: load torch once, fork a trainer per connection, leave with the parent."""
    listener = socket.socket(fileno=int(sys.argv[1]))
    import edge_sdk.train  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return 0
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            serve(Connection(connection.detach()))
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

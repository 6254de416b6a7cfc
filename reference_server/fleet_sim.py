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
from edge_sdk.memory import MALLOC, THREAD_LIMITS
from edge_sdk.profile import load_profile
from edge_sdk.store import make_directory
from edge_sdk.trainer import serve
from reference_server.broker import die_with_parent

# Simulated devices give way to the server and the broker, with whom real ones share no processor.
GIVE_WAY = ("nice", "-n", "10")
# A device that dies at once is started again, but not in a spin.
RESTART_WAIT_S = 0.5
MAX_RESTART_WAIT_S = 10.0
MAX_RESTARTS = 20
STOP_LIMIT_S = 4.0


class Nursery:
    """Handle on the process that forks trainers."""

    def __init__(self, directory: Path) -> None:
        self.socket = str(directory / "nursery.sock")
        self._log = directory / "nursery.log"
        if len(self.socket.encode()) > 100:
            raise StateError(f"{self.socket}: too long for a Unix socket; use a shorter --state")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; its socket takes connections at once, trainers follow when torch is loaded."""
        Path(self.socket).unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.socket)
        listener.listen(64)
        number = str(listener.fileno())
        # What task files print while they train must not end up in the table on the screen.
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*GIVE_WAY, sys.executable, "-m", "reference_server.fleet_sim", number],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[listener.fileno()],
                # With threads of its own it could not be forked safely.
                env={**os.environ, **MALLOC, **dict.fromkeys(THREAD_LIMITS, "1")},
                start_new_session=True,
            )  # fmt: skip
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
            # Ctrl-C is for whoever supervises it, and then ends it in good order.
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=die_with_parent(),
            )  # fmt: skip

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
            return f"{self.device} gave up (exit code {code}): {self.last_words()}"
        return f"{self.device} died (exit code {code}), starting it again"

    @property
    def gave_up(self) -> bool:
        """Whether it will not be started again."""
        return self.process is None and self.starts > MAX_RESTARTS

    def ask_to_stop(self) -> None:
        """Let the agent end itself."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def stop(self, until_s: float) -> None:
        """See the agent end, by itself until then."""
        if self.process is not None:
            try:
                self.process.wait(timeout=max(0.0, until_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def last_words(self) -> str:
        """The last line of its log, which says why it ended."""
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("edge-sdk: ")[:500] if lines else "it said nothing"


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
            make_directory(home)
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

    def given_up(self) -> list[SimulatedDevice]:
        """Devices that will not be started again."""
        return [simulated for simulated in self.devices if simulated.gave_up]

    def stop(self) -> None:
        """End every device."""
        for simulated in self.devices:
            simulated.ask_to_stop()
        until_s = time.monotonic() + STOP_LIMIT_S
        for simulated in self.devices:
            simulated.stop(until_s)

    def names(self) -> list[str]:
        """Device ids: the profile's name, numbered where a profile occurs more than once."""
        boards = [load_profile(profile).name[:56] for profile in self.profiles]
        counts = [boards[: place + 1].count(board) for place, board in enumerate(boards)]
        return [
            board if count == 1 else f"{board}-{count}"
            for board, count in zip(boards, counts, strict=True)
        ]

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

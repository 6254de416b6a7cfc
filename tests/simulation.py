"""Real fleets for end-to-end tests: a task that trains in moments, and the processes of a run."""

from __future__ import annotations

import json
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from edge_sdk.errors import MalformedMessage
from edge_sdk.link import Arrived, LinkEvent, LinkUp
from edge_sdk.mqtt import Link
from edge_sdk.wire import Message, Piece, Topics, decode
from tests.relay import eventually

# Boards with time and memory for the whole small model, so that a plan never depends on the load
# of the machine the tests run on. The first has a quarter of the data and is done first.
FAST, SLOW = "raspberry-pi-5-8gb", "raspberry-pi-4b-8gb"
BOARDS = (FAST, SLOW)
START_S = 60.0
ROUND_S = 90.0

_TASK = """
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import nn

from edge_sdk import Task, Training


def share(begin, end):
    home = Path(find_spec("sklearn").origin).parent
    table = np.loadtxt(home / "datasets/data/digits.csv.gz", delimiter=",", dtype="float32")
    rows = table[np.random.default_rng(0).permutation(len(table))]
    rows = rows[int(begin * len(rows)) : int(end * len(rows))]
    return rows[:, :64] / 16, rows[:, 64].astype("int64")


def train_data(part, parts):
    x, y = share(0.2, 1.0)
    begin, end = (int(len(x) * (edge / parts) ** 2) for edge in (part, part + 1))
    return x[begin:end], y[begin:end]


def build_model():
    return nn.Sequential(
        nn.Linear(64, {width}), nn.ReLU(), nn.Linear({width}, {width}), nn.ReLU(),
        nn.Linear({width}, 10),
    )


def task():
    return Task(
        name="tiny", build_model=build_model, loss=nn.functional.cross_entropy,
        train_data=train_data, test_data=lambda: share(0.0, 0.2),
        training=Training(learning_rate=0.01, batch_size=32, local_epochs={epochs}),
    )
"""


def write_task(directory: Path, *, width: int = 128, epochs: int = 1) -> Path:
    """A perceptron 64-width-width-10 on digits; ``epochs`` is how long a device trains a round."""
    path = directory / "tiny.py"
    path.write_text(_TASK.format(width=width, epochs=epochs))
    return path


def command(module: str, *arguments: object) -> list[str]:
    """A command line of ours."""
    return [sys.executable, "-m", module, *map(str, arguments)]


class Running:
    """A command in a process of its own, and all it starts; killed with the ``with`` block."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._arguments, self.log = list(arguments), log

    def __enter__(self) -> Running:
        with self.log.open("ab") as log:
            self.process = psutil.Popen(
                self._arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        return self

    def __exit__(self, *_: object) -> None:
        family = [self.process, *self.family()]
        for member in family:
            kill(member)
        self.process.wait()

    def family(self, *words: str) -> list[psutil.Process]:
        """Its descendants whose command line has all these words, parents before children."""
        try:
            members = self.process.children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [member for member in members if set(words) <= set(command_line(member))]

    def one(self, *words: str) -> psutil.Process:
        """The one descendant with these words in its command line, once it is there."""
        eventually(lambda: len(self.family(*words)) == 1, START_S)
        return self.family(*words)[0]

    def finish(self, timeout_s: float) -> int:
        """Its exit code, once it has ended by itself."""
        return int(self.process.wait(timeout_s))


class Simulation(Running):
    """``reference-server simulate`` with the two boards, in a directory of its own."""

    def __init__(self, task: Path, directory: Path, *options: object) -> None:
        directory.mkdir(exist_ok=True)
        self.state, self.json = directory / "s", directory / "report.json"
        arguments = ("--task", task, "--devices", ",".join(BOARDS), "--codec", "lossless")
        places = ("--state", self.state, "--json", self.json)
        start = command("reference_server", "simulate", *arguments, *places, *options)
        super().__init__(start, directory / "screen.txt")

    def __enter__(self) -> Simulation:
        super().__enter__()
        return self

    def device_log(self, device: str) -> Path:
        """Where a device's own output goes."""
        return self.state / "devices" / device / "log.txt"

    def spooled(self, device: str) -> list[Path]:
        """The updates of a device that have no receipt yet."""
        return list((self.state / "devices" / device / "spool").glob("*.json"))

    def trains(self, device: str, number: int, times: int = 1) -> None:
        """Wait until a device says that it trains in a round, for the so-manieth time."""
        log = self.device_log(device)
        eventually(lambda: says(log, f"round {number}: trains ") >= 2 * times, START_S)

    def report(self, timeout_s: float = ROUND_S) -> dict[str, Any]:
        """The report, once everything has ended by itself and in good order."""
        code = self.finish(timeout_s)
        assert code == 0, self.log.read_text()
        report: dict[str, Any] = json.loads(self.json.read_text())
        return report


class Watcher:
    """Reads along what is said in a job, on the given one of its topics or on all of them."""

    def __init__(self, url: str, job: str, side: str = "+") -> None:
        self.inbox: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self.topics = Topics(job)
        self.link = Link(url, f"watcher-{side}", self.inbox)
        self.link.subscribe(f"{self.topics.root}/{side}/+")
        if side == "u":
            self.link.subscribe(self.topics.all_data)
        self.link.subscribe(self.topics.head)

    def __enter__(self) -> Watcher:
        self.link.start()
        while not isinstance(self.inbox.get(timeout=START_S), LinkUp):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def wait_for(
        self, wanted: Callable[[str, Message | Piece], bool], timeout_s: float = START_S
    ) -> tuple[str, Any]:
        """Device (none: the head) and message of the next that is wanted; queue.Empty if none."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            event = self.inbox.get(timeout=max(0.0, deadline_s - time.monotonic()))
            if isinstance(event, Arrived):
                device = event.topic.rpartition("/")[2] if event.topic != self.topics.head else ""
                try:
                    message = decode(event.payload)
                except MalformedMessage:
                    continue
                if wanted(device, message):
                    return device, message


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_line(process: psutil.Process) -> list[str]:
    """Words of a process's command line; none when it has ended."""
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def kill(process: psutil.Process) -> None:
    """SIGKILL, whether or not it is still there."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def says(log: Path, text: str) -> int:
    """How often a text stands in a log that may not be there yet."""
    return log.read_text(errors="replace").count(text) if log.exists() else 0

"""How a server and a simulated fleet end: by themselves, by a signal, by kill -9, by giving up."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import queue
import re
import signal
import struct
import subprocess
import termios
import threading
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from edge_sdk.link import Arrived
from edge_sdk.model import BlockModel
from edge_sdk.task import load_task
from edge_sdk.wire import Head, Hello, Offer, decode, encode
from reference_server.broker import choose
from reference_server.cli import main
from tests.relay import eventually
from tests.simulation import (
    BOARDS,
    START_S,
    Running,
    Simulation,
    Watcher,
    command,
    says,
    write_task,
)

pytestmark = pytest.mark.timeout(180)
ENDLESS = ("--rounds", 100_000)
# Everything must be gone by then, on a machine that has other things to do.
GONE_S = 10.0
CURSOR_AWAY, CURSOR_BACK = "\x1b[?25l", "\x1b[?25h"
COLOUR = r"\x1b\[[0-9;]*\b[34][0-9;]*m"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), width=16)


class InItsTerminal(Running):
    """A command in a session of its own, as in a terminal, with what it says."""

    def __init__(self, log: Path, *arguments: object) -> None:
        # A child of ours leads no group yet, so setsid keeps its process id.
        super().__init__(["setsid", *command("reference_server", *arguments)], log)

    def __enter__(self) -> InItsTerminal:
        super().__enter__()
        return self

    def heard(self, words: str) -> None:
        """Wait until it has said that."""
        eventually(lambda: says(self.log, words) > 0, START_S)


def fleet(task: Path, state: Path, *options: object) -> list[object]:
    words = ["simulate", "--task", task, "--devices", ",".join(BOARDS), "--state", state]
    return [*words, "--codec", "lossless", *options]


def assert_all_gone(members: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(members, timeout=GONE_S)
    assert [" ".join(process.cmdline()) for process in alive] == []


def assert_ended_in_good_order(run: InItsTerminal, code: int, state: Path) -> None:
    members = run.family()
    assert run.finish(GONE_S) == code
    assert_all_gone(members)
    text = run.log.read_text()
    assert "Traceback" not in text
    last = f"stopped; the same command with --state {state} goes on from here"
    assert text.splitlines()[-1] == last


def test_ctrl_c_ends_the_whole_fleet(task: Path, tmp_path: Path) -> None:
    state = tmp_path / "s"
    with InItsTerminal(tmp_path / "log", *fleet(task, state, *ENDLESS)) as run:
        run.heard("round 2 of ")
        # Server, nursery, broker, two agents, a trainer for each.
        assert len(run.family()) == 7
        os.killpg(run.process.pid, signal.SIGINT)
        assert_ended_in_good_order(run, 130, state)
    assert main(["audit", "--state", str(state)]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_told_to_end_while_it_loads_leaves_nothing(tmp_path: Path, number: int) -> None:
    state = tmp_path / "s"
    with InItsTerminal(tmp_path / "log", "demo", "--state", state, *ENDLESS) as run:
        eventually(lambda: len(run.family()) >= 7, START_S)
        run.process.send_signal(number)
        assert_ended_in_good_order(run, 128 + number, state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_told_to_end_takes_its_broker_along(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    state = tmp_path / "s"
    words = ["run", "--task", task, "--port", 0, "--state", state]
    with InItsTerminal(tmp_path / "log", *words) as run:
        run.heard("waiting for 1 device")
        assert re.search(r"^on each device: edge-sdk run --task \S+/tiny.py --broker mqtt://127"
                         r"\.0\.0\.1:\d+ --job tiny$", run.log.read_text(), re.M)  # fmt: skip
        assert len(run.family()) == 1
        assert main([str(word) for word in words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{state} is in use by process {run.process.pid}: stop that process, or" in line
        assert main(["status", "--state", str(state)]) == 0, "looking is allowed"
        os.killpg(run.process.pid, number)
        assert_ended_in_good_order(run, 128 + number, state)


def test_a_killed_simulation_leaves_nothing_and_is_continued(task: Path, tmp_path: Path) -> None:
    with Simulation(task, tmp_path / "run", "--rounds", 3) as run:
        eventually(lambda: says(run.log, "round 1 of 3") == 1, START_S)
        members = run.family()
        run.process.kill()
        assert_all_gone(members)
        assert not run.json.exists()
    with Simulation(task, tmp_path / "run", "--rounds", 3) as run:
        report = run.report()
    assert [entry["round"] for entry in report["rounds"]] == list(range(1, 4))
    assert report["totals"]["updates_counted"] == 6
    assert report["totals"]["updates_lost"] == report["totals"]["updates_double"] == 0
    assert says(run.log, "round 1 of 3") == 1, "round 1 was not repeated"
    assert main(["audit", "--state", str(run.state)]) == 0


def test_a_fleet_that_would_never_be_whole_is_given_up(task: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.py"
    path.write_text(
        task.read_text().replace("x, y = share(0.2, 1.0)", "x, y = (share, 1 / (1 - part))")
    )
    with InItsTerminal(tmp_path / "log", *fleet(path, tmp_path / "s")) as run:
        members = run.family()
        assert run.finish(START_S) == 2
        assert_all_gone(members)
    *_, line = run.log.read_text().splitlines()
    assert re.match(r"reference-server: [12] of 2 devices cannot take part; raspberry-pi-", line)
    assert re.search(r": task 'tiny': train_data\([01], 2\) failed: \w+: .* \(more in ", line)


class SilentDevice(threading.Thread):
    """Greets whoever is the server of a job, and takes no notice of its offers."""

    def __init__(self, url: str, job: str, digest: str) -> None:
        super().__init__(daemon=True)
        self._url, self._job, self._digest = url, job, digest
        self.rounds: list[int] = []

    def run(self) -> None:
        # Silence is how it ends: nobody says good-bye to it.
        with Watcher(self._url, self._job, "d") as watcher, suppress(queue.Empty):
            hello = Hello(
                session=1, sdk="x", profile="x", memory_bytes=1, flops_per_s=1.0,
                spec_digest=self._digest, num_examples=1,
            )  # fmt: skip
            while True:
                event = watcher.inbox.get(timeout=START_S)
                message = decode(event.payload) if isinstance(event, Arrived) else None
                if isinstance(message, Head) and message.state == "running":
                    watcher.link.publish(watcher.topics.up("silent"), encode(hello))
                elif isinstance(message, Offer):
                    self.rounds.append(message.round)


def test_a_quorum_that_never_answers_ends_the_server(
    task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = choose("auto", tmp_path / "broker")
    broker.start()
    digest = BlockModel(load_task(task)).spec.digest()
    device = SilentDevice(broker.url, "tiny", digest)
    device.start()
    # The broker lets anybody in, so that it does not matter who we say we are.
    url = broker.url.replace("//", "//operator:secret@")
    words = ["run", "--task", task, "--state", tmp_path / "s", "--broker", url]
    try:
        code = main([str(word) for word in [*words, "--round-s", 1, "--deadline-s", 1]])
    finally:
        broker.stop()
    output, errors = capsys.readouterr()
    assert code == 4
    assert device.rounds == [1, 2, 3]
    assert errors.startswith(
        "reference-server: 3 rounds in a row ended without a version: fewer than 1 updates"
    )
    assert len(errors.splitlines()) == 1
    assert "waiting for 1 device\nsilent joined (profile x)\n" in output
    for number in (1, 2, 3):
        assert f"round {number} extended: deadline: 0 accepted of the 1 needed" in output
        assert f"round {number} abandoned: deadline: 0 accepted of the 1 needed" in output
    assert f"--broker {broker.url} --job tiny\n" in output
    assert "secret" not in output
    main(["status", "--state", str(tmp_path / "s"), "--json"])
    rows = json.loads(capsys.readouterr().out)["rounds"]
    assert [(row["phase"], row["version"]) for row in rows] == [("ABANDONED", None)] * 3


# On a terminal


def on_a_terminal(words: list[str], **environment: str) -> tuple[int, str]:
    """Exit code, and all that came to the screen, of a command in a window of 24 lines."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    known = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    with closing(os.fdopen(ours, "rb", buffering=0)) as screen:
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            env={**known, "TERM": "xterm-256color", **environment}, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # Linux says so when the last writer is gone
            while part := screen.read(4096):
                shown += part
        return child.wait(), shown.decode()


def test_a_live_table_that_goes_away_in_the_end(task: Path, tmp_path: Path) -> None:
    words = command("reference_server", *fleet(task, tmp_path / "s", "--rounds", 2))
    code, shown = on_a_terminal(words)
    assert code == 0, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"device +state +trains +peak MiB \(planned\) +up +down", plain)
    assert re.search(rf" {BOARDS[0]} +(ready|training|accepted)", plain)
    assert re.search(r"rounds ━+ 0/2", plain)
    assert re.search(r"rounds ━+ 2/2", plain)
    assert re.search(COLOUR, shown)
    assert shown.count(CURSOR_AWAY) == shown.count(CURSOR_BACK) == 1
    # After the cursor is back, lines are only wiped: the table is gone, what was said stays.
    assert re.fullmatch(r"(\r|\x1b\[1A|\x1b\[2K)*", shown.rpartition(CURSOR_BACK)[2])
    assert "done: 2 rounds in " in plain


def test_an_error_of_the_server_is_not_lost_in_the_live_table(task: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.py"
    path.write_text(task.read_text().replace("test_data=lambda: share(0.0, 0.2)", "test_data=f"))
    words = command("reference_server", *fleet(path, tmp_path / "s"))
    code, shown = on_a_terminal(words, NO_COLOR="1")
    assert code == 2
    assert shown.count(CURSOR_AWAY) == shown.count(CURSOR_BACK) == 1
    assert not re.search(COLOUR, shown)
    what = r"task\(\) failed at line \d+: NameError: name 'f' is not defined"
    assert re.search(r"reference-server: [^\r\n]*" + what, shown)
    assert "Traceback" not in shown

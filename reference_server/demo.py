"""A whole fleet on this machine: broker, server and devices as the processes a user would start.

Used by ``demo`` (the digits task that ships with us) and ``simulate`` (any task). This process
only supervises: it restarts what dies, shows what the server reports, and adds to the report what
only it knows, the broker and the time since the command was typed.
"""

from __future__ import annotations

import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from edge_sdk.errors import ConfigError
from edge_sdk.profile import load_profile
from edge_sdk.store import DirectoryLock, make_directory, write_atomically
from reference_server import broker as brokers
from reference_server.broker import die_with_parent
from reference_server.fleet_sim import Nursery, SimulatedFleet
from reference_server.screen import Screen, summary

LOOK_S = 0.1
LAST_WORDS_S = 2.0
MAX_SERVER_RESTARTS = 20
# Chosen so that these boards' own rates and memory lead to different depths.
DEMO_ROUND_S = 4.0
DEMO_DEVICES = (
    "raspberry-pi-zero-2w",
    "raspberry-pi-4b-2gb",
    "raspberry-pi-5-8gb",
    "raspberry-pi-3b-plus",
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What ``reference-server demo`` or ``simulate`` was asked to do."""

    task_path: Path
    state_dir: Path
    job: str
    profiles: tuple[str, ...] = DEMO_DEVICES
    strategy: str = "last_blocks"
    codec: str = "balanced"
    rounds: int = 10
    started_s: float
    round_s: float
    deadline_s: float
    seed: int = 0
    broker: str = "auto"
    broker_profile: str | None = None


def shipped_task() -> Path:
    """The digits task, in the checkout or installed beside this package."""
    for folder in (Path(__file__).parent / "examples", Path(__file__).parent.parent / "examples"):
        if (folder / "digits.py").is_file():
            return folder / "digits.py"
    raise ConfigError("examples/digits.py is not installed; use simulate --task FILE")


def run(settings: DemoSettings) -> dict[str, Any]:
    """Run everything to the end of the job; returns the report."""
    for profile in settings.profiles:
        load_profile(profile)
    settings = replace(settings, state_dir=make_directory(settings.state_dir.absolute()))
    # Two fleets in one directory would take each other's sockets and devices away.
    lock = DirectoryLock(settings.state_dir)
    try:
        broker = brokers.choose(settings.broker, settings.state_dir / "broker")
        broker.check()
        with Screen(settings.rounds) as screen:
            return _Demo(settings, broker, screen).run()
    finally:
        lock.release()


class _Demo:
    """The supervisor's state while a demo runs."""

    def __init__(self, settings: DemoSettings, broker: Any, screen: Screen) -> None:
        self._settings, self._broker, self._screen = settings, broker, screen
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._nursery = Nursery(settings.state_dir)
        self._fleet = SimulatedFleet(
            url=broker.url,
            job=settings.job,
            task_path=settings.task_path,
            directory=settings.state_dir / "devices",
            profiles=list(settings.profiles),
            nursery=self._nursery.socket,
        )
        self._server_starts = 0
        self._listener: threading.Thread | None = None
        self._first_round_s: float | None = None
        self._report: dict[str, Any] | None = None
        self._finished = _is_finished(settings)

    def run(self) -> dict[str, Any]:
        """Start everything, look after it until the server is done, end it."""
        # Loading torch takes longest, so the two processes that do it start first, and the devices,
        # which wait for the server anyway, when it has: the first round is on the screen sooner.
        server = self._start_server()
        try:
            if not self._finished:
                self._screen.line(self._broker.describe())
                self._nursery.start()
                self._broker.start()
            while self._report is None:
                server = self._look_after(server)
                self._show_news()
            server.wait(timeout=30)
        finally:
            server.kill()
            server.wait()
            self._hear_out()
            self._fleet.stop()
            self._nursery.stop()
            self._broker.stop()
        return self._finish(self._report)

    def _show_news(self) -> None:
        for event in _drain(self._events):
            what = event.get("event")
            if what == "done":
                self._report = event["report"]
            elif what == "loaded":
                self._start_fleet()
            else:
                self._screen.show(event)
            if what == "published" and self._first_round_s is None:
                self._first_round_s = self._since_start_s()

    def _since_start_s(self) -> float:
        return time.monotonic() - self._settings.started_s

    def _start_fleet(self) -> None:
        if not self._finished and not self._fleet.devices:
            self._fleet.start()

    def _look_after(self, server: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        code = server.poll()
        if code is not None and code > 0:
            self._show_news()
            raise SystemExit(code)  # it has said why on its own stderr
        if not self._finished:
            self._look_after_fleet()
        if code is None or code == 0:
            return server
        if self._server_starts > MAX_SERVER_RESTARTS:
            raise ConfigError(
                f"the server died {self._server_starts} times, the last time with exit code "
                f"{code}; look for what kills it, such as too little memory"
            )
        self._screen.line(f"the server died (exit code {code}), starting it again")
        return self._start_server()

    def _look_after_fleet(self) -> None:
        if self._broker.ensure_running():
            self._screen.line("the broker died and was started again")
        self._nursery.ensure_running()
        for line in self._fleet.look_after():
            self._screen.line(line)
        given_up = self._fleet.given_up()
        # A job that began goes on with fewer; one that waits for its whole fleet would for ever.
        if given_up and (self._first_round_s is None or len(given_up) == len(self._fleet.devices)):
            first = given_up[0]
            raise ConfigError(
                f"{len(given_up)} of {len(self._fleet.devices)} devices cannot take part; "
                f"{first.device}: {first.last_words()} (more in {first.log})"
            )

    def _start_server(self) -> subprocess.Popen[bytes]:
        mine = self._settings
        self._server_starts += 1
        command = [
            *(sys.executable, "-m", "reference_server", "run", "--events"),
            *("--task", str(mine.task_path), "--broker", self._broker.url, "--job", mine.job),
            *("--broker-profile", mine.broker_profile or self._broker.limits),
            *("--state", str(mine.state_dir / "server"), "--strategy", mine.strategy),
            *("--codec", mine.codec, "--rounds", str(mine.rounds), "--seed", str(mine.seed)),
            *("--devices", str(len(mine.profiles)), "--round-s", str(mine.round_s)),
            *("--deadline-s", str(mine.deadline_s)),
        ]
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True, preexec_fn=die_with_parent(),
        )  # fmt: skip
        threading.Thread(target=_read, args=(server, self._events), daemon=True).start()
        self._listener = threading.Thread(target=_repeat_errors, args=(server,), daemon=True)
        self._listener.start()
        return server

    def _hear_out(self) -> None:
        """Wait until the last words of a server that ended are on the screen."""
        if self._listener is not None:
            self._listener.join(LAST_WORDS_S)

    def _finish(self, report: dict[str, Any]) -> dict[str, Any]:
        kept = _kept_report(self._settings)
        if self._finished and kept is not None:
            report = kept
        else:
            report["broker"] = {"kind": self._broker.kind, "version": self._broker.version}
            report["first_round_s"] = self._first_round_s
            report["wall_s"] = self._since_start_s()
            write_atomically(_report_path(self._settings), msgspec.json.encode(report), mode=0o644)
        for line in summary(report):
            self._screen.line(line)
        self._screen.line(
            "next: train on machines of your own: reference-server run --task "
            f"{shlex.quote(str(self._settings.task_path))}"
        )
        return report


def _read(server: subprocess.Popen[bytes], events: queue.SimpleQueue[Any]) -> None:
    """Reader thread: one JSON event a line."""
    assert server.stdout is not None
    for line in server.stdout:
        try:
            events.put(msgspec.json.decode(line, type=dict[str, Any]))
        except msgspec.MsgspecError:  # a library that prints past Python
            sys.stderr.write(line.decode(errors="replace"))


def _repeat_errors(server: subprocess.Popen[bytes]) -> None:
    """Listener thread: what the server says appears above the live table, not in it."""
    assert server.stderr is not None
    for line in server.stderr:
        sys.stderr.write(line.decode(errors="replace"))
        sys.stderr.flush()


def _report_path(settings: DemoSettings) -> Path:
    return settings.state_dir / "report.json"


def _kept_report(settings: DemoSettings) -> dict[str, Any] | None:
    """The report of a job that an earlier start has finished, if it can be read."""
    try:
        return msgspec.json.decode(_report_path(settings).read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.MsgspecError):
        return None


def _is_finished(settings: DemoSettings) -> bool:
    """Whether an earlier start has done what is asked for, so that no device is needed."""
    kept, home = _kept_report(settings), settings.state_dir / "server"
    if kept is None or not any(home.glob("ledger.*")):
        return False
    from reference_server.ledger import Ledger  # costs a new demo time that it does not have

    with Ledger.open(home, exclusive=False) as ledger:
        latest = ledger.latest_version(settings.job)
    return (
        latest is not None
        and latest.version >= settings.rounds
        and latest.sha == kept.get("model_sha256")
    )


def _drain(events: queue.SimpleQueue[Any]) -> Iterator[dict[str, Any]]:
    """Events that are there, after waiting a moment for the first."""
    try:
        yield events.get(timeout=LOOK_S)
        while True:
            yield events.get_nowait()
    except queue.Empty:
        return

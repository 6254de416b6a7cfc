"""Which broker: one elsewhere by its URL, mosquitto if installed, else the embedded amqtt.

A broker we start is a supervised child: it dies with us, keeps its port over a restart, and holds
nothing that would be missed, since devices and server both send again what has no receipt.
``python -m reference_server.broker`` is the embedded broker's child process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import ipaddress
import logging
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edge_sdk.errors import BrokerSetupError, ConfigError
from edge_sdk.link import parse_address

Kind = Literal["mosquitto", "amqtt"]

# A broker's port must be free again after a crash. Ports from 32768 up are lent to outgoing
# connections, and a client that retries a dead local port there can even connect to itself.
PORTS_OF_CHOICE = range(20000, 32000)
PORT_ATTEMPTS = 50
# Importing amqtt takes seconds on a small board.
READY_LIMIT_S = 30.0
READY_POLL_S = 0.02
STOP_LIMIT_S = 3.0
# amqtt cuts an idle client at the announced second; the standard allows half as much again.
AMQTT_GRACE_S = 5
MAX_PACKET_BYTES = 1 << 20
HEAD_LIMIT_S = 10.0
MQTT_3_1_1_LEVEL = 4
CONNACK_OTHER_VERSION = b"\x20\x02\x00\x01"
# Debian puts mosquitto where only root's PATH looks; Homebrew where a service's PATH does not.
MOSQUITTO_PLACES = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/homebrew/bin")

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ExternalBroker:
    """A broker somebody else runs; starting and stopping it is not ours."""

    url: str
    kind: str = "external"
    version: str = "unknown"
    limits: str = "generic"
    pid: int | None = None

    def check(self) -> None:
        """Fail now, not after minutes of trying, when it is not there or refuses us."""
        from edge_sdk.mqtt import connect_once  # the embedded broker's process has no use for it

        connect_once(self.url)

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def poll(self) -> int | None:
        """None: as far as we know it runs."""
        return None

    def ensure_running(self) -> bool:
        """False: nothing was restarted."""
        return False

    def describe(self) -> str:
        """One line for people, without credentials."""
        return f"broker at {parse_address(self.url)}, not started here"


class BrokerProcess:
    """A broker on this machine, run as a child that dies with us.

    On Linux the kernel kills mosquitto when the thread that started it ends: start it from a
    thread that lives as long as the process.
    """

    def __init__(self, kind: Kind, state_dir: Path, port: int = 0, bind: str = "127.0.0.1") -> None:
        """``port`` 0 is a free one, chosen now and kept."""
        self.kind: Kind = kind
        self.bind = bind
        self._state_dir = state_dir
        self._command = _mosquitto_command() if kind == "mosquitto" else _amqtt_command()
        self.version = _version(kind, self._command[0])
        if kind == "amqtt" and not _is_loopback(bind):
            raise BrokerSetupError(
                f"{bind}: the embedded broker has no access control and listens on this machine "
                "only; install mosquitto (apt install mosquitto), or give --broker mqtt://HOST:PORT"
            )
        self.port = port or _free_port(bind)
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def limits(self) -> str:
        """Name of its profile in ``edge_sdk.brokers``."""
        return self.kind

    @property
    def url(self) -> str:
        """Where clients on this machine connect."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.bind, self.bind)
        return f"mqtt://{_host_port(host, self.port)}"

    @property
    def pid(self) -> int | None:
        """Process id, None when it was not started."""
        return self._child.pid if self._child else None

    def check(self) -> None:
        """Fail now where ``start`` would, without starting anything."""
        _refuse_port_in_use(self.bind, self.port)
        if self.kind == "mosquitto":
            self._access_lines()

    def start(self) -> None:
        """Start it and wait until it takes connections; BrokerSetupError with the reason."""
        self.check()
        self._state_dir.mkdir(parents=True, exist_ok=True)
        log = self._state_dir / "broker.log"
        with log.open("wb") as log_file:
            self._child = self._spawn(log_file.fileno())
        deadline_s = time.monotonic() + READY_LIMIT_S
        while not _answers(self.bind, self.port):
            code = self._child.poll()
            if code is not None or time.monotonic() > deadline_s:
                self.stop()
                what = f"ended with code {code}" if code is not None else "does not answer"
                raise BrokerSetupError(
                    f"{self.kind} {self.version} {what} on {_host_port(self.bind, self.port)}: "
                    f"{_last_line(log)}. Try another --port, or another --broker"
                )
            time.sleep(READY_POLL_S)

    def poll(self) -> int | None:
        """Exit code of a broker that died, None while it runs or before it was started."""
        return self._child.poll() if self._child else None

    def ensure_running(self) -> bool:
        """Restart it on the same port if it died; whether that was needed."""
        if self._child is not None and self._child.poll() is None:
            return False
        self._forget_child()
        self.start()
        return True

    def stop(self) -> None:
        """End it: gently first, then for certain."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._forget_child()

    def describe(self) -> str:
        """One line for people."""
        line = f"{self.kind} {self.version} on {_host_port(self.bind, self.port)}"
        if self.kind == "amqtt":
            line += ", the embedded broker, meant for trials; next step up: apt install mosquitto"
        return line

    def _spawn(self, log_fd: int) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in the terminal must not take the broker away from a
        # server that is still saying goodbye to its devices.
        if self.kind == "amqtt":
            return subprocess.Popen(
                [*self._command, "--port", str(self.port), "--bind", self.bind],
                stdin=subprocess.PIPE,
                stdout=log_fd,
                stderr=log_fd,
                start_new_session=True,
                env=_child_environment(),
            )
        config = self._state_dir / "mosquitto.conf"
        config.write_text(self._mosquitto_config())
        return subprocess.Popen(
            [*self._command, "-c", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=log_fd,
            stderr=log_fd,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )

    def _mosquitto_config(self) -> str:
        lines = [
            f"listener {self.port} {self.bind}",
            # Mosquitto's default drops messages above 1000 waiting ones, after acknowledging them.
            "max_queued_messages 0",
            "max_inflight_messages 100",
            f"max_packet_size {MAX_PACKET_BYTES}",
            "persistence false",
            "log_dest stderr",
            "log_type error",
            "log_type warning",
            "connection_messages false",
            *self._access_lines(),
        ]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            # Changing the user would clear the wish to die with the parent.
            lines.append("user root")
        return "\n".join(lines) + "\n"

    def _access_lines(self) -> list[str]:
        if _is_loopback(self.bind):
            return ["allow_anonymous true"]
        passwords, rules = self._state_dir / "broker.passwd", self._state_dir / "broker.acl"
        if not passwords.exists():
            raise BrokerSetupError(
                f"{self.bind}: a broker that others can reach needs accounts, and {passwords} does "
                f"not exist; run: mosquitto_passwd -c {passwords} NAME, or stay on 127.0.0.1"
            )
        lines = ["allow_anonymous false", f"password_file {passwords}"]
        if rules.exists():
            # Otherwise one account could connect with another's client id and throw it out.
            lines += [f"acl_file {rules}", "use_username_as_clientid true"]
        return lines

    def _forget_child(self) -> None:
        if self._child is not None and self._child.stdin is not None:
            self._child.stdin.close()
        self._child = None


def choose(
    kind_or_url: str, state_dir: Path, port: int = 0, bind: str = "127.0.0.1"
) -> BrokerProcess | ExternalBroker:
    """The broker for auto, mosquitto, embedded or an ``mqtt(s)://`` URL; not started yet."""
    if "://" in kind_or_url:
        parse_address(kind_or_url)
        return ExternalBroker(kind_or_url)
    if kind_or_url not in ("auto", "mosquitto", "embedded"):
        raise ConfigError(
            f"--broker {kind_or_url}: unknown; one of auto, mosquitto, embedded, mqtt://HOST:PORT"
        )
    if kind_or_url == "auto":
        kind_or_url = "mosquitto" if find_mosquitto() else "embedded"
    return BrokerProcess(
        "amqtt" if kind_or_url == "embedded" else "mosquitto", state_dir, port, bind
    )


def find_mosquitto() -> str | None:
    """Path of an installed mosquitto, on PATH or where packages put it."""
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), *MOSQUITTO_PLACES])
    return shutil.which("mosquitto", path=places)


def _mosquitto_command() -> list[str]:
    path = find_mosquitto()
    if path is None:
        raise BrokerSetupError(
            "mosquitto is not installed; run: apt install mosquitto (or brew install mosquitto), "
            "or use --broker embedded"
        )
    return [path]


def _amqtt_command() -> list[str]:
    if importlib.util.find_spec("amqtt") is None:
        raise BrokerSetupError(
            "neither mosquitto nor the embedded broker is installed; run: pip install "
            "'edge-sdk[server]', or apt install mosquitto"
        )
    return [sys.executable, "-m", "reference_server.broker"]


def _child_environment() -> dict[str, str]:
    """Ours, with the directory this package was imported from, wherever that was."""
    here = str(Path(__file__).resolve().parent.parent)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    }


def _version(kind: Kind, executable: str) -> str:
    if kind == "amqtt":
        return importlib.metadata.version("amqtt")
    help_text = subprocess.run([executable, "-h"], capture_output=True, text=True, check=False)
    match = re.search(r"version (\S+)", help_text.stdout + help_text.stderr)
    return match.group(1) if match else "unknown"


def die_with_parent() -> Callable[[], None] | None:
    """What a child does before its program starts; None where the kernel cannot do it."""
    if sys.platform != "linux":
        return None
    libc, parent = ctypes.CDLL(None), os.getpid()

    def ask_kernel() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before we asked
            os._exit(1)

    return ask_kernel


def _is_loopback(bind: str) -> bool:
    if bind == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(bind).is_loopback
    return False


def _host_port(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listening_socket(bind: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((bind, port))
    except OSError:
        listener.close()
        raise
    return listener


def _free_port(bind: str) -> int:
    for port in random.sample(PORTS_OF_CHOICE, PORT_ATTEMPTS):
        with contextlib.suppress(OSError), _listening_socket(bind, port):
            return port
    raise BrokerSetupError(
        f"{bind}: no free port found in {PORT_ATTEMPTS} attempts between {PORTS_OF_CHOICE.start} "
        f"and {PORTS_OF_CHOICE.stop}; is that an address of this machine? Name one with --port"
    )


def _refuse_port_in_use(bind: str, port: int) -> None:
    try:
        with _listening_socket(bind, port):
            return
    except OSError as error:
        raise BrokerSetupError(
            f"{_host_port(bind, port)} cannot be used for the broker: {error.strerror}. Choose "
            "another --port (0: any free one), or, if a broker runs there already, "
            f"give --broker mqtt://{_host_port(bind, port)}"
        ) from error


def _answers(bind: str, port: int) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1):
        return True
    return False


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), f"{log} is empty")


def _end_with_stdin() -> None:
    """Leave when the parent's end of the pipe closes, whatever closed it."""
    with contextlib.suppress(OSError):
        while sys.stdin.buffer.read(1):
            pass
    os._exit(0)


class _Rewound:
    """A stream for amqtt whose first bytes were read already."""

    def __init__(self, head: bytes, stream: asyncio.StreamReader) -> None:
        self._head, self._stream = head, stream

    async def read(self, n: int = -1) -> bytes:
        """Exactly ``n`` bytes, or all there are; the interface amqtt asks for."""
        if n < 0:
            head, self._head = self._head, b""
            return head + await self._stream.read()
        head, self._head = self._head[:n], self._head[n:]
        return head + (await self._stream.readexactly(n - len(head)) if len(head) < n else b"")

    def feed_eof(self) -> None:
        """Nothing more will come."""
        self._stream.feed_eof()


async def _read_head(stream: asyncio.StreamReader) -> bytes:
    """A CONNECT packet up to the byte with the protocol version."""
    head = await stream.readexactly(2)
    while head[-1] & 0x80 and len(head) < 5:
        head += await stream.readexactly(1)
    return head + await stream.readexactly(7)


async def _serve(bind: str, port: int) -> None:
    from amqtt.adapters import StreamWriterAdapter  # the server must not pay for these imports
    from amqtt.broker import Broker

    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": _host_port(bind, port)}},
            "timeout_disconnect_delay": AMQTT_GRACE_S,
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}
            },
        }
    )

    async def accept(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, listener_name: str
    ) -> None:
        # amqtt reads an MQTT 5 CONNECT as if it were an older one, and waits for bytes that never
        # come; every client would lose seconds before it tries 3.1.1.
        try:
            head = await asyncio.wait_for(_read_head(reader), HEAD_LIMIT_S)
        except (OSError, EOFError, asyncio.TimeoutError):
            writer.close()
            return
        if head[-1] > MQTT_3_1_1_LEVEL:
            writer.write(CONNACK_OTHER_VERSION)
            writer.close()
            return
        await broker.external_connected(
            _Rewound(head, reader), StreamWriterAdapter(writer), listener_name
        )

    broker.stream_connected = accept
    await broker.start()
    await asyncio.Event().wait()


def main() -> None:
    """The embedded broker's process: serves until its standard input closes."""
    parser = argparse.ArgumentParser(prog="reference_server.broker")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bind", required=True)
    arguments = parser.parse_args()
    # amqtt logs every lost client as an error; only its failure to start is news.
    logging.disable(logging.CRITICAL)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    asyncio.run(_serve(arguments.bind, arguments.port))


if __name__ == "__main__":
    main()

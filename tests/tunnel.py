"""A bad link for real TCP stacks: two TUN devices with a process between them that spoils it.

One device is in a network namespace of its own, where a test starts what plays the remote machine
(``command``); the other stands in the namespace the test runs in. The process between them
delays, drops and limits IP packets, or goes dark, so both kernels' TCP sees a real line. Traffic
control would be simpler, but not every kernel has netem. Where the namespace or a device of a
killed run was left over, the next run removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import heapq
import ipaddress
import itertools
import json
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, cast

PREFIX = "elk"  # both names end with "<pid>-<number>"; a device's has at most 15 characters
NAMESPACES = Path("/run/netns")
TUN_FILE = "/dev/net/tun"
SBIN = ("/usr/sbin", "/sbin")
# Set aside for tests of networks (RFC 2544), so nobody's real address; a pair of them each.
ADDRESSES = ipaddress.ip_network("198.18.0.0/15")
PAIR_BYTES = 4
MTU_BYTES = 1500
START_LIMIT_S = 10.0
STOP_LIMIT_S = 5.0

_SET_INTERFACE = 0x400454CA
_TUN_WITHOUT_HEADER = 0x0001 | 0x1000
_NEW_NETWORK = 0x40000000
_TCP = 6

_numbers = itertools.count()


@dataclass
class Way:
    """What one direction has carried; bytes are whole IP packets unless they say payload.

    sent:    handed to the link by the sender's kernel, whatever became of it.
    payload: TCP payload within that, so a byte that was sent again counts again.
    """

    sent_packets: int = 0
    sent_bytes: int = 0
    payload_bytes: int = 0
    arrived_packets: int = 0
    arrived_bytes: int = 0
    lost_packets: int = 0
    overflowed_packets: int = 0
    dark_packets: int = 0


@dataclass
class Traffic:
    """Up is from the namespace to the outside."""

    up: Way = field(default_factory=Way)
    down: Way = field(default_factory=Way)


@dataclass(frozen=True)
class LinkSettings:
    """Of each way; ``loss`` is the chance of a packet, ``queue_bytes`` what waits at most."""

    rate_bytes_per_s: float
    delay_s: float
    loss: float
    queue_bytes: int
    seed: int


@functools.cache
def tunnel_reason() -> str | None:
    """Why no tunnel can be made here, None where one can."""
    if sys.platform != "linux":
        return f"TUN devices and network namespaces are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return f"a network namespace needs root, this is user {os.geteuid()}"
    if _ip_path() is None or shutil.which("nsenter") is None:
        return "the commands ip and nsenter are needed: apt install iproute2 util-linux"
    try:
        # Two threads may ask at once.
        os.close(_open_tun(f"{PREFIX}{threading.get_native_id()}-try"))
    except OSError as error:
        return f"{TUN_FILE}: no TUN device: {error.strerror}"
    return None


class Tunnel:
    """Use as a context manager; ``namespace`` is the far machine, ``server_ip`` this one."""

    def __init__(
        self,
        *,
        rate_bytes_per_s: float = 125_000,
        delay_s: float = 0.1,
        loss: float = 0.0,
        queue_bytes: int = 64_000,
        seed: int = 0,
        congestion: str | None = None,
    ) -> None:
        """``congestion``: the device's TCP congestion control, None for the kernel's choice."""
        self._settings = LinkSettings(rate_bytes_per_s, delay_s, loss, queue_bytes, seed)
        self._congestion = congestion
        number = next(_numbers)
        self.namespace = f"{PREFIX}{os.getpid()}-{number}"
        index = (os.getpid() * 16 + number) % (ADDRESSES.num_addresses // PAIR_BYTES)
        self.server_ip = str(ADDRESSES[index * PAIR_BYTES + 1])
        self.device_ip = str(ADDRESSES[index * PAIR_BYTES + 2])
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> Tunnel:
        if reason := tunnel_reason():
            raise RuntimeError(f"no tunnel: {reason}")
        _remove_leftovers()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            for stream in (self._child.stdin, self._child.stdout):
                with contextlib.suppress(OSError):
                    cast("IO[str]", stream).close()
            try:
                self._child.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
            self._child = None
        if (NAMESPACES / self.namespace).exists():
            _ip("netns", "del", self.namespace)

    def command(self, *words: str | Path) -> list[str]:
        """The same command, run at the far end of the link; its process id stays one's own."""
        # ``ip netns exec`` would also hide /sys/fs/cgroup, which a device looks into.
        return ["nsenter", f"--net={NAMESPACES / self.namespace}", *map(str, words)]

    def dark(self, is_dark: bool) -> None:
        """Lose every packet from now on, also those under way; or no more."""
        self._ask({"dark": is_dark})

    def dark_for(self, seconds: float) -> None:
        """Go dark now and come back by itself; does not wait."""
        self._ask({"dark_for_s": seconds})

    def traffic(self) -> Traffic:
        """The counters so far."""
        answer = self._ask({})
        return Traffic(Way(**answer["up"]), Way(**answer["down"]))

    def _start(self) -> None:
        _ip("netns", "add", self.namespace)
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        # A process of its own: no test's Python may disturb its timing. It ends with its input.
        self._child = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                __file__,
                self.namespace,
                json.dumps(asdict(self._settings)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()
        _ip("addr", "add", self.server_ip, "peer", self.device_ip, "dev", self.namespace)
        _ip("link", "set", self.namespace, "up", "mtu", str(MTU_BYTES))
        far = ("-n", self.namespace)
        _ip(*far, "addr", "add", self.device_ip, "peer", self.server_ip, "dev", self.namespace)
        _ip(*far, "link", "set", self.namespace, "up", "mtu", str(MTU_BYTES))
        if self._congestion is not None:  # by the route: a namespace's sysctl refuses most names
            route = ("route", "replace", self.server_ip, "dev", self.namespace)
            _ip(*far, *route, "src", self.device_ip, "congctl", self._congestion)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._child is not None, "the tunnel is not open"
        stdin = cast("IO[str]", self._child.stdin)
        stdin.write(json.dumps(question) + "\n")
        stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child is not None
        stdout = cast("IO[str]", self._child.stdout)
        ready, _, _ = select.select([stdout], [], [], START_LIMIT_S)
        line = stdout.readline() if ready else ""
        if not line:
            raise RuntimeError(f"{self.namespace}: the link's process gives no answer")
        return cast("dict[str, Any]", json.loads(line))


class Line:
    """One direction in the link's process: which packets arrive, and when."""

    def __init__(self, settings: LinkSettings, target_fd: int, seed: str) -> None:
        self._settings, self._target_fd = settings, target_fd
        self._rng = random.Random(seed)
        self._free_at_s = 0.0
        self._airborne: list[tuple[float, int, bytes]] = []
        self.way = Way()

    def take(self, packet: bytes, now_s: float, dark: bool) -> None:
        """A packet the sender's kernel put on the line; IPv6, which nobody asked for, is not one.

        Its neighbour discovery would use up draws of the seed.
        """
        if packet[0] >> 4 != 4:
            return
        way, settings = self.way, self._settings
        way.sent_packets += 1
        way.sent_bytes += len(packet)
        way.payload_bytes += tcp_payload_bytes(packet)
        if dark:
            way.dark_packets += 1
        elif max(0.0, self._free_at_s - now_s) * settings.rate_bytes_per_s > settings.queue_bytes:
            way.overflowed_packets += 1
        else:
            start_s = max(now_s, self._free_at_s)
            self._free_at_s = start_s + len(packet) / settings.rate_bytes_per_s
            if self._rng.random() < settings.loss:  # on the air: it took its time on the line
                way.lost_packets += 1
                return
            due_s = self._free_at_s + settings.delay_s
            heapq.heappush(self._airborne, (due_s, way.sent_packets, packet))

    def deliver(self, now_s: float, dark: bool) -> None:
        """Hand over what has arrived by now."""
        while self._airborne and self._airborne[0][0] <= now_s:
            packet = heapq.heappop(self._airborne)[2]
            if dark:
                self.way.dark_packets += 1
                continue
            with contextlib.suppress(BlockingIOError):
                os.write(self._target_fd, packet)
                self.way.arrived_packets += 1
                self.way.arrived_bytes += len(packet)

    @property
    def next_due_s(self) -> float:
        """When the next packet arrives; infinity for never."""
        return self._airborne[0][0] if self._airborne else float("inf")


def tcp_payload_bytes(packet: bytes) -> int:
    """Of an IPv4 packet; 0 where it carries something else."""
    if len(packet) < 20 or packet[9] != _TCP:
        return 0
    ip_bytes = (packet[0] & 15) * 4
    if len(packet) < ip_bytes + 20:
        return 0
    return int.from_bytes(packet[2:4], "big") - ip_bytes - (packet[ip_bytes + 12] >> 4) * 4


class _Link:
    """The process between the devices: lines of JSON in its input give orders, each answered."""

    def __init__(self, near_fd: int, far_fd: int, settings: LinkSettings) -> None:
        self._up = Line(settings, near_fd, f"{settings.seed} up")
        self._down = Line(settings, far_fd, f"{settings.seed} down")
        self._sources = {far_fd: self._up, near_fd: self._down}
        self._dark_until_s = 0.0
        self._orders = b""

    def run(self) -> None:
        """Until the input closes."""
        self._answer()
        stdin_fd = sys.stdin.fileno()
        watched = [stdin_fd, *self._sources]
        while True:
            due_s = min(self._up.next_due_s, self._down.next_due_s)
            timeout_s = None if due_s == float("inf") else max(0.0, due_s - time.monotonic())
            ready, _, _ = select.select(watched, [], [], timeout_s)
            now_s = time.monotonic()
            dark = now_s < self._dark_until_s
            for line in self._sources.values():
                line.deliver(now_s, dark)
            for fd in ready:
                if fd == stdin_fd:
                    if not self._obey(os.read(fd, 4096)):
                        return
                else:
                    self._drain(fd, now_s, dark)

    def _drain(self, fd: int, now_s: float, dark: bool) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._sources[fd].take(os.read(fd, 1 << 16), now_s, dark)

    def _obey(self, data: bytes) -> bool:
        self._orders += data
        *lines, self._orders = self._orders.split(b"\n")
        for line in lines:
            order = json.loads(line)
            if "dark" in order:
                self._dark_until_s = float("inf") if order["dark"] else 0.0
            if "dark_for_s" in order:
                self._dark_until_s = time.monotonic() + order["dark_for_s"]
            self._answer()
        return bool(data)

    def _answer(self) -> None:
        answer = Traffic(self._up.way, self._down.way)
        sys.stdout.write(json.dumps(asdict(answer)) + "\n")
        sys.stdout.flush()


def _ip_path() -> str | None:
    return shutil.which("ip", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *SBIN]))


def _ip(*words: str) -> None:
    done = subprocess.run(
        [_ip_path() or "ip", *words], capture_output=True, text=True, check=False, timeout=10
    )
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _remove_leftovers() -> None:
    """Namespaces of processes that are no more; their devices went with them."""
    for place in NAMESPACES.glob(f"{PREFIX}*-*"):
        pid = place.name.removeprefix(PREFIX).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            with contextlib.suppress(RuntimeError):  # another run was faster
                _ip("netns", "del", place.name)


def _open_tun(name: str) -> int:
    fd = os.open(TUN_FILE, os.O_RDWR | os.O_NONBLOCK)
    try:
        request = struct.pack("16sH22x", name.encode(), _TUN_WITHOUT_HEADER)
        fcntl.ioctl(fd, _SET_INTERFACE, request)
    except OSError:
        os.close(fd)
        raise
    return fd


def _enter_namespace(name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(NAMESPACES / name, os.O_RDONLY)
    try:
        if libc.setns(fd, _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {name}")
    finally:
        os.close(fd)


def _main(arguments: Sequence[str]) -> None:
    namespace, settings = arguments
    near_fd = _open_tun(namespace)
    _enter_namespace(namespace)
    _Link(near_fd, _open_tun(namespace), LinkSettings(**json.loads(settings))).run()


if __name__ == "__main__":
    _main(sys.argv[1:])

"""What may keep this machine from taking part, with the command that fixes it; what it holds.

Every package is imported in a child process: a build that does not fit the processor dies there
by a signal, and what it loads is gone with the child.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_sdk.errors import MIB, BrokerRefused, LinkError
from edge_sdk.probe import Memory, available_memory
from edge_sdk.profile import TORCH_FLOOR_BYTES, load_profile
from edge_sdk.store import SpoolEntry, disk_errors

Verdict = Literal["ok", "warn", "fail"]

# A clock before this day refuses certificates that are valid, and dates updates before their model.
RELEASED = datetime.date(2026, 11, 21)
# Torch from a card takes the better part of a minute on the smallest boards.
IMPORT_LIMIT_S = 120.0
# A small model's blocks and one update; then some rounds of a model of tens of megabytes.
LEAST_DISK_BYTES, EASY_DISK_BYTES = 32 * MIB, 512 * MIB
# What a small model needs beside torch itself.
LEAST_TRAINING_BYTES = 32 * MIB
# Boards begin to slow down at 80 to 85 degrees.
WARM_CELSIUS = 80.0
# A control message may be larger than that for models of many blocks.
LEAST_PACKET_BYTES = 128 * 1024

PIP = f"{sys.executable} -m pip install"
# Import name: distribution, what it is for where one can do without it, a first use.
PACKAGES: dict[str, tuple[str, str, str]] = {
    "msgspec": ("msgspec", "", ""),
    "msgpack": ("msgpack", "", ""),
    "paho.mqtt.client": ("paho-mqtt", "", ""),
    "zstandard": ("zstandard", "", "zstandard.compress(b'x')"),
    "numpy": ("numpy", "", "numpy.ones((64, 64)) @ numpy.ones((64, 64))"),
    "torch": ("torch", "edge-sdk run", "torch.ones(64, 64) @ torch.ones(64, 64)"),
    "onnxruntime": ("onnxruntime", "edge-sdk infer", "onnxruntime.get_available_providers()"),
}
_EXTRAS = {"torch": "train", "onnxruntime": "infer"}
_MISSING = 70
_CHILD = """
import importlib, importlib.metadata, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
name, distribution, use = sys.argv[1:]
root = name.partition(".")[0]
try:
    globals()[root] = importlib.import_module(root)
    importlib.import_module(name)
except ModuleNotFoundError as error:
    if error.name != root:
        raise
    sys.exit({missing})
exec(use)
try:
    print(importlib.metadata.version(distribution))
except importlib.metadata.PackageNotFoundError:
    print("of unknown version")
""".replace("{missing}", str(_MISSING))

# Bits of `vcgencmd get_throttled` that hold now; 16 places higher the same since the start.
_THROTTLED = {
    0: "under-voltage",
    1: "frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing looked at: what was seen, and the command or change that makes it better."""

    name: str
    status: Verdict
    seen: str
    fix: str = ""


def examine(state_dir: Path, broker: str | None, ca_file: str | None) -> Iterator[Finding]:
    """Look at everything, one finding at a time, the quick ones first."""
    yield check_python()
    yield check_memory(available_memory())
    yield check_storage(state_dir)
    yield check_clock(time.time())
    yield check_heat()
    yield check_throttling()
    for module in PACKAGES:
        yield check_package(module)
    if broker is not None:
        yield check_broker(broker, ca_file)


def exit_code(findings: list[Finding]) -> int:
    """0 if nothing failed, 3 if only the broker did, 2 otherwise."""
    failed = {finding.name for finding in findings if finding.status == "fail"}
    if not failed:
        return 0
    return 3 if failed == {"broker"} else 2


def check_python() -> Finding:
    """Version and word size: nobody builds torch for 32 bits."""
    bits = 64 if sys.maxsize > 2**32 else 32
    seen = f"{platform.python_version()}, {bits}-bit, {platform.machine()}"
    if bits == 32:
        return Finding(
            name="python",
            status="warn",
            seen=f"{seen}: torch is not built for it, this device can only infer",
            fix="install the 64-bit system on this board",
        )
    return Finding(name="python", status="ok", seen=seen)


def check_package(module: str) -> Finding:
    """Import one package in a child and use it once."""
    distribution, purpose, use = PACKAGES[module]
    name = module.partition(".")[0]
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, module, distribution, use],
            capture_output=True,
            timeout=IMPORT_LIMIT_S,
            text=True,
            errors="replace",
            check=False,
        )
    except subprocess.TimeoutExpired:
        seen = f"did not import within {IMPORT_LIMIT_S:.0f} s"
        return Finding(
            name=name, status="fail", seen=seen, fix="stop what else runs; look at `top`"
        )
    if done.returncode == 0:
        version = done.stdout.strip().splitlines()[-1:]
        return Finding(name=name, status="ok", seen=version[0] if version else "imports")
    if done.returncode == _MISSING:
        return _missing(name, distribution, purpose)
    if done.returncode < 0:
        return _killed(name, distribution, -done.returncode)
    last = done.stderr.strip().splitlines()[-1:]
    return Finding(
        name=name,
        status="fail",
        seen=f"is there but does not work: {last[0][:300] if last else 'no message'}",
        fix=f"{PIP} --force-reinstall {distribution}",
    )


def _missing(name: str, distribution: str, purpose: str) -> Finding:
    if not purpose:
        fix = f"{PIP} {distribution}"
        return Finding(name=name, status="fail", seen="is not installed", fix=fix)
    return Finding(
        name=name,
        status="warn",
        seen=f"is not installed; `{purpose}` needs it",
        fix=f"{PIP} 'edge-sdk[{_EXTRAS[name]}]'",
    )


def _killed(name: str, distribution: str, number: int) -> Finding:
    signal_name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
    why, fix = "this build does not work here", f"{PIP} --force-reinstall {distribution}"
    if number == signal.SIGILL:
        why = f"this build uses instructions this {platform.machine()} processor does not have"
        # Of torch the releases from 2.10 on were built for newer arm64 processors, or with CUDA.
        fix = f"{PIP} 'torch<2.10'" if name == "torch" else f"{PIP} --upgrade {distribution}"
    elif number == signal.SIGKILL:
        why, fix = (
            "most likely there was not enough memory",
            "stop what else runs; look at `free -m`",
        )
    seen = f"importing it was killed by {signal_name}: {why}"
    return Finding(name=name, status="fail", seen=seen, fix=fix)


def check_memory(memory: Memory) -> Finding:
    """Whether torch and a small model have room; swap is shown and not counted."""
    usable_bytes = memory.usable_bytes
    if usable_bytes is None:
        return Finding(name="memory", status="warn", seen="cannot be read on this system")
    seen = f"{usable_bytes // MIB:,} MiB usable"
    if memory.total_bytes is not None:
        seen += f" of {memory.total_bytes // MIB:,} MiB"
    if memory.cgroup is not None:
        seen += f"; cgroup limit {memory.cgroup.limit_bytes // MIB:,} MiB ({memory.cgroup.source})"
    if memory.swap_bytes:
        seen += f"; swap {memory.swap_bytes // MIB:,} MiB"
        seen += f" ({memory.zram_bytes // MIB:,} in zram)" if memory.zram_bytes else ""
        seen += " is not counted"
    need_bytes = TORCH_FLOOR_BYTES + LEAST_TRAINING_BYTES
    if usable_bytes >= need_bytes:
        return Finding(name="memory", status="ok", seen=seen)
    by_group = memory.cgroup is not None and usable_bytes == memory.cgroup_free_bytes
    return Finding(
        name="memory",
        status="warn",
        seen=f"{seen}: training needs at least {need_bytes // MIB} MiB, torch alone most of it",
        fix="raise MemoryMax= of the service or --memory of the container"
        if by_group
        else "stop what else runs, or use this device to infer only",
    )


def check_storage(state_dir: Path) -> Finding:
    """Free space where the state directory is or will be, and whether a synced write works."""
    directory = state_dir.absolute()
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    other = "give a directory of yours with --state"
    if not existing.is_dir():
        seen = f"{state_dir}: {existing} is a file, not a directory"
        return Finding(name="storage", status="fail", seen=seen, fix=other)
    try:
        started_s = time.monotonic()
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        took_s = time.monotonic() - started_s
        free_bytes = shutil.disk_usage(existing).free
    except OSError as error:
        seen = f"{existing}: a synced write fails: {error.strerror or error}"
        fix = f"sudo chown {os.getuid()} {existing}, or {other}"
        return Finding(name="storage", status="fail", seen=seen, fix=fix)
    seen = (
        f"{free_bytes // MIB:,} MiB free in {existing}, a synced write takes {took_s * 1e3:.0f} ms"
    )
    if free_bytes >= EASY_DISK_BYTES:
        return Finding(name="storage", status="ok", seen=seen)
    return Finding(
        name="storage",
        status="warn" if free_bytes >= LEAST_DISK_BYTES else "fail",
        seen=seen,
        fix=f"delete files, or {other} on another disk",
    )


def check_clock(now_s: float) -> Finding:
    """Whether it can be now at all; boards without a battery wake up in the past."""
    today = datetime.datetime.fromtimestamp(now_s, datetime.timezone.utc)
    seen = f"{today:%Y-%m-%d %H:%M} UTC"
    if today.date() >= RELEASED:
        return Finding(name="clock", status="ok", seen=seen)
    return Finding(
        name="clock",
        status="fail",
        seen=f"{seen}, before this program was released ({RELEASED}): certificates are refused",
        fix="sudo timedatectl set-ntp true",
    )


def check_heat(thermal: Path = Path("/sys/class/thermal")) -> Finding:
    """The warmest sensor of the board."""
    celsius = []
    for sensor in thermal.glob("thermal_zone*/temp"):
        try:
            celsius.append(int(sensor.read_text()) / 1000)
        except (OSError, ValueError):  # some zones answer only while their device is on
            continue
    if not celsius:
        return Finding(name="temperature", status="ok", seen="no sensor can be read here")
    seen = f"{max(celsius):.0f} degrees Celsius at the warmest of {len(celsius)} sensors"
    if max(celsius) < WARM_CELSIUS:
        return Finding(name="temperature", status="ok", seen=seen)
    fix = "cool the board, or train with fewer cores: edge-sdk run --threads 1"
    return Finding(name="temperature", status="warn", seen=f"{seen}: it slows down", fix=fix)


def check_throttling() -> Finding:
    """What a Raspberry Pi's firmware says about its supply and temperature."""
    command = shutil.which("vcgencmd")
    if command is None:
        return Finding(name="throttling", status="ok", seen="not told by this board's firmware")
    try:
        done = subprocess.run(
            [command, "get_throttled"], capture_output=True, timeout=5, text=True, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name="throttling", status="ok", seen=f"vcgencmd does not answer: {error}")
    return throttling(done.stdout)


def throttling(answer: str) -> Finding:
    """The finding for the firmware's answer, such as ``throttled=0x50005``."""
    found = re.search(r"throttled=(0x[0-9a-fA-F]{1,8})\b", answer)
    if found is None:
        seen = f"vcgencmd answers {answer.strip()[:80]!r}"
        return Finding(name="throttling", status="ok", seen=seen)
    bits = int(found[1], 16)
    now = [words for bit, words in _THROTTLED.items() if bits >> bit & 1]
    before = [words for bit, words in _THROTTLED.items() if bits >> (bit + 16) & 1]
    if not now and not before:
        return Finding(name="throttling", status="ok", seen="none since the start")
    fix = "use the board's own power supply, a short cable and a cooler"
    seen = f"now: {', '.join(now)}" if now else f"since the start: {', '.join(before)}"
    return Finding(name="throttling", status="warn", seen=seen, fix=fix)


def check_broker(url: str, ca_file: str | None) -> Finding:
    """Reach the broker as `edge-sdk run` would; ConfigError when the address itself is wrong."""
    from edge_sdk.mqtt import connect_once

    try:
        started_s = time.monotonic()
        greeting = connect_once(url, ca_file=ca_file)
        took_s = time.monotonic() - started_s
    except LinkError as error:
        fix = "start the server or a broker there, or correct --broker"
        if isinstance(error, BrokerRefused):
            fix = "correct --broker mqtt://USER:PASSWORD@HOST:PORT"
        return Finding(name="broker", status="fail", seen=str(error), fix=fix)
    limit_bytes = greeting.max_packet_bytes
    limit = "no packet limit" if limit_bytes is None else f"packets up to {limit_bytes:,} bytes"
    seen = f"answers in {took_s * 1e3:.0f} ms, MQTT {greeting.protocol}, {limit}"
    if limit_bytes is None or limit_bytes >= LEAST_PACKET_BYTES:
        return Finding(name="broker", status="ok", seen=seen)
    return Finding(
        name="broker",
        status="warn",
        seen=f"{seen}: messages of up to {LEAST_PACKET_BYTES:,} bytes are sent",
        fix=f"raise the broker's packet limit, in mosquitto.conf: max_packet_size {MIB}",
    )


def is_state(directory: Path) -> bool:
    """Whether a device was ever run with this state directory."""
    return (directory / "device-id").is_file()


def state_of(directory: Path) -> dict[str, Any]:
    """What lies in a state directory, read without touching anything: the device may be running."""
    updates, unreadable = [], 0
    with disk_errors("read", directory):
        device = (directory / "device-id").read_bytes()[:200].decode(errors="replace").strip()
        sizes = [path.stat().st_size for path in (directory / "blocks").glob("*.block")]
        for header in sorted((directory / "spool").glob("*.json")):
            try:
                updates.append(msgspec.json.decode(header.read_bytes(), type=SpoolEntry))
            except FileNotFoundError:  # its receipt came just now
                continue
            except (msgspec.MsgspecError, UnicodeDecodeError):
                unreadable += 1
    path = directory / "profile.toml"
    profile = load_profile(path) if path.exists() else None
    return {
        "state": str(directory),
        "device": device,
        "process": _holder(directory / "lock"),
        "blocks": {"count": len(sizes), "bytes": sum(sizes)},
        "spool": [
            {"job": e.job, "round": e.round, "bytes": e.size_bytes, "created_s": e.created_s}
            for e in sorted(updates, key=lambda entry: entry.created_s)
        ],
        "unreadable": unreadable,
        "profile": profile
        and {"name": profile.name, "date": profile.date, "memory_bytes": profile.memory_bytes},
    }


def _holder(lock: Path) -> int | None:
    """The process that holds a lock, by the kernel's list; trying it could make a start fail."""
    try:
        inode = lock.stat().st_ino
        locks = Path("/proc/locks").read_text()
    except OSError:
        return None
    found = re.search(rf"FLOCK\s+ADVISORY\s+WRITE\s+(\d+)\s+\S+:{inode}\s", locks)
    return int(found[1]) if found else None

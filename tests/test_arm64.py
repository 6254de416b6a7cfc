"""A Raspberry Pi 4 as far as a machine without one can have it: Debian for arm64 under qemu.

Run it with ``python -m pytest -m slow tests/test_arm64.py``, as root, after
``apt install qemu-user-static debootstrap``. The first run makes the file system in some minutes
and keeps it below ``~/.cache``, or where EDGE_SDK_ARM64_ROOT says; every run installs anew into a
copy of it, which takes ten minutes and more: each instruction of the Pi is translated.

The processor is the Pi 4's (Cortex-A72), so that a build which needs a newer one dies here as it
would there. Memory, storage and times are this machine's and say nothing about a Pi.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("chroot", "debootstrap", "qemu-aarch64-static", "unshare")
RELEASE, PACKAGES = "bookworm", "ca-certificates,python3,python3-venv"
CHECKOUT = "/root/edge-sdk"
BOARD = "raspberry-pi-4b-4gb"
DIGITS = "examples/digits.py"

# What the kernel needs to know to start a program for arm64 with qemu: the first bytes of its file.
# F: the interpreter is opened now, so that it is found from inside the other file system, too.
BINFMT = (
    r":qemu-aarch64:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:{qemu}:F"
)
# Libraries look up what the processor can do here, and the emulated one shows the host's.
CORE = """processor\t: {number}
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""
# Settings with which this machine's pip reaches packages.
CLIENT_SETTING = re.compile(
    r"PIP_(?!CONFIG_FILE$)\w+|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|CURL_CA_BUNDLE|\w+_proxy",
    re.IGNORECASE,
)
ONE_STEP = """
import json
from pathlib import Path
from edge_sdk.model import BlockModel
from edge_sdk.plan import Plan
from edge_sdk.task import load_task
from edge_sdk.train import Samples, train

task = load_task(Path("examples/digits.py"))
model = BlockModel(task)
samples = Samples(task.train_data(0, 4), "digits")

def weights():
    return {name: [a.tobytes() for a in model.read(name).values()] for name in model.spec.names}

before = weights()
plan = Plan(blocks=("blocks.5", "head"), batch_size=16, micro_batch=16, steps=1, codec="balanced",
            peak_bytes=0, budget_bytes=0, train_s=0.0, round_s=0.0, upload_bytes=0, flops=0)
result = train(model, samples, plan, task.training, order_seed=0)
after = weights()
changed = [name for name in before if before[name] != after[name]]
print(json.dumps({"steps": result.steps, "loss": result.loss, "changed": changed}))
"""


@dataclass(frozen=True)
class Pi:
    """A file system for arm64, and what of this machine its programs may see."""

    root: Path
    environment: dict[str, str]
    binds: dict[Path, str]

    def run(self, command: str, *, limit_s: float = 900) -> str:
        """What a shell command in the checkout prints; it must succeed."""
        spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        done = subprocess.run(
            [*spaces, "sh", "-euc", self._script(command)],
            capture_output=True, text=True, timeout=limit_s, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def edge_json(self, words: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.run(f".venv/bin/edge-sdk {words} --json"))
        return report

    def _script(self, command: str) -> str:
        """Mounts that vanish with the command, then the command inside."""
        qemu, formats = shutil.which("qemu-aarch64-static"), "/proc/sys/fs/binfmt_misc"
        root = quote(str(self.root))
        lines = [
            f"test -e {formats}/register || mount -t binfmt_misc binfmt_misc {formats}",
            f"test -e {formats}/qemu-aarch64 || "
            f"printf %s {quote(BINFMT.format(qemu=qemu))} >{formats}/register",
            f"mount --rbind /dev {root}/dev",
            f"mount --rbind /sys {root}/sys",
            f"mount -t proc proc {root}/proc",
        ]
        for source, target in self.binds.items():
            lines.append(f"mount --bind -o ro {quote(str(source))} {root}{quote(target)}")
        settings = [quote(f"{name}={value}") for name, value in self.environment.items()]
        inside = quote(f"cd {CHECKOUT} 2>/dev/null || cd /\n{command}")
        lines.append(f"exec chroot {root} env -i {' '.join(settings)} sh -euc {inside}")
        return "\n".join(lines)


@pytest.fixture(scope="module")
def pi() -> Iterator[Pi]:
    """A Pi with this checkout, on which the README's line was run; gone after the tests."""
    _skip_if_impossible()
    base = _debian()
    with tempfile.TemporaryDirectory(prefix="edge-sdk-arm64-") as directory:
        root = Path(directory) / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", base, root], check=True)
        shutil.copytree(ROOT, root / CHECKOUT[1:], ignore=_not_of_the_checkout)
        for name in ("resolv.conf", "hosts"):
            shutil.copyfile(Path("/etc") / name, root / "etc" / name)
        settings = _client_settings()
        cpuinfo = Path(directory) / "cpuinfo"
        cpuinfo.write_text("".join(CORE.format(number=n) for n in range(os.cpu_count() or 1)))
        binds = {path: str(path) for path in _local_paths(settings)}
        for path in binds:
            _make_place(root / str(path)[1:], path)
        machine = Pi(
            root,
            _environment() | {"QEMU_CPU": "cortex-a72"} | settings,
            {cpuinfo: "/proc/cpuinfo"} | binds,
        )
        machine.run(_readme_line(), limit_s=3600)
        yield machine


@pytest.fixture(scope="module")
def table(pi: Pi, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost table made on this machine, in the Pi's checkout too."""
    path = tmp_path_factory.mktemp("costs") / "digits.json"
    _edge_here(f"plan --task {DIGITS} --parts 4 --profile {BOARD} --save-cost-table {path}")
    shutil.copyfile(path, pi.root / CHECKOUT[1:] / "digits.json")
    return path


def _skip_if_impossible() -> None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)}: apt install qemu-user-static debootstrap")
    if os.geteuid() != 0:
        pytest.skip("only root may make another file system and change into it")
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "tmpfs", "/tmp"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if tried.returncode != 0:
        pytest.skip(f"mounts are not permitted here: {tried.stderr.strip()}")


def _readme_line() -> str:
    """How the README says a device is set up."""
    found = re.search(r"On each device: install with `([^`]+)`", (ROOT / "README.md").read_text())
    assert found is not None, "README.md does not say how to install on a device"
    return found[1]


def _debian() -> Path:
    """Debian for arm64 as debootstrap makes it, kept for the next time."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = os.environ.get("EDGE_SDK_ARM64_ROOT") or home / "edge-sdk" / f"{RELEASE}-arm64"
    base = Path(kept).absolute()
    if base.exists():
        return base
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=base.parent) as directory:
        root = Path(directory) / "root"
        words = ["--arch=arm64", "--foreign", "--variant=minbase", f"--include={PACKAGES}"]
        subprocess.run(
            ["debootstrap", *words, RELEASE, root, *_mirror()], check=True, capture_output=True
        )
        Pi(root, _environment(), {}).run("/debootstrap/debootstrap --second-stage", limit_s=3600)
        root.rename(base)  # what was interrupted is never taken for done
    return base


def _mirror() -> list[str]:
    """Where this machine's apt finds the release; without an answer, debootstrap's own choice."""
    if shutil.which("apt-get") is None:
        return []
    shown = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)"],
        capture_output=True, text=True, check=False,
    ).stdout  # fmt: skip
    found = re.search(rf"^Debian {RELEASE} (\S+)$", shown, re.MULTILINE)
    return [found[1]] if found else []


def _environment() -> dict[str, str]:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"HOME": "/root", "LANG": "C.UTF-8", "PATH": path}


def _client_settings() -> dict[str, str]:
    """How this machine's pip reaches packages, from its files and environment, as environment."""
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = {}
    for name, value in re.findall(r"^(?:global|install)\.([\w-]+)=(.+)$", shown, re.MULTILINE):
        key = "PIP_" + name.upper().replace("-", "_")
        settings[key] = " ".join(ast.literal_eval(value).split())
    named = {name: value for name, value in os.environ.items() if CLIENT_SETTING.fullmatch(name)}
    return settings | named


def _local_paths(settings: dict[str, str]) -> set[Path]:
    """Files and directories of this machine that the settings name."""
    paths = set()
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if word.startswith("file://"):
            path = path.parent  # an index links to files beside it
        if path.is_absolute() and path.exists() and path != Path("/"):
            paths.add(path)
    return paths


def _make_place(target: Path, source: Path) -> None:
    """What something is mounted on must exist."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


def _not_of_the_checkout(directory: str, names: list[str]) -> set[str]:
    """Leftovers of work on the checkout: hidden ones, built ones, virtual environments."""
    here = Path(directory)
    built = {"__pycache__", "build", "dist"}
    return {
        name
        for name in names
        if name.startswith(".") or name in built or (here / name / "pyvenv.cfg").exists()
    }


def _edge_here(words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk", *words.split()],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_install_line_brings_no_gpu_libraries(pi: Pi) -> None:
    listed = json.loads(pi.run(".venv/bin/python -m pip list --format json"))
    names = {package["name"].lower() for package in listed}
    assert {"edge-sdk", "torch"} <= names
    assert {n for n in names if n.startswith(("nvidia", "cuda", "triton"))} == set()


def test_profile_says_of_every_figure_whether_it_was_measured(pi: Pi) -> None:
    text = pi.run(".venv/bin/edge-sdk profile --quick --save pi.toml")
    assert 'board = "Linux aarch64"' in text
    report = pi.edge_json("profile --quick")
    figures = [
        key for key, source in report["profile"]["sources"].items() if key.endswith("_per_s")
    ]
    assert figures
    for key in figures:
        said = "assumed" if key in report["not_measured"] else "measured"
        assert report["profile"]["sources"][key].startswith(said)
    assert "memory_bytes = " in pi.run("cat pi.toml")


def test_plan_from_a_cost_table_is_the_workstations(pi: Pi, table: Path) -> None:
    words = f"plan --profile {BOARD} --json --cost-table"
    there = json.loads(pi.run(f".venv/bin/edge-sdk {words} digits.json"))
    assert there == json.loads(_edge_here(f"{words} {table}"))
    assert there["plan"]["blocks"]


def test_plan_for_the_machine_itself(pi: Pi, table: Path) -> None:
    found = pi.edge_json("plan --profile measure --cost-table digits.json")
    assert found["plan"]["blocks"]
    assert found["plan"]["peak_bytes"] <= found["plan"]["budget_bytes"]


def test_costs_of_a_task_are_the_workstations(pi: Pi, table: Path) -> None:
    """Torch traces the task there; what it counts depends on neither processor nor release."""
    pi.run(
        f".venv/bin/edge-sdk plan --task {DIGITS} --parts 4 --profile {BOARD} "
        "--save-cost-table own.json"
    )
    own = json.loads((pi.root / CHECKOUT[1:] / "own.json").read_text())
    given = json.loads(table.read_text())
    assert own["spec"] == given["spec"]
    assert own["num_examples"] == given["num_examples"]


def test_doctor_finds_nothing_wrong(pi: Pi) -> None:
    found = pi.run(".venv/bin/edge-sdk doctor").splitlines()
    assert re.match(r"ok +python +3\.11\.\d+, 64-bit, aarch64", found[0])
    for name in ("msgspec", "msgpack", "paho", "zstandard", "numpy", "torch", "onnxruntime"):
        assert any(re.match(rf"ok +{name} +\d", line) for line in found), found


def test_one_training_step(pi: Pi) -> None:
    result = json.loads(pi.run(f".venv/bin/python -c {quote(ONE_STEP)}"))
    assert result["steps"] == 1
    assert 1.0 < result["loss"] < 5.0  # ten classes, hardly trained: about ln 10
    assert result["changed"] == ["blocks.5", "head"]

"""The map of the house: what each file may import. A file that is not on it fails."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Room:
    """A file's layer, and the files it may import although no rule of layers lets it."""

    layer: int
    beside: tuple[str, ...] = ()


# A file may import any file of a lower layer. Imports point down.
def _files(*names: str) -> tuple[str, ...]:
    return tuple(f"edge_sdk/{name}.py" for name in names)


ROOMS = {
    "edge_sdk/errors.py": Room(0),
    "edge_sdk/blocks.py": Room(1),
    "edge_sdk/brokers.py": Room(1),
    "edge_sdk/figures.py": Room(1),
    "edge_sdk/profile.py": Room(1, beside=_files("figures")),
    "edge_sdk/wire.py": Room(1, beside=_files("blocks")),
    "edge_sdk/codec.py": Room(2, beside=_files("cost", "frames", "grid", "quantise")),
    "edge_sdk/cost.py": Room(2),
    "edge_sdk/step.py": Room(2, beside=_files("cost")),
    "edge_sdk/frames.py": Room(2),
    "edge_sdk/grid.py": Room(2, beside=_files("frames", "quantise")),
    "edge_sdk/pieces.py": Room(2),
    "edge_sdk/quantise.py": Room(2),
    "edge_sdk/merge.py": Room(3),
    "edge_sdk/plan.py": Room(3, beside=_files("ways")),
    "edge_sdk/ways.py": Room(3),
    "edge_sdk/session.py": Room(4),
    "edge_sdk/offers.py": Room(4, beside=_files("strategies/__init__")),
    "edge_sdk/strategies/last_blocks.py": Room(4),
    "edge_sdk/strategies/__init__.py": Room(4, beside=_files("strategies/last_blocks")),
    "edge_sdk/condition.py": Room(5, beside=_files("memory")),
    "edge_sdk/confine.py": Room(5, beside=_files("memory", "process")),
    "edge_sdk/corrections.py": Room(5, beside=_files("store")),
    "edge_sdk/echo.py": Room(5, beside=_files("link", "measure", "mqtt")),
    "edge_sdk/fused.py": Room(5),
    "edge_sdk/hollow.py": Room(5, beside=_files("model")),
    "edge_sdk/infer.py": Room(5),
    "edge_sdk/link.py": Room(5),
    "edge_sdk/measure.py": Room(5, beside=_files("memory")),
    "edge_sdk/memory.py": Room(5),
    "edge_sdk/model.py": Room(5, beside=_files("task")),
    "edge_sdk/connection.py": Room(5, beside=_files("link")),
    "edge_sdk/feed.py": Room(5, beside=_files("mqtt")),
    "edge_sdk/fetch.py": Room(5, beside=_files("mqtt", "parts", "store")),
    "edge_sdk/mqtt.py": Room(5, beside=_files("connection", "link")),
    "edge_sdk/outbox.py": Room(5, beside=_files("feed", "mqtt", "store")),
    "edge_sdk/parts.py": Room(5, beside=_files("store")),
    "edge_sdk/operators.py": Room(5),
    "edge_sdk/optimizer.py": Room(5),
    "edge_sdk/prefix.py": Room(
        5,
        beside=_files("hollow", "model", "prefix_cache", "prefix_cut", "prefix_export", "train"),
    ),
    "edge_sdk/prefix_cache.py": Room(5, beside=_files("store")),
    "edge_sdk/prefix_cut.py": Room(5, beside=_files("hollow", "model")),
    "edge_sdk/prefix_export.py": Room(5, beside=_files("infer", "model", "prefix_cut")),
    "edge_sdk/probe.py": Room(5, beside=_files("condition", "echo", "measure", "memory")),
    "edge_sdk/process.py": Room(5),
    "edge_sdk/quota.py": Room(5, beside=_files("memory")),
    "edge_sdk/recompute.py": Room(5, beside=_files("model")),
    "edge_sdk/store.py": Room(5),
    "edge_sdk/tally.py": Room(5, beside=_files("operators")),
    "edge_sdk/task.py": Room(5),
    "edge_sdk/trace.py": Room(5, beside=_files("model", "recompute", "train", "watch")),
    "edge_sdk/train.py": Room(5, beside=_files("model", "optimizer", "recompute", "task")),
    "edge_sdk/watch.py": Room(5, beside=_files("fused", "model", "operators")),
    "edge_sdk/trainer.py": Room(6),
    "edge_sdk/allowance.py": Room(6),
    "edge_sdk/apart.py": Room(6, beside=_files("trainer")),
    "edge_sdk/calibrate.py": Room(6, beside=_files("trainer")),
    "edge_sdk/rehearse.py": Room(6, beside=_files("allowance", "apart", "trainer")),
    "edge_sdk/emulate.py": Room(6, beside=_files("allowance", "rehearse", "trainer")),
    "edge_sdk/tune.py": Room(6, beside=_files("allowance", "rehearse", "trainer")),
    "edge_sdk/profile_edit.py": Room(6),
    "edge_sdk/assignment.py": Room(6, beside=_files("trainer")),
    "edge_sdk/supervisor.py": Room(6, beside=_files("allowance", "assignment", "trainer")),
    "edge_sdk/agent.py": Room(6, beside=_files("assignment", "supervisor", "trainer")),
    "edge_sdk/doctor.py": Room(6),
    "edge_sdk/screen.py": Room(6),
    "edge_sdk/console.py": Room(6),
    "edge_sdk/cli_rehearse.py": Room(7),
    "edge_sdk/cli_plan.py": Room(7, beside=_files("cli_rehearse")),
    "edge_sdk/cli.py": Room(7, beside=_files("cli_plan", "cli_rehearse")),
    "edge_sdk/__init__.py": Room(8),
    "edge_sdk/__main__.py": Room(8),
    "reference_server/broker.py": Room(10),
    "reference_server/database.py": Room(10),
    "reference_server/fleet.py": Room(10),
    "reference_server/report.py": Room(10),
    "reference_server/rounds.py": Room(10),
    "reference_server/screen.py": Room(10),
    "reference_server/trust.py": Room(10),
    "reference_server/versions.py": Room(10),
    "reference_server/accounts.py": Room(11),
    "reference_server/evaluate.py": Room(11),
    "reference_server/export.py": Room(12),
    "reference_server/reports.py": Room(12),
    "reference_server/ledger.py": Room(13),
    "reference_server/broadcast.py": Room(14),
    "reference_server/counting.py": Room(14),
    "reference_server/merging.py": Room(14),
    "reference_server/downlink.py": Room(15),
    "reference_server/ingest.py": Room(15),
    "reference_server/coordinator.py": Room(16),
    # It is many devices, so it starts what a device starts.
    "reference_server/fleet_sim.py": Room(17, beside=("edge_sdk/agent.py", "edge_sdk/trainer.py")),
    "reference_server/demo.py": Room(18),
    "reference_server/cli.py": Room(19),
    "reference_server/__init__.py": Room(20),
    "reference_server/__main__.py": Room(20),
}

# Besides layers 0-4 without `session`, the server shares these with the device.
SERVER_MAY_IMPORT = {
    f"edge_sdk/{name}.py"
    for name in (
        *("feed", "fetch", "infer", "link", "memory", "model", "mqtt", "parts", "probe", "process"),
        *("store", "task", "train"),
    )
}

STRATEGIES = tuple(path for path in ROOMS if path.startswith("edge_sdk/strategies/"))

# Who may import what we depend on; `msgspec` is everybody's.
OWNERS: dict[str, tuple[str, ...]] = {
    "amqtt": ("reference_server/broker.py",),
    "click": (
        "edge_sdk/cli.py",
        "edge_sdk/cli_plan.py",
        "edge_sdk/cli_rehearse.py",
        "edge_sdk/console.py",
        "reference_server/cli.py",
    ),
    "msgpack": ("edge_sdk/wire.py",),
    "msgspec": tuple(ROOMS),
    "numpy": (
        *_files(
            "calibrate", "cli", "codec", "frames", "grid", "infer", "measure", "merge", "model"
        ),
        *_files("prefix", "prefix_cache", "prefix_export", "quantise", "train", "trainer"),
        "reference_server/evaluate.py",
        "reference_server/export.py",
        "reference_server/versions.py",
        *STRATEGIES,
    ),
    "onnx": ("reference_server/export.py",),
    "onnxruntime": ("edge_sdk/infer.py",),
    "onnxscript": ("reference_server/export.py",),
    "paho": ("edge_sdk/connection.py",),
    "psutil": ("edge_sdk/condition.py", "edge_sdk/memory.py", "edge_sdk/process.py"),
    "rich": (
        "edge_sdk/cli.py",
        "edge_sdk/screen.py",
        "reference_server/cli.py",
        "reference_server/screen.py",
    ),
    "safetensors": ("reference_server/export.py", "reference_server/versions.py"),
    "sqlalchemy": (
        "reference_server/database.py",
        "reference_server/ledger.py",
        "reference_server/reports.py",
    ),
    "tomli": ("edge_sdk/profile.py",),
    "tomli_w": ("edge_sdk/profile.py",),
    "tomllib": ("edge_sdk/profile.py",),
    "torch": (
        *_files("calibrate", "fused", "hollow", "model", "operators", "optimizer", "prefix"),
        *_files("prefix_cut", "prefix_export", "recompute", "tally", "trace", "train", "trainer"),
        *_files("watch"),
        "reference_server/evaluate.py",
        "reference_server/export.py",
    ),
    "zstandard": ("edge_sdk/frames.py",),
}

# These start or are loaded into small processes: the heavy ones only inside functions.
LAZY = ("edge_sdk/cli.py", "edge_sdk/measure.py", "edge_sdk/probe.py", "edge_sdk/trainer.py")

SERVER_PURE = ("accounts", "fleet", "rounds")
PURE = {path for path, room in ROOMS.items() if room.layer <= 4}
PURE |= {f"reference_server/{name}.py" for name in SERVER_PURE}
EFFECTS = {
    *("asyncio", "multiprocessing", "queue", "signal", "subprocess", "threading", "time"),
    *("http", "select", "selectors", "socket", "socketserver", "ssl", "urllib"),
    *(
        "ctypes",
        "fcntl",
        "glob",
        "io",
        "logging",
        "mmap",
        "os",
        "pathlib",
        "resource",
        "shutil",
        "sqlite3",
        "tempfile",
    ),
    *("secrets", "uuid"),
}
# The one reader of files among the pure: profiles are data, and small.
MAY_READ_FILES = {"edge_sdk/profile.py": {"pathlib"}}
CLOCK_CALLS = (
    ["datetime", "now"],
    ["datetime", "utcnow"],
    ["datetime", "today"],
    ["date", "today"],
)
SEEDED = (
    *(["Random"], ["Generator"], ["default_rng"], ["SeedSequence"], []),
    *(["Philox"], ["PCG64"], ["SFC64"]),
)

# Formats that run code when they are read.
NEVER = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}

FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("edge_sdk", "reference_server")
    for path in (ROOT / package).rglob("*.py")
)
every_file = pytest.mark.parametrize("file", FILES)


class Import(NamedTuple):
    """One imported name: where, whether only for annotations, whether inside a function."""

    name: str
    line: int
    typing_only: bool
    lazy: bool


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def imports_of(file: str) -> Iterator[Import]:
    """Every import in a file, those inside functions too, as dotted names."""
    stack: list[tuple[ast.AST, bool, bool]] = [(tree_of(file), False, False)]
    while stack:
        node, typing_only, lazy = stack.pop()
        for name in dotted_names(node):
            yield Import(name, getattr(node, "lineno", 0), typing_only, lazy)
        guard = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            # The `else` of a TYPE_CHECKING guard does run.
            hidden = guard and isinstance(node, ast.If) and child not in node.orelse
            stack.append((child, typing_only or hidden, lazy or inside))


def dotted_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, f"line {node.lineno}: write absolute imports"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


def room_of(name: str) -> str | None:
    """The file of ours a dotted name comes from; None for a package's version and for others'."""
    if name.split(".")[0] not in ("edge_sdk", "reference_server") or name.endswith(".__version__"):
        return None
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = "/".join(parts[:end])
        for candidate in (f"{base}.py", f"{base}/__init__.py"):
            if (ROOT / candidate).is_file():
                return candidate
    return name


def may_import(file: str, target: str) -> bool:
    room, other = ROOMS[file], ROOMS.get(target)
    if other is None:
        return False
    if file.startswith("reference_server/") and target.startswith("edge_sdk/"):
        shared = other.layer <= 4 and target != "edge_sdk/session.py"
        return shared or target in SERVER_MAY_IMPORT or target in room.beside
    return other.layer < room.layer or target in room.beside


def told(head: str, lines: Iterable[str]) -> str:
    return "\n  ".join([f"{head}:", *sorted(lines)])


def test_the_map_and_the_house_agree() -> None:
    new, gone = set(FILES) - set(ROOMS), set(ROOMS) - set(FILES)
    assert not new, told("new files, to be given a room in ROOMS", new)
    assert not gone, told("no such files, to be taken out of ROOMS", gone)


@every_file
def test_imports_point_down(file: str) -> None:
    refused = {
        f"line {found.line}: {target}"
        for found in imports_of(file)
        if (target := room_of(found.name)) and target != file and not may_import(file, target)
    }
    assert not refused, told(f"{file}, in layer {ROOMS[file].layer}, may not import", refused)


@every_file
def test_dependencies_have_owners(file: str) -> None:
    refused = set()
    for found in imports_of(file):
        package = found.name.split(".")[0]
        ours = package in ("__future__", "edge_sdk", "reference_server")
        known = package in sys.stdlib_module_names and package not in OWNERS
        if package in NEVER:
            refused.add(f"line {found.line}: {package} runs what it reads")
        elif not ours and not known and not found.typing_only:
            if file not in OWNERS.get(package, ()):
                owners = ", ".join(OWNERS.get(package, ("nobody",)))
                refused.add(f"line {found.line}: {package} belongs to {owners}")
            elif file in LAZY and package in ("numpy", "torch") and not found.lazy:
                refused.add(f"line {found.line}: import {package} inside a function")
    assert not refused, told(file, refused)


@pytest.mark.parametrize("file", [file for file in FILES if file in PURE])
def test_pure_files_have_no_effects(file: str) -> None:
    banned = EFFECTS - MAY_READ_FILES.get(file, set())
    refused = [
        f"line {found.line}: import of {found.name}"
        for found in imports_of(file)
        if found.name.split(".")[0] in banned and not found.typing_only
    ]
    refused += [f"line {node.lineno}: {why}" for node, why in impure_uses(tree_of(file))]
    assert not refused, told(f"{file} is pure: time and randomness are passed in", refused)


def impure_uses(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """Clocks, global random state, unseeded generators and opened files."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            if [alias.name for alias in node.names] != ["Random"]:
                yield node, "of the random module, only the class Random has no global state"
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node).split(".")
            if path[-2:] in CLOCK_CALLS:
                yield node, f"{ast.unparse(node)} reads the clock"
            if "random" in path[:2] and path[path.index("random") + 1 :][:1] not in SEEDED:
                yield node, f"{ast.unparse(node)} is global random state"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "open":
                yield node, "opens a file"
            if called.endswith(("Random", "default_rng")) and not node.args:
                yield node, f"{called}() without a seed"


def test_no_import_cycles() -> None:
    graph = {
        file: {
            target
            for found in imports_of(file)
            if not found.typing_only and (target := room_of(found.name)) and target != file
        }
        for file in FILES
    }
    TopologicalSorter(graph).prepare()


def test_the_server_stays_out_of_the_device() -> None:
    named = [file for file in FILES if file.startswith("edge_sdk/")]
    refused = [f for f in named for i in imports_of(f) if i.name.startswith("reference_server")]
    assert not refused, told("the device must not know the server", refused)

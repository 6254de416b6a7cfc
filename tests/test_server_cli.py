"""The ``reference-server`` program as people and scripts meet it: what it refuses, what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from edge_sdk.profile import shipped_profiles
from edge_sdk.store import DirectoryLock
from reference_server.broker import find_mosquitto
from reference_server.cli import cli, main
from tests.simulation import BOARDS, Simulation, command, write_task

pytestmark = pytest.mark.timeout(120)
COMMANDS = ("demo", "simulate", "run", "status", "audit", "export")
FLEET = ("--devices", ",".join(BOARDS))
TASK = """
import numpy as np
from torch import nn
from edge_sdk import Task

def build_model():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

def data(count):
    inputs = np.random.default_rng(count).normal(size=(count, 8)).astype("float32")
    return inputs, inputs[:, :3].argmax(axis=1)

def task():
    return Task(name="tiny", build_model=build_model, loss=nn.functional.cross_entropy,
                train_data=lambda part, parts: data(40), test_data=lambda: data(30))
"""

Done = subprocess.CompletedProcess[str]
Call = Callable[..., Done]


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """Run one command to its end in this process, in an empty directory: the many refusals."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Done:
        words = [str(arg) for arg in args]
        code = main(words)
        return Done(words, code, *capsys.readouterr())

    return run


@pytest.fixture
def task_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TASK)
    return path


@pytest.fixture(scope="module")
def digits_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def finished(digits_task: Path, tmp_path_factory: pytest.TempPathFactory) -> Simulation:
    """A simulation that has ended: its state, its report, its screen."""
    with Simulation(digits_task, tmp_path_factory.mktemp("run"), "--rounds", "1") as run:
        run.report()
    return run


@pytest.fixture
def state(finished: Simulation, tmp_path: Path) -> Path:
    """A copy of that state, to be spoiled."""
    return Path(shutil.copytree(finished.state, tmp_path / "s"))


def assert_refused(done: Done, code: int, *patterns: str) -> None:
    """Exit code, nothing on stdout, one line on stderr that matches every pattern."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("reference-server: ")
    for pattern in patterns:
        assert re.search(pattern, line), line


# Usage


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(call: Call, name: str) -> None:
    done = call(name, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--json" in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_list_of_commands_is_this(call: Call) -> None:
    assert set(cli.commands) == set(COMMANDS)
    done = call()
    assert (done.returncode, done.stdout) == (2, "")
    assert all(f"\n  {name} " in done.stderr for name in COMMANDS)
    assert call("--version").stdout.startswith("reference-server, version ")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["serve"], "No such command 'serve'. See reference-server --help"),
        (["demo", "--round", "3"], "No such option.*--round.*See reference-server demo --help"),
        (["simulate", *FLEET], "Missing option '--task'"),
        (["simulate", "--task", "tiny.py"], "Missing option '--devices'"),
        (["status"], "Missing option '--state'"),
        (["demo", "--rounds", "0"], "'--rounds': 0 is not in the range 1<=x<=1000000"),
        (["demo", "--rounds", "many"], "'--rounds': 'many' is not a valid integer"),
        (["demo", "--seed", "-1"], "'--seed': -1 is not in the range"),
        (["demo", "--round-s", "0"], "'--round-s': 0.0 is not in the range"),
        (["run", "--task", "tiny.py", "--port", "65536"], "'--port': 65536 is not in the range"),
    ],
)
def test_wrong_usage_is_one_line(call: Call, words: list[str], complaint: str) -> None:
    assert_refused(call(*words), 2, complaint)


# What demo, simulate and run refuse before anything is started


@pytest.mark.parametrize("words", [["demo"], ["simulate", *FLEET], ["run"]], ids=lambda w: w[0])
@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--strategy", "first_blocks", "'first_blocks' is unknown; known are full, last_blocks"),
        ("--codec", "int3", "codec 'int3' is unknown; known are lossless, fp16, balanced, tiny"),
        ("--json", "none/report.json", "--json none/report.json: cannot be written: No such file"),
        ("--json", "folder", "--json folder: cannot be written: Is a directory; name a file"),
        ("--json", "/proc/report.json", "--json /proc/report.json: cannot be written: "),
        ("--state", "file", "file.*(File exists|Not a directory); .* another state directory"),
        ("--state", "file/state", "file/state.*: Not a directory; .* another state directory"),
        ("--state", "/proc/state", "cannot create /proc/state: No such file or directory; "),
        ("--broker", "rabbit", "--broker rabbit: unknown; one of auto, mosquitto, embedded"),
        ("--broker", "tcp://host", "'tcp://host' names no broker; write mqtt://HOST:PORT"),
        ("--broker", "mqtt://host:99999", "Port out of range 0-65535; write mqtt://HOST:PORT"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    call: Call, task_path: Path, words: list[str], option: str, value: str, complaint: str
) -> None:
    home = task_path.parent
    (home / "file").touch()
    (home / "folder").mkdir()
    task = [] if words == ["demo"] else ["--task", task_path]
    place = [] if option == "--state" else ["--state", "state"]
    free_port = ["--port", "0"] if words == ["run"] else []
    assert_refused(call(*words, *task, *place, *free_port, option, value), 2, complaint)
    assert {path.name for path in home.iterdir()} <= {"tiny.py", "file", "folder", "state"}
    assert not list(home.glob("state/*/*")), "nothing was started"


def test_a_report_that_can_be_written_is_not_touched_before(call: Call, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    for name in ("old.json", "new.json"):
        assert call("run", "--task", "none.py", "--json", name).returncode == 2
        assert call("demo", "--json", name, "--broker", "tcp://x").returncode == 2
    assert (tmp_path / "old.json").read_text() == "{}"
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize("devices", ["", " ", ",", " , "])
@pytest.mark.parametrize("words", [["demo"], ["simulate", "--task", "tiny.py"]])
def test_no_devices_are_no_fleet(
    call: Call, task_path: Path, words: list[str], devices: str
) -> None:
    done = call(*words, "--devices", devices)
    assert_refused(done, 2, f"--devices {devices!r} names no profile", *shipped_profiles())


def test_an_unknown_profile_is_answered_with_those_there_are(call: Call, task_path: Path) -> None:
    words = ["simulate", "--task", task_path, "--state", "state", "--devices"]
    done = call(*words, f"{BOARDS[0]},raspberry-pi-9")
    assert_refused(done, 2, "raspberry-pi-9: no such profile. Did you mean", *shipped_profiles())
    assert_refused(call(*words, "./mine.toml"), 2, "mine.toml: no such profile")
    assert not (task_path.parent / "state").exists()


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (TASK, None, "tiny.py: no such file; give a Python file that defines task"),
        ("import numpy", "import numpyy", "does not import at line 2: ModuleNotFoundError: "),
        ("def build_model():", "def build_model()", "does not import at line 6: SyntaxError: "),
        ("def task", "def tasks", r"defines no function task\(\); add `def task"),
        ("    return Task", "    return Task and 5 or dict", r"task\(\) at line 13 returned int"),
        ("    return Task", "    return 1 / 0, Task", r"task\(\) failed at line 14: ZeroDiv"),
        ("return nn.Seq", "return 5 or nn.Seq", r"build_model\(\) returned int, expected torch"),
        ("name=", "blocks={'a': ['0'], 'b': ['0', '2']}, name=", r"'0.weight' lies in blocks \['a"),
        ("name=", "blocks={'a': ['0']}, name=", "'2.weight' lies in no block; every tensor needs"),
        ("data(30)", "1 / 0", r"'tiny': test_data\(\) failed: ZeroDivisionError: division by zero"),
        ("data(30)", "5", r"'tiny': test_data\(\)"),
    ],
)
def test_a_wrong_task_is_refused_before_a_broker_is_started(
    call: Call, task_path: Path, old: str, new: str | None, complaint: str
) -> None:
    assert TASK.count(old) == 1
    task_path.unlink() if new is None else task_path.write_text(TASK.replace(old, new))
    done = call("run", "--task", task_path, "--state", "state", "--port", 0)
    assert_refused(done, 2, complaint)
    assert not (task_path.parent / "state" / "broker").exists()


@pytest.mark.parametrize("words", [["simulate", *FLEET], ["run"]], ids=lambda w: w[0])
def test_a_broker_elsewhere_that_is_none_exits_3(
    call: Call, task_path: Path, no_broker: str, words: list[str]
) -> None:
    words = [*words, "--task", str(task_path), "--state", "state", "--broker"]
    assert_refused(call(*words, "mqtt://127.0.0.1:1"), 3, "127.0.0.1:1: nobody listens there; ")
    assert_refused(call(*words, no_broker), 3, "it is no MQTT broker .*HTTP.*Check host and port")
    assert not list(task_path.parent.glob("state/*/*"))


def test_a_port_in_use_is_named_with_the_ways_out(call: Call, task_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = call("run", "--task", task_path, "--port", port)
    assert_refused(done, 2, f":{port} cannot be used .*: Address already in use", "--port", "mqtt:")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--bind", "0.0.0.0"], "needs accounts, and state/broker/broker.passwd does not exist; "),
        (["--bind", "0.0.0.0", "--broker", "embedded"], "has no access control .*apt install"),
        (["--bind", "192.0.2.1"], "192.0.2.1: no free port .*address of this machine"),
        (["--job", "../up"], "--job '../up': use 1 to 64 of the characters a-z, 0-9 and '-'"),
        (["--job", ""], "--job ''"),
    ],
)
def test_a_server_that_could_not_be_used_is_not_started(
    call: Call, task_path: Path, words: list[str], complaint: str
) -> None:
    if "0.0.0.0" in words and "embedded" not in words:
        find_mosquitto() or pytest.skip("needs mosquitto")
    done = call("run", "--task", task_path, "--state", "state", "--port", 0, *words)
    assert_refused(done, 2, complaint)
    assert not (task_path.parent / "state").exists()


# A state directory that belongs to something else


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--seed", "7"], "was started with seed 0, now 7 is asked for: continue with the old"),
        (["--codec", "fp16"], "was started with codec 'lossless', now 'fp16'"),
        (["--strategy", "full"], "was started with strategy 'last_blocks', now 'full'"),
        (["--job", "other"], "belongs to job 'demo', not to 'other': choose another state"),
    ],
)
def test_other_terms_do_not_continue_a_job(
    call: Call, state: Path, digits_task: Path, words: list[str], complaint: str
) -> None:
    known = ["--task", digits_task, "--job", "demo", "--codec", "lossless", "--port", 0]
    done = call("run", "--state", state / "server", *known, *words)
    assert_refused(done, 2, f"{state / 'server'}", complaint)


def test_another_model_does_not_continue_a_job(
    call: Call, state: Path, digits_task: Path, task_path: Path
) -> None:
    known = ["--job", "demo", "--codec", "lossless", "--port", 0, "--state", state / "server"]
    assert_refused(call("run", *known, "--task", task_path), 2, "the task now builds .*restore")
    (state / "server" / "report.json").write_text("{")
    done = call("run", *known, "--task", digits_task)
    assert_refused(done, 2, "report.json: cannot be read as a run's report: .*delete it")


def test_simulate_passes_on_what_its_server_refuses(state: Path, digits_task: Path) -> None:
    words = ["simulate", "--task", digits_task, *FLEET, "--state", state, "--codec", "lossless"]
    done = subprocess.run(
        command("reference_server", *words, "--seed", 7, "--rounds", 1),
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert_refused(done, 2, "was started with seed 0, now 7 is asked for: continue with the old")


def test_a_directory_in_use_is_left_alone(call: Call, tmp_path: Path, task_path: Path) -> None:
    (tmp_path / "busy").mkdir()
    lock = DirectoryLock(tmp_path / "busy")
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
    for words in (["run", "--port", port], ["simulate", *FLEET]):
        done = call(*words, "--task", task_path, "--state", "busy")
        assert_refused(done, 2, f"busy is in use by process {os.getpid()}: stop that process, or")
    lock.release()


def spoil(ledger: Path) -> None:
    """Overwrite all but the first pages."""
    data = bytearray(ledger.read_bytes())
    data[8192:] = os.urandom(len(data) - 8192)
    ledger.write_bytes(data)


@pytest.mark.parametrize("name", ["run", "status", "audit"])
def test_a_damaged_ledger_is_named(call: Call, state: Path, digits_task: Path, name: str) -> None:
    ledger = state / "server" / "ledger.sqlite"
    spoil(ledger)
    words = ["--task", digits_task, "--port", 0] if name == "run" else []
    done = call(name, "--state", state / "server", *words)
    assert_refused(done, 2, f"{ledger}.*(damaged|malformed).*; restore a copy of it, or choose")
    ledger.write_text("no database at all")
    assert_refused(call(name, "--state", state / "server", *words), 2, "is not a database; choose")


# status, audit, export


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["status"], "nothing holds no ledger; give the server's --state directory"),
        (["audit"], "nothing holds no ledger; give the server's --state directory"),
        (["export", "--task", "tiny.py"], "nothing holds no versions; give the server's --state"),
        (["export", "--task", "none.py"], "task file none.py: no such file; give"),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_without_a_job_is_refused_and_left_alone(
    call: Call, task_path: Path, words: list[str], complaint: str, exists: bool
) -> None:
    nothing = task_path.parent / "nothing"
    if exists:
        nothing.mkdir()
    assert_refused(call(*words, "--state", "nothing"), 2, complaint)
    assert nothing.exists() == exists
    assert not exists or list(nothing.iterdir()) == []


@pytest.mark.parametrize("inner", ["", "server"])
def test_status_shows_the_rounds(call: Call, finished: Simulation, inner: str) -> None:
    answer = json.loads(call("status", "--state", finished.state / inner, "--json").stdout)
    (row,) = answer["rounds"]
    assert row == {
        "job": "demo", "round": 1, "phase": "PUBLISHED", "version": 1,
        "verdicts": {"accepted": 2}, "samples": row["samples"], "update_bytes": row["update_bytes"],
    }  # fmt: skip
    assert min(row["samples"], row["update_bytes"]) > 1000
    done = call("status", "--state", finished.state / inner)
    assert done.stdout.startswith("round 1    published  version 1   2 accepted, 1438 samples, ")


def test_audit_counts_and_finds_what_is_wrong(call: Call, state: Path) -> None:
    answer = json.loads(call("audit", "--state", state, "--json").stdout)
    assert answer["ok"] is True
    assert all(check["ok"] and check["count"] > 0 for check in answer["checks"])
    assert "\nok     I6 versions form one chain: 2\n" in call("audit", "--state", state).stdout
    with closing(sqlite3.connect(state / "server" / "ledger.sqlite")) as db:
        db.execute("UPDATE version SET parent = 'somebody' WHERE v = 1")
        db.commit()
    done = call("audit", "--state", state, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["ok"] is False
    assert re.fullmatch(r"reference-server: .*: 1 of \d+ checks failed \(I6 .*\n", done.stderr)
    assert "\nBROKEN I6 versions form one chain" in call("audit", "--state", state).stdout


def test_a_job_without_rounds_says_so(call: Call, state: Path) -> None:
    with closing(sqlite3.connect(state / "server" / "ledger.sqlite")) as db:
        for table in ("partial", "upload", "offer", "round", "version", "job"):
            db.execute(f"DELETE FROM {table}")
        db.commit()
    assert call("status", "--state", state).stdout == f"{state}: no round yet\n"
    assert call("audit", "--state", state).stdout == f"{state}: no job yet\n"
    assert json.loads(call("status", "--state", state, "--json").stdout) == {"rounds": []}


def test_export_writes_a_version(call: Call, finished: Simulation, digits_task: Path) -> None:
    words = ["export", "--state", finished.state, "--task", digits_task]
    answer = json.loads(call(*words, "--output", "a/b", "--json").stdout)
    paths = {kind: Path(path) for kind, path in answer["files"].items()}
    assert answer["version"] == 1
    assert set(paths) == {"safetensors", "onnx"}
    exported = safetensors.numpy.load_file(paths["safetensors"])
    last = safetensors.numpy.load_file(finished.state / "server" / "model.safetensors")
    assert exported.keys() == last.keys()
    assert all(np.array_equal(exported[name], last[name]) for name in last)
    done = call(*words, "--version", 0, "--output", "base")
    assert done.stdout.splitlines() == [
        "version 0 as safetensors: base/model.safetensors",
        "version 0 as onnx: base/model.onnx",
    ]
    base = safetensors.numpy.load_file("base/model.safetensors")
    assert not any(np.array_equal(base[name], last[name]) for name in last)


def test_export_refuses_what_is_not_there(
    call: Call, state: Path, digits_task: Path, task_path: Path
) -> None:
    words = ["export", "--state", state, "--task"]
    done = call(*words, digits_task, "--version", 7)
    assert_refused(done, 2, "holds no version 7; it holds 2, from 0 to 1")
    assert_refused(call(*words, task_path), 2, "it builds another model than version 1 of job 'de")
    done = call(*words, digits_task, "--output", task_path)
    assert_refused(done, 2, "--output .*tiny.py: cannot be created: File exists; name another")
    shutil.rmtree(state / "server" / "versions")
    (state / "server" / "versions").mkdir()
    assert_refused(call(*words, digits_task), 2, "holds no version yet; run the server first")


def test_export_without_test_data_writes_what_it_can(
    call: Call, state: Path, digits_task: Path, tmp_path: Path
) -> None:
    path = tmp_path / "blind.py"
    path.write_text(digits_task.read_text().replace("test_data=", "public_data="))
    done = call("export", "--state", state, "--task", path, "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["files"] == {"safetensors": "model.safetensors"}
    assert re.match("reference-server: no ONNX file was written: .* no test_data: ", done.stderr)


# A finished job


def test_the_screen_is_plain_text(finished: Simulation) -> None:
    text = finished.log.read_text()
    assert "\x1b" not in text
    assert "\r" not in text
    assert re.search(r"^round 1 of 1  accuracy 0\.\d{3}  loss \d\.\d{3}  \d+\.\d s$", text, re.M)
    assert re.search(
        rf"^  {BOARDS[0]} +trains 0 2 4 +peak \d+ \(\d+\) MiB of 6580  up ", text, re.M
    )
    assert re.search(r"^done: 1 round in \d+\.\d s, held-out accuracy 0\.\d{3}$", text, re.M)
    assert "updates: 2 made, 2 counted, 0 lost, 0 double\n" in text


def test_a_finished_simulation_says_so_and_keeps_its_report(
    finished: Simulation, tmp_path: Path
) -> None:
    again = list(finished.process.args)
    again[again.index("--json") + 1] = str(tmp_path / "again.json")
    done = subprocess.run(again, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()[:2]
    assert first == "this job was finished before, with 1 round; more --rounds would continue it"
    assert second in finished.log.read_text()
    assert "joined" not in done.stdout
    assert (tmp_path / "again.json").read_text() == finished.json.read_text()


def test_a_finished_server_says_so_and_starts_no_broker(
    call: Call, state: Path, digits_task: Path
) -> None:
    shutil.rmtree(state / "broker")
    words = ["--state", state / "server", "--task", digits_task, "--job", "demo", "--port", 0]
    done = call("run", *words, "--codec", "lossless", "--rounds", 1, "--json", "report.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("this job was finished before, with 1 round; ")
    report = json.loads(Path("report.json").read_text())
    assert report["totals"]["updates_counted"] == 2
    assert not (state / "server" / "broker").exists()


def test_our_own_faults_keep_their_traceback(tmp_path: Path) -> None:
    code = """
import sys
from edge_sdk.errors import ProtocolMisuse
from reference_server.broker import find_mosquitto
from reference_server.cli import cli, main
@cli.command()
def fault():
    raise ProtocolMisuse("ours")
sys.exit(main(["fault"]))
"""
    words: list[Any] = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr

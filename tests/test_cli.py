"""The ``edge-sdk`` program as people and scripts meet it: real processes, files and brokers."""

from __future__ import annotations

import json
import os
import pty
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from edge_sdk.allowance import HEADROOM_SHARE
from edge_sdk.cli import main
from edge_sdk.errors import MIB
from edge_sdk.link import Arrived, LinkEvent
from edge_sdk.mqtt import Link
from edge_sdk.profile import load_profile, shipped_profiles
from edge_sdk.store import Spool
from edge_sdk.wire import Presence, Refusal, Topics, decode, encode
from reference_server.broker import BrokerProcess, choose

ROOT = Path(__file__).resolve().parent.parent
BOARD = "raspberry-pi-4b-2gb"
# Runs main in a process that dies of an assertion when one of the named packages is imported.
WITHOUT = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in {heavy}, name + " was imported"
sys.meta_path.insert(0, Guard())
from edge_sdk.cli import main
sys.exit(main())
"""
TASK = """
import numpy as np
from torch import nn
from edge_sdk import Task, Training

def build_model():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))

def train_data(part, parts):
    inputs = np.random.default_rng(part).normal(size=(40, 8)).astype("float32")
    return inputs, inputs[:, :3].argmax(axis=1)

def task():
    return Task(name="tiny", build_model=build_model, loss=nn.functional.cross_entropy,
                train_data=train_data, training=Training(optimizer="adam", batch_size=8))
"""
# A package that imports fast and does what the doctor tries of each.
WORKING = """
class Square:
    def __matmul__(self, other):
        return self
def ones(*shape):
    return Square()
def compress(data):
    return data
def get_available_providers():
    return []
"""
HEAVY = {"torch", "numpy", "onnxruntime", "rich"}
STUBBED = ("numpy", "onnxruntime", "torch", "zstandard")

Edge = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def edge(tmp_path: Path) -> Edge:
    """Run one command to its end, with an empty home."""

    def run(*args: object, code: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        start = ["-c", code] if code else ["-m", "edge_sdk"]
        return subprocess.run(
            [sys.executable, *start, *(str(arg) for arg in args)],
            capture_output=True, text=True, timeout=50, cwd=tmp_path,
            env=surroundings(tmp_path, **environment),
        )  # fmt: skip

    return run


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Edge:
    """As ``edge``, without the start of a process: for the many ways to be refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*args: object) -> subprocess.CompletedProcess[str]:
        words = [str(arg) for arg in args]
        code = main(words)
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


def surroundings(home: Path, **more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [more.pop("PYTHONPATH", ""), str(ROOT)]))
    return {**os.environ, "HOME": str(home), "PYTHONPATH": path, **more}


@pytest.fixture
def task_path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.py"
    path.write_text(TASK)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A cost table stored by `plan --task`, and what that command printed."""
    path = tmp_path_factory.mktemp("costs") / "digits.json"
    words = ["plan", "--task", str(ROOT / "examples" / "digits.py"), "--parts", "4", "--json"]
    words += ["--profile", BOARD, "--save-cost-table", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk", *words], capture_output=True, text=True,
        env=surroundings(path.parent),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return path, json.loads(done.stdout)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    process = choose("auto", tmp_path / "broker")
    assert isinstance(process, BrokerProcess)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """Packages that take the place of the heavy ones in the doctor's child processes."""
    directory = tmp_path / "stubs"
    directory.mkdir()
    for name in STUBBED:
        (directory / f"{name}.py").write_text(WORKING)
    return directory


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *patterns: str) -> None:
    """Exit code, nothing on stdout, one line on stderr that matches every pattern."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    (line,) = [text for text in done.stderr.splitlines() if not re.match(r"\d{4}-\d\d-\d\d ", text)]
    assert line.startswith("edge-sdk: ")
    for pattern in patterns:
        assert re.search(pattern, line), line


# What the program loads


@pytest.mark.parametrize("words", ["--help", "run --help", "status --json"])
def test_commands_load_neither_torch_nor_numpy(edge: Edge, words: str) -> None:
    done = edge(*words.split(), code=WITHOUT.replace("{heavy}", repr(HEAVY)))
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_planning_from_a_cost_table_does_not_load_torch(
    edge: Edge, measured: tuple[Path, dict[str, Any]]
) -> None:
    code = WITHOUT.replace("{heavy}", repr({"torch", "onnxruntime"}))
    done = edge("plan", "--cost-table", measured[0], "--profile", BOARD, "--json", code=code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == measured[1], "the same as with torch"


# plan


def test_plan_prints_blocks_and_plan(measured: tuple[Path, dict[str, Any]]) -> None:
    answer = measured[1]
    assert [block["name"] for block in answer["blocks"]][-1] == "head"
    for block in answer["blocks"]:
        assert set(block) == {
            *("name", "params", "bytes", "activation_bytes_per_sample"),
            *("flops_forward_per_sample", "flops_backward_per_sample"),
        }
        assert block["flops_backward_per_sample"] >= block["flops_forward_per_sample"]
    plan = answer["plan"]
    assert plan["blocks"] == [block["name"] for block in answer["blocks"]]
    usable_bytes = int(load_profile(BOARD).memory_bytes * (1 - HEADROOM_SHARE))
    assert plan["peak_bytes"] <= plan["budget_bytes"] == usable_bytes
    assert plan["round_s"] > plan["train_s"] > 0
    assert plan["micro_batch"] <= plan["batch_size"] == answer["training"]["batch_size"]
    assert answer["num_examples"] > 1


def test_a_small_budget_leaves_blocks_out_and_says_why(
    call: Edge, measured: tuple[Path, dict[str, Any]]
) -> None:
    words = ["plan", "--cost-table", measured[0], "--profile", BOARD, "--batch-size", "1"]
    words += ["--deadline-s", "100000"]
    everything = json.loads(call(*words, "--json").stdout)["plan"]
    assert everything["left_out"] == []
    most = int(everything["peak_bytes"] / MIB / (1 - HEADROOM_SHARE))
    for allowed in range(most, 0, -1):  # first the same blocks are trained in less memory
        answer = json.loads(call(*words, "--memory-mb", allowed, "--json").stdout)["plan"]
        if answer["blocks"] != everything["blocks"]:
            break
    words += ["--memory-mb", str(allowed)]
    usable_bytes = int(allowed * MIB * (1 - HEADROOM_SHARE))
    assert answer["budget_bytes"] == usable_bytes >= answer["peak_bytes"]
    assert answer["blocks"] == everything["blocks"][-len(answer["blocks"]) :]
    assert len(answer["blocks"]) < len(everything["blocks"])
    assert f"{usable_bytes / MIB:.0f} MiB allowed by flag" in answer["left_out"][0]["reason"]
    text = call(*words).stdout
    assert f"{BOARD} trains {', '.join(answer['blocks'])}\n" in text
    assert re.search(
        rf"^not embed, .*: needs \d+ MiB .*, {usable_bytes / MIB:.0f} MiB allowed by ", text, re.M
    )


def test_all_boards_get_a_row_even_if_nothing_fits(
    call: Edge, measured: tuple[Path, dict[str, Any]]
) -> None:
    words = ["plan", "--cost-table", measured[0], "--profile", "all", "--memory-mb", "150"]
    words += ["--num-examples", "1000000"]
    done = call(*words)
    assert done.returncode == 0, done.stderr
    lines = {line.split(" ")[0]: line for line in done.stdout.splitlines()}
    for name in shipped_profiles():
        assert re.search(r" \d of \d: \S| nothing fits: ", lines[name])
    assert "nothing fits: cheapest plan (head)" in lines["raspberry-pi-zero-2w"]
    plans = json.loads(call(*words, "--json").stdout)["plans"]
    assert [row["profile"] for row in plans] == list(shipped_profiles())
    assert {row["profile"]: row["plan"] for row in plans}["raspberry-pi-zero-2w"] is None


def test_one_board_where_nothing_fits_is_an_error(
    edge: Edge, measured: tuple[Path, dict[str, Any]]
) -> None:
    words = ["plan", "--cost-table", measured[0], "--profile", BOARD, "--memory-mb", "100"]
    done = edge(*words)
    assert done.returncode == 2
    assert "edge-sdk: raspberry-pi-4b-2gb: cheapest plan (head) needs" in done.stderr
    assert "forward FLOP" in done.stdout
    answer = json.loads(edge(*words, "--json").stdout)
    assert answer["plan"] is None
    assert "94 MiB allowed by flag" in answer["reason"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file or directory; make one with `edge-sdk plan --task FILE"),
        (b"", "truncated; make one with"),
        (b"\x93NUMPY garbage", "malformed"),
        (b'{"task": "t"}', "missing required field `spec`"),
        (b'{"task": "t", "spec": {"blocks": []}, "blocks": []}', "1 to 512 blocks"),
        (b"[" * 100_000, "make one with"),
        (b'{"task": "\xff"}', "make one with"),
    ],
)
def test_a_bad_cost_table_is_named(
    call: Edge, tmp_path: Path, content: bytes | None, complaint: str
) -> None:
    path = tmp_path / "costs.json"
    if content is not None:
        path.write_bytes(content)
    done = call("plan", "--cost-table", path, "--profile", BOARD)
    assert_refused(done, 2, f"cost table {path}: ", re.escape(complaint))


def test_a_cut_or_altered_cost_table_is_refused(
    call: Edge, tmp_path: Path, measured: tuple[Path, dict[str, Any]]
) -> None:
    data, path = measured[0].read_bytes(), tmp_path / "cut.json"
    path.write_bytes(data[: len(data) // 2])
    words = ["plan", "--cost-table", path, "--profile", BOARD]
    assert_refused(call(*words), 2, "cut.json: Input data was truncated")
    table = json.loads(data)
    table["blocks"].reverse()
    path.write_text(json.dumps(table))
    assert_refused(call(*words), 2, "its blocks are not those of its model")
    table["blocks"].reverse()
    del table["num_examples"]
    path.write_text(json.dumps(table))
    assert_refused(call(*words), 2, "does not say num_examples; give --num-examples")
    assert call(*words, "--num-examples", 500).returncode == 0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--profile", "raspberry-pi-4b-3gb"], "no such profile. Did you mean raspberry-pi-4b-"),
        (["--profile", "./broken.toml"], "broken.toml: not TOML"),
        (["--profile", BOARD, "--strategy", "first_blocks"], "strategy 'first_blocks' is unknown"),
        (["--profile", BOARD, "--codec", "int3"], "codec 'int3' is unknown; known are lossless"),
        (["--profile", BOARD, "--part", "2", "--parts", "2"], "--part 2 does not exist: .* 0 to 1"),
        (["--profile", BOARD], "give either --task FILE or --cost-table FILE"),
        (["--profile", BOARD, "--task", "none.py"], "task file none.py: no such file"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    call: Edge, tmp_path: Path, words: list[str], complaint: str
) -> None:
    (tmp_path / "broken.toml").write_text("name = ")
    assert_refused(call("plan", *words), 2, complaint)


def test_a_task_whose_data_fails_is_refused(edge: Edge, task_path: Path) -> None:
    task_path.write_text(TASK.replace("(40, 8)", "(40, 'x')"))
    done = edge("plan", "--task", task_path, "--profile", BOARD)
    assert_refused(done, 2, r"task 'tiny': train_data\(0, 1\) failed: TypeError: ")


# run


def run_words(task_path: Path, url: str, state: Path) -> list[str]:
    return [
        *("run", "--task", str(task_path), "--broker", url, "--job", "j", "--device", "d1"),
        *("--profile", BOARD, "--state", str(state), "--threads", "1"),
    ]


def test_no_broker_exits_3_at_once(edge: Edge, task_path: Path, no_broker: str) -> None:
    state = task_path.parent / "state"
    words = run_words(task_path, "mqtt://127.0.0.1:1", state)
    assert_refused(edge(*words), 3, "nobody listens there; start the server")
    words[words.index("--broker") + 1] = no_broker
    assert_refused(edge(*words), 3, "it is no MQTT broker this program can talk to: .*HTTP")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"--task": "none.py"}, "task file none.py: no such file"),
        ({"--broker": "http://x"}, "names no broker; write mqtt://HOST:PORT"),
        ({"--job": "../up"}, "--job '../up': use 1 to 64 of the characters"),
        ({"--device": "A b"}, "the device id asked for is 'A b'"),
        ({"--state": "tiny.py/state"}, "cannot create tiny.py/state: Not a directory; "),
        ({"--state": "/proc/state"}, "cannot create /proc/state: "),
        ({"--part": "1"}, "--part 1 does not exist: with --parts 1 it is 0 to 0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_network(
    call: Edge, task_path: Path, change: dict[str, str], complaint: str
) -> None:
    words = run_words(task_path, "mqtt://127.0.0.1:1", task_path.parent / "state")
    for option, value in change.items():
        if option in words:
            words[words.index(option) + 1] = value
        else:
            words += [option, value]
    assert_refused(call(*words), 2, complaint)


def test_a_bad_profile_is_refused(call: Edge, task_path: Path, broker: BrokerProcess) -> None:
    words = run_words(task_path, broker.url, task_path.parent / "state")
    words[words.index("--profile") + 1] = "raspberry"
    assert_refused(call(*words), 2, "raspberry: no such profile")


@pytest.mark.timeout(200)
def test_a_task_file_without_a_task_is_refused_once_the_device_is_measured(
    edge: Edge, task_path: Path, broker: BrokerProcess
) -> None:
    task_path.write_text("def tasks(): ...\n")
    state = task_path.parent / "state"
    words = run_words(task_path, broker.url, state)
    words[words.index("--profile") + 1] = "measure"
    done = edge(*words)
    assert done.returncode == 2
    kept = load_profile(state / "profile.toml")
    assert {"operator_s", "matmul_flops_per_s"} <= kept.rates.keys()
    assert kept.overhead
    assert done.stderr.splitlines()[-1].startswith(f"edge-sdk: task file {task_path}: defines no ")


class Server:
    """The other end of the broker: what a device says, and what it is told."""

    def __init__(self, url: str) -> None:
        self._inbox: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self.link = Link(url, "server", self._inbox)
        topics = Topics("j")
        self.link.subscribe(topics.presence("d1"))
        self.link.subscribe(topics.up("d1"))
        self.link.start()

    def wait_for(self, wanted: Callable[[Any], bool]) -> None:
        while True:
            event = self._inbox.get(timeout=30)
            if isinstance(event, Arrived) and wanted(decode(event.payload)):
                return

    def wait_for_presence(self, state: str) -> None:
        self.wait_for(lambda said: isinstance(said, Presence) and said.state == state)


@pytest.fixture
def server(broker: BrokerProcess) -> Iterator[Server]:
    peer = Server(broker.url)
    yield peer
    peer.link.close()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_good_order(
    edge: Edge, task_path: Path, broker: BrokerProcess, server: Server, number: int, code: int
) -> None:
    state = task_path.parent / "state"
    words = run_words(task_path, broker.url, state)
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_sdk", *words, "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=surroundings(task_path.parent), start_new_session=True,
    )  # fmt: skip
    server.wait_for_presence("ready")
    (shown,) = json.loads(edge("status", "--state", state, "--json").stdout)["states"]
    assert (shown["device"], shown["process"]) == ("d1", process.pid)
    assert_refused(edge(*words), 2, f"state is in use by process {process.pid}: stop that process")
    process.send_signal(number)
    server.wait_for_presence("sleeping")
    output, errors = process.communicate(timeout=20)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert [json.loads(line)["event"] for line in output.splitlines()] == ["started"]
    (shown,) = json.loads(edge("status", "--state", state, "--json").stdout)["states"]
    assert shown["process"] is None


def test_a_refusing_server_exits_4(
    edge: Edge, task_path: Path, broker: BrokerProcess, server: Server
) -> None:
    def refuse() -> None:
        server.wait_for_presence("ready")
        server.link.publish(Topics("j").down("d1"), encode(Refusal(reason="another model")))

    thread = threading.Thread(target=refuse)
    thread.start()
    done = edge(*run_words(task_path, broker.url, task_path.parent / "state"))
    thread.join()
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == "edge-sdk: the server refuses this device: another model"
    assert done.stdout.startswith("device d1 of job j at 127.0.0.1:")


# doctor and status


def test_doctor_likes_it_here_and_loads_little(edge: Edge, broker: BrokerProcess) -> None:
    words = ["doctor", "--broker", broker.url, "--json"]
    done = edge(*words, code=WITHOUT.replace("{heavy}", repr(HEAVY)))
    findings = {row["name"]: row for row in json.loads(done.stdout)["findings"]}
    assert done.returncode == 0, findings
    assert {"python", "memory", "storage", "clock", "temperature", "throttling"} < set(findings)
    assert {"msgpack", "paho", "zstandard", "numpy", "torch", "onnxruntime"} < set(findings)
    assert findings["torch"]["seen"][0].isdigit()
    assert "MQTT" in findings["broker"]["seen"]


def test_doctor_exits_2_with_what_to_fix(edge: Edge, stubs: Path, tmp_path: Path) -> None:
    (stubs / "torch.py").write_text("import os\nos.kill(os.getpid(), 4)\n")
    state = tmp_path / "file" / "state"
    state.parent.touch()
    done = edge("doctor", "--state", state, PYTHONPATH=str(stubs))
    assert done.returncode == 2
    assert re.search(r"^fail  torch        importing it was killed by SIGILL", done.stdout, re.M)
    assert re.search(r"^ +to fix: .* -m pip install 'torch<2.10'$", done.stdout, re.M)
    assert done.stderr == "2 of 13 failed: storage, torch\n"


def test_doctor_exits_3_when_only_the_broker_fails(edge: Edge, stubs: Path, no_broker: str) -> None:
    done = edge("doctor", "--broker", no_broker, PYTHONPATH=str(stubs))
    assert done.returncode == 3
    assert re.search(r"^fail  broker  .* it is no MQTT broker", done.stdout, re.M)
    assert "\x1b" not in done.stdout
    assert done.stderr == "1 of 14 failed: broker\n"
    assert_refused(edge("doctor", "--broker", "tcp://x"), 2, "names no broker; write mqtt://")


def test_status_shows_what_a_device_holds(edge: Edge, tmp_path: Path) -> None:
    assert "no job was run on this machine yet" in edge("status").stdout
    assert_refused(edge("status", "--state", tmp_path), 2, "holds no device-id; check --state")
    home = tmp_path / ".edge-sdk" / "j"
    (home / "blocks").mkdir(parents=True)
    (home / "device-id").write_text("cam-1\n")
    (home / "blocks" / f"{'a' * 64}.block").write_bytes(bytes(3000))
    Spool(home / "spool").put("j", 7, bytes(16), bytes(2048), 1.7e9)
    (home / "spool" / "j.8.json").write_text("{}")
    (home / "profile.toml").write_bytes((ROOT / "profiles" / f"{BOARD}.toml").read_bytes())
    before = sorted(path.name for path in home.rglob("*"))
    (state,) = json.loads(edge("status", "--json").stdout)["states"]
    assert state["device"] == "cam-1"
    assert state["blocks"] == {"count": 1, "bytes": 3000}
    assert state["spool"] == [{"job": "j", "round": 7, "bytes": 2048, "created_s": 1.7e9}]
    assert state["unreadable"] == 1
    assert state["profile"]["name"] == BOARD
    text = edge("status").stdout
    assert f"device cam-1 in {home}\n  blocks   1 cached, 2.9 KiB\n" in text
    assert "job j, round 7: 2.0 KiB, " in text
    assert sorted(path.name for path in home.rglob("*")) == before, "looking changes nothing"


# The program as a whole


def on_a_terminal(words: list[str], environment: dict[str, str]) -> str:
    ours, theirs = pty.openpty()
    with closing(os.fdopen(ours, "rb", buffering=0)) as screen:
        child = subprocess.Popen(words, stdout=theirs, env=environment)
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # Linux says so when the last writer is gone
            while part := screen.read(4096):
                shown += part
        assert child.wait() == 0
    return shown.decode()


def test_colour_only_on_a_terminal_that_wants_it(tmp_path: Path, stubs: Path) -> None:
    words = [sys.executable, "-m", "edge_sdk", "doctor"]
    environment = surroundings(tmp_path, PYTHONPATH=str(stubs), TERM="xterm")
    environment.pop("NO_COLOR", None)
    assert "\x1b[32mok" in on_a_terminal(words, environment)
    assert "\x1b" not in on_a_terminal(words, {**environment, "NO_COLOR": "1"})


def test_wrong_usage_exits_2_and_version_0(edge: Edge) -> None:
    done = edge("plan", "--profil", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search("No such option:? '?--profil", done.stderr)
    assert edge("nothing").returncode == 2
    assert edge("--version").stdout.startswith("edge-sdk, version ")


@pytest.mark.parametrize("error", ["ProtocolMisuse", "KeyError"])
def test_our_own_faults_keep_their_traceback(edge: Edge, error: str) -> None:
    code = f"""
import sys
from edge_sdk.cli import cli, main
from edge_sdk.errors import ProtocolMisuse
@cli.command()
def fault():
    raise {error}("ours")
sys.exit(main(["fault"]))
"""
    done = edge(code=code)
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert error in done.stderr.splitlines()[-1]

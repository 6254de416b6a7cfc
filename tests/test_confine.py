"""A child's memory limit: real groups and limits where they are permitted, trees of files for all
that this machine does not have.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edge_sdk import confine
from edge_sdk.confine import LEAF, Confinement, sweep_groups
from edge_sdk.errors import MIB
from edge_sdk.memory import CGROUP, PROC
from edge_sdk.process import process_rss_bytes

PATIENCE_S = 30.0
# Waits for a line, then takes memory: a MiB at a time, or shared, which RLIMIT_DATA does not see.
HUNGRY = """
import mmap, sys
print("up", flush=True)
how, size_mb = sys.stdin.readline().split()
try:
    if how == "private":
        kept = [bytearray(b"x") * (1 << 20) for _ in range(int(size_mb))]
    else:
        kept = mmap.mmap(-1, int(size_mb) << 20)
        for offset in range(0, len(kept), 4096):
            kept[offset] = 1
except MemoryError:
    print("refused", flush=True)
else:
    print("had", flush=True)
"""


@contextmanager
def hungry() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HUNGRY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        try:
            yield child
        finally:
            child.kill()


def eats(child: subprocess.Popen[str], how: str, size_mb: int) -> str:
    """What it says after that; nothing when it was killed."""
    said, _ = child.communicate(f"{how} {size_mb}\n", timeout=PATIENCE_S)
    return said.strip()


def group_of(held: Confinement) -> Path:
    assert held._group is not None
    return held._group.directory


@pytest.fixture
def permitted() -> None:
    with hungry() as child:
        held = Confinement(child.pid)
    held.release()
    if not held.how.startswith("cgroup"):
        pytest.skip(f"no memory cgroup can be made here: {held.why_no_group}")


@pytest.mark.usefixtures("permitted")
def test_a_child_beyond_its_group_is_killed_and_told_apart() -> None:
    with hungry() as child:
        held = Confinement(child.pid)
        assert held.how.endswith(" and RLIMIT_DATA")
        held.limit(60 * MIB)
        assert eats(child, "shared", 100) == ""
        assert child.returncode == -signal.SIGKILL
    assert held.killed_for_memory(child.returncode)
    held.release()
    assert not group_of(held).exists()


@pytest.mark.usefixtures("permitted")
def test_a_child_killed_by_somebody_was_not_killed_for_memory() -> None:
    with hungry() as child:
        held = Confinement(child.pid)
        held.limit(60 * MIB)
        child.kill()
        child.wait()
    assert not held.killed_for_memory(child.returncode)
    assert not held.killed_for_memory(-signal.SIGSEGV)
    held.release()


@pytest.mark.usefixtures("permitted")
def test_a_limit_can_be_raised_and_never_goes_below_what_is_held() -> None:
    with hungry() as child:
        held = Confinement(child.pid)
        held.limit(1)
        assert child.poll() is None
        held.limit(200 * MIB)
        assert eats(child, "shared", 100) == "had"
    held.release()


@pytest.mark.usefixtures("permitted")
def test_groups_of_an_agent_that_was_killed_are_swept_by_the_next() -> None:
    program = (
        "import subprocess, sys, time\n"
        "from edge_sdk.confine import Confinement\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "print(Confinement(child.pid)._group.directory, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as agent:
        assert agent.stdout is not None
        left = Path(agent.stdout.readline().strip())
        assert left.is_dir()
        assert sweep_groups() == 0, "a living agent's group is its own"
        agent.kill()
        agent.wait()
        # The child sees its agent's end of the pipe close.
        while (left / "cgroup.procs").read_text():
            pass
        assert sweep_groups() == 1
    assert not left.exists()


def test_without_a_group_allocations_are_refused(tmp_path: Path) -> None:
    with hungry() as child:
        held = Confinement(child.pid, cgroup_root=tmp_path)
        assert held.how == "RLIMIT_DATA"
        assert held.why_no_group == "this process is in no memory cgroup it can see"
        held.limit(60 * MIB)
        soft, hard = resource.prlimit(child.pid, resource.RLIMIT_DATA)
        assert soft < 80 * MIB
        assert hard == resource.RLIM_INFINITY
        held.limit(70 * MIB)
        assert resource.prlimit(child.pid, resource.RLIMIT_DATA)[0] > soft
        assert eats(child, "private", 100) == "refused"
    assert not held.killed_for_memory(child.returncode)


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    with hungry() as child:
        held = Confinement(child.pid, cgroup_root=tmp_path)
        held.limit(150 * MIB)
        assert eats(child, "private", 100) == "had"


def test_torch_says_that_it_was_refused(tmp_path: Path) -> None:
    program = (
        "import torch\n"
        "print('up', flush=True)\n"
        "input()\n"
        "try:\n"
        "    torch.ones(100 << 18)\n"
        "except RuntimeError as error:\n"
        "    print('alloc' in str(error))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "up\n"
        held = Confinement(child.pid, cgroup_root=tmp_path)
        held.limit(process_rss_bytes(child.pid) + 50 * MIB)
        assert child.communicate("\n", timeout=PATIENCE_S)[0] == "True\n"


class Tree:
    """What a process in a version 2 group sees, as plain files."""

    def __init__(self, root: Path, *, controllers: str = "cpu memory pids") -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        self.home = self.cgroup / "app.slice" / "edge.service"
        self.write(self.proc / "self" / "cgroup", "0::/app.slice/edge.service\n")
        self.write(self.proc / "vmstat", "nr_free_pages 7\noom_kill 3\n")
        self.write(self.home / "cgroup.procs", f"{os.getpid()}\n")
        self.write(self.home / "cgroup.controllers", f"{controllers}\n")
        self.write(self.home / "cgroup.subtree_control", "\n")

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def confine(self, pid: int) -> Confinement:
        return Confinement(pid, proc_root=self.proc, cgroup_root=self.cgroup)


def test_version_2_in_a_delegated_subtree(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    with hungry() as child:
        held = tree.confine(child.pid)
        assert held.how == "cgroup v2 and RLIMIT_DATA"
        group = group_of(held)
        assert group.parent == tree.home
        assert (tree.home / LEAF / "cgroup.procs").read_text() == str(os.getpid())
        assert (tree.home / "cgroup.subtree_control").read_text() == "+memory"
        assert (group / "cgroup.procs").read_text() == str(child.pid)
        held.limit(60 * MIB)
        assert (group / "memory.max").read_text() == str(60 * MIB)
        tree.write(group / "memory.current", str(70 * MIB))
        held.limit(60 * MIB)
        assert (group / "memory.max").read_text() == str(70 * MIB)
    tree.write(group / "memory.events", "low 0\nhigh 0\nmax 5\noom 1\noom_kill 0\n")
    assert not held.killed_for_memory(-9)
    tree.write(group / "memory.events", "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n")
    assert held.killed_for_memory(-9)
    assert held.killed_for_memory(None)
    assert not held.killed_for_memory(-11)


def test_version_2_once_this_process_is_in_its_leaf(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write(tree.home / "cgroup.subtree_control", "memory\n")
    tree.write(tree.home / "cgroup.procs", "")
    tree.write(tree.home / LEAF / "cgroup.procs", f"{os.getpid()}\n")
    tree.write(tree.proc / "self" / "cgroup", f"0::/app.slice/edge.service/{LEAF}\n")
    with hungry() as child:
        assert group_of(tree.confine(child.pid)).parent == tree.home


def test_version_2_that_is_not_ours_alone(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write(tree.home / "cgroup.procs", f"{os.getpid()}\n1\n2\n")
    with hungry() as child:
        held = tree.confine(child.pid)
    assert held.how == "RLIMIT_DATA"
    assert held.why_no_group == f"{tree.home} is not ours alone: 2 other processes are in it"


def test_version_2_without_the_memory_controller(tmp_path: Path) -> None:
    tree = Tree(tmp_path, controllers="cpu pids")
    with hungry() as child:
        held = tree.confine(child.pid)
    assert (held.how, held.why_no_group) == (
        "RLIMIT_DATA",
        f"{tree.home} has no memory controller",
    )


def test_a_refusal_by_the_kernel_leaves_this_process_where_it_was(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    (tree.home / "cgroup.subtree_control").unlink()
    (tree.home / "cgroup.subtree_control").mkdir()
    with hungry() as child:
        held = tree.confine(child.pid)
    assert held.how == "RLIMIT_DATA"
    assert "Is a directory" in held.why_no_group
    assert (tree.home / "cgroup.procs").read_text() == str(os.getpid())
    assert list(tree.home.glob("edge-sdk-[0-9]*")) == []


def test_without_a_group_the_machines_count_of_kills_stands_in(tmp_path: Path) -> None:
    tree = Tree(tmp_path, controllers="")
    with hungry() as child:
        held = tree.confine(child.pid)
    assert not held.killed_for_memory(-9)
    tree.write(tree.proc / "vmstat", "oom_kill 4\n")
    assert held.killed_for_memory(-9)
    assert held.killed_for_memory(None)
    assert not held.killed_for_memory(1)


def test_a_machine_without_proc_confines_nothing(tmp_path: Path) -> None:
    with hungry() as child:
        held = Confinement(child.pid, proc_root=tmp_path, cgroup_root=tmp_path)
        held.limit(60 * MIB)
        assert eats(child, "private", 100) == "had"
    assert not held.killed_for_memory(-9)


def test_sweeping_takes_only_empty_groups_of_the_dead(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write(tree.proc / "77" / "status", "")
    for name in ("edge-sdk-77-1", "edge-sdk-78-1", "other-78-1", f"edge-sdk-{os.getpid()}-9"):
        (tree.home / name).mkdir()
    tree.write(tree.home / "edge-sdk-79-2" / "memory.max", "1")  # a directory that is in use
    assert sweep_groups(proc_root=tree.proc, cgroup_root=tree.cgroup) == 2
    left = {path.name for path in tree.home.iterdir() if path.is_dir()}
    assert left == {"edge-sdk-77-1", "other-78-1", "edge-sdk-79-2"}


def test_the_group_lies_below_the_agents_own() -> None:
    homes = [home for _, home in confine.homes(PROC, CGROUP)]
    for home in homes:
        assert os.getpid() in confine._members(home) | confine._members(home / LEAF)

"""Who dies when memory runs out: rounds in a memory cgroup that a neighbour fills and empties.

    python -m tests.benchmarks.never_killed [--quick] [--seed N] [--json FILE]

A real broker and server, and a device (agent and trainer) that shares a memory cgroup with a
process that takes and frees memory at random, now and then more than is there. Each job has a
random network, cgroup limit and budget. A second device outside of the cgroup keeps rounds going.
A round is lost if the device neither delivered an accepted update nor declined because no plan
fitted. Needs the right to make memory cgroups.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edge_sdk.confine import homes, open_for_children
from edge_sdk.errors import MIB
from edge_sdk.memory import CGROUP, PROC
from reference_server.broker import BrokerProcess, choose

MODEL = Path(__file__).with_name("random_model.py")
PARTS = ("house", "anchor")
JOB_LIMIT_S, ROUND_LIMIT_S = 120.0, 90.0
# What an agent and a trainer hold before any model, and the neighbour with nothing taken.
BASE_MB = 45 + 210 + 12
# Reasons to sit a round out that are none of the device's own making.
RIGHT_REASONS = re.compile(r"needs \d+ MiB")

NEIGHBOUR = """
import mmap, random, sys, time
open("/proc/self/oom_score_adj", "w").write("300")
rng, room_mb = random.Random(int(sys.argv[1])), int(sys.argv[2])
taken = []
while True:
    while taken and rng.random() < 0.8:
        taken.pop(rng.randrange(len(taken))).close()
    wanted_mb = room_mb * rng.choice([0.0, rng.uniform(0, 1), rng.uniform(0.6, 1.3)])
    left_mb = wanted_mb - sum(map(len, taken)) / 2**20
    while left_mb > 1:
        size_mb = min(left_mb, rng.randint(1, 64))
        taken.append(mmap.mmap(-1, int(size_mb * 2**20), flags=mmap.MAP_PRIVATE))
        for offset in range(0, len(taken[-1]), 4096):
            taken[-1][offset] = 1
        left_mb -= size_mb
    time.sleep(rng.expovariate(1 / 0.6))
"""


@dataclass
class Job:
    """What was drawn for a job, and what became of its rounds."""

    seed: int
    room_mb: int
    flag_mb: int | None
    rounds: int = 0
    accepted: int = 0
    declined: int = 0
    lost: int = 0
    agent_deaths: int = 0
    trainer_kills: int = 0
    trainer_crashes: int = 0
    lowered: int = 0
    plans: int = 0
    neighbour_deaths: int = 0
    over_plan: float = 0.0
    why_lost: str = ""


class House:
    """A memory cgroup with a room for the device and one for its neighbour."""

    def __init__(self, limit_mb: int) -> None:
        self.version, home = next(homes(PROC, CGROUP))
        if self.version == 2:
            open_for_children(home)
        self.path = home / f"never-killed-{os.getpid()}"
        self.path.mkdir()
        limit = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        if self.version == 2:
            (self.path / "cgroup.subtree_control").write_text("+memory")
        (self.path / limit).write_text(str(limit_mb * MIB))
        for room in ("device", "neighbour"):
            (self.path / room).mkdir()

    def start(self, room: str, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a program that is in the room from its first moment."""
        enter = ["sh", "-c", f'echo $$ > {self.path / room / "cgroup.procs"}; exec "$@"', "sh"]
        with log.open("ab") as output:
            return subprocess.Popen([*enter, *command], stdout=output, stderr=output)

    def close(self) -> None:
        """Tear the house down; everybody has left."""
        deadline_s = time.monotonic() + 10
        below = [path for path in self.path.rglob("*") if path.is_dir()]
        for path in [*sorted(below, key=lambda p: -len(p.parts)), self.path]:
            while path.exists() and time.monotonic() < deadline_s:
                with suppress(OSError):
                    path.rmdir()


def drawn(seed: int) -> Job:
    """A random job; the network is drawn from the seed in the task file."""
    rng = random.Random(seed)
    flag_mb = rng.choice([None, None, rng.randint(260, 420)])
    return Job(seed=seed, room_mb=rng.randint(60, 400), flag_mb=flag_mb)


def device(name: str, task: Path, url: str, job: str, home: Path) -> list[str]:
    """Command line of one device."""
    return [
        *(sys.executable, "-m", "edge_sdk", "run", "--task", str(task), "--broker", url),
        *("--job", job, "--device", name, "--profile", "generic-x86", "--threads", "1"),
        *("--state", str(home / name), "--keep-trying", "--json"),
        *("--part", str(PARTS.index(name)), "--parts", str(len(PARTS))),
    ]


def server(task: Path, url: str, job: str, rounds: int, home: Path) -> list[str]:
    """Command line of the server."""
    return [
        *(sys.executable, "-m", "reference_server", "run", "--task", str(task), "--broker", url),
        *("--job", job, "--rounds", str(rounds), "--devices", "2", "--strategy", "last_blocks"),
        *("--round-s", "60", "--deadline-s", str(ROUND_LIMIT_S)),
        *("--state", str(home / "server"), "--json", str(home / "report.json")),
    ]


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """The process, ended when the block ends."""
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        process.kill()
        process.wait()


def play(job: Job, rounds: int, url: str, home: Path) -> None:
    """Play a job to its end and note what happened."""
    home.mkdir()
    task, name = home / "random_model.py", f"job-{job.seed}"
    task.write_text(MODEL.read_text().replace("SEED = 0", f"SEED = {job.seed}", 1))
    log = home / "house.log"
    inside = device("house", task, url, name, home)
    if job.flag_mb is not None:
        inside += ["--memory-mb", str(job.flag_mb)]
    beside = [sys.executable, "-c", NEIGHBOUR, str(job.seed), str(job.room_mb)]
    house = House(BASE_MB + job.room_mb)
    try:
        with ExitStack() as stack, (home / "other.log").open("wb") as other:
            serving = subprocess.Popen(
                server(task, url, name, rounds, home), stdout=other, stderr=other
            )
            stack.enter_context(ended(serving))
            anchor = device("anchor", task, url, name, home)
            stack.enter_context(ended(subprocess.Popen(anchor, stdout=other, stderr=other)))
            agent = stack.enter_context(ended(house.start("device", inside, log)))
            until_s = time.monotonic() + JOB_LIMIT_S + rounds * ROUND_LIMIT_S
            # The neighbour comes once the device is there, as on a board that has been up for long.
            while b'"plan"' not in log.read_bytes() and time.monotonic() < until_s:
                if serving.poll() is not None:
                    break
                time.sleep(0.05)
            neighbour = house.start("neighbour", beside, home / "neighbour.log")
            stack.enter_context(ended(neighbour))
            while serving.poll() is None and time.monotonic() < until_s:
                time.sleep(0.1)
                if agent.poll() not in (None, 0):
                    job.agent_deaths += 1
                    agent = stack.enter_context(ended(house.start("device", inside, log)))
                if neighbour.poll() is not None:
                    job.neighbour_deaths += 1
                    neighbour = stack.enter_context(
                        ended(house.start("neighbour", beside, home / "neighbour.log"))
                    )
    finally:
        house.close()
    judge(job, rounds, home)


def judge(job: Job, rounds: int, home: Path) -> None:
    """What the server counted and what the device said."""
    path = home / "report.json"
    entries = json.loads(path.read_text())["rounds"] if path.exists() else []
    rows = {e["round"]: row for e in entries for row in e["devices"] if row["id"] == "house"}
    declined: dict[int, str] = {}
    for line in (home / "house.log").read_text(errors="replace").splitlines():
        job.lowered += "too little memory; the next plan is lower" in line
        event: dict[str, Any] = json.loads(line) if line.startswith("{") else {"event": ""}
        job.plans += event["event"] == "plan"
        if event["event"] == "decline":
            declined[event["round"]] = event["reason"]
        elif event["event"] == "killed":
            job.trainer_kills += event["memory"]
            job.trainer_crashes += not event["memory"]
    # Rounds that nobody finished are none of those that were asked for.
    job.rounds = max([rounds, *(entry["round"] for entry in entries)])
    for number in range(1, job.rounds + 1):
        row, why = rows.get(number, {"verdict": "no answer"}), declined.get(number, "")
        if row["verdict"] == "accepted":
            job.accepted += 1
            ratio = row["measured_peak_bytes"] / row["plan_peak_bytes"]
            job.over_plan = max(job.over_plan, ratio)
        elif RIGHT_REASONS.search(why):
            job.declined += 1
        else:
            job.lost += 1
            job.why_lost += f"round {number}: {why or row['verdict']}; "


def kernel_kills() -> int:
    """Processes the kernel killed for memory, on the whole machine."""
    found = re.search(r"^oom_kill (\d+)$", (PROC / "vmstat").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0


def figures_of(jobs: list[Job], killed: int) -> dict[str, float]:
    """The keys of the report."""
    rounds = sum(job.rounds for job in jobs)
    return {
        "rounds": rounds,
        "agent_deaths": sum(job.agent_deaths for job in jobs),
        "trainer_kills": sum(job.trainer_kills for job in jobs),
        "trainer_crashes": sum(job.trainer_crashes for job in jobs),
        "plans_lowered": sum(job.lowered for job in jobs),
        "rounds_accepted": sum(job.accepted for job in jobs),
        "rounds_declined": sum(job.declined for job in jobs),
        "rounds_lost": sum(job.lost for job in jobs),
        "rounds_lost_share": sum(job.lost for job in jobs) / rounds if rounds else 1.0,
        "neighbour_deaths": sum(job.neighbour_deaths for job in jobs),
        "kernel_kills_on_machine": killed,
        "median_measured_over_planned": statistics.median(job.over_plan for job in jobs),
    }


def table(jobs: list[Job]) -> Iterator[str]:
    """One line for each job."""
    yield "seed  room MB  flag MB  rounds  accepted  declined  lost  kills  lowered  crashes  plans"
    for job in jobs:
        yield (
            f"{job.seed:>4}{job.room_mb:>9}{job.flag_mb or '-':>9}{job.rounds:>8}{job.accepted:>10}"
            f"{job.declined:>10}{job.lost:>6}{job.trainer_kills:>7}{job.lowered:>9}"
            f"{job.trainer_crashes:>9}{job.plans:>7}  {job.why_lost}"
        )


def main() -> int:
    """Play the jobs one after another, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="end within a minute")
    parser.add_argument("--seed", type=int, default=101, help="of the first job")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep", type=Path, help="keep all logs in this new directory")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    count, rounds, limit_s = (2, 3, 40.0) if arguments.quick else (20, 10, float("inf"))
    jobs: list[Job] = []
    before, started_s = kernel_kills(), time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        home = arguments.keep or Path(directory)
        home.mkdir(exist_ok=True)
        broker = choose("auto", home / "broker")
        assert isinstance(broker, BrokerProcess)
        broker.start()
        try:
            for seed in range(arguments.seed, arguments.seed + count):
                took_s = time.monotonic() - started_s
                if jobs and took_s + took_s / len(jobs) > limit_s:
                    break
                jobs.append(drawn(seed))
                play(jobs[-1], rounds, broker.url, home / f"job-{seed}")
                print(f"job {seed}: {asdict(jobs[-1])}", file=sys.stderr)
        finally:
            broker.stop()
    figures = figures_of(jobs, kernel_kills() - before)
    print("\n".join(table(jobs)))
    for key, value in figures.items():
        print(f"{key:<30}{value:>12.4g}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result(arguments.quick, broker, jobs, figures)))
    return 0


def result(
    quick: bool, broker: BrokerProcess, jobs: list[Job], figures: dict[str, float]
) -> dict[str, Any]:
    """The JSON document."""
    return {
        "name": "never_killed",
        "quick": quick,
        "machine": {
            "cpus": os.cpu_count(),
            "platform": platform.platform(),
            "load": os.getloadavg()[0],
            "broker": f"{broker.kind} {broker.version}",
        },
        "figures": figures,
        "rows": [asdict(job) for job in jobs],
    }


if __name__ == "__main__":
    sys.exit(main())

"""The commands of ``reference-server``; each only reads its arguments and calls one module.

Exit codes: 0 done, 2 you can fix it, 3 network, 4 the other side refused.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_sdk import __version__
from edge_sdk.brokers import BROKERS
from edge_sdk.errors import ConfigError, EdgeError, LinkError, PeerError, ProtocolMisuse
from edge_sdk.wire import DEVICE_ID
from reference_server.screen import Screen, printable, round_line, summary

if TYPE_CHECKING:
    from reference_server.ledger import Ledger

PROGRAM = "reference-server"
PATH = click.Path(path_type=Path)
DEFAULT_PORT = 1883
DEFAULT_ROUND_S = 60.0
# When the command began, monotonic. Not the process's age: a script may have become this process.
# Four threads share the interpreter; with its usual 5 ms, each answer waits for several turns.
SWITCH_INTERVAL_S = 0.0005
STARTED_S = time.monotonic() - time.process_time()


@click.group(context_settings={"max_content_width": 100}, invoke_without_command=True)
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Train one model on many unequal devices, over MQTT."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help(), err=True)
        context.exit(2)


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command that trains has."""
    options = (
        click.option(
            "--strategy",
            default="last_blocks",
            show_default=True,
            help="full: everyone trains everything; last_blocks: the last blocks each can afford.",
        ),
        click.option(
            "--codec",
            default="balanced",
            show_default=True,
            help="Updates as lossless, fp16, balanced or tiny.",
        ),
        click.option("--rounds", type=click.IntRange(1, 1_000_000), default=10, show_default=True),
        click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True),
        click.option(
            "--broker",
            default="auto",
            show_default=True,
            help="auto, mosquitto, embedded, or mqtt(s)://host:port of your own.",
        ),
        click.option(
            "--broker-profile",
            type=click.Choice(sorted(BROKERS)),
            help="Limits of a broker of your own.  [that of the broker, else generic]",
        ),
        click.option(
            "--round-s",
            type=click.FloatRange(1.0, 1e6),
            help="Time a device may plan for a round, in its own seconds.  [demo: 4, else 60]",
        ),
        click.option(
            "--deadline-s",
            type=click.FloatRange(1.0, 1e7),
            help="Time the server waits.  [three times --round-s, at least 30]",
        ),
        click.option("--json", "json_path", type=PATH, help="Write the report here."),
        click.option("--state", "state_dir", type=PATH, help="Where everything is kept."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command()
@_common
@click.option("--devices", help="Profiles, comma separated; see edge-sdk plan --profile all.")
def demo(devices: str | None, **options: Any) -> None:
    """Train a vision transformer on handwritten digits with four unequal devices, all here."""
    from reference_server.demo import DEMO_DEVICES, DEMO_ROUND_S, shipped_task

    options["round_s"] = options["round_s"] or DEMO_ROUND_S
    chosen = ",".join(DEMO_DEVICES) if devices is None else devices
    _simulate(shipped_task(), chosen, options)


@cli.command()
@_common
@click.option("--task", "task_path", type=PATH, required=True, help="A Python file with task().")
@click.option("--devices", required=True, help="Profiles, comma separated.")
def simulate(task_path: Path, devices: str, **options: Any) -> None:
    """Train a task of your own with simulated devices, all on this machine."""
    _simulate(task_path.absolute(), devices, options)


def _simulate(task_path: Path, devices: str, options: dict[str, Any]) -> None:
    from edge_sdk.profile import shipped_profiles
    from edge_sdk.task import check_task_file
    from reference_server import demo as demos

    check_task_file(task_path)
    json_path = options.pop("json_path")
    state_dir = options.pop("state_dir") or Path(time.strftime("edge-demo-%Y%m%d-%H%M%S"))
    profiles = tuple(name.strip() for name in devices.split(",") if name.strip())
    if not profiles:
        raise ConfigError(
            f"--devices {devices!r} names no profile; give at least one, comma separated: "
            f"{', '.join(shipped_profiles())}"
        )
    _settle_times(options)
    _check_terms(options)
    _check_json_path(json_path)
    settings = demos.DemoSettings(
        task_path=task_path, state_dir=state_dir, job="demo", profiles=profiles,
        started_s=STARTED_S, **options,
    )  # fmt: skip
    with _stoppable(state_dir):
        _write_json(json_path, demos.run(settings))


@cli.command()
@_common
@click.option("--task", "task_path", type=PATH, required=True, help="A Python file with task().")
@click.option("--job", help="Name of the job.  [default: made from the task file's name]")
@click.option(
    "--devices", "min_devices", type=click.IntRange(1, 10_000), default=1, show_default=True,
    help="Open the first round when so many are here.",
)  # fmt: skip
@click.option(
    "--quorum", type=click.IntRange(1, 10_000), default=1, show_default=True,
    help="Publish a version when so many updates are in.",
)  # fmt: skip
@click.option(
    "--port", type=click.IntRange(0, 65535), default=DEFAULT_PORT, show_default=True,
    help="Port of our broker; 0: any free one.",
)  # fmt: skip
@click.option("--bind", default="127.0.0.1", show_default=True, help="Where our broker listens.")
@click.option("--threads", type=click.IntRange(1, 512), default=1, show_default=True)
@click.option("--events", is_flag=True, hidden=True)
def run(**options: Any) -> None:
    """Run the server of one job to its last round; continue it if it was interrupted."""
    _run(**options)


def _run(
    *, task_path: Path, job: str | None, min_devices: int, quorum: int, port: int, bind: str,
    events: bool, json_path: Path | None, state_dir: Path | None, broker: str,
    broker_profile: str | None, **terms: Any,
) -> None:  # fmt: skip
    from edge_sdk.task import check_task_file
    from reference_server import broker as brokers
    from reference_server.ledger import Ledger
    from reference_server.rounds import RoundPolicy

    check_task_file(task_path)
    _settle_times(terms)
    _check_terms(terms)
    _check_json_path(json_path)
    name = _job_name(job, task_path)
    home = state_dir or Path("edge-server") / name
    server_broker = brokers.choose(broker, home / "broker", port, bind)
    if not events:  # whoever supervises us starts the broker beside us
        server_broker.check()
    screen = Screen(terms["rounds"])
    report = _event_printer() if events else screen.show
    facts = {"kind": server_broker.kind, "version": server_broker.version}
    wait_s = terms.pop("deadline_s")
    policy = RoundPolicy(min_devices=quorum, deadline_s=wait_s, extend_s=wait_s / 2)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # The ledger is opened before torch is loaded, which takes long, so that a fault comes first.
    with _stoppable(None if events else home), Ledger.open(home) as ledger:
        from reference_server.coordinator import Coordinator, ServerSettings

        report({"event": "loaded"})
        settings = ServerSettings(
            url=server_broker.url, job=name, task_path=task_path, state_dir=home,
            min_devices=min_devices, policy=policy, broker=facts, report=report,
            look_after=server_broker.ensure_running,
            broker_profile=broker_profile or server_broker.limits, **terms,
        )  # fmt: skip
        coordinator = Coordinator(settings, ledger)
        try:
            done = coordinator.finished_before()
            if done is not None:
                report({"event": "finished", "rounds": len(done["rounds"])})
                report({"event": "done", "report": done})
            else:
                server_broker.start()
                if not events:
                    screen.line(server_broker.describe())
                    screen.line(_join_line(task_path, server_broker.url, bind, name, min_devices))
                with nullcontext() if events else screen:
                    done = coordinator.run()
        finally:
            coordinator.close()
            server_broker.stop()
    if not events:
        for line in summary(done):
            screen.line(line)
    _write_json(json_path, done)


@cli.command()
@click.option("--state", "state_dir", type=PATH, required=True, help="The server's directory.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def status(state_dir: Path, as_json: bool) -> None:
    """Show the rounds of a job and what became of them; may be used while the server runs."""

    with _ledger(state_dir) as ledger:
        rows: list[dict[str, Any]] = [
            {
                "job": job,
                "round": s.round,
                "phase": s.phase.name,
                "version": s.version,
                "verdicts": s.verdicts,
                "samples": s.samples,
                "update_bytes": s.size_bytes,
            }
            for job in ledger.jobs()
            for s in ledger.history(job)
        ]
    if as_json:
        click.echo(json.dumps({"rounds": rows}, indent=2))
        return
    for row in rows:
        click.echo(round_line(row))
    if not rows:
        click.echo(f"{state_dir}: no round yet")


@cli.command()
@click.option("--state", "state_dir", type=PATH, required=True, help="The server's directory.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def audit(state_dir: Path, as_json: bool) -> None:
    """Check the ledger's invariants; exit 2 when one is violated."""
    with _ledger(state_dir) as ledger:
        checks = [check for job in ledger.jobs() for check in ledger.audit(job)]
    if as_json:
        rows = [
            {"invariant": c.name, "ok": c.ok, "count": c.count, "detail": c.detail} for c in checks
        ]
        click.echo(json.dumps({"ok": all(c.ok for c in checks), "checks": rows}, indent=2))
    else:
        for check in checks:
            verdict = "ok    " if check.ok else "BROKEN"
            click.echo(f"{verdict} {check.name}: {check.count} {check.detail}".rstrip())
        if not checks:
            click.echo(f"{state_dir}: no job yet")
    broken = [check.name for check in checks if not check.ok]
    if broken:
        raise ConfigError(
            f"{state_dir}: {len(broken)} of {len(checks)} checks failed ({'; '.join(broken)}): do "
            "not trust its versions; restore a copy, or start a new job in another directory"
        )


@cli.command()
@click.option("--state", "state_dir", type=PATH, required=True, help="The server's directory.")
@click.option("--task", "task_path", type=PATH, required=True, help="The job's task file.")
@click.option("--version", "number", type=click.IntRange(0), help="The latest if left out.")
@click.option("--output", type=PATH, default=Path(), help="Directory for the files.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def export(
    state_dir: Path, task_path: Path, number: int | None, output: Path, as_json: bool
) -> None:
    """Write a version as safetensors and ONNX, the latter checked in ONNX Runtime."""
    from edge_sdk.task import check_task_file
    from reference_server.versions import VersionStore

    check_task_file(task_path)
    home = _server_home(state_dir)
    if not (home / "versions").is_dir():
        raise ConfigError(f"{state_dir} holds no versions; give the server's --state directory")
    versions = VersionStore(home)
    known = versions.versions()
    chosen = max(known, default=None) if number is None else number
    if chosen is None:
        raise ConfigError(f"{state_dir} holds no version yet; run the server first")
    if chosen not in known:
        raise ConfigError(
            f"{state_dir} holds no version {chosen}; it holds {len(known)}, "
            f"from {min(known)} to {max(known)}"
        )
    manifest = versions.load_manifest(chosen)
    _make_output(output)
    from reference_server.evaluate import Evaluator
    from reference_server.export import check_model, export_all

    evaluator = Evaluator(task_path, seed=0)
    check_model(evaluator.spec, manifest, task_path)
    files, fault = export_all(evaluator, versions, manifest, output)
    if as_json:
        click.echo(json.dumps({"version": manifest.version, "files": files}))
    else:
        for kind, path in files.items():
            click.echo(f"version {manifest.version} as {kind}: {path}")
    if fault:
        raise ConfigError(f"no ONNX file was written: {fault}")


def _make_output(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {directory}: cannot be created: {error.strerror}; name another directory"
        ) from error


def _server_home(state_dir: Path) -> Path:
    """The server's own directory, also where that of a whole demo or simulation is given."""
    inner = state_dir / "server"
    return inner if inner.is_dir() and not any(state_dir.glob("ledger.*")) else state_dir


def _ledger(state_dir: Path) -> Ledger:
    """The ledger of a server that may be running."""
    home = _server_home(state_dir)
    if not any(home.glob("ledger.*")):
        raise ConfigError(f"{state_dir} holds no ledger; give the server's --state directory")
    from reference_server.ledger import Ledger

    return Ledger.open(home, exclusive=False)


def _settle_times(terms: dict[str, Any]) -> None:
    terms["round_s"] = terms["round_s"] or DEFAULT_ROUND_S
    terms["deadline_s"] = terms["deadline_s"] or max(30.0, 3 * terms["round_s"])


def _check_terms(terms: dict[str, Any]) -> None:
    """Fail before anything is started when a term does not exist."""
    from edge_sdk.cost import bits_per_param
    from edge_sdk.strategies import strategy_named

    strategy_named(terms["strategy"])
    bits_per_param(terms["codec"])


def _job_name(job: str | None, task_path: Path) -> str:
    made = re.sub(r"[^a-z0-9]+", "-", task_path.stem.lower()).strip("-")[:64]
    name = made if job is None else job
    if re.match(DEVICE_ID, name) is None:
        raise ConfigError(f"--job {name!r}: use 1 to 64 of the characters a-z, 0-9 and '-'")
    return name


def _join_line(task_path: Path, url: str, bind: str, job: str, devices: int) -> str:
    """The command that joins a device; without the credentials the server itself uses."""
    import shlex
    import socket

    from edge_sdk.link import parse_address

    address = parse_address(url)
    shown = f"{'mqtts' if address.tls else 'mqtt'}://{address}"
    if bind in ("0.0.0.0", "::"):
        shown = f"mqtt://{socket.gethostname()}:{address.port}"
    words = ["edge-sdk", "run", "--task", str(task_path), "--broker", shown, "--job", job]
    line = f"on each device: {shlex.join(words)}"
    return line if devices == 1 else f"{line} --part I --parts {devices}, I from 0 to {devices - 1}"


def _event_printer() -> Callable[[dict[str, Any]], None]:
    """Events as JSON lines on standard output, which from now on is for them alone."""
    lines, sys.stdout = sys.stdout, sys.stderr

    def print_event(event: dict[str, Any]) -> None:
        lines.write(json.dumps(event) + "\n")
        lines.flush()

    return print_event


def _check_json_path(path: Path | None) -> None:
    """Fail before hours of training when the report could not be written after them."""
    if path is None:
        return
    try:
        is_new = not path.exists()
        path.open("a").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise ConfigError(
            f"--json {path}: cannot be written: {error.strerror}; name a file in a directory that "
            "exists and that this user may write to"
        ) from error


def _write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        try:
            path.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"--json {path}: cannot be written any more: {error.strerror}; the same command "
                "with another --json and this run's --state writes it again"
            ) from error


@contextmanager
def _stoppable(state_dir: Path | None) -> Iterator[None]:
    """End in good order on SIGTERM and SIGHUP as on Ctrl-C, and say how to go on."""

    def stop(number: int, _frame: object) -> None:
        raise KeyboardInterrupt(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except KeyboardInterrupt as error:
        if state_dir is not None:
            click.echo(
                f"stopped; the same command with --state {state_dir} goes on from here", err=True
            )
        raise SystemExit(128 + (error.args[0] if error.args else signal.SIGINT)) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stderr(logging.StreamHandler[Any]):
    """Logs to standard error as it is now: while a live table is shown, above it.

    What a message quotes may come from a hostile device, and must not reach a terminal as codes.
    """

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(printable(line) for line in super().format(record).splitlines())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a fault of ours keeps its traceback."""
    # No matrix products here for OpenBLAS to start threads for, which doubles numpy's import time.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s %(message)s", handlers=[_Stderr()]
    )
    try:
        result = cli.main(args=argv, prog_name=PROGRAM, standalone_mode=False)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        where = PROGRAM if context is None else context.command_path
        return _complain(f"{error.format_message()} See {where} --help", 2)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ProtocolMisuse:
        raise
    except EdgeError as error:
        return _complain(str(error), _exit_code(error))
    return result if isinstance(result, int) else 0


def _complain(what: str, code: int) -> int:
    click.echo(f"{PROGRAM}: {printable(' '.join(what.split()))}", err=True)
    return code


def _exit_code(error: EdgeError) -> int:
    if isinstance(error, LinkError):
        return 3
    return 4 if isinstance(error, PeerError) else 2

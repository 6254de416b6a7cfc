"""The commands of ``reference-server``; each only reads its arguments and calls one module.

Exit codes: 0 done, 2 you can fix it, 3 network, 4 the other side refused.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_sdk import __version__
from edge_sdk.errors import ConfigError, EdgeError, LinkError, PeerError, ProtocolMisuse

if TYPE_CHECKING:
    from reference_server.ledger import Ledger

PATH = click.Path(path_type=Path)
DEFAULT_PORT = 1883
DEFAULT_ROUND_S = 60.0


@click.group()
@click.version_option(__version__)
def cli() -> None:
    """Aggregator for fleets of unequal devices."""


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command that trains has."""
    for option in (
        click.option(
            "--strategy",
            default="last_blocks",
            show_default=True,
            help="full: everyone trains everything; last_blocks: the last blocks each can afford.",
        ),
        click.option(
            "--codec", default="int8", show_default=True, help="Updates as fp32, fp16 or int8."
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
            "--round-s",
            type=click.FloatRange(1.0, 1e6),
            help="Time a device may plan for a round, in its own seconds.  [demo: 5, else 60]",
        ),
        click.option(
            "--deadline-s",
            type=click.FloatRange(1.0, 1e7),
            help="Time the server waits.  [three times --round-s, at least 30]",
        ),
        click.option("--json", "json_path", type=PATH, help="Write the report here."),
        click.option("--state", "state_dir", type=PATH, help="Where everything is kept."),
    ):
        command = option(command)
    return command


@cli.command()
@_common
@click.option("--devices", help="Profiles, comma separated; see edge-sdk plan --profile all.")
def demo(devices: str | None, **options: Any) -> None:
    """Train a vision transformer on handwritten digits with four unequal devices, all here."""
    from reference_server.demo import DEMO_DEVICES, DEMO_ROUND_S, shipped_task

    options["round_s"] = options["round_s"] or DEMO_ROUND_S
    _simulate(shipped_task(), devices.split(",") if devices else list(DEMO_DEVICES), options)


@cli.command()
@_common
@click.option("--task", "task_path", type=PATH, required=True, help="A Python file with task().")
@click.option("--devices", required=True, help="Profiles, comma separated.")
def simulate(task_path: Path, devices: str, **options: Any) -> None:
    """Train a task of your own with simulated devices, all on this machine."""
    _simulate(task_path.absolute(), devices.split(","), options)


def _simulate(task_path: Path, devices: list[str], options: dict[str, Any]) -> None:
    from edge_sdk.task import check_task_file
    from reference_server import demo as demos

    check_task_file(task_path)
    json_path = options.pop("json_path")
    state_dir = options.pop("state_dir") or Path(time.strftime("edge-demo-%Y%m%d-%H%M%S"))
    profiles = tuple(name.strip() for name in devices if name.strip())
    if not profiles:
        raise ConfigError("--devices names no profile; give at least one, comma separated")
    _settle_times(options)
    _check_terms(options)
    settings = demos.DemoSettings(
        task_path=task_path, state_dir=state_dir, job="demo", profiles=profiles, **options
    )
    _write_json(json_path, demos.run(settings))


@cli.command()
@_common
@click.option("--task", "task_path", type=PATH, required=True, help="A Python file with task().")
@click.option("--job", help="Name of the job; the task's name if left out.")
@click.option(
    "--devices", "min_devices", type=click.IntRange(1, 10_000), default=1, show_default=True,
    help="Open the first round when so many are here.",
)  # fmt: skip
@click.option(
    "--quorum", type=click.IntRange(1, 10_000), default=1, show_default=True,
    help="Publish a version when so many updates are in.",
)  # fmt: skip
@click.option("--port", type=click.IntRange(1, 65535), default=DEFAULT_PORT, show_default=True)
@click.option("--bind", default="127.0.0.1", show_default=True, help="Where our broker listens.")
@click.option("--threads", type=click.IntRange(1, 512), default=1, show_default=True)
@click.option("--events", is_flag=True, hidden=True)
def run(**options: Any) -> None:
    """Run the server of one job to its last round; continue it if it was interrupted."""
    _run(**options)


def _run(
    *, task_path: Path, job: str | None, min_devices: int, quorum: int, port: int, bind: str,
    events: bool, json_path: Path | None, state_dir: Path | None, broker: str,
    **terms: Any,
) -> None:  # fmt: skip
    from edge_sdk.task import check_task_file
    from reference_server import broker as brokers
    from reference_server.rounds import RoundPolicy
    from reference_server.screen import Screen, summary

    check_task_file(task_path)
    _settle_times(terms)
    _check_terms(terms)
    deadline_s = terms.pop("deadline_s")
    name = job or _job_name(task_path)
    home = state_dir or Path("edge-server") / name
    server_broker = brokers.choose(broker, home / "broker", port, bind)
    screen = Screen(terms["rounds"])
    if not events:
        screen.line(server_broker.describe())
        screen.line(_join_line(task_path, server_broker.url, bind, name, min_devices))
    server_broker.start()
    try:
        from reference_server.coordinator import Coordinator, ServerSettings

        settings = ServerSettings(
            url=server_broker.url, job=name, task_path=task_path, state_dir=home,
            min_devices=min_devices, policy=RoundPolicy(min_devices=quorum, deadline_s=deadline_s,
            extend_s=deadline_s / 2), report=_print_event if events else screen.show,
            look_after=server_broker.ensure_running, **terms,
        )  # fmt: skip
        with screen:
            report = Coordinator(settings).run()
    finally:
        server_broker.stop()
    report["broker"] = {"kind": server_broker.kind, "version": server_broker.version}
    if not events:
        for line in summary(report):
            screen.line(line)
    _write_json(json_path, report)


@cli.command()
@click.option("--state", "state_dir", type=PATH, required=True, help="The server's directory.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")
def status(state_dir: Path, as_json: bool) -> None:
    """Show the rounds of a job and what became of them; may be used while the server runs."""
    from reference_server.screen import human_bytes

    with _ledger(state_dir) as ledger:
        rows: list[dict[str, Any]] = [
            {
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
        click.echo(
            f"round {row['round']:<4} {row['phase']:<10} version {row['version']}  "
            f"{row['verdicts']}  {row['samples']} samples  {human_bytes(row['update_bytes'])}"
        )


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
    if not all(check.ok for check in checks):
        raise ConfigError(f"{state_dir}: the ledger violates an invariant, see above")


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
    from edge_sdk.store import make_directory
    from reference_server.evaluate import Evaluator
    from reference_server.export import export_onnx, export_safetensors
    from reference_server.versions import VersionStore

    if not (state_dir / "versions").is_dir():
        raise ConfigError(f"{state_dir} holds no versions; give the server's --state directory")
    versions = VersionStore(state_dir)
    chosen = versions.latest() if number is None else number
    if chosen is None:
        raise ConfigError(f"{state_dir} holds no version yet; run the server first")
    manifest = versions.load_manifest(chosen)
    evaluator = Evaluator(task_path, seed=0)
    make_directory(output)
    files = {
        "safetensors": export_safetensors(
            evaluator, versions, manifest, output / "model.safetensors"
        ),
        "onnx": export_onnx(evaluator, versions, manifest, output / "model.onnx"),
    }
    if as_json:
        shown = {kind: str(path) for kind, path in files.items()}
        click.echo(json.dumps({"version": manifest.version, "files": shown}))
    else:
        for kind, path in files.items():
            click.echo(f"version {manifest.version} as {kind}: {path}")


def _ledger(state_dir: Path) -> Ledger:
    """The ledger of a server that may be running."""
    from reference_server.ledger import Ledger

    if not state_dir.is_dir() or not any(state_dir.glob("ledger.*")):
        raise ConfigError(f"{state_dir} holds no ledger; give the server's --state directory")
    return Ledger.open(state_dir, exclusive=False)


def _settle_times(terms: dict[str, Any]) -> None:
    terms["round_s"] = terms["round_s"] or DEFAULT_ROUND_S
    terms["deadline_s"] = terms["deadline_s"] or max(30.0, 3 * terms["round_s"])


def _check_terms(terms: dict[str, Any]) -> None:
    """Fail before anything is started when a term does not exist."""
    from edge_sdk.codec import CODECS
    from edge_sdk.strategies import strategy_named

    strategy_named(terms["strategy"])
    if terms["codec"] not in CODECS:
        raise ConfigError(f"codec {terms['codec']!r} is unknown; known are {', '.join(CODECS)}")


def _job_name(task_path: Path) -> str:
    name = "".join(c if c.isalnum() else "-" for c in task_path.stem.lower()).strip("-")
    if not name:
        raise ConfigError(f"{task_path}: no job name can be made of it; give --job")
    return name[:64]


def _join_line(task_path: Path, url: str, bind: str, job: str, devices: int) -> str:
    import socket

    if bind in ("0.0.0.0", "::"):
        url = url.replace("127.0.0.1", socket.gethostname()).replace("[::1]", socket.gethostname())
    return (
        "on each device: edge-sdk run "
        f"--task {task_path} --broker {url} --job {job} --part I --parts {devices}"
    )


def _print_event(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _write_json(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        try:
            path.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {path}: cannot be written: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        cli.main(args=argv, prog_name="reference-server", standalone_mode=False)
        return 0
    except click.ClickException as error:
        error.show()
        return 2
    except click.Abort:
        return 130
    except KeyboardInterrupt:
        return 130
    except ProtocolMisuse:
        raise
    except EdgeError as error:
        click.echo(f"reference-server: {error}", err=True)
        return _exit_code(error)


def _exit_code(error: EdgeError) -> int:
    if isinstance(error, LinkError):
        return 3
    return 4 if isinstance(error, PeerError) else 2

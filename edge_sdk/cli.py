"""The commands of ``edge-sdk``; each reads its arguments, calls the house and prints.

Exit codes: 0 done, 2 you can fix it, 3 network, 4 the other side refused. What is heavy (torch,
numpy, onnxruntime, the agent) is imported inside the command that needs it.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
import msgspec

from edge_sdk import __version__
from edge_sdk.brokers import BROKERS
from edge_sdk.cli_plan import plan, profile
from edge_sdk.cli_rehearse import tune
from edge_sdk.console import (
    MEASURE,
    PATH,
    check_part,
    extra,
    home,
    json_option,
    measured_profile,
    pip,
    print_json,
    state_option,
    write,
)
from edge_sdk.errors import MIB, ConfigError, EdgeError, LinkError, PeerError, ProtocolMisuse
from edge_sdk.profile import DeviceProfile, load_profile, profile_toml
from edge_sdk.wire import DEVICE_ID

if TYPE_CHECKING:
    import numpy as np


@click.group(context_settings={"max_content_width": 100})
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Train on this device what it can afford, together with others, over MQTT."""
    if os.environ.get("NO_COLOR"):
        context.color = False


cli.add_command(profile)
cli.add_command(plan)
cli.add_command(tune)


@cli.command()
@click.option("--task", "task_path", type=PATH, required=True, help="A Python file with task().")
@click.option(
    "--broker", envvar="EDGE_BROKER", show_envvar=True, required=True,
    help="mqtt://[USER:PASSWORD@]HOST[:PORT], or mqtts:// for TLS.",
)  # fmt: skip
@click.option("--job", required=True, help="Name of the job, as the server prints it.")
@click.option("--device", help="This device's id.  [default: host name and a random number]")
@click.option(
    "--profile", "profile_name", default=MEASURE, show_default=True,
    help="A name, a TOML file, or measure: once, then kept in the state directory.",
)  # fmt: skip
@click.option("--part", type=click.IntRange(0), default=0, show_default=True, help="Whose data.")
@click.option("--parts", type=click.IntRange(1), default=1, show_default=True)
@state_option
@click.option("--memory-mb", type=click.IntRange(1, 1 << 30), help="Use at most so many MiB.")
@click.option("--threads", type=click.IntRange(1, 4096), help="[default: the profile's cores]")
@click.option("--ca-file", help="PEM file with the CA of the broker's certificate.")
@click.option(
    "--broker-profile", type=click.Choice(sorted(BROKERS)), default="generic", show_default=True,
    help="Limits of the broker that it does not tell by itself.",
)  # fmt: skip
@click.option("--keep-trying", is_flag=True, help="Wait for a broker that is not there yet.")
@click.option("--nursery", hidden=True, help="Socket of a process that forks trainers.")
@click.option("--verbose", is_flag=True, help="Log more.")
@json_option
def run(**options: Any) -> None:
    """Join a job and work until it is over. SIGTERM ends it in good order."""
    with _end_on_sigterm():
        _run(**options)


def _run(
    *, task_path: Path, broker: str, job: str, device: str | None, profile_name: str, part: int,
    parts: int, state_dir: Path | None, memory_mb: int | None, threads: int | None,
    ca_file: str | None, broker_profile: str, keep_trying: bool, nursery: str | None,
    verbose: bool, as_json: bool,
) -> None:  # fmt: skip
    from edge_sdk.link import parse_address
    from edge_sdk.mqtt import connect_once
    from edge_sdk.store import DirectoryLock, Identity, make_directory
    from edge_sdk.task import check_task_file

    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(message)s")
    check_task_file(task_path)
    check_part(part, parts)
    if nursery is None and find_spec("torch") is None:
        raise ConfigError(f"torch is not installed: {pip('train')}")
    address = parse_address(broker)
    if re.match(DEVICE_ID, job) is None:
        raise ConfigError(f"--job {job!r}: use 1 to 64 of the characters a-z, 0-9 and '-'")
    state_dir = make_directory(state_dir or home() / job)
    lock = DirectoryLock(state_dir)
    try:
        identity = Identity.load_or_create(
            state_dir, stem=socket.gethostname(), rng=random.SystemRandom(), device=device
        )
        if not keep_trying:  # fail now, not after minutes of trying
            connect_once(broker, client_id=identity.device, ca_file=ca_file)
        profile = _own_profile(profile_name, state_dir)
        from edge_sdk.agent import Agent, AgentSettings

        report = _reporter(as_json)
        where = {"broker": str(address), "state": str(state_dir)}
        who = {"device": identity.device, "job": job, "profile": profile.name}
        report({"event": "started", **who, **where})
        settings = AgentSettings(
            url=broker, job=job, device=identity.device, task_path=task_path, state_dir=state_dir,
            profile=profile, part=part, parts=parts, nursery=nursery, ca_file=ca_file,
            threads=threads or max(1, min(profile.cores, os.cpu_count() or 1)),
            memory_bytes=None if memory_mb is None else memory_mb * MIB, report=report,
            broker_profile=broker_profile,
        )  # fmt: skip
        Agent(settings).run()
        report({"event": "done", "job": job})
    finally:
        lock.release()


def _own_profile(name: str, state_dir: Path) -> DeviceProfile:
    """The profile to run with; a measured one is kept, so that a device plans alike every day."""
    if name != MEASURE:
        return load_profile(name)
    path = state_dir / "profile.toml"
    if not path.exists():
        write(path, profile_toml(measured_profile(state_dir)).encode())
    return load_profile(path)


class _Terminated(BaseException):
    """SIGTERM arrived."""


@contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """SIGTERM leaves the block in good order; a second one ends the process at once."""

    def end(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except _Terminated:
        return
    finally:
        signal.signal(signal.SIGTERM, before)


def _reporter(as_json: bool) -> Callable[[dict[str, Any]], None]:
    from edge_sdk.screen import event_words

    def report(event: dict[str, Any]) -> None:
        click.echo(json.dumps(event) if as_json else event_words(event))

    return report


@cli.command()
@click.argument("model_path", metavar="MODEL.onnx", type=PATH)
@click.option("--input", "input_path", type=PATH, required=True, help="Arrays: .npy or .npz.")
@click.option("--output", "output_path", type=PATH, help="Write the outputs here, as .npz.")
@click.option("--threads", type=click.IntRange(1, 4096), default=1, show_default=True)
@json_option
def infer(
    model_path: Path, input_path: Path, output_path: Path | None, threads: int, as_json: bool
) -> None:
    """Run an exported model on arrays from a file."""
    if not model_path.is_file():
        raise ConfigError(f"model {model_path}: no such file; give an exported .onnx file")
    with extra("infer"):
        from edge_sdk.infer import OnnxModel
    from edge_sdk.screen import infer_lines, top_classes

    model = OnnxModel(model_path, threads)
    inputs = _inputs(input_path, tuple(model.inputs))
    started_s = time.perf_counter()
    outputs = model.run(inputs)
    run_s = time.perf_counter() - started_s
    if output_path is not None:
        _save_arrays(output_path, outputs)
    if as_json:
        print_json(
            {
                "model": str(model_path),
                "inputs": {name: list(array.shape) for name, array in inputs.items()},
                "outputs": [list(output.shape) for output in outputs],
                "run_s": run_s,
                "top1": [top_classes(output) for output in outputs],
            }
        )
        return
    click.echo("\n".join(infer_lines(inputs, outputs, run_s)))


def _inputs(path: Path, names: tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    """The file's arrays by input name; a lone array is the lone input, whatever its name."""
    arrays = _load_arrays(path)
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ConfigError(f"{path}: {name or 'the array'} has dtype {array.dtype}, not numbers")
    if len(arrays) == len(names) == 1:
        return {names[0]: next(iter(arrays.values()))}
    if "" in arrays:
        raise ConfigError(f"{path}: one array, the model takes {list(names)}; save them as .npz")
    return arrays


def _load_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays of a .npz file by name, the array of a .npy file under ""; never unpickles."""
    import zipfile
    import zlib

    import numpy as np

    damage = (OSError, ValueError, EOFError, MemoryError, RuntimeError)
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}
            return {name: loaded[name] for name in loaded.files}
    except (*damage, zipfile.BadZipFile, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"{path}: no arrays can be read from it: {reason}; "
            "write them with numpy.save or numpy.savez, without objects"
        ) from error


def _save_arrays(path: Path, outputs: list[np.ndarray[Any, Any]]) -> None:
    import io

    import numpy as np

    buffer = io.BytesIO()
    named: dict[str, Any] = {f"output_{place}": output for place, output in enumerate(outputs)}
    np.savez(buffer, **named)
    write(path, buffer.getvalue())


@cli.command()
@click.option("--broker", envvar="EDGE_BROKER", show_envvar=True, help="Check this broker too.")
@click.option("--ca-file", help="PEM file with the CA of the broker's certificate.")
@state_option
@json_option
def doctor(broker: str | None, ca_file: str | None, state_dir: Path | None, as_json: bool) -> int:
    """Check this machine and the broker. Says for what is wrong how to fix it."""
    from edge_sdk.doctor import examine, exit_code
    from edge_sdk.link import parse_address

    if broker is not None:
        parse_address(broker)
    colors = {"ok": "green", "warn": "yellow", "fail": "red"}
    findings = []
    for finding in examine(state_dir or home(), broker, ca_file):
        findings.append(finding)
        if not as_json:
            verdict = click.style(f"{finding.status:<4}", fg=colors[finding.status])
            click.echo(f"{verdict}  {finding.name:<11}  {finding.seen}")
            if finding.fix:
                click.echo(f"{'':<19}to fix: {finding.fix}")
    failed = [finding.name for finding in findings if finding.status == "fail"]
    if as_json:
        rows = [msgspec.to_builtins(finding) for finding in findings]
        print_json({"ok": not failed, "findings": rows})
    elif failed:
        click.echo(f"{len(failed)} of {len(findings)} failed: {', '.join(failed)}", err=True)
    return exit_code(findings)


@cli.command()
@state_option
@json_option
def status(state_dir: Path | None, as_json: bool) -> None:
    """Show the jobs of this machine. May be used while they run."""
    from edge_sdk.doctor import is_state, state_of
    from edge_sdk.screen import state_lines

    if state_dir is not None and not is_state(state_dir):
        raise ConfigError(
            f"{state_dir} is no state directory: it holds no device-id; check --state"
        )
    homes = [state_dir] if state_dir else sorted(p for p in home().glob("*") if is_state(p))
    states = [state_of(home) for home in homes]
    if as_json:
        print_json({"states": states})
    elif not states:
        click.echo(f"no job was run on this machine yet: nothing in {home()}")
    for state in [] if as_json else states:
        click.echo("\n".join(state_lines(state, time.time())))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a fault of ours keeps its traceback."""
    try:
        result = cli.main(args=argv, prog_name="edge-sdk", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except ProtocolMisuse:
        raise
    except EdgeError as error:
        click.echo(f"edge-sdk: {' '.join(str(error).split())}", err=True)
        return 3 if isinstance(error, LinkError) else 4 if isinstance(error, PeerError) else 2
    return result if isinstance(result, int) else 0

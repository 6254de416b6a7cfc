"""``edge-sdk plan --emulate`` and ``edge-sdk tune``: plans carried out here, and what they cost."""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from edge_sdk.console import (
    MEASURE,
    PATH,
    check_part,
    extra,
    home,
    json_option,
    measured_profile,
    print_json,
    progress,
    state_option,
    write,
)
from edge_sdk.errors import ConfigError, NothingFits
from edge_sdk.figures import LABEL
from edge_sdk.profile import load_profile, parse_profile, profile_toml
from edge_sdk.profile_edit import with_correction

if TYPE_CHECKING:
    from edge_sdk.emulate import Emulated
    from edge_sdk.plan import Plan
    from edge_sdk.tune import Tuned

# How a figure is called, by its name in JSON.
FIGURES = {
    "peak_bytes": "memory at the peak",
    "above_floor_bytes": "  above what torch takes here",
    "peak_with_profile_floor_bytes": "  with torch as the profile says",
    "train_s": "training",
    "flops": "operations",
    "upload_bytes": "upload",
}


def emulate_board(name: str, task_path: Path, terms: dict[str, Any], *, as_json: bool) -> None:
    """Carry out a board's plan here and show the figures; NothingFits when it did not end well."""
    from edge_sdk.task import check_task_file

    check_task_file(task_path)
    with extra("train"):
        from edge_sdk.emulate import Terms, emulate
    board, here = load_profile(name), measured_profile(home(), quick=True)
    progress(f"training here as on {board.name}")
    with tempfile.TemporaryDirectory() as directory:
        found = emulate(board, here, task_path, Path(directory), Terms(**terms))
    if as_json:
        print_json({**terms, **msgspec.to_builtins(found)})
    else:
        click.echo("\n".join(emulated_lines(found)))
    if not found.finished:
        raise NothingFits(f"{found.board}: {found.reason}")


def emulated_lines(found: Emulated) -> Iterator[str]:
    """Under which limits, what was planned, and predicted against measured."""
    from edge_sdk.screen import size, table

    yield f"{found.board}, emulated here"
    yield f"  memory  {size(found.limit_bytes)}, limited by {found.memory_by}"
    if found.plan is None:
        return
    yield f"  speed   {_speed(found)}"
    yield f"  trains  {_ends(found.plan)}; {how(found.plan)}"
    yield ""
    rows = [
        (
            FIGURES[row.name],
            amount(row.name, row.predicted),
            amount(row.name, row.measured),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "",
        )
        for row in found.figures
    ]
    if rows:
        yield from table(("", "predicted", "measured", "ratio", ""), rows)


def _speed(found: Emulated) -> str:
    """What the board's speed comes to here, and what was given."""
    wanted = f"the board's is {found.wanted_cores:.2f} cores of this machine"
    if not found.cores:
        return f"{wanted}, not limited ({found.cores_by}): seconds are this machine's"
    given = f"{wanted}; given {found.cores:.2f}, limited by {found.cores_by}"
    slower = found.wanted_cores > 1.1 * found.cores
    return f"{given}: slower than the board" if slower else given


def amount(name: str, value: float) -> str:
    """A figure in the unit its name ends in."""
    from edge_sdk.screen import size

    if name.endswith("_bytes"):
        return size(value)
    if name.endswith("_s"):
        return f"{value:.3g} s"
    return f"{value / 1e9:,.3g} GFLOP"


def how(plan: Plan) -> str:
    """The way a plan trains, in words."""
    words = [f"{plan.micro_batch} of {plan.batch_size} samples at a time"]
    words += ["activations computed again"] * plan.checkpoint
    words += ["stepped in backward"] * plan.step_in_backward
    prefix = plan.prefix
    if prefix.cache != "none":
        words.append(f"frozen blocks kept {'on disk' if prefix.cache == 'disk' else 'in memory'}")
    if prefix.engine != "torch":
        words.append(f"frozen blocks in {prefix.engine}")
    return ", ".join(words)


@click.command()
@click.option("--task", "task_path", type=PATH, required=True, help="A Python file with task().")
@click.option("--profile", "profile_name", required=True, help="A TOML file, a name, or measure.")
@state_option
@click.option("--save", "save_path", type=PATH, help="Write the profile here.  [default: its file]")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=60.0, show_default=True)
@click.option("--strategy", default="last_blocks", show_default=True)
@click.option("--memory-mb", type=click.IntRange(1, 1 << 30), help="Use at most so many MiB.")
@click.option("--part", type=click.IntRange(0), default=0, show_default=True, help="Whose data.")
@click.option("--parts", type=click.IntRange(1), default=1, show_default=True)
@json_option
def tune(
    task_path: Path, profile_name: str, state_dir: Path | None, save_path: Path | None,
    seconds: float, strategy: str, memory_mb: int | None, part: int, parts: int, as_json: bool,
) -> None:  # fmt: skip
    """Measure a few plans on this device and correct its profile. No network."""
    from edge_sdk.store import DirectoryLock, make_directory
    from edge_sdk.strategies import strategy_named
    from edge_sdk.task import check_task_file

    check_task_file(task_path)
    check_part(part, parts)
    strategy_named(strategy)
    # An agent at work here would be measured too.
    lock = None if state_dir is None else DirectoryLock(make_directory(state_dir))
    try:
        text, where, target = _profile_file(profile_name, state_dir, save_path)
        with extra("train"):
            from edge_sdk.tune import tune_task
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            found = tune_task(
                parse_profile(text, where), task_path, Path(directory), seconds=seconds,
                strategy=strategy, memory_mb=memory_mb, part=part, parts=parts, tell=progress,
            )  # fmt: skip
        day = datetime.date.today().isoformat()
        source = f"measured: by edge-sdk tune, the last of them {found.task} on {day}"
        edited = with_correction(text, where, found.task, found.correction, source)
        write(target.resolve(), edited.encode())
    finally:
        if lock is not None:
            lock.release()
    if as_json:
        print_json({"profile": str(target), **msgspec.to_builtins(found)})
    else:
        click.echo("\n".join([*tuned_lines(found), f"written to {target}"]))


def _profile_file(name: str, state_dir: Path | None, save: Path | None) -> tuple[str, str, Path]:
    """The profile's text, what to call it in errors, and where the corrected one goes."""
    kept = None if state_dir is None else state_dir / "profile.toml"
    target: Path | None
    if name == MEASURE:
        target = save or kept
        if target is not None and kept is not None and kept.exists():
            return kept.read_text(encoding="utf-8"), str(kept), target
    else:
        target = save or (None if LABEL.fullmatch(name) else Path(name))
    if target is None:
        hint = " or --state DIR, as for `edge-sdk run`" if name == MEASURE else ""
        what = "is not in a file yet" if name == MEASURE else "comes with the package"
        raise ConfigError(f"--profile {name} {what}: say where to write it with --save FILE{hint}")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: its directory does not exist; make it first")
    if name == MEASURE:
        return profile_toml(measured_profile(target.parent)), name, target
    profile = load_profile(name)
    if LABEL.fullmatch(name):
        return profile_toml(profile), name, target
    return Path(name).read_text(encoding="utf-8"), name, target


def tuned_lines(found: Tuned) -> Iterator[str]:
    """Predicted and measured, before and after the correction."""
    from edge_sdk.screen import size, table

    by = found.correction
    rows = []
    for row in found.rows:
        if row.problem:
            rows.append((row.what, *[""] * 8, f"not measured: {row.problem}"))
            continue
        predicted_bytes, predicted_s = row.predicted_bytes, row.predicted_step_s
        rows.append(
            (
                row.what,
                size(predicted_bytes),
                size(row.measured_bytes),
                _ratio(row.measured_bytes, predicted_bytes),
                _ratio(row.measured_bytes, predicted_bytes * by.memory),
                f"{predicted_s * 1e3:,.1f} ms",
                f"{row.measured_step_s * 1e3:,.1f} ms",
                _ratio(row.measured_step_s, predicted_s),
                _ratio(row.measured_step_s, predicted_s * by.time),
                f"{_ends(row.plan)}; {how(row.plan)}" if row.judged else "not counted",
            )
        )
    yield f"task {found.task}: memory above the {size(found.floor_bytes)} of torch, seconds a step"
    head = ("predicted", "measured", "ratio", "after")
    yield from table(("", *head, *head, ""), rows)
    yield (
        f"correction: memory x {by.memory:g}, time x {by.time:g}, from {by.samples} plans; "
        f"it was {found.before.memory:g} and {found.before.time:g}"
    )
    if found.engine_step_s:
        times = [f"{name} {s * 1e3:,.1f} ms" for name, s in found.engine_step_s.items()]
        yield f"a step with the frozen blocks in {', in '.join(times)}"


def _ends(plan: Plan) -> str:
    names = plan.blocks
    return ", ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"


def _ratio(measured: float, predicted: float) -> str:
    return f"{measured / predicted:.2f}" if predicted > 0 else "-"

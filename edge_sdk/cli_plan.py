"""``edge-sdk profile`` and ``edge-sdk plan``: what this device, or any other, can afford."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from edge_sdk.cost import CostTable
from edge_sdk.errors import MIB, ConfigError, NothingFits, TaskError
from edge_sdk.profile import DeviceProfile, budget, load_profile, profile_toml, shipped_profiles
from edge_sdk.wire import Training

if TYPE_CHECKING:
    from edge_sdk.plan import Plan
    from edge_sdk.screen import Compared, Outcome

ALL = "all"
# Costs of the largest model allowed are well below.
MAX_COST_TABLE_BYTES = 64 * MIB


class CostFile(CostTable, frozen=True, kw_only=True):
    """A stored cost table, and what of its task a plan depends on besides."""

    training: Training = Training()
    num_examples: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] | None = None


@click.command()
@click.option("--quick", is_flag=True, help="Within 2 seconds instead of 5, without torch.")
@click.option("--seconds", type=click.FloatRange(1, 3600), help="Take at most so long instead.")
@click.option("--broker", help="Measure the link to it: mqtt://[USER:PASSWORD@]HOST[:PORT].")
@click.option("--ca-file", help="PEM file with the CA of the broker's certificate.")
@click.option("--compare", "compare_name", help="Show measured against this profile or file.")
@click.option("--name", help="Label of the profile.  [default: made from the board's name]")
@click.option("--save", "save_path", type=PATH, help="Write the profile here, as TOML.")
@state_option
@json_option
def profile(
    quick: bool, seconds: float | None, broker: str | None, ca_file: str | None,
    compare_name: str | None, name: str | None, save_path: Path | None,
    state_dir: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure this machine. Every figure says where it comes from and how much it varied."""
    from edge_sdk.probe import probe
    from edge_sdk.screen import compare, profile_lines

    file = None if compare_name is None else load_profile(compare_name)
    if broker is not None:
        from edge_sdk.link import parse_address

        parse_address(broker)
    progress("measuring memory, storage and processor")
    result = probe(
        quick, state_dir or home(), name=name, broker=broker, ca_file=ca_file, limit_s=seconds
    )
    if save_path is not None:
        write(save_path, profile_toml(result.profile).encode())
    rows = None if file is None else compare(result.profile, file)
    if as_json:
        answer = {
            "profile": msgspec.to_builtins(result.profile),
            "took_s": result.took_s,
            "limit_s": result.limit_s,
            "spreads": result.spreads,
            "not_measured": result.not_measured,
            "memory": msgspec.to_builtins(result.memory),
            "condition": msgspec.to_builtins(result.condition),
        }
        if file is not None and rows is not None:
            answer["compared"] = {"file": file.name, "figures": [row._asdict() for row in rows]}
        print_json(answer)
    elif file is not None and rows is not None:
        _show_compared(rows, file.name)
    else:
        click.echo("\n".join(profile_lines(result)))


def _show_compared(rows: list[Compared], name: str) -> None:
    """The table, with what is far off in colour."""
    from edge_sdk.screen import compare_lines

    header, *lines = compare_lines(rows, name)
    click.echo(header)
    for row, line in zip(rows, lines, strict=True):
        click.echo(click.style(line, fg="yellow") if row.off else line)


@click.command()
@click.option("--task", "task_path", type=PATH, help="A Python file with task(); needs torch.")
@click.option("--cost-table", "table_path", type=PATH, help="Costs stored earlier; without torch.")
@click.option("--profile", "profile_name", help="A name, a TOML file, measure, all.")
@click.option("--emulate", help="A profile: carry its plan out here, at its memory and speed.")
@click.option("--strategy", default="last_blocks", show_default=True)
@click.option(
    "--codec",
    default="balanced",
    show_default=True,
    help="Updates as lossless, fp16, balanced or tiny.",
)
@click.option("--deadline-s", type=click.FloatRange(0.1, 1e7), default=60.0, show_default=True)
@click.option("--memory-mb", type=click.IntRange(1, 1 << 30), help="Use at most so many MiB.")
@click.option("--batch-size", type=click.IntRange(1, 65536), help="Instead of the task's.")
@click.option("--num-examples", type=click.IntRange(1, 1 << 40), help="Instead of the data's.")
@click.option("--part", type=click.IntRange(0), default=0, show_default=True, help="Whose data.")
@click.option("--parts", type=click.IntRange(1), default=1, show_default=True)
@click.option("--save-cost-table", "save_path", type=PATH, help="Store the costs as JSON.")
@json_option
def plan(
    task_path: Path | None, table_path: Path | None, part: int, parts: int,
    batch_size: int | None, num_examples: int | None, save_path: Path | None,
    profile_name: str | None, emulate: str | None, as_json: bool, **terms: Any,
) -> None:  # fmt: skip
    """Show what a device would train. What each block costs, and why not more; no network."""
    check_part(part, parts)
    _check_terms(**terms)
    if emulate is not None:
        if task_path is None or profile_name or table_path or num_examples or save_path:
            raise ConfigError(
                "--emulate trains for real: it needs --task, and takes no --profile, --cost-table, "
                "--num-examples or --save-cost-table"
            )
        from edge_sdk.cli_rehearse import emulate_board

        more = {"batch_size": batch_size, "part": part, "parts": parts}
        return emulate_board(emulate, task_path, terms | more, as_json=as_json)
    if profile_name is None:
        raise ConfigError("give --profile NAME, or --emulate NAME to carry its plan out here")
    profiles = _profiles(profile_name)
    if table_path is not None and task_path is None:
        costs = _read_costs(table_path)
    elif task_path is not None and table_path is None:
        costs = _measure_costs(task_path, part, parts)
    else:
        raise ConfigError("give either --task FILE or --cost-table FILE")
    if save_path is not None:
        write(save_path, msgspec.json.format(msgspec.json.encode(costs)) + b"\n")
    training = msgspec.structs.replace(
        costs.training, batch_size=batch_size or costs.training.batch_size
    )
    examples = num_examples or costs.num_examples
    if examples is None:
        raise ConfigError(f"cost table {table_path} does not say num_examples; give --num-examples")
    costs = msgspec.structs.replace(costs, training=training, num_examples=examples)
    outcomes = [(p, *_try_plan(costs, p, examples, **terms)) for p in profiles]
    _show_plans(costs, outcomes, terms, single=profile_name != ALL, as_json=as_json)


def _check_terms(strategy: str, codec: str, **_: Any) -> None:
    """Fail before anything is measured when a name does not exist."""
    from edge_sdk.cost import bits_per_param
    from edge_sdk.strategies import strategy_named

    strategy_named(strategy)
    bits_per_param(codec)


def _profiles(name: str) -> list[DeviceProfile]:
    if name == ALL:
        return [load_profile(shipped) for shipped in shipped_profiles()]
    return [measured_profile(home()) if name == MEASURE else load_profile(name)]


def _measure_costs(task_path: Path, part: int, parts: int) -> CostFile:
    from edge_sdk.task import check_task_file, load_task

    check_task_file(task_path)
    progress("loading torch")
    with extra("train"):
        from edge_sdk.model import BlockModel
        from edge_sdk.trace import cost_table
        from edge_sdk.train import Samples
    task = load_task(task_path)
    progress(f"measuring the costs of task {task.name!r}")
    model = BlockModel(task)
    where = f"task {task.name!r}: train_data({part}, {parts})"
    try:
        data = task.train_data(part, parts)
    except Exception as error:
        raise TaskError(f"{where} failed: {type(error).__name__}: {error}") from error
    samples = Samples(data, where)
    table = cost_table(model, samples)
    return CostFile(
        **msgspec.structs.asdict(table), training=task.training, num_examples=samples.count
    )


def _read_costs(path: Path) -> CostFile:
    """A stored cost table; ConfigError when the file is anything else."""
    advice = f"make one with `edge-sdk plan --task FILE --save-cost-table {path}`"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_COST_TABLE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cost table {path}: {error.strerror or error}; {advice}") from error
    if len(data) > MAX_COST_TABLE_BYTES:
        raise ConfigError(f"cost table {path}: over {MAX_COST_TABLE_BYTES} bytes; {advice}")
    try:
        return msgspec.json.decode(data, type=CostFile)
    except (msgspec.MsgspecError, ConfigError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"cost table {path}: {error}; {advice}") from error


def _try_plan(
    costs: CostFile, profile: DeviceProfile, num_examples: int, *,
    strategy: str, codec: str, deadline_s: float, memory_mb: int | None,
) -> tuple[Plan | None, str]:  # fmt: skip
    """The plan, or None and why nothing fits."""
    from edge_sdk.allowance import limits_of
    from edge_sdk.corrections import UNCORRECTED
    from edge_sdk.cost import bits_per_param
    from edge_sdk.plan import choose
    from edge_sdk.strategies import strategy_named

    flag_bytes = None if memory_mb is None else memory_mb * MIB
    limit = budget(profile, available_bytes=None, cgroup_limit_bytes=None, flag_bytes=flag_bytes)
    correction = profile.corrections.get(costs.task, UNCORRECTED)
    limits = limits_of(
        profile,
        limit,
        floor_bytes=profile.torch_floor_bytes,
        deadline_s=deadline_s,
        correction=correction,
    )
    try:
        chosen = choose(
            costs,
            strategy_named(strategy).candidates(costs.spec, costs.spec.names),
            costs.training,
            limits,
            num_examples=num_examples,
            codec=codec,
            bits_per_param=bits_per_param(codec),
        )
    except NothingFits as error:
        return None, str(error)
    return chosen, ""


def _show_plans(
    costs: CostFile, outcomes: list[Outcome], terms: dict[str, Any], *, single: bool, as_json: bool
) -> None:
    """Print what was planned; with a single profile, NothingFits after that."""
    from edge_sdk.screen import block_costs, block_lines, board_lines, plan_lines

    profile, chosen, reason = outcomes[0]
    if as_json:
        plans = [
            {"profile": p.name, "plan": msgspec.to_builtins(found), "reason": why}
            for p, found, why in outcomes
        ]
        head = {
            "task": costs.task,
            **terms,
            "training": msgspec.to_builtins(costs.training),
            "num_examples": costs.num_examples,
            "blocks": block_costs(costs),
        }
        print_json({**head, **plans[0]} if single else {**head, "plans": plans})
    else:
        lines = [*block_lines(costs, costs.num_examples or 0), ""]
        if not single:
            lines += board_lines(outcomes, len(costs.blocks))
        elif chosen is not None:
            lines += plan_lines(profile, chosen)
        click.echo("\n".join(lines))
    if single and chosen is None:
        raise NothingFits(f"{profile.name}: {reason}")

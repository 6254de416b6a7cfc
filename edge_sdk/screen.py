"""What a person reads on a terminal: results and events as lines of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from edge_sdk.cost import CostTable
from edge_sdk.figures import human
from edge_sdk.plan import Plan
from edge_sdk.probe import ProbeResult
from edge_sdk.profile import FIGURES, DeviceProfile, profile_toml

if TYPE_CHECKING:
    import numpy as np

SHOWN_CLASSES = 10
# A measured figure further away from its file's than that is worth a look.
OFF_RATIO = 1.3

# A board, what it would do, and why it cannot do anything when that is None.
Outcome = tuple[DeviceProfile, Plan | None, str]


def size(count: float) -> str:
    """Bytes in binary units, as memory is counted."""
    if count < 1024:
        return f"{count:.0f} B"
    for unit in ("KiB", "MiB"):
        count /= 1024
        if count < 1024:
            return f"{count:,.1f} {unit}"
    return f"{count / 1024:,.1f} GiB"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned columns: the first and the last to the left, between them numbers to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, *rows):
        between = [c.rjust(w) for c, w in zip(row[1:-1], widths[1:-1], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *between, row[-1]]).rstrip()


def profile_lines(result: ProbeResult) -> Iterator[str]:
    """The profile as TOML a profile file may consist of, source and spread beside each figure."""
    lines = profile_toml(result.profile).partition("\n\n[sources]")[0].splitlines()
    width = max(len(line.partition("  # ")[0]) for line in lines)
    place = ""
    for line in lines:
        value, _, human = line.partition("  # ")
        if value.startswith("["):
            place = f"{value.strip('[]')}."
            yield line
            continue
        key = place + value.partition(" = ")[0]
        source = result.profile.sources.get(key, "")
        if not source and key in result.spreads:
            source = f"spread {result.spreads[key]:.0%}"
        notes = [human, source]
        comment = "; ".join(note for note in notes if note)
        yield f"{value:<{width}}  # {comment}" if comment else value
    yield ""
    yield from (f"# {line}" for line in _now_lines(result))


def _now_lines(result: ProbeResult) -> Iterator[str]:
    """What no profile keeps: memory and condition of this moment, and what could not be had."""
    memory, now = result.memory, result.condition
    if memory.swap_bytes:
        zram = f", {size(memory.zram_bytes)} of it in zram" if memory.zram_bytes else ""
        yield f"swap of {size(memory.swap_bytes)}{zram}: not counted"
    if memory.unified:
        yield "processor and GPU share the memory: what one takes, the other lacks"
    if now.celsius is not None:
        yield f"{now.celsius:.0f} degrees Celsius at {now.sensor}"
    if now.throttled is not None:
        yield f"slowed down by: {', '.join(now.throttled_by) or 'nothing'}"
    if now.throttled_before:
        yield f"slowed down since the start by: {', '.join(now.throttled_before)}"
    if now.on_battery is not None:
        charge = "" if now.battery_percent is None else f", {now.battery_percent:.0f} % charged"
        yield f"{'on battery' if now.on_battery else 'not on battery'}{charge}"
    for key, reason in result.not_measured.items():
        yield f"{key} is not measured: {' '.join(reason.split())}"
    yield f"took {result.took_s:.1f} s"


class Compared(NamedTuple):
    """One figure as measured here and as a file says, ``None`` where one of them lacks it."""

    figure: str
    measured: float | None
    file: float | None
    ratio: float | None
    off: bool


def compare(measured: DeviceProfile, file: DeviceProfile) -> list[Compared]:
    """Every figure of either; off is a ratio that is not within OFF_RATIO of one."""
    ours = {
        key: value
        for key, value in _figures(measured).items()
        if measured.sources.get(key.partition(".")[0], "").startswith("measured:")
    }
    theirs = _figures(file)
    rows = []
    for key in dict.fromkeys([*theirs, *ours]):
        here, there = ours.get(key), theirs.get(key)
        ratio = here / there if here is not None and there else None
        off = ratio is not None and not 1 / OFF_RATIO <= ratio <= OFF_RATIO
        rows.append(Compared(key, here, there, ratio, off))
    return rows


def compare_lines(rows: Sequence[Compared], name: str) -> list[str]:
    """A header and one line per row, in their order."""
    cells = [
        (
            row.figure,
            _amount(row.figure, row.measured, "not measured"),
            _amount(row.figure, row.file, "-"),
            "" if row.ratio is None else f"{row.ratio:.2f}",
            "off" if row.off else "",
        )
        for row in rows
    ]
    return list(table(("figure", "measured", name, "ratio", ""), cells))


def _figures(profile: DeviceProfile) -> dict[str, float]:
    """All numbers of a profile by name, those of its tables with the table before a dot."""
    found = {key: getattr(profile, key) for key in FIGURES}
    found |= {f"rates.{key}": value for key, value in profile.rates.items()}
    found |= {f"overhead.{key}": value for key, value in profile.overhead.items()}
    return {key: value for key, value in found.items() if value is not None}


def _amount(figure: str, value: float | None, missing: str) -> str:
    return missing if value is None else human(figure, value) or f"{value:,}"


def block_costs(costs: CostTable) -> list[dict[str, Any]]:
    """Per block; the FLOPs backward are those of training everything."""
    return [
        {
            "name": block.name,
            "params": block.params,
            "bytes": block.size_bytes,
            "activation_bytes_per_sample": block.activation_bytes_per_sample,
            "flops_forward_per_sample": block.flops_forward_per_sample,
            "flops_backward_per_sample": block.flops_backward_per_sample,
        }
        for block in costs.blocks
    ]


def block_lines(costs: CostTable, num_examples: int) -> Iterator[str]:
    """The model and the cost of each block; FLOP and bytes kept are per sample."""
    spec = costs.spec
    yield (
        f"task {costs.task}: {len(spec.blocks)} blocks, {spec.params:,} parameters, "
        f"{size(spec.size_bytes)}; {num_examples:,} samples here"
    )
    rows = [
        (
            row["name"],
            f"{row['params']:,}",
            size(row["bytes"]),
            size(row["activation_bytes_per_sample"]),
            f"{row['flops_forward_per_sample']:,}",
            f"{row['flops_backward_per_sample']:,}",
            "",
        )
        for row in block_costs(costs)
    ]
    yield from table(
        ("block", "params", "size", "kept/sample", "forward FLOP", "backward FLOP", ""), rows
    )


def plan_lines(profile: DeviceProfile, plan: Plan) -> Iterator[str]:
    """One board's plan, and what was left out."""
    yield f"{profile.name} trains {', '.join(plan.blocks)}"
    yield f"  batch   {plan.batch_size}, {plan.micro_batch} at a time"
    if plan.steps is not None:
        yield f"  steps   {plan.steps:,}, all there is time for"
    for words in _lever_words(plan):
        yield f"  how     {words}"
    yield f"  memory  {size(plan.peak_bytes)} at the peak, {size(plan.budget_bytes)} allowed"
    yield f"  time    {plan.train_s:.1f} s of training, {plan.round_s:.1f} s with the upload"
    yield f"  upload  {size(plan.upload_bytes)} as {plan.codec}"
    for left_out in plan.left_out:
        yield f"not {', '.join(left_out.blocks)}: {left_out.reason}"


def _lever_words(plan: Plan) -> Iterator[str]:
    """What is unusual in the way a plan trains."""
    if plan.checkpoint:
        yield "activations are computed again in backward"
    if plan.step_in_backward:
        yield "parameters are updated in backward, one by one"
    prefix = plan.prefix
    engine = {"torch": "torch", "onnx": "ONNX Runtime", "onnx_int8": "ONNX Runtime in int8"}
    if prefix.cache != "none":
        where = {"memory": "in memory", "disk": "on disk"}[prefix.cache]
        yield (
            f"{_ends(prefix.blocks)} run once in {engine[prefix.engine]}, their output is kept "
            f"{where} as {prefix.dtype}"
        )
    elif prefix.engine != "torch":
        yield f"{_ends(prefix.blocks)} run in {engine[prefix.engine]}"


def board_lines(outcomes: Sequence[Outcome], blocks: int) -> Iterator[str]:
    """One row per board, for a model of so many blocks."""
    rows = []
    for profile, plan, reason in outcomes:
        cells = [size(profile.memory_bytes), "", "", "", "", f"nothing fits: {reason}"]
        if plan is not None:
            cells = [
                size(plan.budget_bytes),
                size(plan.peak_bytes),
                f"{plan.micro_batch} of {plan.batch_size}",
                f"{plan.round_s:.1f} s",
                size(plan.upload_bytes),
                f"{len(plan.blocks)} of {blocks}: {_ends(plan.blocks)}"
                + ("" if plan.steps is None else f", {plan.steps:,} steps only"),
            ]
        rows.append([profile.name, *cells])
    yield from table(("profile", "allowed", "peak", "at a time", "round", "upload", "trains"), rows)


def _ends(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"


def event_words(event: Mapping[str, Any]) -> str:
    """One line for an event of the agent; what is not known here is shown field by field."""
    match event:
        case {"event": "started"}:
            return (
                f"device {event['device']} of job {event['job']} at {event['broker']}, "
                f"profile {event['profile']}, state in {event['state']}"
            )
        case {"event": "plan", "round": number, "blocks": blocks}:
            return f"round {number}: trains {', '.join(blocks)}"
        case {"event": "receipt", "round": number, "verdict": verdict}:
            return f"round {number}: update {verdict}"
        case {"event": "decline", "round": number, "reason": reason}:
            return f"round {number}: sits out: {reason}"
        case {"event": "killed", "memory": True}:
            return "the trainer is started again: memory ran out"
        case {"event": "killed", "exit_code": code}:
            return f"the trainer is started again after exit code {code}"
        case {"event": "paused", "round": number, "reason": reason}:
            return f"round {number}: paused: {reason}"
        case {"event": "resumed", "round": number}:
            return f"round {number}: goes on"
        case {"event": "done", "job": job}:
            return f"job {job} is over"
    return ", ".join(f"{key} {value}" for key, value in event.items())


def state_lines(state: Mapping[str, Any], now_s: float) -> Iterator[str]:
    """What ``doctor.state_of`` found; ``now_s`` is wall time."""
    process = state["process"]
    running = "" if process is None else f", process {process} is running"
    yield f"device {state['device']} in {state['state']}{running}"
    blocks = state["blocks"]
    yield f"  blocks   {blocks['count']} cached, {size(blocks['bytes'])}"
    yield f"  updates  {len(state['spool'])} without a receipt"
    for update in state["spool"]:
        age_min = max(0.0, now_s - update["created_s"]) / 60
        yield (
            f"           job {update['job']}, round {update['round']}: "
            f"{size(update['bytes'])}, {age_min:.0f} min old"
        )
    if state["unreadable"]:
        yield f"           {state['unreadable']} cannot be read"
    profile = state["profile"]
    if profile is not None:
        allowed = size(profile["memory_bytes"])
        yield f"  profile  {profile['name']} of {profile['date']}, {allowed} for training"


def top_classes(output: np.ndarray[Any, Any]) -> list[int] | None:
    """The most likely class of each sample, for an output of shape (samples, classes)."""
    classes: list[int] | None = output.argmax(1).tolist() if output.ndim == 2 else None
    return classes


def infer_lines(
    inputs: Mapping[str, np.ndarray[Any, Any]],
    outputs: Sequence[np.ndarray[Any, Any]],
    run_s: float,
) -> Iterator[str]:
    """Shapes, time, and the classes of the first samples."""
    for name, array in inputs.items():
        yield f"input {name}: {array.dtype} {list(array.shape)}"
    for place, output in enumerate(outputs):
        yield f"output {place}: {output.dtype} {list(output.shape)}"
        classes = top_classes(output) or []
        rest = len(classes) - SHOWN_CLASSES
        if classes:
            shown = " ".join(str(label) for label in classes[:SHOWN_CLASSES])
            yield f"  top-1 classes: {shown}{f' and {rest} more' if rest > 0 else ''}"
    yield f"took {run_s * 1e3:.1f} ms"

"""The trained model as files others can open: one safetensors file, one ONNX file."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from edge_sdk.blocks import ModelSpec
from edge_sdk.errors import TaskError
from edge_sdk.infer import OnnxModel
from edge_sdk.store import write_atomically
from reference_server.evaluate import Evaluator
from reference_server.versions import Manifest, VersionStore

# Two runtimes order float32 sums differently; beyond this they compute different models.
ONNX_TOLERANCE = 1e-3


def export_safetensors(
    evaluator: Evaluator, versions: VersionStore, manifest: Manifest, path: Path
) -> Path:
    """All tensors of a version in one file, named by their state_dict keys."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for entry in manifest.blocks:
        tensors.update(versions.load_block(evaluator.spec.block(entry.name), entry.sha256))
    own = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    notes = {"job": manifest.job, "version": str(manifest.version), "sha256": manifest.model_sha256}
    write_atomically(path, safetensors.numpy.save(own, metadata=notes), mode=0o644)
    return path


def check_model(spec: ModelSpec, manifest: Manifest, task_path: Path) -> None:
    """TaskError when a version is of another model than the task builds."""
    ours = {block.name: block.size_bytes for block in spec.blocks}
    stored = {entry.name: entry.raw_bytes for entry in manifest.blocks}
    differ = [name for name in {**stored, **ours} if ours.get(name) != stored.get(name)]
    if differ:
        raise TaskError(
            f"task file {task_path}: it builds another model than version {manifest.version} of "
            f"job {manifest.job!r}, which differs in blocks {', '.join(differ)[:200]}: give the "
            "task file the job was started with"
        )


def export_all(
    evaluator: Evaluator, versions: VersionStore, manifest: Manifest, directory: Path
) -> tuple[dict[str, str], str]:
    """Write both kinds of file; their paths by kind, and why there is no ONNX file if so."""
    what = (evaluator, versions, manifest)
    files = {"safetensors": str(export_safetensors(*what, directory / "model.safetensors"))}
    try:
        files["onnx"] = str(export_onnx(*what, directory / "model.onnx"))
    except TaskError as error:
        return files, str(error)
    return files, ""


class _ByName(torch.nn.Module):
    """A module that takes its inputs by keyword, for an exporter that gives them by place."""

    def __init__(self, module: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *values: torch.Tensor) -> Any:
        return self.module(**dict(zip(self.names, values, strict=True)))


def export_onnx(
    evaluator: Evaluator, versions: VersionStore, manifest: Manifest, path: Path
) -> Path:
    """A version as ONNX with a free batch size, checked against torch in onnxruntime.

    TaskError when the model cannot be exported or the two runtimes disagree.
    """
    evaluator.load(versions, manifest)
    # With gradients, torch's attention takes the path that is made of exportable operations.
    module = evaluator.model.module.requires_grad_(True).eval()
    example = evaluator.example(2)
    names = [f"input{place}" for place in range(len(example) if isinstance(example, tuple) else 1)]
    if isinstance(example, Mapping):
        names = list(example)
        module = _ByName(module, names).eval()
    data = _export(module, _values(example), names)
    # Another batch size than the traced one, so that a size that was baked in is noticed.
    _compare(data, module, _values(evaluator.example(3)), names)
    write_atomically(path, data, mode=0o644)
    return path


def _values(inputs: object) -> tuple[Any, ...]:
    if isinstance(inputs, Mapping):
        return tuple(inputs.values())
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _export(module: torch.nn.Module, arguments: tuple[Any, ...], names: list[str]) -> bytes:
    buffer = io.BytesIO()
    axes = {name: {0: "batch"} for name in [*names, "output"]}
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            # The exporter without torch's compiler is marked old, but takes a third of a second
            # where the new one takes six, and knows every operation our models use.
            warnings.simplefilter("ignore")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)
            torch.onnx.export(
                module,
                arguments,
                buffer,  # type: ignore[arg-type]  # documented, but missing in its type
                input_names=names,
                output_names=["output"],
                dynamic_axes=axes,
                dynamo=False,
            )
    except Exception as error:
        raise TaskError(f"the model cannot be exported to ONNX: {error}") from error
    return buffer.getvalue()


def _compare(
    data: bytes, module: torch.nn.Module, arguments: tuple[Any, ...], names: list[str]
) -> None:
    with torch.no_grad():
        output = module(*arguments)
    if not isinstance(output, torch.Tensor):
        raise TaskError(
            f"the model returns {type(output).__name__}: ONNX export needs one tensor as output"
        )
    expected = output.numpy()
    got = OnnxModel(data).run({n: a.numpy() for n, a in zip(names, arguments, strict=True)})[0]
    difference = float(np.max(np.abs(expected - got), initial=0.0))
    if not difference <= ONNX_TOLERANCE * max(1.0, float(np.max(np.abs(expected)))):
        raise TaskError(
            f"the exported ONNX model differs from torch by {difference:.2e}, allowed is "
            f"{ONNX_TOLERANCE:.0e} of the largest output: an operation is exported wrongly"
        )

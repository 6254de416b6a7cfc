"""Whatever the code can list must be in the documentation, and what the README says must exist."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

import edge_sdk
from edge_sdk import errors
from edge_sdk.brokers import BROKERS
from edge_sdk.cost import CODEC_FIGURES
from edge_sdk.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = {"edge-sdk": "edge_sdk.cli", "reference-server": "reference_server.cli"}


def commands(program: str) -> dict[str, click.Command]:
    """The command table of one of our programs."""
    module = importlib.import_module(PROGRAMS[program])
    groups = [value for value in vars(module).values() if isinstance(value, click.Group)]
    assert groups, f"{module.__name__} has no click group"
    return max((group.commands for group in groups), key=len)


def shell_lines() -> Iterator[list[str]]:
    """The commands in the README's shell blocks, split into words."""
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|", line):
                if words := shlex.split(command, comments=True):
                    yield words


@pytest.mark.parametrize("program", PROGRAMS)
def test_readme_names_every_command(program: str) -> None:
    missing = [name for name in commands(program) if f"`{program} {name}`" not in README]
    assert missing == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_readme_names_no_other_command(program: str) -> None:
    named = set(re.findall(rf"`{program} ([a-z]+)", README))
    assert named - set(commands(program)) == set()


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_command_has_help(program: str) -> None:
    assert [name for name, command in commands(program).items() if not command.help] == []


def test_readme_names_every_profile() -> None:
    profiles = sorted(path.stem for path in (ROOT / "profiles").glob("*.toml"))
    assert profiles
    assert [name for name in profiles if f"`{name}`" not in README] == []


def test_readme_names_every_example() -> None:
    examples = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
    assert examples
    assert [name for name in examples if f"examples/{name}" not in README] == []


def test_readme_names_every_strategy() -> None:
    assert [name for name in STRATEGIES if f"`{name}`" not in README] == []


def test_readme_names_every_codec_and_broker_profile() -> None:
    assert [name for name in (*CODEC_FIGURES, *BROKERS) if f"| `{name}` |" not in README] == []


def test_the_readmes_task_is_a_task(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    path = tmp_path / "my_task.py"
    path.write_text(block, encoding="utf-8")
    task = edge_sdk.load_task(path)
    inputs, targets = task.train_data(0, 2)
    loss = task.loss(task.build_model()(torch.as_tensor(inputs)), torch.as_tensor(targets))
    assert loss.ndim == 0


def test_readme_names_every_error() -> None:
    classes = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.EdgeError)
    ]
    assert [name for name in classes if f"`{name}`" not in README] == []


def test_the_error_tree_is_drawn_in_full() -> None:
    drawn = set(re.findall(r"-- (\w+)", errors.__doc__ or ""))
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert drawn == defined - {"EdgeError"}


def test_what_the_readme_tells_to_type_exists() -> None:
    told = set()
    for words in shell_lines():
        for place, word in enumerate(words):
            name = Path(word).name
            if word.startswith("scripts/"):
                assert os.access(ROOT / word, os.X_OK), f"README tells to run {word}"
                told.add(word)
            elif name in PROGRAMS and place + 1 < len(words) and words[place + 1][0] != "-":
                assert words[place + 1] in commands(name), f"README tells to type {words}"
    assert {"scripts/demo", "scripts/test"} <= told


def test_the_changelog_is_about_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert versions[0] == edge_sdk.__version__

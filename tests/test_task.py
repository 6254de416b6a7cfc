"""Task files: what is wrong is said with the file and the line, and nothing is left behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edge_sdk.errors import TaskError
from edge_sdk.task import Task, load_task
from edge_sdk.wire import Training

GOOD = """\
from edge_sdk import Task, Training

def task():
    return Task(name="toy", build_model=list, loss=max, train_data=lambda part, parts: ([], []))
"""


def write(folder: Path, text: str, name: str = "mytask.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message_of(path: Path) -> str:
    with pytest.raises(TaskError) as caught:
        load_task(path)
    text = str(caught.value)
    assert text.startswith(f"task file {path}: ")
    return text.removeprefix(f"task file {path}: ")


def test_a_task_is_loaded(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD))
    assert (task.name, task.training, task.test_data) == ("toy", Training(), None)


def test_the_file_may_be_imported_by_what_it_defines(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, GOOD))
    assert task.train_data.__module__ in sys.modules


def test_a_missing_file(tmp_path: Path) -> None:
    why = "no such file; give a Python file that defines task()"
    assert message_of(tmp_path / "mytask.py") == why
    assert message_of(tmp_path) == why


def test_a_file_that_is_no_python(tmp_path: Path) -> None:
    assert "its name must end in .py" in message_of(write(tmp_path, GOOD, "mytask.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\nx = = 3\n", "does not import at line 2: SyntaxError: invalid syntax"),
        ("\nimport no_such_module_7\n", "does not import at line 2: ModuleNotFoundError: No modu"),
        ("x = 1\n\ny = x / 0\n", "does not import at line 3: ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit(3)\n", "does not import at line 2: SystemExit: 3"),
        ("x = 1\n", "defines no function task(); add `def task() -> Task:`"),
        ("task = 3\n", "defines no function task()"),
        (
            "def helper():\n    raise KeyError('data')\n\ndef task():\n    return helper()\n",
            "task() failed at line 2: KeyError: 'data'",
        ),
        (
            "import json\ndef task():\n    return json.loads('{')\n",
            "task() failed at line 3: JSONDecodeError: ",
        ),
        ("def task():\n    raise SystemExit('bye')\n", "task() failed at line 2: SystemExit: bye"),
        ("def task(path):\n    pass\n", "task() failed: TypeError: task() missing 1 required"),
        ("\ndef task():\n    return 7\n", "task() at line 2 returned int, expected edge_sdk.Task"),
        ("def task():\n    pass\n", "task() at line 1 returned NoneType"),
        ("task = dict\n", "task() returned dict, expected edge_sdk.Task"),
        (
            GOOD.replace("toy", "My Task"),
            "task() failed at line 4: Task(name='My Task'): use 1 to 64 of the characters a-z",
        ),
        (
            GOOD.replace("loss=max", "loss='mse'"),
            "task() failed at line 4: Task(loss=...) of 'toy' is not callable",
        ),
        (
            GOOD.replace("loss=max", "loss=max, training={}"),
            "task() failed at line 4: Task 'toy': training and pretraining must be Training(...)",
        ),
        (
            GOOD.replace("loss=max", "loss=max, augment='flip'"),
            "task() failed at line 4: Task(augment=...) of 'toy' is not callable",
        ),
        (
            GOOD.replace("loss=max", "loss=max, augment=max, augment_views=0"),
            "task() failed at line 4: Task(augment_views=0) of 'toy': give a whole number from 1",
        ),
        (
            GOOD.replace("loss=max", "loss=max, augment=max, augment_views=True"),
            "task() failed at line 4: Task(augment_views=True) of 'toy': give a whole number",
        ),
        (
            GOOD.replace("loss=max", "loss=max, augment_views=3"),
            "task() failed at line 4: Task(augment_views=3) of 'toy': there is no augment to make "
            "views; add augment=..., or leave augment_views out",
        ),
        (
            GOOD.replace("loss=max", "loss=max, random_prefix='no'"),
            "task() failed at line 4: Task(random_prefix=...) of 'toy': say True or False",
        ),
        (
            GOOD.replace("loss=max", "loss=max, lossy_prefix=1"),
            "task() failed at line 4: Task(lossy_prefix=...) of 'toy': say True or False",
        ),
    ],
)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, text: str, message: str) -> None:
    assert message_of(write(tmp_path, text)).startswith(message)


def test_a_relative_path_has_its_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "\n\nx = 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    assert message_of(Path("mytask.py")).startswith("does not import at line 3: ZeroDivision")


def test_a_fault_in_another_file_names_the_line_that_led_there(tmp_path: Path) -> None:
    write(tmp_path, "\n\n\n\nx = = 3\n", "otherfile.py")
    text = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nimport otherfile\n"
    try:
        message = message_of(write(tmp_path, text))
    finally:
        sys.path.remove(str(tmp_path))
    assert message.startswith(
        "does not import at line 3: SyntaxError: invalid syntax (otherfile.py"
    )


def test_a_file_that_failed_may_be_corrected_and_loaded_again(tmp_path: Path) -> None:
    path = write(tmp_path, "x = 1 / 0\n")
    message_of(path)
    assert "edge_sdk_task_mytask" not in sys.modules
    path.write_text(GOOD + "# the same file, longer\n")
    assert load_task(path).name == "toy"


@pytest.mark.parametrize("name", ["", "Toy", "a b", "a/b", "x" * 65, "toy\n", 7])
def test_names_that_cannot_be_part_of_a_topic(name: object) -> None:
    with pytest.raises(TaskError, match="use 1 to 64 of the characters a-z, 0-9, '-'"):
        Task(name=name, build_model=list, loss=max, train_data=max)  # type: ignore[arg-type]

"""Budgets for the length of files and functions."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("edge_sdk", "reference_server")
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
MAX_MEDIAN_LINES = 12


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Each function's place and the lines of its body, without its docstring."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body
            if ast.get_docstring(node) is not None and len(body) > 1:
                body = body[1:]
            lines = (node.end_lineno or 0) - body[0].lineno + 1
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", lines


def test_no_file_is_over_the_ceiling() -> None:
    counted = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*SOURCES, "examples", "tests")
    }
    assert {file: lines for file, lines in counted.items() if lines > MAX_FILE_LINES} == {}


def test_no_function_is_over_the_ceiling() -> None:
    files = python_files(*SOURCES, "examples", "tests")
    long = {name: n for path in files for name, n in functions(path) if n > MAX_FUNCTION_LINES}
    assert long == {}


def test_the_median_function_is_short() -> None:
    lines = [lines for path in python_files(*SOURCES) for _, lines in functions(path)]
    assert statistics.median(lines) <= MAX_MEDIAN_LINES

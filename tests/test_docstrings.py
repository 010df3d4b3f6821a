"""Docstrings say in one way what is raised: a section `Raises:` with a line for each error.

Raises:
    TargetError: the masks do not fit the model.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FILES = sorted(
    file.relative_to(ROOT).as_posix() for folder in ("px_hf", "recipes") for file in (ROOT / folder).rglob("*.py")
)

PROSE = re.compile(r"\*\*Raises|(^|[.:;]\s+)Raises\b(?!:$)", re.MULTILINE)
"""A sentence that says what is raised; a heading stands alone on its line."""

ENTRY = re.compile(r"[A-Z]\w+(, [A-Z]\w+)*: \S")


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
    """Name of what is documented, and its docstring without the indentation."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text is not None:
                yield getattr(node, "name", "the module"), text


def problems(text: str) -> list[str]:
    found = ["says in prose what is raised"] if PROSE.search(text) else []
    for section in re.split(r"^Raises:$", text, flags=re.MULTILINE)[1:]:
        lines = [line for line in section.split("\n\n")[0].splitlines() if line]
        entries = [line[4:] for line in lines if re.match(r" {4}\S", line)]
        if not entries or any(not line.startswith("    ") for line in lines):
            found.append("has a section that does not list errors")
        found += [f"lists {entry!r}, which is no error" for entry in entries if not ENTRY.match(entry)]
    return found


@pytest.mark.parametrize("name", FILES)
def test_errors_are_listed_in_a_section(name: str) -> None:
    found = [f"{owner}: {problem}" for owner, text in docstrings(ROOT / name) for problem in problems(text)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "It is so.\n\nRaises TargetError if it is not.",
        "It is so. Raises TargetError if it is not.",
        "It is so.\n\n**Raises** `TargetError` if it is not.",
        "It is so.\n\nRaises: TargetError if it is not.",
        "It is so.\n\nRaises:\n    If it is not.",
        "It is so.\n\nRaises:\nTargetError: it is not.",
    ],
)
def test_other_ways_would_be_found(text: str) -> None:
    assert problems(text)


def test_the_way_is_accepted() -> None:
    section = "Raises:\n    TargetError: it is not so,\n        for a reason.\n    OSError, ValueError: no."
    assert problems(f"It raises the bar.\n\n{section}\n\nMore.") == []

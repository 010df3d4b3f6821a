"""The lines of a comparison, one for each cell: read, append, look up."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import px_hf as px

Line = dict[str, Any]
MEASURES = {"fine_tuned": "fine-tuned", "zero_shot": "no fine-tuning (head fitted to the dense model)"}


def read_lines(path: Path) -> list[Line]:
    """The cells that are done. A last line that a kill cut short is cut off the file.

    Raises:
        CheckpointError: any other line is none of ours.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole, newline, rest = content.rpartition(b"\n")
    if rest:
        with path.open("r+b") as file:
            file.truncate(len(whole) + len(newline))
    lines = []
    for number, text in enumerate(whole.splitlines(), start=1):
        try:
            line = json.loads(text)
            line["key"]["method"]
        except (ValueError, TypeError, KeyError) as error:
            raise px.CheckpointError(
                f"Line {number} of {path} is no cell of a comparison. Remove it, or name another --output_dir."
            ) from error
        lines.append(line)
    return lines


def append_line(path: Path, line: Line) -> None:
    """One write at the end of the file, on the disk before this returns."""
    text = json.dumps(line, sort_keys=True) + "\n"
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def task_of(line: Line) -> tuple[str, str]:
    return line["key"]["model"], line["key"]["dataset"]


def method_of(line: Line) -> str:
    return line["key"]["method"]


def values_of(lines: Iterable[Line], method: str, sparsity: float, measure: str) -> list[float]:
    return [
        line[measure]
        for line in lines
        if method_of(line) == method and line["key"]["sparsity"] == sparsity and line.get(measure) is not None
    ]


def in_order(lines: Iterable[Line], of: Callable[[Line], Any]) -> list[Any]:
    return list(dict.fromkeys(of(line) for line in lines))

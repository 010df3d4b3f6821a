"""The lines of a comparison, one for each cell: read, append, choose, look up."""

from __future__ import annotations

import json
import os
import statistics
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
            line["key"]["method"], dict(line.get("fine_tuned") or {})
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


def reported(lines: Iterable[Line], split: str) -> list[Line]:
    """What tables and figures show: accuracies on that split alone, and one learning rate for each method.

    A method takes, in each task and at each sparsity, the rate of the highest mean accuracy on the validation split,
    over the seeds that all of its rates have; the rate it has for most seeds if they share none. `line["rates"]` says
    how many there were to choose from.
    """
    cells: dict[tuple[Any, ...], dict[float, dict[int, Line]]] = {}
    for line in lines:
        key = line["key"]
        rates = cells.setdefault((task_of(line), method_of(line), key["sparsity"]), {})
        rates.setdefault(key["learning_rate"], {})[key["seed"]] = line
    found = []
    for rates in cells.values():
        shared = set.intersection(*(set(seeds) for seeds in rates.values()))

        def merit(rate: float, rates: Any = rates, shared: set[int] = shared) -> tuple[float, int]:
            tuned = [rates[rate][seed].get("fine_tuned") for seed in shared]
            known = [accuracies["validation"] for accuracies in tuned if accuracies]
            return (statistics.mean(known) if known else 0.0, len(rates[rate]))

        for line in rates[max(rates, key=merit)].values():
            own = {name: values[split] for name in MEASURES if (values := line.get(name))}
            found.append({**line, **dict.fromkeys(MEASURES), **own, "split": split, "rates": len(rates)})
    return found


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

"""The lines of a comparison: read, append, as a table, as a plot."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter

import px_hf as px

from ..drawing import DENSE, line_style, picture

Line = dict[str, Any]
MEASURES = {"fine_tuned": "fine-tuned", "zero_shot": "no fine-tuning (head fitted to the dense model)"}


def read_lines(path: Path) -> list[Line]:
    """The cells that are done. A last line that a kill cut short is cut off the file.

    **Raises** `CheckpointError` for any other line that is none of ours.
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


def mean_and_spread(values: Sequence[float]) -> str:
    """In percent; the spread is the standard deviation over seeds."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def markdown(lines: Iterable[Line]) -> str:
    """For every task and measure a table: a row for each method, a column for each sparsity."""
    lines = list(lines)
    parts = []
    for task in _in_order(lines, _task):
        here = [line for line in lines if _task(line) == task]
        sparsities = sorted({s for line in here if (s := line["key"]["sparsity"]) > 0})
        for measure, title in MEASURES.items():
            if not any(line.get(measure) is not None for line in here):
                continue
            seeds = len({line["key"]["seed"] for line in here})
            dense = _values(here, "dense", 0.0, measure)
            report_on = here[0]["key"]["report_on"]
            parts.append(f"### {task[0]} on {task[1]}, {title}\n")
            parts.append(
                f"Accuracy in % on the {report_on} split, mean ± standard deviation over {seeds} seed(s). "
                f"Dense: {mean_and_spread(dense) or 'not measured'}. Cost of scoring in forward passes of one image.\n"
            )
            heads = [f"{100 * s:g} % sparse" for s in sparsities]
            parts.append(f"| method | {' | '.join(heads)} | cost |")
            parts.append("|---" * (len(heads) + 2) + "|")
            for method in _in_order(here, _method):
                if method == "dense":
                    continue
                cells = [mean_and_spread(_values(here, method, s, measure)) for s in sparsities]
                costs = [line["forward_units"] for line in here if _method(line) == method]
                parts.append(f"| {method} | {' | '.join(cells)} | {max(costs):,.0f} |")
            parts.append("")
    return "\n".join(parts + [text for measure in MEASURES if (text := _over_all(lines, measure))])


def _over_all(lines: Sequence[Line], measure: str) -> str:
    """One row for each method that has every cell: what a default is chosen by. Empty if fewer than two have, or if
    there is one cell only.

    A cell is a (model, task) at a sparsity; of its seeds those count that all of these methods have.
    """
    found: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for line in lines:
        if line["key"]["sparsity"] > 0 and line.get(measure) is not None:
            cell = found.setdefault((_task(line), line["key"]["sparsity"]), {})
            cell.setdefault(_method(line), {})[line["key"]["seed"]] = line[measure]
    methods = [m for m in _in_order(lines, _method) if all(m in cell for cell in found.values())]
    means: list[dict[str, float]] = []
    for cell in found.values():
        seeds = set.intersection(*(set(cell[m]) for m in methods)) if methods else set()
        if seeds:
            means.append({m: 100 * statistics.mean(cell[m][seed] for seed in sorted(seeds)) for m in methods})
    if len(methods) < 2 or len(means) < 2:
        return ""
    best = [max(cell.values()) for cell in means]
    text = [
        f"### Over all tasks and sparsities, {MEASURES[measure]}\n",
        f"Means over {len(means)} cells (model, task and sparsity), in percent points, over seeds that all methods "
        "have. Rank 1 is the best of a cell.\n",
        "| method | accuracy | rank | behind the best, mean | largest |",
        "|---|---|---|---|---|",
    ]
    accuracies = {method: statistics.mean(cell[method] for cell in means) for method in methods}
    for method, accuracy in sorted(accuracies.items(), key=lambda item: -item[1]):
        rank = statistics.mean(1 + sum(other > cell[method] for other in cell.values()) for cell in means)
        gaps = [top - cell[method] for top, cell in zip(best, means, strict=True)]
        text.append(f"| {method} | {accuracy:.1f} | {rank:.1f} | {statistics.mean(gaps):.1f} | {max(gaps):.1f} |")
    return "\n".join([*text, ""])


def plot(lines: Iterable[Line], path: Path) -> None:
    """Accuracy against sparsity, a panel for each task and measure; bars are the standard deviation over seeds."""
    lines = list(lines)
    tasks = _in_order(lines, _task)
    measures = [m for m in MEASURES if any(line.get(m) is not None for line in lines)]
    methods = [m for m in _in_order(lines, _method) if m != "dense"]
    panels = [(task, measure) for task in tasks for measure in measures]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with picture(path, 5.4 * columns + 2.2, 3.9 * rows + 0.3) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        handles: dict[str, Any] = {}
        for (task, measure), axes in zip(panels, grid, strict=False):
            here = [line for line in lines if _task(line) == task]
            sparsities = sorted({s for line in here if (s := line["key"]["sparsity"]) > 0})
            dense = _values(here, "dense", 0.0, measure)
            if dense:
                handles["dense"] = axes.axhline(100 * statistics.mean(dense), color=DENSE, linestyle="--", linewidth=1)
            for index, method in enumerate(methods):
                found = [(_place(s), v) for s in sparsities if (v := _values(here, method, s, measure))]
                drawn = axes.errorbar(
                    [x for x, _ in found],
                    [100 * statistics.mean(v) for _, v in found],
                    [100 * statistics.stdev(v) if len(v) > 1 else 0 for _, v in found],
                    elinewidth=0.8, capsize=2, **line_style(index),
                )  # fmt: skip
                handles.setdefault(method, drawn)
            axes.xaxis.set_major_locator(FixedLocator([_place(s) for s in sparsities]))
            names = {_place(s): f"{100 * s:g}" for s in sparsities}
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _, names=names: names.get(x, "")))
            axes.set_title(f"{task[0]} on {task[1]}\n{MEASURES[measure]}")
            axes.set_xlabel("sparsity in %")
            axes.set_ylabel(f"accuracy in % ({here[0]['key']['report_on']})")
            axes.grid()
        for axes in grid:  # what is left of the last row
            axes.set_visible(False)
        figure.legend(list(handles.values()), list(handles), loc="outside right center")


def _place(sparsity: float) -> float:
    """Position on the axis, so that 90, 95 and 98 % stand apart: twice as sparse is one step on."""
    return -math.log2(1 - sparsity)


def _task(line: Line) -> tuple[str, str]:
    return line["key"]["model"], line["key"]["dataset"]


def _method(line: Line) -> str:
    return line["key"]["method"]


def _values(lines: Iterable[Line], method: str, sparsity: float, measure: str) -> list[float]:
    return [
        line[measure]
        for line in lines
        if _method(line) == method and line["key"]["sparsity"] == sparsity and line.get(measure) is not None
    ]


def _in_order(lines: Iterable[Line], of: Callable[[Line], Any]) -> list[Any]:
    return list(dict.fromkeys(of(line) for line in lines))

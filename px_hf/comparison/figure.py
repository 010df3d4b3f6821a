"""The results of a comparison as a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.ticker import FixedLocator, FuncFormatter

from .. import drawing
from .method import DENSE
from .results import MEASURES, Line, in_order, method_of, task_of, values_of


def plot(lines: Iterable[Line], path: Path) -> None:
    """Accuracy against sparsity, a panel for each task and measure; bars are the standard deviation over seeds."""
    lines = list(lines)
    tasks = in_order(lines, task_of)
    measures = [m for m in MEASURES if any(line.get(m) is not None for line in lines)]
    methods = [m for m in in_order(lines, method_of) if m != DENSE]
    partners = list(dict.fromkeys(map(_before_training, methods)))
    panels = [(task, measure) for task in tasks for measure in measures]
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with drawing.picture(path, 5.4 * columns + 2.2, 3.9 * rows + 0.3) as figure:
        grid = figure.subplots(rows, columns, squeeze=False).flat
        handles: dict[str, Any] = {}
        for (task, measure), axes in zip(panels, grid, strict=False):
            here = [line for line in lines if task_of(line) == task]
            sparsities = sorted({s for line in here if (s := line["key"]["sparsity"]) > 0})
            dense = values_of(here, DENSE, 0.0, measure)
            if dense:
                handles[DENSE] = axes.axhline(
                    100 * statistics.mean(dense), color=drawing.DENSE, linestyle="--", linewidth=1
                )
            for method in methods:
                partner = _before_training(method)
                found = [(_place(s), v) for s in sparsities if (v := values_of(here, method, s, measure))]
                drawn = axes.errorbar(
                    [x for x, _ in found],
                    [100 * statistics.mean(v) for _, v in found],
                    [100 * statistics.stdev(v) if len(v) > 1 else 0 for _, v in found],
                    elinewidth=0.8, capsize=2, **drawing.line_style(partners.index(partner)),
                    linestyle="--" if partner == method and len(partners) < len(methods) else "-",
                )  # fmt: skip
                handles.setdefault(method, drawn)
            axes.xaxis.set_major_locator(FixedLocator([_place(s) for s in sparsities]))
            names = {_place(s): f"{100 * s:g}" for s in sparsities}
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _, names=names: names.get(x, "")))
            axes.set_title(f"{task[0]} on {task[1]}\n{MEASURES[measure]}")
            axes.set_xlabel("sparsity in %")
            axes.set_ylabel(f"accuracy in % ({here[0]['split']})")
            axes.grid()
        for axes in grid:  # what is left of the last row
            axes.set_visible(False)
        figure.legend(list(handles.values()), list(handles), loc="outside right center")


def _before_training(method: str) -> str:
    """The method without its schedule: both have one colour, and that which prunes before training is dashed."""
    return ":".join(setting for setting in method.split(":") if not setting.startswith(("schedule=", "until=")))


def _place(sparsity: float) -> float:
    """Position on the axis, so that 90, 95 and 98 % stand apart: twice as sparse is one step on."""
    return -math.log2(1 - sparsity)

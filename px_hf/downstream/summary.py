"""Several downstream evaluations in one: what part of the dense accuracy a subnetwork keeps, over tasks and seeds.

A line is one network on one task by one method: `{"model", "task", "network", "kind", "criterion", "sparsity",
"method", "seed", "accuracy", "balanced_accuracy", "examples", "settings"}`, accuracies in [0, 1].
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student_t

from .. import drawing
from ..errors import CheckpointError, InvalidArgumentError
from ..evaluation.intervals import LEVEL
from .page import METHODS, RESULTS_FILE, read_results, table

LINES_FILE, SUMMARY_FILE, SUMMARY_FIGURE = "results.jsonl", "summary.md", "summary.png"

Line = dict[str, Any]
_OWN = ("subjects", "seed", "versions")
"""Settings of a task's record that may differ between runs that are put together."""


class Row(NamedTuple):
    """A network in the tables: what it was made by, and how sparse it is; of a random mask, of which density."""

    network: str
    criterion: str
    sparsity: float


def lines_of(results: Mapping[str, Any]) -> list[Line]:
    """The lines of one run's `downstream.json`, without the tasks that failed."""
    subjects = {subject["name"]: subject for subject in results["subjects"]}
    lines = []
    for task, record in results["tasks"].items():
        for name, methods in {} if record["error"] else record["results"].items():
            told = record["settings"]["subjects"].get(name, subjects[name])
            for method, found in methods.items():
                scores = found["scores"]
                lines.append(
                    {
                        "model": results["model"],
                        "task": task,
                        "network": name,
                        "kind": told["kind"],
                        "criterion": told.get("criterion", ""),
                        "sparsity": round(told["sparsity"], 4),
                        "method": method,
                        "seed": record["settings"]["seed"],
                        "accuracy": scores["accuracy"]["value"],
                        "balanced_accuracy": scores["balanced_accuracy"]["value"],
                        "examples": record["examples"],
                        "settings": {k: v for k, v in record["settings"].items() if k not in _OWN},
                    }
                )
    return lines


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Line]:
    """The lines of runs, given as their folders, or as files of lines that `write_lines` wrote.

    Raises:
        CheckpointError: a path holds neither, or a damaged one.
        InvalidArgumentError: the same network, task, method and seed twice, or runs with other settings.
    """
    lines: list[Line] = []
    for path in map(Path, paths):
        found = read_results(path)
        if found is not None:
            lines += lines_of(found)
        elif path.is_file():
            lines += _read_lines(path)
        else:
            raise CheckpointError(f"{path} is no folder with a {RESULTS_FILE}, and no file of lines.")
    known: dict[tuple[Any, ...], Line] = {}
    settings: dict[tuple[str, str], Line] = {}
    for line in lines:
        cell = (line["model"], line["task"], line["method"], _row(line), line["seed"])
        if line["kind"] != "dense" and cell in known:
            raise InvalidArgumentError(f"{_told(line)} is there twice. Leave out one of the runs.")
        known[cell] = line
        first = settings.setdefault((line["model"], line["task"]), line)
        differing = [k for k, v in first["settings"].items() if line["settings"].get(k) != v]
        if differing:
            both = ", ".join(f"{k} {first['settings'][k]} and {line['settings'].get(k)}" for k in differing)
            raise InvalidArgumentError(f"Runs with other settings of {line['task']!r} cannot be put together: {both}.")
    return list(known.values())


def write_lines(lines: Iterable[Line], path: Path) -> None:
    """One line of JSON for each, in an order that does not depend on the runs'."""
    texts = sorted(json.dumps(line, sort_keys=True) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's confidence interval of the mean at 95 %, `x̄ ± t·s/√n`; None of a single value."""
    if len(values) < 2:
        return None
    reach = student_t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - float(reach), statistics.mean(values) + float(reach)


def kept(lines: Sequence[Line], metrics: Mapping[str, str] | None = None) -> dict[Row, dict[str, dict[int, float]]]:
    """The share of the dense accuracy: row -> task -> seed -> accuracy over that of the dense network of the seed.

    `metrics` tells the metric of tasks that are not judged by accuracy. The lines are of one model and one method;
    seeds without a dense network have no share.
    """
    accuracies = {(line["task"], _row(line), line["seed"]): _judged(line, metrics) for line in lines}
    dense = {(line["task"], line["seed"]): _judged(line, metrics) for line in lines if line["kind"] == "dense"}
    shares: dict[Row, dict[str, dict[int, float]]] = {}
    for (task, row, seed), accuracy in accuracies.items():
        if row.sparsity and dense.get((task, seed)):
            shares.setdefault(row, {}).setdefault(task, {})[seed] = accuracy / dense[task, seed]
    return shares


def mean_over_tasks(by_task: Mapping[str, Mapping[int, float]], tasks: Iterable[str]) -> list[float]:
    """Of each seed that has all of the tasks."""
    found = [by_task.get(task, {}) for task in tasks]
    seeds = set.intersection(*(set(each) for each in found)) if found else set()
    return [statistics.mean(each[seed] for each in found) for seed in sorted(seeds)]


def summary(lines: Sequence[Line], metrics: Mapping[str, str] | None = None) -> str:
    """Markdown: for each model and method a table of the shares that are kept, a column for each task, and the mean.

    Cells are means over seeds with their standard deviation; the mean over tasks has its 95 % interval over seeds.
    """
    parts = []
    for model, method, here in _panels(lines):
        tasks = sorted({line["task"] for line in here})
        seeds = sorted({line["seed"] for line in here})
        shares = kept(here, metrics)
        rows = [["dense, %", "", *(_cell(_dense(here, task, metrics)) for task in tasks), ""]]
        for row in sorted(shares, key=lambda row: (row.sparsity, row.network, row.criterion)):
            cells = [_cell(list(shares[row].get(task, {}).values())) for task in tasks]
            mean = mean_over_tasks(shares[row], tasks)
            told = f"{row.network}, {row.criterion}" if row.criterion else row.network
            rows.append([f"{100 * row.sparsity:.3g} %", told, *cells, _with_interval(mean)])
        parts += [
            f"### {model}, {METHODS[method]}\n",
            f"The share of the dense accuracy that is kept, in %; seeds {', '.join(map(str, seeds))}: mean ± standard "
            "deviation, and of the mean over tasks the 95 % interval over seeds.\n",
            *table(["sparsity", "network", *tasks, "mean"], rows, left=2),
            "",
        ]
    return "\n".join(parts)


def plot_summary(
    lines: Sequence[Line], path: str | os.PathLike[str], metrics: Mapping[str, str] | None = None
) -> None:
    """The mean share that is kept against sparsity, with its interval; a panel for each model and method."""
    panels = list(_panels(lines))
    networks = sorted({_label(row) for _, _, here in panels for row in kept(here, metrics)})
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with drawing.picture(path, 4.6 * columns, 3.2 * rows + 0.3 + 0.2 * len(networks)) as figure:
        handles: dict[str, Any] = {}
        grid = figure.subplots(rows, columns, squeeze=False).flat
        for (model, method, here), axes in zip(panels, grid, strict=False):
            tasks, shares = sorted({line["task"] for line in here}), kept(here, metrics)
            for place, network in enumerate(networks):
                points = []
                for row in sorted(shares, key=lambda row: row.sparsity):
                    values = mean_over_tasks(shares[row], tasks)
                    if values and _label(row) == network:
                        mean = statistics.mean(values)
                        reach = mean - (interval(values) or (mean, mean))[0]
                        points.append((100 * row.sparsity, 100 * mean, 100 * reach))
                handles[network] = axes.errorbar(
                    *zip(*points, strict=True) if points else ([], []),
                    elinewidth=0.8, capsize=2, **drawing.line_style(place),
                )  # fmt: skip
            axes.axhline(100, color=drawing.DENSE, linestyle="--", linewidth=1)
            axes.set_title(f"{model}, {METHODS[method]}: mean of {len(tasks)} tasks")
            axes.set_xlabel("sparsity in %")
            axes.set_ylabel("share of the dense accuracy in %")
            axes.grid()
        for axes in grid:  # what is left of the last row
            axes.set_visible(False)
        figure.legend(list(handles.values()), list(handles), loc="outside lower center")


def _panels(lines: Sequence[Line]) -> Iterable[tuple[str, str, list[Line]]]:
    """The lines of each model and method."""
    for model, method in dict.fromkeys((line["model"], line["method"]) for line in lines):
        yield model, method, [line for line in lines if (line["model"], line["method"]) == (model, method)]


def _row(line: Line) -> Row:
    return Row(line["network"], line["criterion"], line["sparsity"])


def _label(row: Row) -> str:
    """The row at any sparsity."""
    name = "random" if row.network.startswith("random ") else row.network
    return f"{name}, {row.criterion}" if row.criterion else name


def _judged(line: Line, metrics: Mapping[str, str] | None) -> float:
    return float(line[(metrics or {}).get(line["task"], "accuracy")])


def _dense(lines: Iterable[Line], task: str, metrics: Mapping[str, str] | None) -> list[float]:
    return [_judged(line, metrics) for line in lines if line["kind"] == "dense" and line["task"] == task]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _with_interval(values: Sequence[float]) -> str:
    found = interval(values)
    told = f" [{100 * found[0]:.1f}, {100 * found[1]:.1f}]" if found else ""
    return f"{100 * statistics.mean(values):.1f}{told}" if values else "-"


def _told(line: Line) -> str:
    return f"{line['network']} on {line['task']} ({line['method']}, seed {line['seed']})"


def _read_lines(path: Path) -> list[Line]:
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            lines.append({name: line[name] for name in _FIELDS})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"Line {number} of {path} is no result of px-hf transfer: {error!r}.") from error
    return lines


_FIELDS = (
    *("model", "task", "network", "kind", "criterion", "sparsity", "method", "seed"),
    *("accuracy", "balanced_accuracy", "examples", "settings"),
)

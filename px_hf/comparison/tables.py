"""The results of a comparison as tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from .method import DENSE
from .results import MEASURES, Line, in_order, method_of, task_of, values_of


def mean_and_spread(values: Sequence[float]) -> str:
    """In percent; the spread is the standard deviation over seeds."""
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


_CHOSEN = " After the @: the learning rate, chosen on the validation split."


def _rate(lines: Sequence[Line], method: str, sparsity: float) -> str:
    """The learning rate, if it was chosen among several."""
    chosen = {
        line["key"]["learning_rate"]
        for line in lines
        if method_of(line) == method and line["key"]["sparsity"] == sparsity and line["rates"] > 1
    }
    return "".join(f" @ {rate:g}" for rate in chosen)


def markdown(lines: Iterable[Line]) -> str:
    """For every task and measure a table: a row for each method, a column for each sparsity."""
    lines = list(lines)
    parts = []
    for task in in_order(lines, task_of):
        here = [line for line in lines if task_of(line) == task]
        sparsities = sorted({s for line in here if (s := line["key"]["sparsity"]) > 0})
        for measure, title in MEASURES.items():
            if not any(line.get(measure) is not None for line in here):
                continue
            seeds = len({line["key"]["seed"] for line in here})
            dense = mean_and_spread(values_of(here, DENSE, 0.0, measure)) + _rate(here, DENSE, 0.0)
            chosen = _CHOSEN if any(line["rates"] > 1 for line in here) else ""
            parts.append(f"### {task[0]} on {task[1]}, {title}\n")
            parts.append(
                f"Accuracy in % on the {here[0]['split']} split, mean ± standard deviation over {seeds} seed(s). "
                f"Dense: {dense or 'not measured'}. Cost of scoring in forward passes of one image.{chosen}\n"
            )
            heads = [f"{100 * s:g} % sparse" for s in sparsities]
            parts.append(f"| method | {' | '.join(heads)} | cost |")
            parts.append("|---" * (len(heads) + 2) + "|")
            for method in in_order(here, method_of):
                if method == DENSE:
                    continue
                cells = [
                    mean_and_spread(values_of(here, method, s, measure)) + _rate(here, method, s) for s in sparsities
                ]
                if not any(cells):  # what prunes while it is fine-tuned has no accuracy before
                    continue
                costs = [line["forward_units"] for line in here if method_of(line) == method]
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
            cell = found.setdefault((task_of(line), line["key"]["sparsity"]), {})
            cell.setdefault(method_of(line), {})[line["key"]["seed"]] = line[measure]
    methods = [m for m in in_order(lines, method_of) if all(m in cell for cell in found.values())]
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

"""One picture of a downstream evaluation: a panel for each task."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..plots import _DPI, _save
from .page import METHODS

_COLOURS = {"dense": "#222222", "pruned": "#31688e", "random": "#c1440e"}


def plot_downstream(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Accuracy with its interval, by task, method and subject; `results` as in `px_hf.evaluation.page`.

    Pruned subjects and their controls fade as their sparsity rises. Tasks that failed have an empty panel.
    """
    subjects, methods, tasks = results["subjects"], results["methods"], results["tasks"]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    width = 1.8 + columns * max(3.0, 0.16 * len(methods) * len(subjects) + 1)
    figure = Figure(figsize=(width, 3.1 * rows + 0.9), dpi=_DPI, layout="constrained")
    panels = iter(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    shades, markers = _shades(subjects), _markers(subjects)
    for (task, record), axes in zip(sorted(tasks.items()), panels, strict=False):
        axes.set_title(task if not record["error"] else f"{task}: failed", fontsize=10)
        for place, subject in enumerate(subjects):
            found = record["results"].get(subject["name"], {})
            for column, method in enumerate(methods):
                if method in found:
                    score = found[method]["scores"]["accuracy"]
                    value, low, high = (100 * score[key] for key in ("value", "low", "high"))
                    x = column + 0.72 * ((place + 0.5) / len(subjects) - 0.5)
                    axes.errorbar(
                        x, value, [[value - low], [high - value]],
                        fmt=markers[place], color=_COLOURS[subject["kind"]], alpha=shades[place],
                        markersize=5, elinewidth=1.3,
                    )  # fmt: skip
        axes.set_xticks(range(len(methods)), [METHODS[method] for method in methods], fontsize=8)
        axes.set_xlim(-0.5, len(methods) - 0.5)
        axes.set_ylim(0, 102)
        axes.grid(axis="y", color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels:  # those without a task
        axes.set_visible(False)
    figure.supylabel("test accuracy, %, with 95 % interval", fontsize=9)
    figure.suptitle(f"{results['model']} on downstream tasks")
    handles = [
        Line2D([], [], marker=marker, color=_COLOURS[subject["kind"]], alpha=shade, label=subject["name"])
        for subject, shade, marker in zip(subjects, shades, markers, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=8)
    _save(figure, path)


def _markers(subjects: list[Mapping[str, Any]]) -> list[str]:
    """By kind; pruned subjects of the same sparsity have different ones."""
    markers: list[str] = []
    for place, subject in enumerate(subjects):
        alike = sum((s["kind"], s["sparsity"]) == (subject["kind"], subject["sparsity"]) for s in subjects[:place])
        markers.append({"dense": "s", "pruned": "o^Dvp"[alike % 5], "random": "x"}[subject["kind"]])
    return markers


def _shades(subjects: list[Mapping[str, Any]]) -> list[float]:
    """Opacity: 1 for the least sparse of its kind, down to 0.4."""
    shades = []
    for subject in subjects:
        kin = sorted({s["sparsity"] for s in subjects if s["kind"] == subject["kind"]})
        shades.append(1 - 0.6 * kin.index(subject["sparsity"]) / max(1, len(kin) - 1))
    return shades

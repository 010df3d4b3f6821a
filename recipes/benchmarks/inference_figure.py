"""The picture of the inference benchmark: time of each model, as a share of the dense one's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#8a9ba8", "#31688e", "#c1440e", "#3a7d44", "#7b4ea3", "#b8860b", "#1fa187")


def plot(rows: Sequence[Mapping[str, Any]], models: Sequence[str], path: Path) -> None:
    """Bars from top to bottom in the order of the rows, a colour for each model; rows without a ratio are left out."""
    shown = [row for row in rows if row["of_dense"] is not None]
    figure = Figure(figsize=(8.5, 0.27 * len(shown) + 1.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {model: _COLOURS[i % len(_COLOURS)] for i, model in enumerate(models)}
    for model in models:
        bars = [(y, row["of_dense"]) for y, row in enumerate(shown) if row["model"] == model]
        if bars:
            axes.barh(*zip(*bars, strict=True), color=colours[model], label=model)
    for y, row in enumerate(shown):
        axes.annotate(
            f" {row['of_dense']:.2f} ({row['milliseconds']:.3g} ms)", (row["of_dense"], y), va="center", fontsize=7
        )
    axes.axvline(1, color="0.3", linewidth=1)
    labels = [f"{row['runtime']}, batch {row['batch_size']}" for row in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7.5)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_xlabel("time of the dense model in the same kind of runtime = 1")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=min(4, len(models)), frameon=False, fontsize=8)
    unfinished = path.with_name(f".{path.stem}.tmp{path.suffix}")
    figure.savefig(unfinished)
    os.replace(unfinished, path)

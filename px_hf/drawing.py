"""How all pictures look: one palette, one type, one way to make a figure and to write it to a file.

Drawn through Matplotlib's Agg canvas without pyplot: no display, and no setting stays behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_hex
from matplotlib.figure import Figure

from .atomic import whole

BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, PURPLE = SERIES = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d3a9b",
)  # fmt: skip
"""Colours of things that are compared, told apart by colour-blind people too (Okabe and Ito, 2008; their yellow is too
light for lines, and purple takes its place)."""

MARKERS = ("o", "s", "^", "D", "v")

DENSE = "#4d4d4d"
"""The unpruned network, in every picture."""

KEPT = "#dde5ea"
"""What is left, behind bars of what is gone."""

LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.labelsize": 9,
    "axes.prop_cycle": f"cycler(color={list(SERIES)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.dpi": 130,
    "figure.labelsize": 9,
    "figure.titlesize": 11,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": "#e6e6e6",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "savefig.dpi": "figure",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
"""Settings of Matplotlib while a figure is drawn, see `matplotlib.rcParams`."""


@contextmanager
def picture(path: str | os.PathLike[str], width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, which becomes the PNG file ``path`` when the block ends, whole or not at all."""
    with rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with whole(path) as unfinished:
            figure.savefig(unfinished, format="png")


def line_style(index: int) -> dict[str, Any]:
    """Colour and marker of a line; the first 35 differ in one of them, and neighbours in both."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)]}


def shades(colour: str, count: int) -> list[str]:
    """Shades of one colour from light to dark; one alone is the colour itself."""
    scale = LinearSegmentedColormap.from_list("shades", [_mixed(colour, "w"), colour, _mixed(colour, "k")])
    return [to_hex(scale(place / (count - 1) if count > 1 else 0.5)) for place in range(count)]


def class_colours(count: int) -> ListedColormap:
    """A colour for each class of a map; with many classes colours come again."""
    few, many = [*SERIES, DENSE], colormaps["tab20"]
    return ListedColormap(few[:count] if count <= len(few) else [many(k % many.N) for k in range(count)])


def _mixed(colour: str, other: str) -> str:
    """Half of each."""
    return to_hex(LinearSegmentedColormap.from_list("mixed", [colour, other])(0.5))

"""Pictures of an evaluation: accuracy with a panel for each task, and maps of classes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

from ..drawing import BLUE, DENSE, VERMILION, class_colours, picture, shades
from .page import METHODS

COLOURS = {"dense": DENSE, "pruned": BLUE, "random": VERMILION}


def plot_downstream(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Accuracy with its interval, by task, method and subject; `results` as in `px_hf.downstream.page`.

    Pruned subjects and their controls darken as their sparsity rises. Tasks that failed have an empty panel.
    """
    subjects, methods, tasks = results["subjects"], results["methods"], results["tasks"]
    panel = max(3.0, 0.16 * len(methods) * len(subjects) + 1)  # inches
    columns = max(1, min(3, len(tasks), int(11 / panel)))
    rows = -(-len(tasks) // columns)
    width = 1.8 + columns * panel
    with picture(path, width, 3.1 * rows + 0.9) as figure:
        handles = [
            Line2D([], [], linestyle="", marker=marker, color=colour, label=subject["name"])
            for subject, colour, marker in zip(subjects, _shades(subjects), _markers(subjects), strict=True)
        ]
        panels = iter(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
        for (task, record), axes in zip(sorted(tasks.items()), panels, strict=False):
            axes.set_title(task if not record["error"] else f"{task}: failed")
            for place, (subject, handle) in enumerate(zip(subjects, handles, strict=True)):
                found = record["results"].get(subject["name"], {})
                for column, method in enumerate(methods):
                    if method in found:
                        score = found[method]["scores"]["accuracy"]
                        value, low, high = (100 * score[key] for key in ("value", "low", "high"))
                        x = column + 0.72 * ((place + 0.5) / len(subjects) - 0.5)
                        axes.errorbar(
                            x, value, [[value - low], [high - value]],
                            fmt=handle.get_marker(), color=handle.get_color(), elinewidth=1.3,
                        )  # fmt: skip
            axes.set_xticks(range(len(methods)), [METHODS[method] for method in methods])
            axes.set_xlim(-0.5, len(methods) - 0.5)
            axes.set_ylim(0, 102)
            axes.grid(axis="y")
        for axes in panels:  # those without a task
            axes.set_visible(False)
        figure.supylabel("test accuracy, %, with 95 % interval")
        figure.suptitle(f"{results['model']} on downstream tasks")
        entry = 0.75 + 0.07 * max(len(subject["name"]) for subject in subjects)  # inches, at this size of type
        lines = -(-len(handles) // max(1, int(width / entry)))
        figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(handles) // lines))


def _markers(subjects: list[Mapping[str, Any]]) -> list[str]:
    """By kind; pruned subjects of the same sparsity have different ones."""
    markers: list[str] = []
    for place, subject in enumerate(subjects):
        alike = sum((s["kind"], s["sparsity"]) == (subject["kind"], subject["sparsity"]) for s in subjects[:place])
        markers.append({"dense": "s", "pruned": "o^Dvp"[alike % 5], "random": "x"}[subject["kind"]])
    return markers


def _shades(subjects: list[Mapping[str, Any]]) -> list[str]:
    """The colours of the subjects: of its kind, the darker the sparser."""
    found = []
    for subject in subjects:
        kin = sorted({s["sparsity"] for s in subjects if s["kind"] == subject["kind"]})
        found.append(shades(COLOURS[subject["kind"]], len(kin))[kin.index(subject["sparsity"])])
    return found


def plot_segmentation(
    images: Sequence[Image.Image], maps: Mapping[str, Sequence[np.ndarray]], labels: Sequence[str],
    path: str | os.PathLike[str],
) -> None:  # fmt: skip
    """A row for each image: the image, then its maps `[H, W]` by name, a colour for each class, white where < 0.

    Maps of another size than the image are drawn at its size.
    """
    height = sum(1.9 * image.height / image.width + 0.1 for image in images)
    colours = class_colours(len(labels))
    with picture(path, 1.9 * (1 + len(maps)), height + 0.9) as figure:
        panels = figure.subplots(len(images), 1 + len(maps), squeeze=False)
        for row, image in enumerate(images):
            size = (0, image.width, image.height, 0)
            panels[row, 0].imshow(image)
            for column, (name, drawn) in enumerate(maps.items(), start=1):
                shown = np.ma.masked_less(drawn[row], 0)
                panels[row, column].imshow(
                    shown, cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, interpolation="nearest", extent=size
                )
                panels[0, column].set_title(name)
        for axes in panels.flat:
            axes.spines[:].set_visible(True)
            axes.set_xticks([])
            axes.set_yticks([])
        handles = [Patch(color=colours(k), label=label) for k, label in enumerate(labels[:20])]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)))

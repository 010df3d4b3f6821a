"""Two figures of a pruning run, as PNG files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from .drawing import BLUE, DENSE, KEPT, VERMILION, picture


def plot_layer_sparsity(masks: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """One bar per layer: the share of its weights that is pruned, and how many are kept of how many.

    `masks` maps parameter names to bool tensors, True = kept. The picture grows with the number of layers,
    so that every name stays readable.
    """
    names = _short_names(list(masks))
    sizes = [mask.numel() for mask in masks.values()]
    kept = [int(mask.sum()) for mask in masks.values()]
    sparsity = [100 * (1 - k / n) for k, n in zip(kept, sizes, strict=True)]
    total = 100 * (1 - sum(kept) / sum(sizes))

    with picture(path, 9.0, 0.21 * len(names) + 1.5) as figure:
        axes = figure.add_subplot()
        rows = range(len(names))
        axes.barh(rows, [100.0] * len(names), color=KEPT, height=0.78, label="kept")
        axes.barh(rows, sparsity, color=BLUE, height=0.78, label="pruned")
        axes.axvline(total, color=VERMILION, label=f"all layers together: {total:.2f} % pruned")
        for row, (k, n) in enumerate(zip(kept, sizes, strict=True)):
            color = "black" if k else VERMILION  # an emptied layer cuts the network
            text = f"{k:,} of {n:,}"
            axes.annotate(text, (101, row), va="center", fontsize=7, color=color, annotation_clip=False)
        axes.set_yticks(rows, names, fontsize=7.5)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlim(0, 100)
        axes.xaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.set_xlabel("share of the layer's weights that is pruned (right: weights kept)")
        axes.set_title(f"Sparsity per layer: {sum(kept):,} of {sum(sizes):,} weights kept", pad=28)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)


def plot_training(
    log_history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "Fine-tuning",
    dense_accuracy: float | None = None,
) -> None:
    """Loss and accuracy against epochs, from `trainer.state.log_history`.

    `dense_accuracy`, of the unpruned network on the same examples, is drawn as a line to compare with.
    """
    series = {
        key: [(entry["epoch"], entry[key]) for entry in log_history if key in entry and "epoch" in entry]
        for key in ("loss", "eval_loss", "eval_accuracy")
    }
    with picture(path, 8.0, 6.0) as figure:
        figure.suptitle(title)
        panels = figure.subplots(2 if series["eval_accuracy"] else 1, 1, sharex=True, squeeze=False)[:, 0]
        _line(panels[0], series["loss"], "training", BLUE, marker="" if len(series["loss"]) > 40 else ".")
        _line(panels[0], series["eval_loss"], "validation", VERMILION, marker="o")
        panels[0].set_ylabel("loss (cross-entropy)")
        panels[0].set_ylim(bottom=0)
        if series["eval_accuracy"]:
            percent = [(epoch, 100 * accuracy) for epoch, accuracy in series["eval_accuracy"]]
            _line(panels[1], percent, "validation", VERMILION, marker="o")
            if dense_accuracy is not None:
                label = f"validation, dense network: {100 * dense_accuracy:.1f} %"
                panels[1].axhline(100 * dense_accuracy, color=DENSE, linestyle="--", label=label)
            panels[1].set_ylabel("accuracy")
            panels[1].yaxis.set_major_formatter(PercentFormatter(decimals=None))
        panels[-1].set_xlabel("epoch")
        for axes in panels:
            axes.grid()
            axes.legend()


def _line(axes: Axes, points: list[tuple[float, float]], label: str, color: str, marker: str) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, label=label)


def _short_names(names: list[str]) -> list[str]:
    """Names without what all of them share: a leading module path and the trailing `.weight`."""
    parts = [name.removesuffix(".weight").split(".") for name in names]
    shared = 0
    while len(parts) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    if shared and any(p[shared].isdigit() for p in parts):
        shared -= 1  # "layers.0.attention" rather than "0.attention"
    return [".".join(p[shared:]) for p in parts]

"""The two figures of a run: real PNG files, every layer named, nothing cut off."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import px_hf.plots
from px_hf.plots import plot_layer_sparsity, plot_training


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look inside."""
    figures: list[Figure] = []
    save = px_hf.plots._save
    monkeypatch.setattr(px_hf.plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def log(epochs: int, steps: int = 4) -> list[dict[str, float]]:
    history = []
    for step in range(1, epochs * steps + 1):
        history.append({"epoch": step / steps, "loss": 2.0 * math.exp(-step / 9), "learning_rate": 1e-3})
        if step % steps == 0:
            history.append({"epoch": step / steps, "eval_loss": 1.0 / step, "eval_accuracy": 1 - 0.5 / step})
    return [*history, {"epoch": float(epochs), "train_loss": 1.0, "train_runtime": 3.0}]


@pytest.mark.parametrize("layers", [1, 9, 120])
def test_every_layer_has_a_readable_bar(tmp_path: Path, drawn: list[Figure], layers: int) -> None:
    masks = {f"model.encoder.layer.{i}.output.weight": torch.zeros(10, 10, dtype=torch.bool) for i in range(layers)}
    for i, mask in enumerate(masks.values()):
        mask.view(-1)[: i % 100] = True
    plot_layer_sparsity(masks, tmp_path / "sparsity.png")
    assert Image.open(tmp_path / "sparsity.png").format == "PNG"
    assert [file.name for file in tmp_path.iterdir()] == ["sparsity.png"]

    (axes,) = drawn[0].axes
    bars = axes.containers[1]  # containers[0] is the background
    assert [bar.get_width() for bar in bars] == pytest.approx([100 - i % 100 for i in range(layers)])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == (["model.encoder.layer.0.output"] if layers == 1 else [f"layer.{i}.output" for i in range(layers)])
    # neither do labels overlap nor does a text leave the picture
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
    width, height = FigureCanvasAgg(drawn[0]).get_width_height()
    for text in [*axes.texts, *axes.get_yticklabels(), axes.title, axes.xaxis.label]:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height


def test_training_curve_shows_losses_accuracy_and_the_dense_network(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_training(log(5), tmp_path / "curve.png", title="ResNet on digits", dense_accuracy=0.97)
    assert Image.open(tmp_path / "curve.png").format == "PNG"
    losses, accuracy = drawn[0].axes
    assert [line.get_label() for line in losses.lines] == ["training", "validation"]
    assert [len(line.get_xdata()) for line in losses.lines] == [20, 5]
    assert accuracy.lines[0].get_ydata()[-1] == pytest.approx(97.5)
    assert accuracy.lines[1].get_ydata()[0] == pytest.approx(97.0)
    assert accuracy.get_xlabel() == "epoch"


def test_training_without_evaluation_has_one_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    history = [entry for entry in log(1) if "eval_loss" not in entry]
    plot_training(history, tmp_path / "curve.png")
    assert len(drawn[0].axes) == 1


def test_pyplot_is_left_alone() -> None:
    import subprocess

    code = "import px_hf.plots, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The look of all figures, and the two of a run: real PNG files, every layer named, nothing cut off."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from px_hf.drawing import DENSE, LOOK, SERIES, class_colours, line_style, picture, shades
from px_hf.plots import plot_layer_sparsity, plot_training


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved, to look inside."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **kw: (figures.append(self), save(self, *a, **kw)))
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
    code = "import px_hf.plots, sys; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_hold_inside_a_picture_alone(tmp_path: Path) -> None:
    before = dict(rcParams)
    with picture(tmp_path / "new" / "one.png", 3, 2) as figure:
        assert all(rcParams[name] == value for name, value in LOOK.items() if name.endswith("size"))
        figure.add_subplot().plot([1, 2])
    assert dict(rcParams) == before
    with Image.open(tmp_path / "new" / "one.png") as image:
        assert (image.format, image.size) == ("PNG", (390, 260))


def test_a_picture_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), picture(tmp_path / "one.png", 3, 2):
        _ = 1 / 0
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("one.png", b"old")]


def test_colours_and_markers_tell_lines_apart() -> None:
    styles = [tuple(line_style(index).values()) for index in range(35)]
    assert len(set(styles)) == 35
    assert all(a != c and b != d for (a, b), (c, d) in itertools.pairwise(styles))


def test_shades_darken_and_class_colours_suffice() -> None:
    light, middle, dark = ([int(shade[i : i + 2], 16) for i in (1, 3, 5)] for shade in shades(SERIES[0], 3))
    assert sum(light) > sum(middle) > sum(dark)
    assert shades(DENSE, 1) == [DENSE]
    assert [class_colours(n).N for n in (1, 8, 9, 150)] == [1, 8, 9, 150]
    many = class_colours(150)
    assert all(many(k) != many(k + 1) for k in range(149))

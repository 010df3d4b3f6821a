"""The metric scripts: scikit-learn's own numbers, slow oracles where it has none, and no network."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from px_hf.metrics import metric_path
from px_hf.metrics.mean_iou.mean_iou import confusion_matrices, from_confusion

ON_CLASSES = {
    "accuracy": sklearn_metrics.accuracy_score,
    "macro_f1": lambda true, predicted: sklearn_metrics.f1_score(true, predicted, average="macro"),
    "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
}
ON_SCORES = ("top_5_accuracy", "calibration_error")
ALL = [*ON_CLASSES, *ON_SCORES, "mean_iou"]


@cache
def metric(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(metric_path(name), keep_in_memory=True)


def draws(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, K], rounded so that there are ties, and classes, not all of which need occur."""
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet(np.full(classes, 0.3), count)
    return np.round(scores * 8) / 8 + (1 - (np.round(scores * 8) / 8).sum(1, keepdims=True)) / classes, rng.integers(
        0, classes, count
    )


@pytest.mark.parametrize("name", ON_CLASSES)
@pytest.mark.parametrize(("count", "classes"), [(1, 2), (7, 3), (50, 12), (300, 40)])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
@pytest.mark.filterwarnings("ignore:A single label was found")
def test_metrics_of_classes_are_scikit_learns(name: str, count: int, classes: int) -> None:
    scores, true = draws(count, classes, seed=count)
    predicted = scores.argmax(1)
    assert metric(name).compute(predictions=predicted, references=true) == {name: ON_CLASSES[name](true, predicted)}


@pytest.mark.parametrize("classes", [6, 10, 50])
def test_top_5_is_scikit_learns_also_with_ties_and_absent_classes(classes: int) -> None:
    scores, true = draws(40, classes, seed=classes)
    expected = sklearn_metrics.top_k_accuracy_score(true, scores, k=5, labels=range(classes))
    assert metric("top_5_accuracy").compute(predictions=scores, references=true) == {"top_5_accuracy": expected}


@pytest.mark.parametrize("classes", [2, 5])
def test_top_5_of_five_classes_or_fewer_is_one(classes: int) -> None:
    scores, true = draws(9, classes, seed=1)
    assert metric("top_5_accuracy").compute(predictions=scores, references=true) == {"top_5_accuracy": 1.0}


def slow_calibration_error(probabilities: np.ndarray, true: np.ndarray, bins: int) -> float:
    """Guo et al., Eq. 3, by the book: exact edges, one example at a time."""
    total = Fraction(0)
    for i in range(bins):
        members = [
            (Fraction(float(max(row))), int(np.argmax(row)) == label)
            for row, label in zip(probabilities, true, strict=True)
            if (Fraction(i, bins) < Fraction(float(max(row))) or i == 0)
            and (Fraction(float(max(row))) <= Fraction(i + 1, bins) or i == bins - 1)
        ]
        if members:
            accuracy = Fraction(sum(right for _, right in members), len(members))
            confidence = sum(value for value, _ in members) / len(members)
            total += Fraction(len(members), len(true)) * abs(accuracy - confidence)
    return float(total)


@pytest.mark.parametrize("bins", [1, 8, 15, 100])
def test_calibration_error_is_that_of_its_definition(bins: int) -> None:
    rng = np.random.default_rng(bins)
    probabilities, true = rng.dirichlet(np.ones(4), 60), rng.integers(0, 4, 60)
    result = metric("calibration_error").compute(predictions=probabilities, references=true, bins=bins)
    assert result["calibration_error"] == pytest.approx(slow_calibration_error(probabilities, true, bins), abs=1e-14)


def test_calibration_error_by_hand() -> None:
    """Sure and right; half sure and wrong: (|1 - 1| + |0 - 0.5|) / 2. A confidence on an edge is in the lower bin."""
    compute = metric("calibration_error").compute
    assert compute(predictions=[[0.0, 1.0], [0.5, 0.5]], references=[1, 1]) == {"calibration_error": 0.25}
    # 0.5 and 0.75 are in one bin of (0.5, 1] and (0, 0.5]: apart with 2 bins, together with 1
    rows = {"predictions": [[0.5, 0.5], [0.75, 0.25]], "references": [1, 0]}
    assert compute(**rows, bins=2) == {"calibration_error": (0.5 + 0.25) / 2}
    assert compute(**rows, bins=1) == {"calibration_error": 0.125}


@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_mean_iou_is_scikit_learns_over_the_pixels_that_count(ignore_index: int) -> None:
    rng = np.random.default_rng(3)
    sizes = [(5, 7), (3, 3), (8, 2)]
    predicted = [rng.integers(0, 5, size) for size in sizes]  # class 5 of 6 never occurs
    true = [np.where(rng.random(size) < 0.2, ignore_index, rng.integers(0, 4, size)) for size in sizes]
    flat_true, flat_predicted = (np.concatenate([m.ravel() for m in maps]) for maps in (true, predicted))
    counted = flat_true != ignore_index
    flat_true, flat_predicted = flat_true[counted], flat_predicted[counted]
    result = metric("mean_iou").compute(
        predictions=predicted, references=true, num_labels=6, ignore_index=ignore_index
    )
    occurring = sorted({*flat_true.tolist(), *flat_predicted.tolist()})
    expected = sklearn_metrics.jaccard_score(flat_true, flat_predicted, average=None, labels=occurring)
    assert [result["per_category_iou"][k] for k in occurring] == expected.tolist()
    assert result["mean_iou"] == sklearn_metrics.jaccard_score(flat_true, flat_predicted, average="macro")
    assert result["overall_accuracy"] == sklearn_metrics.accuracy_score(flat_true, flat_predicted)
    assert np.isnan(result["per_category_iou"][5])
    # the same from counts image by image, as a training loop adds them up
    counts = sum(confusion_matrices([p], [t], 6, ignore_index).sum(0) for p, t in zip(predicted, true, strict=True))
    assert from_confusion(counts)["mean_iou"] == result["mean_iou"]
    matrix = sklearn_metrics.confusion_matrix(flat_true, flat_predicted, labels=range(6))
    assert (counts == matrix).all()


def test_mean_iou_with_reduced_labels() -> None:
    """0 is background and does not count; 1 and 2 are the classes 0 and 1."""
    true = [[[0, 1, 2], [2, 255, 1]]]
    predicted = [[[1, 0, 1], [1, 0, 1]]]
    result = metric("mean_iou").compute(predictions=predicted, references=true, num_labels=2, reduce_labels=True)
    assert result["per_category_iou"] == [1 / 2, 2 / 3]
    assert result["overall_accuracy"] == 3 / 4


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("accuracy", {"predictions": [0, 1], "references": [0]}, "Mismatch in the number"),
    ("top_5_accuracy", {"predictions": [[0.1] * 6], "references": [6]}, "classes 0 to 5, got 6"),
    ("calibration_error", {"predictions": [[2.0, -1.0]], "references": [0]}, "Apply softmax to logits first"),
    ("calibration_error", {"predictions": [[0.5, 0.5]], "references": [2]}, "classes 0 to 1, got 2"),
    ("calibration_error", {"predictions": [[0.5, 0.5]], "references": [0], "bins": 0}, "bins must be at least 1"),
    ("mean_iou", {"predictions": [[[0]]], "references": [[[2]]], "num_labels": 2}, "references has values from 2"),
    ("mean_iou", {"predictions": [[[2]]], "references": [[[0]]], "num_labels": 2}, "predictions has values from 2"),
    ("mean_iou", {"predictions": [[[0, 0]]], "references": [[[0]]], "num_labels": 2}, r"Map 0 is \[1, 2\] in predict"),
]


@pytest.mark.parametrize(("name", "inputs", "message"), BAD)
def test_bad_input_is_an_error(name: str, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(name).compute(**inputs)


def test_every_metric_loads_where_every_connection_fails(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import evaluate\n"
        "from px_hf.metrics import metric_path\n"
        f"for name in {ALL!r}:\n"
        "    assert evaluate.load(metric_path(name)).inputs_description\n"
        "    print(name)\n"
        "print(evaluate.load(metric_path('accuracy')).compute(predictions=[1, 0], references=[1, 1])['accuracy'])\n"
    )
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [*ALL, "0.5"], done.stderr
    assert {path.name for path in Path(metric_path("accuracy")).parent.iterdir() if path.is_dir()} - {
        "__pycache__"
    } == set(ALL)

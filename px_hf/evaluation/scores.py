"""The scores of a classifier on test examples, with confidence intervals."""

from __future__ import annotations

from functools import cache
from typing import TypedDict

import evaluate
import numpy as np

from ..errors import DataError
from ..metrics import metric_path
from ..metrics.mean_iou.mean_iou import from_confusion
from .intervals import bootstrap, unit_counts, wilson


class Score(TypedDict, total=False):
    """A value with its 95 % interval; the calibration error has none, because resampling would only raise it."""

    value: float
    low: float
    high: float
    interval: str


def classification_scores(
    scores: np.ndarray, labels: np.ndarray, *, probabilities: bool = True, seed: int = 0
) -> dict[str, Score]:
    """accuracy, top_5_accuracy, macro_f1, balanced_accuracy and, of probabilities, calibration_error.

    `scores` [N, K], the highest for the predicted class (of equals the first); `labels` int [N] in [0, K).
    Values are those of the metric scripts of px_hf, intervals those of `px_hf.evaluation.intervals`.

    Raises:
        DataError: shapes or labels do not fit.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] != len(labels) or len(labels) == 0:
        raise DataError(f"Scores {list(scores.shape)} and {len(labels)} labels: expected [N, K] and N, N at least 1.")
    classes, count = scores.shape[1], len(labels)
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"Labels {labels.min()} to {labels.max()} for scores of {classes} classes.")
    predicted = scores.argmax(1)
    found = {
        name: _metric(name).compute(predictions=predicted, references=labels)[name]
        for name in ("accuracy", "macro_f1", "balanced_accuracy")
    }
    found["top_5_accuracy"] = _metric("top_5_accuracy").compute(predictions=scores, references=labels)[
        "top_5_accuracy"
    ]

    cells, multiplicity = np.unique(labels * classes + predicted, return_counts=True)
    units = np.zeros((len(cells), 3, classes))
    each, true, guess = np.arange(len(cells)), cells // classes, cells % classes
    units[each, 0, true] = true == guess
    units[each, 1, true] = 1
    units[each, 2, guess] = 1

    result: dict[str, Score] = {}
    for name in ("accuracy", "top_5_accuracy"):
        low, high = wilson(round(found[name] * count), count)
        result[name] = {"value": found[name], "low": low, "high": high, "interval": "Wilson"}
    for name in ("macro_f1", "balanced_accuracy"):
        low, high = bootstrap(name, units, multiplicity, seed=seed)
        result[name] = {"value": found[name], "low": low, "high": high, "interval": "bootstrap"}
    if probabilities:
        computed = _metric("calibration_error").compute(predictions=scores, references=labels)
        result["calibration_error"] = {"value": computed["calibration_error"]}
    return result


def segmentation_scores(confusions: np.ndarray, *, seed: int = 0) -> dict[str, Score]:
    """mean_iou and overall_accuracy from the counts of each image, `[N, K, K]`: `[n, true, predicted]`.

    The interval is for other images of the same kind: a bootstrap over images, since pixels are not independent.
    """
    found = from_confusion(confusions.sum(0))
    low, high = bootstrap("mean_iou", unit_counts(confusions), seed=seed)
    return {
        "mean_iou": {"value": found["mean_iou"], "low": low, "high": high, "interval": "bootstrap over images"},
        "overall_accuracy": {"value": found["overall_accuracy"]},
    }


@cache
def _metric(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(metric_path(name), keep_in_memory=True)

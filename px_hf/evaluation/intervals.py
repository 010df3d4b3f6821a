"""Confidence intervals at 95 %, over the drawing of the test examples (not of training seeds).

Shares of examples (accuracy, top-5) get Wilson's score interval; means over classes of a ratio of counts (macro F1,
balanced accuracy, mean IoU) the percentile bootstrap.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import binomtest

LEVEL = 0.95


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share of `right` out of `count` independent examples."""
    interval = binomtest(right, count).proportion_ci(LEVEL, method="wilson")
    return float(interval.low), float(interval.high)


def unit_counts(confusion: np.ndarray) -> np.ndarray:
    """`[..., K, K]` counts `[true, predicted]` -> `[..., 3, K]`: right, true and predicted of each class."""
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.stack([right, confusion.sum(-1), confusion.sum(-2)], -2)


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """2 TP / (true + predicted), `[..., 3, K] -> [...]`, over the classes that occur."""
    right, true, predicted = np.moveaxis(counts, -2, 0)
    return _mean_ratio(2 * right, true + predicted)


def balanced_accuracy(counts: np.ndarray) -> np.ndarray:
    """TP / true, over the true classes."""
    right, true, _ = np.moveaxis(counts, -2, 0)
    return _mean_ratio(right, true)


def mean_iou(counts: np.ndarray) -> np.ndarray:
    """TP / (true + predicted - TP), over the classes that occur."""
    right, true, predicted = np.moveaxis(counts, -2, 0)
    return _mean_ratio(right, true + predicted - right)


MEANS_OVER_CLASSES = {"macro_f1": macro_f1, "balanced_accuracy": balanced_accuracy, "mean_iou": mean_iou}


def bootstrap(
    name: str, units: np.ndarray, multiplicity: np.ndarray | None = None, *, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of one of `MEANS_OVER_CLASSES` when the units are drawn anew, with replacement.

    `units` are counts `[U, 3, K]` (see `unit_counts`): of images in segmentation, of the cells of the confusion
    matrix in classification, where `multiplicity` `[U]` says how many examples a cell stands for.
    """
    weights = np.ones(len(units)) if multiplicity is None else multiplicity.astype(np.float64)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(round(weights.sum()), weights / weights.sum(), size=resamples)
    sums = np.tensordot(drawn, units, axes=1)
    low, high = np.quantile(MEANS_OVER_CLASSES[name](sums), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _mean_ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    occurs = whole > 0
    ratio = np.divide(part, whole, out=np.zeros(part.shape), where=occurs)
    return ratio.sum(-1) / np.maximum(occurs.sum(-1), 1)

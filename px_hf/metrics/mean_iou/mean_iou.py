"""Mean intersection over union as an `evaluate` metric that loads from this file, without the network.

    metric = evaluate.load("<folder of px_hf>/metrics/mean_iou")
    metric.compute(predictions=maps, references=maps, num_labels=12, ignore_index=255)  # {"mean_iou": ...}

Arguments and results have the names of evaluate's own `mean_iou`. That and this metric keep every pixel until
`compute`; a training loop adds up `confusion_matrices` instead, [K, K] numbers an image, and ends with
`from_confusion`. evaluate reads the import lines of this file: one import per line, and none of px_hf.
"""

from typing import Any

import datasets
import evaluate
import numpy

_DESCRIPTION = """
For each class IoU = TP / (TP + FP + FN) over the pixels of all images together, and its mean over the classes that
occur, in a prediction or a reference.
"""

_INPUTS = """
Args:
    predictions: maps [height, width] of predicted classes, integers in [0, num_labels). Sizes may differ.
    references: maps of true classes, likewise, or ignore_index.
    num_labels: K, the number of classes.
    ignore_index: the value of pixels in `references` that do not count.
    reduce_labels: whether 0 marks the background, which does not count, and classes start with 1: references 0
        becomes ignore_index, and k becomes k - 1.
Returns:
    mean_iou: in [0, 1], over the classes that occur; scikit-learn's jaccard_score(average="macro") of the pixels that
        count.
    mean_accuracy: the mean over the true classes of TP / (TP + FN).
    overall_accuracy: the share of right pixels.
    per_category_iou, per_category_accuracy: one number for each class; NaN for a class that does not occur.
"""


def confusion_matrices(predictions, references, num_labels: int, ignore_index: int) -> numpy.ndarray:  # type: ignore[no-untyped-def]
    """Counts of pixels, int64 [N, K, K]: `[n, true, predicted]`, of the maps `predictions` and `references` [N, H, W].

    Raises:
        ValueError: a reference is neither a class nor `ignore_index`, or a prediction is no class.
    """
    counts = numpy.zeros((len(references), num_labels, num_labels), dtype=numpy.int64)
    for n, (predicted, true) in enumerate(zip(predictions, references, strict=True)):
        predicted, true = numpy.asarray(predicted), numpy.asarray(true)
        if predicted.shape != true.shape:
            raise ValueError(
                f"Map {n} is {list(predicted.shape)} in predictions and {list(true.shape)} in references."
            )
        counted = true != ignore_index
        for name, values in (("references", true[counted]), ("predictions", predicted[counted])):
            if values.size and (values.min() < 0 or values.max() >= num_labels):
                raise ValueError(
                    f"Map {n} of {name} has values from {values.min()} to {values.max()}, expected classes 0 to "
                    f"{num_labels - 1}"
                    + (f", or {ignore_index} for pixels to ignore." if name == "references" else ".")
                )
        pairs = true[counted].astype(numpy.int64) * num_labels + predicted[counted].astype(numpy.int64)
        counts[n] = numpy.bincount(pairs.ravel(), minlength=num_labels**2).reshape(num_labels, num_labels)
    return counts


def from_confusion(confusion: numpy.ndarray) -> dict[str, Any]:
    """The results of the metric from the counts [K, K] of all images: `[true, predicted]`."""
    right, true, predicted = numpy.diag(confusion), confusion.sum(1), confusion.sum(0)
    with numpy.errstate(invalid="ignore"):  # 0 / 0 is NaN: a class that does not occur
        iou, accuracy, overall = right / (true + predicted - right), right / true, right.sum() / true.sum()
    return {
        "mean_iou": _mean(iou),
        "mean_accuracy": _mean(accuracy),
        "overall_accuracy": float(overall),
        "per_category_iou": iou.tolist(),
        "per_category_accuracy": accuracy.tolist(),
    }


def _mean(values: numpy.ndarray) -> float:
    known = values[~numpy.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


class MeanIoU(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(  # type: ignore[no-untyped-def]
        self, predictions, references, num_labels: int, ignore_index: int = 255, reduce_labels: bool = False
    ) -> dict[str, Any]:
        references = [numpy.asarray(true) for true in references]
        if reduce_labels:
            ignored = [(true == 0) | (true == ignore_index) for true in references]
            references = [numpy.where(i, ignore_index, true - 1) for i, true in zip(ignored, references, strict=True)]
        return from_confusion(confusion_matrices(predictions, references, num_labels, ignore_index).sum(0))

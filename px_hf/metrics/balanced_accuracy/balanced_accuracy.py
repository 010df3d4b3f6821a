"""Balanced accuracy as an `evaluate` metric that loads from this file, without the network.

    metric = evaluate.load("<folder of px_hf>/metrics/balanced_accuracy")
    metric.compute(predictions=[0, 1, 1], references=[0, 0, 1])  # {"balanced_accuracy": 0.75}

evaluate reads the import lines of this file: one import per line, and none of px_hf.
"""

import warnings

import datasets
import evaluate
from sklearn.metrics import balanced_accuracy_score

_DESCRIPTION = "The mean over classes of the recall TP / (TP + FN), every class with the same weight."

_INPUTS = """
Args:
    predictions: predicted classes, integers.
    references: true classes, integers, as many as predictions.
Returns:
    balanced_accuracy: in [0, 1], by scikit-learn's balanced_accuracy_score: over the classes that are true at least
        once. Chance is 1 / (number of them).
"""


class BalancedAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")  # as documented
            return {"balanced_accuracy": float(balanced_accuracy_score(references, predictions))}

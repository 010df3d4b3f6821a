"""Accuracy as an `evaluate` metric that loads from this file, without the network.

    metric = evaluate.load("<folder of px_hf>/metrics/accuracy")
    metric.compute(predictions=[0, 1, 1], references=[0, 1, 2])  # {"accuracy": 0.666...}

`evaluate.load("accuracy")` always asks the Hub for its script. evaluate copies this file elsewhere
before importing it, and finds what it needs by reading its import lines: hence one import per line, and
none of px_hf.
"""

import datasets
import evaluate
from sklearn.metrics import accuracy_score

_DESCRIPTION = "The share of predictions that equal their reference: (correct predictions) / (all predictions)."

_INPUTS = """
Args:
    predictions: predicted classes, integers.
    references: true classes, integers, as many as predictions.
Returns:
    accuracy: in [0, 1].
"""


class Accuracy(evaluate.Metric):
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
        return {"accuracy": float(accuracy_score(references, predictions))}

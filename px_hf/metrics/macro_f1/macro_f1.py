"""Macro F1 as an `evaluate` metric that loads from this file, without the network.

    metric = evaluate.load("<folder of px_hf>/metrics/macro_f1")
    metric.compute(predictions=[0, 1, 1], references=[0, 1, 2])  # {"macro_f1": 0.555...}

evaluate reads the import lines of this file: one import per line, and none of px_hf.
"""

import datasets
import evaluate
from sklearn.metrics import f1_score

_DESCRIPTION = "The mean over classes of F1 = 2 TP / (2 TP + FP + FN), every class with the same weight."

_INPUTS = """
Args:
    predictions: predicted classes, integers.
    references: true classes, integers, as many as predictions.
Returns:
    macro_f1: in [0, 1], by scikit-learn's f1_score(average="macro"): over the classes that are predicted or true at
        least once.
"""


class MacroF1(evaluate.Metric):
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
        return {"macro_f1": float(f1_score(references, predictions, average="macro"))}

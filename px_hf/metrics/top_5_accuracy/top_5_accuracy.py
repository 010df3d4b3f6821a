"""Top-5 accuracy as an `evaluate` metric that loads from this file, without the network.

    metric = evaluate.load("<folder of px_hf>/metrics/top_5_accuracy")
    metric.compute(predictions=scores, references=labels)  # {"top_5_accuracy": ...}

evaluate reads the import lines of this file: one import per line, and none of px_hf.
"""

import datasets
import evaluate
from sklearn.metrics import top_k_accuracy_score

_DESCRIPTION = "The share of examples whose true class is among the five classes of highest score."

_INPUTS = """
Args:
    predictions: a score for each class, [N, K] with K > 2, in label order: logits or probabilities.
    references: true classes, integers in [0, K).
Returns:
    top_5_accuracy: in [0, 1], by scikit-learn's top_k_accuracy_score; 1 where there are five classes or fewer. Of
        equal scores that of the higher class counts as the higher.
"""

_TOP = 5


class Top5Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int]) -> dict[str, float]:
        classes = len(predictions[0])
        if min(references) < 0 or max(references) >= classes:
            raise ValueError(
                f"references must be classes 0 to {classes - 1}, got {min(references)} to {max(references)}."
            )
        if classes <= _TOP:
            return {"top_5_accuracy": 1.0}
        return {"top_5_accuracy": float(top_k_accuracy_score(references, predictions, k=_TOP, labels=range(classes)))}

"""Expected calibration error as an `evaluate` metric that loads from this file, without the network.

    metric = evaluate.load("<folder of px_hf>/metrics/calibration_error")
    metric.compute(predictions=probabilities, references=labels)  # {"calibration_error": ...}

evaluate reads the import lines of this file: one import per line, and none of px_hf.
"""

import datasets
import evaluate
import numpy

_DESCRIPTION = """
Expected calibration error of the predicted class (top-label ECE): sum over bins b of |b| / N · |acc(b) - conf(b)|.
An example's confidence is its highest probability. Bins are of equal width: bin i of M holds the confidences in
(i / M, (i + 1) / M], and the first one 0 too. acc(b) is the share of right predictions in b, conf(b) their mean
confidence; empty bins count nothing.
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title = {On Calibration of Modern Neural Networks},
  author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle = {ICML}, year = {2017}, note = {Eq. 3, arXiv 1706.04599}
}
"""

_INPUTS = """
Args:
    predictions: probabilities [N, K] in label order, in [0, 1], each row with the sum 1 (to 1e-3).
    references: true classes, integers in [0, K).
    bins: M, 15 as in the paper.
Returns:
    calibration_error: in [0, 1], 0 is calibrated. Of equal probabilities the first class is the predicted one.
"""


class CalibrationError(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.List(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[list[float]], references: list[int], bins: int = 15) -> dict[str, float]:
        probabilities, labels = numpy.asarray(predictions, dtype=numpy.float64), numpy.asarray(references)
        if bins < 1:
            raise ValueError(f"bins must be at least 1, got {bins}.")
        low, high = probabilities.min(), probabilities.max()
        if not (low >= 0 and high <= 1 + 1e-3 and numpy.allclose(probabilities.sum(1), 1, rtol=0, atol=1e-3)):
            raise ValueError(
                f"predictions must be probabilities in [0, 1] whose rows add up to 1, got values from {low:.4g} to "
                f"{high:.4g}. Apply softmax to logits first."
            )
        if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
            raise ValueError(
                f"references must be classes 0 to {probabilities.shape[1] - 1}, got {labels.min()} to {labels.max()}."
            )
        confidence = probabilities.max(1)
        right = probabilities.argmax(1) == labels
        upper_edges = numpy.linspace(0, 1, bins + 1)[1:-1]
        found = numpy.searchsorted(upper_edges, confidence, side="left")
        gaps = numpy.bincount(found, right, bins) - numpy.bincount(found, confidence, bins)
        return {"calibration_error": float(numpy.abs(gaps).sum() / len(labels))}

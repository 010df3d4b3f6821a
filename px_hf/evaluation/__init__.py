"""What a model can still do on a task: probes on its frozen features, scores with confidence intervals.

features = head_inputs(model, split)                                     # [N, D], the input of the classifier head
fitted = LinearProbe().fit(train, validation, num_classes)               # regularisation chosen on `validation`
scores = classification_scores(fitted.scores(test.features), test.labels)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import loaded_when_used as _loaded_when_used

if TYPE_CHECKING:
    from .by_name import PROBES
    from .features import FeatureCache, head_inputs
    from .knn import KNN
    from .linear_probe import LinearProbe
    from .probe import Examples, Fitted, Probe
    from .ridge import Ridge
    from .scores import classification_scores

_LAZY = {
    "KNN": "knn",
    "PROBES": "by_name",
    "Examples": "probe",
    "FeatureCache": "features",
    "Fitted": "probe",
    "LinearProbe": "linear_probe",
    "Probe": "probe",
    "Ridge": "ridge",
    "classification_scores": "scores",
    "head_inputs": "features",
}
"""Names that are loaded when first used: scikit-learn, datasets and evaluate take seconds to import."""

__getattr__ = _loaded_when_used(__name__, _LAZY)


__all__ = [
    "KNN",
    "PROBES",
    "Examples",
    "FeatureCache",
    "Fitted",
    "LinearProbe",
    "Probe",
    "Ridge",
    "classification_scores",
    "head_inputs",
]

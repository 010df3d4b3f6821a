"""What a model can still do on a task: probes on its frozen features, scores with confidence intervals.

features = head_inputs(model, split)                                     # [N, D], the input of the classifier head
fitted = LinearProbe().fit(train, validation, num_classes)               # regularisation chosen on `validation`
scores = classification_scores(fitted.scores(test.features), test.labels)
"""

from .features import FeatureCache, head_inputs
from .knn import KNN
from .linear_probe import LinearProbe
from .probe import Examples, Fitted, Probe
from .ridge import Ridge
from .scores import classification_scores

PROBES: dict[str, Probe] = {"knn": KNN(), "ridge": Ridge(), "linear": LinearProbe()}

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

"""Linear probe: multinomial logistic regression on standardised features, by scikit-learn.

min over W, b of  Σ_n cross-entropy_n + ‖W‖² / (2 C)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from .probe import Examples, Fitted, Probe, Standardise, best


@dataclass(frozen=True)
class LinearProbe(Probe):
    """Scores are probabilities; `strengths` is the grid of C, in rising order, each fit starting from the last.

    A fit ends after `max_iter` steps of L-BFGS; if the chosen one had not converged, `note` says so.
    """

    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    max_iter: int = 300

    def fit(self, train: Examples, validation: Examples, num_classes: int) -> Fitted:
        standardise = Standardise.of(train.features)
        x, held_out = standardise(train.features), standardise(validation.features)
        solver = LogisticRegression(max_iter=self.max_iter, warm_start=True)
        fits: dict[float, tuple[np.ndarray, np.ndarray, bool]] = {}

        def probabilities(features: np.ndarray, strength: float) -> np.ndarray:
            solver.coef_, solver.intercept_, _ = fits[strength]
            found = np.zeros((len(features), num_classes))
            found[:, solver.classes_] = solver.predict_proba(features)
            return found

        def accuracy(strength: float) -> float:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", ConvergenceWarning)
                solver.set_params(C=strength).fit(x, train.labels)
            converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
            fits[strength] = solver.coef_.copy(), solver.intercept_.copy(), converged
            return float((probabilities(held_out, strength).argmax(1) == validation.labels).mean())

        strength, reached = best(self.strengths, accuracy)
        note = "" if fits[strength][2] else f"not converged after {self.max_iter} steps"
        return Fitted(
            lambda features: probabilities(standardise(features), strength), True, {"C": strength}, reached, note
        )

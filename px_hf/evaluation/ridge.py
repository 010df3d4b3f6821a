"""Ridge regression on one-hot classes, in closed form, for the whole grid of λ from one eigendecomposition.

With standardised features X [N, D], centred one-hot classes Y [N, K] and XᵀX = U diag(s) Uᵀ:

    W = argmin ‖X W - Y‖² + λ N ‖W‖² = U diag(1 / (s + λ N)) Uᵀ Xᵀ Y
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .probe import Examples, Fitted, Probe, Standardise, best


@dataclass(frozen=True)
class Ridge(Probe):
    """Scores are the regression's values, no probabilities; `penalties` is the grid of λ, the largest first."""

    penalties: tuple[float, ...] = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)

    def fit(self, train: Examples, validation: Examples, num_classes: int) -> Fitted:
        standardise = Standardise.of(train.features)
        x, y = standardise(train.features), np.eye(num_classes)[train.labels]
        mean = y.mean(0)
        s, u = np.linalg.eigh(x.T @ x)
        projected = u.T @ (x.T @ (y - mean))

        def weights(penalty: float) -> np.ndarray:
            return u @ (projected / (s.clip(min=0) + penalty * len(x))[:, None])

        held_out = standardise(validation.features)

        def accuracy(penalty: float) -> float:
            return float(((held_out @ weights(penalty) + mean).argmax(1) == validation.labels).mean())

        penalty, reached = best(self.penalties, accuracy)
        w = weights(penalty)
        return Fitted(lambda features: standardise(features) @ w + mean, False, {"lambda": penalty}, reached)

"""k nearest neighbours by cosine similarity, their votes weighted (Wu et al., 2018; the protocol of DINO).

A training example i votes for its class with the weight exp(cos(x, x_i) / τ); k is chosen on the validation examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from .probe import Examples, Fitted, Probe, best


@dataclass(frozen=True)
class KNN(Probe):
    """Scores are shares of the votes; `neighbours` is the grid of k, `temperature` is τ (DINO: 0.07)."""

    neighbours: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    temperature: float = 0.07

    def fit(self, train: Examples, validation: Examples, num_classes: int) -> Fitted:
        grid = [k for k in self.neighbours if k <= len(train.labels)] or [len(train.labels)]
        index = NearestNeighbors(n_neighbors=max(grid), algorithm="brute").fit(normalize(train.features))

        def scores(features: np.ndarray, k: int) -> np.ndarray:
            # On unit vectors |x - y|² = 2 - 2 cos: the nearest are the most similar.
            distance, neighbour = index.kneighbors(normalize(features), n_neighbors=k)
            cosine = 1 - distance**2 / 2
            weight = np.exp((cosine - cosine[:, :1]) / self.temperature)
            votes = np.zeros((len(features), num_classes))
            np.add.at(votes, (np.arange(len(features))[:, None], train.labels[neighbour]), weight)
            return votes / votes.sum(1, keepdims=True)

        def accuracy(k: int) -> float:
            return float((scores(validation.features, k).argmax(1) == validation.labels).mean())

        k, reached = best(grid, accuracy)
        return Fitted(lambda features: scores(features, k), True, {"k": k}, reached)

"""What probes have in common: fitted on one set of examples, their one setting chosen on another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from ..errors import DataError, NonFiniteError

Setting = TypeVar("Setting", int, float)


@dataclass(frozen=True)
class Examples:
    """Features, float [N, D], and classes, int [N].

    Raises:
        DataError: there are none, or the numbers differ.
        NonFiniteError: a feature is NaN or infinite.
    """

    features: np.ndarray
    labels: np.ndarray

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or len(self.features) != len(self.labels) or len(self.labels) == 0:
            raise DataError(
                f"Features {list(self.features.shape)} and labels {list(self.labels.shape)}: expected [N, D] and [N], "
                "with N at least 1."
            )
        if not np.isfinite(self.features).all():
            raise NonFiniteError(
                f"{int((~np.isfinite(self.features)).any(1).sum())} of {len(self.features)} examples have features "
                "that are NaN or infinite: check the weights of the model and its images."
            )


@dataclass(frozen=True)
class Fitted:
    """`scores(features [N, D]) -> [N, K]`, the highest for the predicted class; `chosen` is what validation chose.

    `probabilities` says whether the scores are such; `validation_accuracy` is that of the chosen setting;
    `note` tells what the reader should know.
    """

    scores: Callable[[np.ndarray], np.ndarray]
    probabilities: bool
    chosen: dict[str, float]
    validation_accuracy: float
    note: str = field(default="")


class Probe(ABC):
    """A classifier on frozen features. Subclasses are frozen dataclasses that hold the grid of their one setting."""

    @abstractmethod
    def fit(self, train: Examples, validation: Examples, num_classes: int) -> Fitted:
        """Fits on `train` alone; `validation` only chooses the setting. Labels are in [0, num_classes)."""


@dataclass(frozen=True)
class Standardise:
    """`(x - mean) / deviation` with those of the training features; a constant feature becomes 0."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Standardise:
        features = features.astype(np.float64)
        mean, deviation = features.mean(0), features.std(0)
        constant = deviation <= 1e-7 * np.abs(features).max(0, initial=1e-30)
        return cls(mean, np.where(constant, np.inf, deviation))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return (features.astype(np.float64) - self.mean) / self.deviation


def best(settings: Iterable[Setting], accuracy: Callable[[Setting], float]) -> tuple[Setting, float]:
    """The setting of the highest accuracy, and that; of equals the first."""
    found = [(setting, accuracy(setting)) for setting in settings]
    return max(found, key=lambda pair: pair[1])

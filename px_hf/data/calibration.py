"""The few images that a pruning criterion looks at."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ..errors import DataError, listed
from .split import Pixels, Split


@dataclass(frozen=True)
class CalibrationSet:
    """Batches `{"pixel_values": [n, 3, H, W], "labels": int64 [n]}`; may be iterated any number of times.

    Batches are kept in memory after the first time, up to `cache_bytes`, and computed again beyond.
    """

    split: Split
    examples_per_class: int
    seed: int
    batch_size: int
    cache_bytes: int = 2**31
    _cache: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return -(-len(self.split) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(self.split), self.batch_size):
            batch = self._cache.get(start)
            if batch is None:
                batch = self._batch(range(start, min(start + self.batch_size, len(self.split))))
                used = sum(kept["pixel_values"].nbytes for kept in self._cache.values())
                if used + batch["pixel_values"].nbytes <= self.cache_bytes:
                    self._cache[start] = batch
            yield batch

    def _batch(self, positions: Sequence[int]) -> dict[str, torch.Tensor]:
        items = self.split.__getitems__(positions)
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "labels": torch.tensor([item["labels"] for item in items]),
        }

    def describe(self) -> dict[str, object]:
        """What it takes to draw the same set again, and a hash of its RGB pixels and labels."""
        digest = hashlib.sha256()
        for position in range(len(self.split)):
            image = self.split.images([position])[0]
            digest.update(f"{image.size} {self.split.labels[position]};".encode())
            digest.update(image.tobytes())
        return {
            "split": self.split.name,
            "examples": len(self.split),
            "examples_per_class": self.examples_per_class,
            "seed": self.seed,
            "sha256": digest.hexdigest(),
        }


def calibration_set(
    train: Split,
    labels: Sequence[str],
    pixels: Pixels,
    *,
    examples_per_class: int = 10,
    seed: int = 0,
    batch_size: int = 16,
) -> CalibrationSet:
    """Draws `examples_per_class` random examples of every class from the training split.

    `pixels` is the transform of evaluation: scores should not depend on random crops.

    Raises:
        DataError: a class has fewer examples than that; names the classes and their counts.
    """
    chosen = class_balanced(train.labels, labels, examples_per_class, seed, train.name)
    return CalibrationSet(train.select(chosen).with_pixels(pixels), examples_per_class, seed, batch_size)


def class_balanced(
    classes: np.ndarray, labels: Sequence[str], examples_per_class: int, seed: int, split: str = "train"
) -> np.ndarray:
    """Positions of `examples_per_class` random examples of every class, in random order; `classes` is int [N].

    Raises:
        DataError: a class has fewer examples than that; names the classes and their counts.
    """
    if examples_per_class < 1:
        raise DataError(f"examples_per_class is {examples_per_class}, expected at least 1.")
    counts = np.bincount(classes, minlength=len(labels))
    short = [f"{name!r}: {count}" for name, count in zip(labels, counts, strict=True) if count < examples_per_class]
    if short:
        raise DataError(
            f"{examples_per_class} calibration examples per class were asked for, but {len(short)} of "
            f"{len(labels)} classes have fewer in split {split!r}: "
            f"{listed(short, 12)}. "
            "Ask for fewer (examples_per_class) or add examples."
        )
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(classes == k), examples_per_class, replace=False) for k in range(len(labels))]
    return rng.permutation(np.concatenate(chosen))

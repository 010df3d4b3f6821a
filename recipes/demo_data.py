"""The demo's downstream task: scikit-learn's handwritten digits as a `datasets` dataset. Needs no network."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def digits(seed: int = 0) -> DatasetDict:
    """The 1,797 digits of `sklearn.datasets.load_digits`, split by class at random, by a fixed `seed`.

    Columns: `image`, grey PIL images of 8 × 8 (mode "L"; the original 0..16 stretched to 0..255), and `label`,
    a `ClassLabel` of the names "0" to "9". Splits: train 1,149, validation 288, test 360 images. All 1,797 images
    differ, so the splits share none; they may share a writer, since the data does not say who wrote what.
    """
    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    fitted, test = train_test_split(range(len(images)), test_size=0.2, stratify=data.target, random_state=seed)
    train, validation = train_test_split(fitted, test_size=0.2, stratify=data.target[fitted], random_state=seed)
    features = Features(
        {"image": Image(mode="L"), "label": ClassLabel(names=[str(name) for name in data.target_names])}
    )
    return DatasetDict(
        {
            split: Dataset.from_dict(
                {"image": list(images[rows]), "label": data.target[rows].tolist()}, features=features
            )
            for split, rows in {"train": train, "validation": validation, "test": test}.items()
        }
    )

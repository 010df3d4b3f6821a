"""The embedded tasks, as `datasets` datasets that need no network: digits, Greek letters, Latin letters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from . import letters as glyphs


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


def greek() -> DatasetDict:
    """21 Greek letters, rendered as the backbones' Latin letters were: train 1,050, validation 420, test 1,050 images.

    None of them looks like a Latin letter, so the backbones have seen neither images nor classes. Splits share fonts.
    """
    return _rendered(glyphs.greek, glyphs.GREEK)


def letters() -> DatasetDict:
    """The Latin letters that the backbones were pretrained on, newly drawn: a source task, not a test of transfer."""
    return _rendered(glyphs.letters, glyphs.CLASSES)


EMBEDDED = {"digits": digits, "greek": greek, "letters": letters}
"""Name -> dataset. The classes of `digits` and `greek` are not those that the backbones were pretrained on."""

_DRAWN = {"train": (1050, 10), "validation": (420, 11), "test": (1050, 12)}  # images, seed


def _rendered(
    draw: Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]], names: Sequence[str]
) -> DatasetDict:
    features = Features({"image": Image(mode="L"), "label": ClassLabel(names=list(names))})
    splits = {}
    for split, (count, seed) in _DRAWN.items():
        images, labels = draw(count, torch.Generator().manual_seed(seed))
        splits[split] = Dataset.from_dict({"image": list(images.numpy()), "label": labels.tolist()}, features=features)
    return DatasetDict(splits)

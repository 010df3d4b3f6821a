"""From any dataset to a checked classification task: which column is what, which classes, which splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature

from ..errors import DataError
from .columns import described, names_in, only_column, require_column, rows_of, table, validation_split_of
from .split import Split

_LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class ClassificationTask:
    """Class names in label order, and splits that share no example; `test` is None if there is none."""

    labels: list[str]
    train: Split
    validation: Split
    test: Split | None

    def with_test(self, validation_share: float = 0.15, seed: int = 0) -> ClassificationTask:
        """The same task with a test split that nothing is chosen on.

        Where there is none, the validation split becomes the test split, and another validation split is taken off
        the training split.
        """
        if self.test is not None:
            return self
        train, validation = _split_off(self.train, self.labels, validation_share, seed)
        return ClassificationTask(self.labels, train, validation, self.validation)


def classification_task(
    raw: DatasetDict,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = "test",
    validation_share: float = 0.15,
    seed: int = 0,
) -> ClassificationTask:
    """Finds columns by feature type, checks every label, takes a validation split off if there is none.

    Args:
        image_column, label_column: by default the only column of that type, or among several the one called `image`,
            `label` or `labels`. Labels are `ClassLabel`, integers 0..K-1, or strings, whose sorted distinct training
            values become the classes.
        validation_split: its name; by default `validation`, `valid`, `val` or `dev`. Where there is none, a seeded
            share `validation_share` of each class of the training split. The test split is never used.
        test_split: its name; a dataset without it has no test split; None ignores it.

    Raises:
        DataError: no such column or split, an empty split, labels that are missing, not integers, negative or out of
            range, fewer than two classes, a class without a training example, other classes in another split.
    """
    validation_split = validation_split_of(raw, train_split, validation_split)
    if len(raw[train_split]) == 0:
        raise DataError(f"The training split {train_split!r} is empty.")

    features = raw[train_split].features
    image = find_image_column(features, image_column)
    label = find_label_column(features, label_column)
    labels = class_names(raw[train_split], label)
    if len(labels) < 2:
        raise DataError(
            f"Column {label!r} of split {train_split!r} has the classes [{names_in(labels)}], expected at least 2: "
            "there is nothing to tell apart."
        )

    def split(name: str) -> Split:
        rows = rows_of(raw, name, {image, label})
        targets = read_labels(rows, label, labels, name)
        undecoded = rows.cast_column(image, ImageFeature(decode=False)).select_columns([image])
        return Split(name, undecoded, image, np.arange(len(rows)), targets)

    train = split(train_split)
    counts = np.bincount(train.labels, minlength=len(labels))
    if not counts.all():
        empty = [labels[k] for k in np.flatnonzero(counts == 0)]
        raise DataError(
            f"{len(empty)} of {len(labels)} classes have no example in the training split {train_split!r}: "
            f"{names_in(empty)}. Add examples of them, or remove them from the label column's classes."
        )
    if validation_split is None:
        train, validation = _split_off(train, labels, validation_share, seed)
    else:
        validation = split(validation_split)
    test = split(test_split) if test_split is not None and test_split in raw else None
    return ClassificationTask(labels, train, validation, test)


def find_image_column(features: Features, name: str | None = None) -> str:
    """The column of images. A named one may also hold paths or encoded bytes without the `Image` type."""
    if name is not None:
        require_column(name, features, "image")
        feature = features[name]
        encoded = isinstance(feature, Value) and feature.dtype in ("string", "binary", "large_binary")
        struct = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
        if not (isinstance(feature, ImageFeature) or encoded or struct):
            raise DataError(f"Column {name!r} holds no images but {described(feature)}. Columns: {table(features)}.")
        return name
    found = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    return only_column(found, ("image", "images", "img"), "image", "of type Image", features)


def find_label_column(features: Features, name: str | None = None) -> str:
    """The column of classes: `ClassLabel` before integers before strings."""
    if name is not None:
        require_column(name, features, "label")
        if not any(accepts(features[name]) for accepts in (_is_class, _is_integer, _is_string)):
            raise DataError(
                f"Column {name!r} holds {described(features[name])}, expected ClassLabel, integers or "
                f"strings. Columns: {table(features)}."
            )
        return name
    for accepts in (_is_class, _is_integer, _is_string):
        found = [column for column, feature in features.items() if accepts(feature)]
        if found:
            return only_column(found, _LABEL_NAMES, "label", "of classes", features)
    return only_column([], _LABEL_NAMES, "label", "of type ClassLabel, integer or string", features)


def class_names(rows: Dataset, column: str) -> list[str]:
    """The classes that the label column of the training rows defines, in label order."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = [value for value in rows.unique(column) if value is not None]
    if _is_string(feature):
        return sorted(values)
    return [str(k) for k in range(max(values, default=-1) + 1)]


def read_labels(rows: Dataset, column: str, labels: Sequence[str], split: str) -> np.ndarray:
    """The class of every row, int64 in [0, len(labels)).

    Raises:
        DataError: a row has no such class; names the first one.
    """
    feature = rows.features[column]
    if isinstance(feature, ClassLabel) and list(feature.names) != list(labels):
        raise DataError(
            f"Split {split!r} has other classes in column {column!r} than the training split, or another order: "
            f"{names_in(feature.names)} instead of {names_in(labels)}."
        )
    values = rows.with_format(None)[column][:]
    if _is_string(feature):
        known = {name: k for k, name in enumerate(labels)}
        values = [None if value is None else known.get(value, value) for value in values]
    elif not (_is_class(feature) or _is_integer(feature)):
        raise DataError(f"Column {column!r} of split {split!r} holds {described(feature)}, expected class labels.")
    for row, value in enumerate(values):
        if isinstance(value, int) and 0 <= value < len(labels):
            continue
        what = f"Label {value!r} in split {split!r} at index {row}, column {column!r}"
        if value is None:
            raise DataError(f"{what}: the label is missing. Remove unlabelled examples.")
        if isinstance(value, int) and value < 0:
            raise DataError(
                f"{what}: labels are classes 0 to {len(labels) - 1}. Negative labels usually mark a split "
                "whose labels are not published: leave that split out."
            )
        raise DataError(f"{what} is none of the {len(labels)} classes of the training split: {names_in(labels)}.")
    return np.asarray(values, dtype=np.int64)


def _split_off(train: Split, labels: Sequence[str], share: float, seed: int) -> tuple[Split, Split]:
    """The same share of every class, at least one example, chosen at random."""
    if not 0 < share < 1:
        raise DataError(f"The validation share is {share}, expected a number between 0 and 1.")
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(train), dtype=bool)
    for k, name in enumerate(labels):
        members = np.flatnonzero(train.labels == k)
        if len(members) < 2:
            raise DataError(
                f"Class {name!r} has {len(members)} training example, too few to take a validation split "
                "off: at least 2 of each class are needed. Add examples, or name a validation split."
            )
        count = min(max(1, round(share * len(members))), len(members) - 1)
        chosen[rng.permutation(members)[:count]] = True
    return train.select(np.flatnonzero(~chosen)), train.select(np.flatnonzero(chosen))


def _is_class(feature: object) -> bool:
    return isinstance(feature, ClassLabel)


def _is_integer(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def _is_string(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")

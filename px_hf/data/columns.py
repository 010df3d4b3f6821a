"""Which columns and which splits of a dataset are which, and errors that show what there is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from ..errors import DataError, listed

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def names_in(names: Iterable[object]) -> str:
    """`'a', 'b' and 5 more`: names of classes, columns or splits in a message."""
    return listed(map(repr, names), 12)


def validation_split_of(raw: DatasetDict, train: str, validation: str | None) -> str | None:
    """The split to validate on: the one of that name, else one with a usual name, else None.

    Raises:
        DataError: there is no split `train`, or none of the name `validation`.
    """
    if train not in raw:
        raise DataError(f"No split {train!r} to train on; the dataset has {names_in(raw)}.")
    if validation is None:
        return next((name for name in _VALIDATION_NAMES if name in raw), None)
    if validation not in raw:
        raise DataError(f"No split {validation!r} to validate on; the dataset has {names_in(raw)}.")
    return validation


def rows_of(raw: DatasetDict, split: str, columns: set[str]) -> Dataset:
    """The rows of a split.

    Raises:
        DataError: it lacks one of the columns, or has no rows.
    """
    rows = raw[split]
    if absent := columns - set(rows.column_names):
        raise DataError(f"Split {split!r} has no column {names_in(absent)}; it has {names_in(rows.column_names)}.")
    if len(rows) == 0:
        raise DataError(f"Split {split!r} is empty: give it examples, or leave it out.")
    return rows


def require_column(name: str, features: Features, kind: str) -> None:
    """There must be a column of that name.

    Raises:
        DataError: there is none.
    """
    if name not in features:
        raise DataError(f"No column {name!r} for the {kind}. Columns: {table(features)}.")


def only_column(found: list[str], preferred: Sequence[str], kind: str, expected: str, features: Features) -> str:
    """The only column found, or the one with the usual name.

    Raises:
        DataError: there is none, or more than one.
    """
    usual = found if len(found) == 1 else [column for column in found if column in preferred]
    if len(usual) == 1:
        return usual[0]
    count = f"{len(found)} columns {names_in(found)} are" if found else "No column is"
    raise DataError(
        f"{count} {expected}, so the {kind} column is unclear. Columns: {table(features)}. "
        f"Name it with {kind}_column_name."
    )


def table(features: Features) -> str:
    """All columns with their types."""
    return ", ".join(f"{column} ({described(feature)})" for column, feature in features.items())


def described(feature: object) -> str:
    """The type of a column."""
    if isinstance(feature, Value):
        return feature.dtype
    if isinstance(feature, ClassLabel):
        return f"ClassLabel of {feature.num_classes}"
    return type(feature).__name__

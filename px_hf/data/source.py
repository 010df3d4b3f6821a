"""Where the images come from: the Hub, image folders or Parquet files, read as one `DatasetDict`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet

from ..errors import DataError
from .columns import names_in


@dataclass(frozen=True)
class DataSource:
    """One of three kinds of source; exactly one kind may be named.

    A dataset of the Hub or a local folder that `datasets.load_dataset` understands, image folders with
    one sub-folder per class, or Parquet files.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_dir: str | None = None
    validation_dir: str | None = None
    test_dir: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None

    @property
    def folders(self) -> dict[str, str]:
        """Split name -> image folder, of those named."""
        named = {"train": self.train_dir, "validation": self.validation_dir, "test": self.test_dir}
        return {split: folder for split, folder in named.items() if folder}

    @property
    def files(self) -> dict[str, str]:
        """Split name -> Parquet file, of those named."""
        named = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: file for split, file in named.items() if file}

    def __bool__(self) -> bool:
        """Whether anything is named at all."""
        return bool(self.dataset_name or self.folders or self.files)


def read_dataset(source: DataSource, cache_dir: str | None = None) -> DatasetDict:
    """Reads every split of `source`.

    Raises:
        DataError: no kind of source or more than one is named, a folder or file does not exist, or there is no
            training data among them.
    """
    kinds = [kind for kind in (source.dataset_name, source.folders, source.files) if kind]
    if len(kinds) != 1:
        raise DataError(
            f"{len(kinds)} kinds of data source are named, expected exactly one of: dataset_name, train_dir "
            "(with validation_dir, test_dir), train_file (with validation_file, test_file)."
        )
    if source.dataset_name:
        try:
            raw = load_dataset(source.dataset_name, source.dataset_config_name, cache_dir=cache_dir)
            files = _local_parquet(source, cache_dir)
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise DataError(f"Cannot read the dataset {source.dataset_name!r}: {_reason(error)}") from error
        if isinstance(raw, Dataset):
            raw = DatasetDict({"train": raw})
        _require_own_names(files, raw)
        return raw

    named = source.folders or source.files
    missing = [path for path in named.values() if not Path(path).exists()]
    if missing:
        raise DataError(f"No such file or folder: {', '.join(missing)}.")
    if "train" not in named:
        raise DataError(f"No training data: only {', '.join(named)} is named. Name train_dir or train_file too.")
    if source.folders:
        patterns = {split: str(Path(folder) / "**") for split, folder in named.items()}
        try:
            return load_dataset("imagefolder", data_files=patterns, cache_dir=cache_dir)
        except (OSError, ValueError, DatasetGenerationError) as error:
            raise DataError(f"Cannot read the images of {', '.join(named.values())}: {_reason(error)}") from error
    # One by one: together they would all be read with the columns and class names of the first.
    return DatasetDict({split: _read_parquet(split, file, cache_dir) for split, file in named.items()})


def _read_parquet(split: str, file: str, cache_dir: str | None) -> Dataset:
    try:
        return load_dataset("parquet", data_files={split: file}, split=split, cache_dir=cache_dir)
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise DataError(f"Cannot read split {split!r} from {file}: {_reason(error)}") from error


def _local_parquet(source: DataSource, cache_dir: str | None) -> list[str]:
    """The Parquet files of the dataset, if it is a local folder of such."""
    if not source.dataset_name or not Path(source.dataset_name).is_dir():
        return []
    builder = load_dataset_builder(source.dataset_name, source.dataset_config_name, cache_dir=cache_dir)
    by_split = builder.config.data_files or {}
    return [file for files in by_split.values() for file in files if file.endswith(".parquet")]


def _require_own_names(files: list[str], raw: DatasetDict) -> None:
    """Parquet files must have the class names that datasets read them with: for all files, those of the first.

    Raises:
        DataError: one has others.
    """
    used = next(iter(raw.values())).features
    for file in files:
        for column, feature in Features.from_arrow_schema(parquet.read_schema(file)).items():
            names = getattr(feature, "names", None)
            if names and column in used and list(getattr(used[column], "names", None) or names) != list(names):
                raise DataError(
                    f"{file} has other classes in column {column!r} than the other splits, or another order: "
                    f"[{names_in(names)}] instead of [{names_in(used[column].names)}]."
                )


def _reason(error: Exception) -> str:
    """The innermost cause: datasets says of many errors only that there was one."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return "it is empty." if "corresponds to no data" in str(error) else str(error) or type(error).__name__

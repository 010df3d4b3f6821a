"""The tasks of a recipe by name: embedded ones, datasets of the Hub or a folder, and YAML files of data arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

import px_hf as px

from ..data import ClassificationTask
from ..data.embedded.characters import EMBEDDED
from .arguments import DataArguments


@dataclass(frozen=True)
class DownstreamTask:
    """A classification task that has not been read yet."""

    name: str
    data: DataArguments

    def load(self, seed: int = 0, cache_dir: str | None = None) -> ClassificationTask:
        """Train, validation and test split, which share no example.

        Raises:
            DataError: they cannot be read; it names the task.
        """
        try:
            task = self.data.read(lambda: EMBEDDED[self.name](), seed, cache_dir)
            task = task.with_test(self.data.train_val_split, seed)
        except px.DataError as error:
            raise px.DataError(f"Task {self.name!r}: {error}") from error
        return self.data.limited(task, seed)


def find_tasks(
    words: Sequence[str], max_train_samples: int | None = None, max_eval_samples: int | None = None
) -> list[DownstreamTask]:
    """The tasks that the words name, on at most so many examples.

    Raises:
        InvalidArgumentError: no task, the same name twice, a bad file.
    """
    tasks = [_task(word) for word in words]
    for task in tasks:
        task.data.max_train_samples = max_train_samples or task.data.max_train_samples
        task.data.max_eval_samples = max_eval_samples or task.data.max_eval_samples
    names = [task.name for task in tasks]
    if not names:
        raise px.InvalidArgumentError(f"Name at least one task: {', '.join(EMBEDDED)}, a dataset, a YAML file.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise px.InvalidArgumentError(f"Two tasks are called {', '.join(twice)}: rename one of the folders or files.")
    return tasks


def _task(word: str) -> DownstreamTask:
    if word in EMBEDDED:
        # mirrored or cropped characters are others, or none
        return DownstreamTask(word, DataArguments(random_crop=False, horizontal_flip=False))
    if not word.endswith((".yaml", ".yml")):
        return DownstreamTask(_safe(word), DataArguments(dataset_name=word))
    try:
        content = yaml.safe_load(Path(word).read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no mapping of argument names to values")
        (data,) = HfArgumentParser(DataClassType(DataArguments)).parse_dict(content)
        if not data.source():
            raise ValueError("it names no data: dataset_name, train_dir or train_file")
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise px.InvalidArgumentError(f"Cannot read the task file {word}: {error}") from error
    return DownstreamTask(_safe(Path(word).stem), data)


def _safe(name: str) -> str:
    """A name for files: the id of a dataset, or the last part of a local path."""
    name = Path(name).absolute().name if Path(name).exists() else name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "task"

"""The tasks of a recipe by name: embedded ones, datasets of the Hub or a folder, and YAML files of data arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers import HfArgumentParser

import px_hf as px

from ..data import ClassificationTask, Split, classification_task, read_dataset
from ..data.embedded.characters import EMBEDDED
from .arguments import DataArguments


@dataclass(frozen=True)
class Task:
    """A classification task that has not been read yet."""

    name: str
    data: DataArguments

    def load(self, seed: int = 0, cache_dir: str | None = None) -> ClassificationTask:
        """Train, validation and test split, which share no example. **Raises** `DataError` that names the task."""
        data = self.data
        try:
            raw = EMBEDDED[self.name]() if not data.source() else read_dataset(data.source(), cache_dir)
            task = classification_task(
                raw,
                image_column=data.image_column_name,
                label_column=data.label_column_name,
                train_split=data.train_split_name,
                validation_split=data.validation_split_name,
                test_split=None if data.test_split_name == "none" else data.test_split_name,
                validation_share=data.train_val_split,
                seed=seed,
            ).with_test(data.train_val_split, seed)
        except px.DataError as error:
            raise px.DataError(f"Task {self.name!r}: {error}") from error
        train = task.train.sample(data.max_train_samples, seed)
        held_out: list[Split] = [
            split.sample(data.max_eval_samples, seed) for split in (task.validation, task.test) if split is not None
        ]
        return ClassificationTask(task.labels, train, *held_out)


def find_tasks(
    words: Sequence[str], max_train_samples: int | None = None, max_eval_samples: int | None = None
) -> list[Task]:
    """The tasks that the words name, on at most so many examples.

    **Raises** `InvalidArgumentError` for none, the same name twice, a bad file.
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


def _task(word: str) -> Task:
    if word in EMBEDDED:
        # mirrored or cropped characters are others, or none
        return Task(word, DataArguments(random_crop=False, horizontal_flip=False))
    if not word.endswith((".yaml", ".yml")):
        return Task(_safe(word), DataArguments(dataset_name=word))
    try:
        content = yaml.safe_load(Path(word).read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no mapping of argument names to values")
        (data,) = HfArgumentParser(DataArguments).parse_dict(content)
        if not data.source():
            raise ValueError("it names no data: dataset_name, train_dir or train_file")
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise px.InvalidArgumentError(f"Cannot read the task file {word}: {error}") from error
    return Task(_safe(Path(word).stem), data)


def _safe(name: str) -> str:
    """A name for files: the id of a dataset, or the last part of a local path."""
    name = Path(name).absolute().name if Path(name).exists() else name
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "task"

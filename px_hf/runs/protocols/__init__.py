"""Published protocols of transfer: which tasks, how a network is fine-tuned on each, and what is reported.

A YAML file of this folder is one, see `Protocol`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

import px_hf as px

from ..downstream_tasks import DownstreamTask, find_tasks

FILES = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}
"""By the names that `--protocol` takes."""


@dataclass(frozen=True)
class ProtocolTask:
    """A task of a protocol: its number of classes, what it is reported in, and its own learning rate if it has one."""

    classes: int
    metric: str = "accuracy"
    learning_rate: float | None = None


@dataclass(frozen=True)
class SGD:
    """SGD with momentum, whose learning rate becomes a tenth after each of these shares of the steps."""

    momentum: float
    drops: tuple[float, ...]


@dataclass(frozen=True)
class Protocol:
    """Attributes:
    name: as in `--protocol`.
    arguments: of `TrainingArguments`; the command line overrides them.
    sgd: the optimizer.
    validation_share: of the training images of a task without a validation split, which nothing is chosen by.
    tasks: by their names.
    """

    name: str
    arguments: Mapping[str, Any]
    sgd: SGD
    validation_share: float
    tasks: Mapping[str, ProtocolTask]

    @classmethod
    def read(cls, name: str) -> Protocol:
        """The protocol of that name."""
        told = yaml.safe_load(FILES[name].read_text(encoding="utf-8"))
        return cls(
            name,
            told["arguments"],
            SGD(told["momentum"], tuple(told["drops"])),
            told["validation_share"],
            {task: ProtocolTask(**settings) for task, settings in told["tasks"].items()},
        )

    @cached_property
    def metrics(self) -> dict[str, str]:
        """What each task is reported in."""
        return {name: task.metric for name, task in self.tasks.items()}

    def find(self, folder: Path, names: Sequence[str], **limits: int | None) -> list[DownstreamTask]:
        """The tasks of those names, or all for none: `folder/<name>.yaml`, or the folder `folder/<name>`.

        Raises:
            InvalidArgumentError: an unknown name, or a task that is not in the folder.
        """
        if unknown := [name for name in names if name not in self.tasks]:
            raise px.InvalidArgumentError(
                f"{', '.join(unknown)}: no task of the protocol {self.name}, which has {', '.join(self.tasks)}."
            )
        wanted = list(names) or list(self.tasks)
        files = {name: [path for path in (folder / f"{name}.yaml", folder / name) if path.exists()] for name in wanted}
        if missing := [name for name, found in files.items() if not found]:
            raise px.InvalidArgumentError(
                f"{folder} has neither a folder nor a YAML file of data arguments for {', '.join(missing)}. Put them "
                "there, or name the tasks that there are by --targets."
            )
        tasks = find_tasks([str(found[0]) for found in files.values()], **limits)
        share = self.validation_share
        return [replace(task, data=replace(task.data, train_val_split=share)) for task in tasks]

    def learning_rate(self, task: str, default: float) -> float:
        """The rate of a task: its own over that of the protocol, as `default` is to that of the protocol."""
        own = self.tasks[task].learning_rate
        return default if own is None else default * own / float(self.arguments["learning_rate"])

    def notes(self, classes: Mapping[str, int]) -> list[str]:
        """What a reader must know; `classes`: how many each task that was run has."""
        told = [
            f"Protocol {self.name}: SGD with momentum {self.sgd.momentum:g}, a tenth of the learning rate after "
            f"{' and '.join(f'{drop:.0%}' for drop in self.sgd.drops)} of the steps, {self.validation_share:.0%} of "
            "the training images held out; in the summary the mean accuracy of the classes for "
            f"{', '.join(name for name, metric in self.metrics.items() if metric != 'accuracy')}."
        ]
        if left_out := [name for name in self.tasks if name not in classes]:
            told.append(f"Not run: {', '.join(left_out)}. Means are over the other tasks.")
        others = [f"{name} {here}" for name, here in classes.items() if here != self.tasks[name].classes]
        return [*told, f"Other numbers of classes than published: {', '.join(others)}."] if others else told

"""The arguments of the commands that evaluate models on several tasks."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from .arguments import EXAMPLE, EXAMPLE_MODEL, FineTuneArguments, ModelArguments, embedded
from .help import Usage
from .parsing import parse_groups
from .pruning_source import SourceArguments


@dataclass
class DownstreamArguments(SourceArguments):
    """How many examples of each task are used."""

    topic: ClassVar[str] = "tasks"

    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many examples a task."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise for each other split."})

    def limits(self) -> dict[str, int | None]:
        """Both of them: results with others are not comparable."""
        return {"max_train_samples": self.max_train_samples, "max_eval_samples": self.max_eval_samples}


Group = TypeVar("Group", bound=DownstreamArguments)


def parse_downstream(
    argv: Sequence[str],
    group: type[Group],
    usage: Usage,
    output_dir: str,
    pushes: bool = False,
    defaults: Callable[[argparse.Namespace], Mapping[str, Any]] = lambda named: {},
) -> tuple[ModelArguments, Group, FineTuneArguments]:
    """The three groups; nothing is saved, evaluated or logged while a model trains.

    `defaults` tells other defaults, given what was named.

    Raises:
        InvalidArgumentError: see `parse_groups`.
    """
    example = {"learning_rate": EXAMPLE["learning_rate"], "num_train_epochs": 5.0}
    model_args, args, training = parse_groups(
        argv,
        (ModelArguments, group, FineTuneArguments),
        usage,
        lambda named: (
            {"output_dir": output_dir}
            | (example if embedded(named.model_name_or_path) == EXAMPLE_MODEL else {})
            | dict(defaults(named))
        ),
        pushes,
    )
    training.name_output(model=Path(model_args.model_name_or_path).name)
    training.save_strategy, training.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    training.logging_strategy = IntervalStrategy.NO
    return model_args, args, training

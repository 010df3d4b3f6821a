"""The arguments of the recipes: four groups, a YAML file, the command line.

Defaults < the embedded example's settings (when no data is named) < `--config file.yaml` < command line.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import CONFIG_NAME

import px_hf as px

from ..controls import CONTROLS
from ..data import DataSource
from ..scopes import as_scope

DEMO_MODELS = Path(__file__).resolve().parents[2] / "recipes" / "demo"
"""The pretrained backbones that come with the repository."""

EXAMPLE_MODEL = str(DEMO_MODELS / "resnet")
EXAMPLE = {
    "num_train_epochs": 10.0,
    "learning_rate": 2e-3,
    "random_crop": False,
    "horizontal_flip": False,
    "compare_dense": True,
}
"""What differs from the defaults for the embedded digits."""


@dataclass
class ModelArguments:
    """The pretrained backbone."""

    config: str | None = field(
        default=None, metadata={"help": "YAML file of arguments; the command line overrides it."}
    )
    model_name_or_path: str = field(
        default=EXAMPLE_MODEL,
        metadata={"help": "Backbone: a model id of the Hub (timm models as timm/...) or a local folder."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models and data are kept."})
    token: str | None = field(default=None, metadata={"help": "Access token for private repositories of the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model. Only if you have read it."}
    )

    def short_name(self) -> str:
        """The id of a Hub model; of a local folder only its own name."""
        path = Path(self.model_name_or_path)
        return path.name if path.is_dir() else self.model_name_or_path

    def commit(self) -> str | None:
        """The commit of the Hub that the loaded model is of; None for a local folder."""
        if Path(self.model_name_or_path).is_dir():
            return None
        cached = try_to_load_from_cache(
            self.model_name_or_path, CONFIG_NAME, cache_dir=self.cache_dir, revision=self.model_revision
        )
        return Path(cached).parent.name if isinstance(cached, str) else None

    def hub(self) -> dict[str, Any]:
        """What every `from_pretrained` of the backbone takes."""
        return {
            "revision": self.model_revision,
            "cache_dir": self.cache_dir,
            "token": self.token,
            "trust_remote_code": self.trust_remote_code,
        }


@dataclass
class DataArguments:
    """The task. With none of the sources named: the embedded handwritten digits."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset id of the Hub, or a local folder, for example of Parquet files."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Image folder, one sub-folder per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Likewise, for validation."})
    test_dir: str | None = field(default=None, metadata={"help": "Likewise, for the test at the end."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file of training examples."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise, for validation."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise, for the test at the end."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: found by its type."})
    label_column_name: str | None = field(default=None, metadata={"help": "Default: found by its type."})
    train_split_name: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split_name: str | None = field(
        default=None, metadata={"help": "Split to validate on. Default: found by its name, else split off."}
    )
    test_split_name: str = field(
        default="test", metadata={"help": "Split of the final test, left out where there is none; 'none' ignores it."}
    )
    train_val_split: float = field(
        default=0.15,
        metadata={"help": "Share of each class split off the training data where there is no validation split."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many examples."})
    random_crop: bool = field(
        default=True, metadata={"help": "Train on random crops, 25 to 100 %% of the image. Off for the digits."}
    )
    horizontal_flip: bool = field(
        default=True, metadata={"help": "Train on mirrored images too. Off for the digits; switch it off for signs."}
    )

    def source(self) -> DataSource:
        """The data source, false if none is named."""
        return DataSource(**{f.name: getattr(self, f.name) for f in fields(DataSource)})

    def short_name(self) -> str:
        """The name of the data, without folders and extension."""
        path = Path(self.dataset_name or self.train_dir or self.train_file or "digits")
        return path.absolute().parent.name if path.stem == "train" else path.stem

    def hub_id(self) -> str | None:
        """The id of a dataset of the Hub; None for local data."""
        return None if self.dataset_name is None or Path(self.dataset_name).exists() else self.dataset_name


@dataclass
class ScoringArguments:
    """How weights are ranked for pruning."""

    criterion: str = field(
        default="px-active", metadata={"help": "How weights are scored.", "choices": list(px.CRITERIA)}
    )
    power: float | None = field(
        default=None, metadata={"help": "Exponent of the path flow in the px criteria: 1 = the paper, 0 = magnitude."}
    )
    rounds: int = field(default=20, metadata={"help": "Rounds of scoring and pruning. The paper uses 100."})
    scope: str | None = field(
        default=None,
        metadata={
            "help": "Rank all weights together (global), within each layer or each output (row), or n:m, as in 2:4: "
            "keep at most n of m inputs in a row; structured takes out whole units, which are hidden units, heads and "
            "channels, structured:uniform the same share of every layer and no heads. Default: the criterion's own.",
        },
    )
    min_layer_density: float = field(
        default=0.0,
        metadata={
            "help": "With scope global: the fraction of each layer that is kept in any case; structured: of its units."
        },
    )
    prune_head: bool = field(default=False, metadata={"help": "Prune the classifier head too."})
    examples_per_class: int = field(default=10, metadata={"help": "Training images of each class to score with."})
    scoring_batch_size: int = field(
        default=16, metadata={"help": "Images scored at once. Smaller saves memory; scores do not depend on it."}
    )

    def __post_init__(self) -> None:
        if self.scope is not None:
            as_scope(self.scope)

    def criterion_object(self) -> px.Criterion:
        """The criterion of that name, with `power`. **Raises** `InvalidArgumentError` if it takes none."""
        criterion = px.CRITERIA[self.criterion]
        if self.power is None:
            return criterion
        if not isinstance(criterion, px.PX):
            raise px.InvalidArgumentError(f"--power is for the px criteria, and --criterion is {self.criterion}.")
        return replace(criterion, power=self.power)


@dataclass
class PruneArguments(ScoringArguments):
    """The sparse subnetwork."""

    sparsity: float = field(default=0.9, metadata={"help": "Fraction of the weights to prune, in [0, 1)."})
    keep_masks: bool = field(
        default=False,
        metadata={"help": "The backbone is sparse, by px_hf: prune nothing more, and keep exactly its masks."},
    )
    control: str = field(
        default="none",
        metadata={
            "help": "Instead of the found mask: the same in random order within each layer (a random mask of the "
            "found layer densities), the same with units permuted, or the same on weights drawn anew.",
            "choices": list(CONTROLS),
        },
    )
    dense: bool = field(default=False, metadata={"help": "Prune nothing: train the ceiling to compare with."})
    compare_dense: bool = field(
        default=False,
        metadata={"help": "Train the unpruned network as well, with the same settings. On for the digits."},
    )

    def describe(self) -> dict[str, Any]:
        """The settings that the masks depend on, as JSON can say them."""
        return {
            "criterion": "none (dense)" if self.dense else repr(self.criterion_object()),
            "sparsity_asked": self.sparsity,
            "rounds": self.rounds,
            "scope": self.scope,
            "min_layer_density": self.min_layer_density,
            "prune_head": self.prune_head,
            "control": self.control,
        }


@dataclass
class FineTuneArguments(TrainingArguments):
    """transformers.TrainingArguments with other defaults."""

    output_dir: str = field(
        default="outputs/{model}-{data}-{mask}",
        metadata={"help": "Folder to write; {model}, {data}, {mask} stand for their names, as in resnet-digits-px90."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the model or the checkpoints that output_dir already holds."}
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs of fine-tuning."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Batch size of each process."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size of evaluation."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1 a share of all steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: no, steps, epoch."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to write a checkpoint: no, steps, epoch."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Keep at most so many checkpoints."})
    logging_steps: float = field(default=0.05, metadata={"help": "Steps between logs; below 1 a share of all steps."})
    push_to_hub: bool = field(
        default=False,
        metadata={
            "help": "Push the finished model to the Hub, as --hub_model_id (default: the name of output_dir), in one "
            "commit with its masks and a model card. See also --hub_private_repo, --hub_token, --hub_revision."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # torch would warn at every epoch


Arguments = tuple[ModelArguments, DataArguments, PruneArguments, FineTuneArguments]


def parse(argv: Sequence[str]) -> Arguments:
    """The four groups from the command line and the files it names. **Raises** `InvalidArgumentError`."""
    model, data, prune, training = parse_groups(
        argv,
        (ModelArguments, DataArguments, PruneArguments, FineTuneArguments),
        "accelerate launch recipes/prune_finetune.py [--config file.yaml] [--name value ...]",
        lambda named: (
            {}
            if any(getattr(named, f.name) for f in fields(DataSource))
            else {**EXAMPLE, "compare_dense": not named.keep_masks}
        ),
        pushes=True,
    )
    if prune.keep_masks and prune.control != "none":
        raise px.InvalidArgumentError("--control changes masks, and --keep_masks keeps them. Leave one out.")
    if prune.keep_masks and (prune.dense or prune.compare_dense):
        other = "--dense" if prune.dense else "--compare_dense"
        raise px.InvalidArgumentError(
            f"{other} needs the unpruned network, and with --keep_masks there is only the sparse one. Leave one out."
        )
    if prune.scope is not None and as_scope(prune.scope).whole_units and prune.control != "none":
        raise px.InvalidArgumentError(f"--control changes single weights, and --scope {prune.scope} whole units.")
    if prune.dense:
        prune.criterion, prune.power, prune.sparsity, prune.compare_dense = "magnitude", None, 0.0, False
        prune.min_layer_density, prune.control, prune.scope = 0.0, "none", None
    prune.scope = prune.scope or px.CRITERIA[prune.criterion].scope
    mask = "dense" if prune.dense else f"{prune.criterion}{100 * prune.sparsity:g}"
    mask += f"-{prune.scope.replace(':', '-')}" if as_scope(prune.scope).whole_units else ""
    mask += "" if prune.control == "none" else f"-{prune.control}"
    mask = "kept" if prune.keep_masks else mask
    names = {"model": Path(model.model_name_or_path).name, "data": data.short_name(), "mask": mask}
    for name, value in names.items():
        training.output_dir = training.output_dir.replace(f"{{{name}}}", value)
    return model, data, prune, training


def parse_groups(
    argv: Sequence[str],
    groups: Sequence[type],
    usage: str,
    example: Callable[[argparse.Namespace], Mapping[str, Any]],
    pushes: bool = False,
) -> list[Any]:
    """One object for each of the dataclasses `groups`; `example` tells other defaults, given what was named.

    **Raises** `InvalidArgumentError` for an unknown argument, an unreadable `--config`, or `--push_to_hub` of a
    recipe that does not.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    config = first.parse_known_args(argv)[0].config
    given = [*(_read_config(config) if config else []), *argv]

    parser = HfArgumentParser(tuple(groups), allow_abbrev=False, usage=usage)
    parser.set_defaults(**example(parser.parse_known_args(given)[0]))
    *found, unknown = parser.parse_args_into_dataclasses(given, True, look_for_args_file=False)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise px.InvalidArgumentError(
            f"Unknown arguments: {' '.join(unknown)}." + (f" Did you mean {close[0]}?" if close else "")
        )
    if not pushes and any(getattr(group, "push_to_hub", False) for group in found):
        raise px.InvalidArgumentError(
            "--push_to_hub is for recipes/prune_finetune.py and recipes/evaluate_downstream.py: this recipe makes no "
            "one model."
        )
    return found


def _read_config(path: str) -> list[str]:
    """A YAML mapping as command-line words, so that it is checked by the same parser."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise px.InvalidArgumentError(f"Cannot read --config {path}: {error}") from error
    if not isinstance(content, dict):
        raise px.InvalidArgumentError(f"--config {path} is no YAML mapping of argument names to values.")
    words: list[str] = []
    for name, value in content.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(_word(item) for item in values)]
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)

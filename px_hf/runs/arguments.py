"""The arguments that commands share, in groups: the model, the data, fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import DatasetDict
from huggingface_hub import try_to_load_from_cache
from transformers import TrainingArguments
from transformers.utils import CONFIG_NAME

from ..data import ClassificationTask, DataSource, classification_task, read_dataset
from .embedded_models import DEMO_MODELS, EXAMPLE_MODEL, embedded

__all__ = [
    "DEMO_MODELS",
    "EXAMPLE",
    "EXAMPLE_MODEL",
    "DataArguments",
    "FineTuneArguments",
    "ModelArguments",
    "embedded",
    "one_thread",
]

EXAMPLE = {
    "num_train_epochs": 10.0,
    "learning_rate": 2e-3,
    "random_crop": False,
    "horizontal_flip": False,
    "compare_dense": True,
}
"""What differs from the defaults for the embedded digits."""


def one_thread() -> None:
    """For the embedded examples: more threads cost more than they give on images this small, and round differently."""
    torch.set_num_threads(1)


@dataclass
class ModelArguments:
    """The pretrained backbone."""

    topic: ClassVar[str] = "model"

    config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of arguments, or settings that come with px_hf: vit-50, vit-80, vit-90, resnet-50, "
            "resnet-80, resnet-90. The command line overrides it."
        },
    )
    model_name_or_path: str = field(
        default="demo-resnet",
        metadata={
            "help": "Backbone: a model id of the Hub (timm models as timm/...), a local folder, or the embedded "
            "demo-resnet or demo-vit."
        },
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models and data are kept."})
    token: str | None = field(default=None, metadata={"help": "Access token for private repositories of the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model. Only if you have read it."}
    )

    def __post_init__(self) -> None:
        self.model_name_or_path = embedded(self.model_name_or_path)

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

    topic: ClassVar[str] = "data"

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

    def read(self, embedded: Callable[[], DatasetDict], seed: int, cache_dir: str | None = None) -> ClassificationTask:
        """All of the source's examples, or of the `embedded` data if none is named.

        Raises:
            DataError: they cannot be read, or are no images of classes.
        """
        source = self.source()
        return classification_task(
            read_dataset(source, cache_dir) if source else embedded(),
            image_column=self.image_column_name,
            label_column=self.label_column_name,
            train_split=self.train_split_name,
            validation_split=self.validation_split_name,
            test_split=None if self.test_split_name == "none" else self.test_split_name,
            validation_share=self.train_val_split,
            seed=seed,
        )

    def limited(self, task: ClassificationTask, seed: int) -> ClassificationTask:
        """At most as many examples as `max_train_samples` and `max_eval_samples` say, drawn at random."""
        return ClassificationTask(
            task.labels,
            task.train.sample(self.max_train_samples, seed),
            task.validation.sample(self.max_eval_samples, seed),
            None if task.test is None else task.test.sample(self.max_eval_samples, seed),
        )

    def short_name(self) -> str:
        """The name of the data, without folders and extension."""
        path = Path(self.dataset_name or self.train_dir or self.train_file or "digits")
        return path.absolute().parent.name if path.stem == "train" else path.stem

    def hub_id(self) -> str | None:
        """The id of a dataset of the Hub; None for local data."""
        return None if self.dataset_name is None or Path(self.dataset_name).exists() else self.dataset_name


@dataclass
class FineTuneArguments(TrainingArguments):
    """transformers.TrainingArguments with other defaults."""

    topics: ClassVar[Mapping[str, Sequence[str]]] = {
        "training": (
            *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
            *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "max_grad_norm"),
            *("gradient_accumulation_steps", "label_smoothing_factor", "bf16", "fp16", "torch_compile", "use_cpu"),
            *("eval_strategy", "logging_steps", "report_to", "disable_tqdm", "dataloader_num_workers", "seed"),
        ),
        "saving": (
            *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_strategy", "save_steps"),
            *("save_total_limit", "load_best_model_at_end", "metric_for_best_model", "push_to_hub", "hub_model_id"),
            *("hub_private_repo", "hub_token", "hub_revision"),
        ),
    }
    """Those that are shown by `--help training` and `--help saving`; the others, by `--help all`."""

    output_dir: str = field(
        default="outputs/{model}-{data}-{mask}",
        metadata={"help": "Folder to write; {model}, {data}, {mask} stand for their names, as in resnet-digits-px90."},
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the model or the checkpoints that output_dir already holds."}
    )
    num_train_epochs: float = field(
        default=3.0,
        metadata={"help": "Epochs of fine-tuning; 0 trains nothing: for a model whose head knows the classes."},
    )
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

    @property
    def trains(self) -> bool:
        """Whether there is any fine-tuning."""
        return self.max_steps > 0 or self.num_train_epochs > 0

    def name_output(self, **names: str) -> None:
        """Put `names` where `output_dir` has them in braces; by default trackers call the run as that folder."""
        for name, value in names.items():
            self.output_dir = self.output_dir.replace(f"{{{name}}}", value)
        self.run_name = self.run_name or Path(self.output_dir).name  # trackers take what follows for the same run

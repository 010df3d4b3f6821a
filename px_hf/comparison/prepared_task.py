"""A (model, task) of the comparison: pixels computed once, and a head fitted to the dense model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..atomic import whole
from ..data import DataSource, Preprocess, classification_task, read_dataset
from ..data.calibration import class_balanced
from ..data.embedded.characters import EMBEDDED
from ..runs.arguments import FineTuneArguments, ModelArguments
from ..runs.backbone import load_model, load_processor
from .fitted_head import fit_head, set_head_
from .pixels import Pixels, read_pixels, write_pixels

TASK_FILE = "task.json"


class Settings(Protocol):
    """The arguments of a comparison that its data depend on."""

    output_dir: str
    cache_dir: str | None
    trust_remote_code: bool
    max_train_samples: int | None
    max_eval_samples: int | None
    train_val_split: float


@dataclass(frozen=True)
class PreparedTask:
    """What the cells of one (model, dataset) share."""

    model: ModelArguments
    labels: list[str]
    train: Pixels
    validation: Pixels
    test: Pixels
    head: Path

    def dense_model(self, seed: int, head: str, device: torch.device) -> PreTrainedModel:
        """The backbone with its head: ``"random"``, drawn by `seed`, or ``"fitted"``."""
        training = cast(FineTuneArguments, SimpleNamespace(seed=seed, device=device))  # all that is read of them
        model = load_model(self.model, self.labels, training)
        if head == "fitted":
            set_head_(model, self.head)
        return model

    def calibration(self, per_class: int, seed: int, batch_size: int) -> list[dict[str, Tensor]]:
        """Class-balanced batches of the training images, drawn by `seed`, as `px_hf.data.calibration_set` draws."""
        drawn = class_balanced(self.train.labels, self.labels, per_class, seed, self.train.name)
        batches = []
        for start in range(0, len(drawn), batch_size):
            images, labels = self.train.batch(drawn[start : start + batch_size])
            batches.append({"pixel_values": images, "labels": labels})
        return batches


def prepare(args: Settings, model_name: str, dataset_name: str) -> Path:
    """Writes the task's folder, unless it is there already. Whole or not at all."""
    model = ModelArguments(
        model_name_or_path=model_name, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    names, samples = [short(model_name), short(dataset_name)], [args.max_train_samples, args.max_eval_samples]
    settings = [*names, *samples, args.train_val_split]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    folder = Path(args.output_dir) / "cache" / f"{short(model_name)}-{short(dataset_name)}-{key}"
    if (folder / TASK_FILE).exists():
        return folder
    embedded = EMBEDDED.get(dataset_name)
    raw = embedded() if embedded else read_dataset(DataSource(dataset_name=dataset_name), args.cache_dir)
    task = classification_task(raw, validation_share=args.train_val_split, seed=0)
    pixels = Preprocess(load_processor(model))
    splits = {
        "train": task.train.sample(args.max_train_samples, 0),
        "validation": task.validation.sample(args.max_eval_samples, 0),
        "test": (task.test or task.validation).sample(args.max_eval_samples, 0),
    }
    with whole(folder) as unfinished:
        unfinished.mkdir()
        for name, split in splits.items():
            write_pixels(split.with_pixels(pixels), unfinished, name)
        (unfinished / TASK_FILE).write_text(json.dumps({"model": vars(model), "labels": task.labels}))
        found = load(unfinished)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        fit_head(found.dense_model(0, "random", device), found.train, found.validation, found.head)
    return folder


def load(folder: Path) -> PreparedTask:
    """What `prepare` wrote."""
    told = json.loads((folder / TASK_FILE).read_text())
    return PreparedTask(
        ModelArguments(**told["model"]),
        told["labels"],
        train=read_pixels(folder, "train"),
        validation=read_pixels(folder, "validation"),
        test=read_pixels(folder, "test"),
        head=folder / "head.safetensors",
    )


def short(name: str) -> str:
    """The last part of a Hub id or path: the same wherever the files lie."""
    return Path(name).name

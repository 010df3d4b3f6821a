"""A (model, task) of the comparison: pixels computed once and memory-mapped, and a head fitted to the dense model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import px_hf as px

from ..data import DataSource, Preprocess, Split, classification_task, read_dataset
from ..data.calibration import class_balanced
from ..data.embedded.characters import EMBEDDED
from ..evaluation import Examples, LinearProbe, head_inputs
from ..evaluation.probe import Standardise
from ..model.targets import head_modules
from ..runs.arguments import ModelArguments
from ..runs.backbone import load_model, load_processor

HEAD_IMAGES = 5000
"""Training images that the head is fitted to, at most."""


@dataclass(frozen=True)
class Pixels(torch.utils.data.Dataset):
    """Images as the model takes them, float32 [N, 3, H, W] in a memory-mapped file, with classes int64 [N]."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, positions: np.ndarray | slice, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.array(self.images[positions]))
        return images.to(device), torch.from_numpy(np.array(self.labels[positions])).to(device)

    def __getitems__(self, positions: range) -> list[dict[str, Any]]:
        images, labels = self.batch(slice(positions.start, positions.stop))
        return [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]

    def first(self, count: int) -> Pixels:
        return Pixels(self.name, self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Task:
    """What the cells of one (model, dataset) share."""

    model: ModelArguments
    labels: list[str]
    train: Pixels
    validation: Pixels
    test: Pixels
    head: Path

    def dense_model(self, seed: int, head: str, device: torch.device) -> PreTrainedModel:
        """The backbone with its head: ``"random"``, drawn by `seed`, or ``"fitted"``."""
        model = load_model(self.model, self.labels, SimpleNamespace(seed=seed, device=device))
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


def prepare(args: Any, model_name: str, dataset_name: str) -> Path:
    """Writes the task's folder, unless it is there already. Whole or not at all."""
    model = ModelArguments(
        model_name_or_path=model_name, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code
    )
    settings = [short(model_name), short(dataset_name), args.max_train_samples, args.max_eval_samples]
    settings += [args.train_val_split]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
    folder = Path(args.output_dir) / "cache" / f"{short(model_name)}-{short(dataset_name)}-{key}"
    if (folder / "task.json").exists():
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
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name, split in splits.items():
        _write(unfinished / f"{name}.npy", split.with_pixels(pixels))
        np.save(unfinished / f"{name}.labels.npy", split.labels)
    found = Task(model, task.labels, *(_read(unfinished, name) for name in splits), unfinished / "head.safetensors")
    fit_head(found)
    (unfinished / "task.json").write_text(json.dumps({"model": vars(model), "labels": task.labels}))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)
    return folder


def load(folder: Path) -> Task:
    told = json.loads((folder / "task.json").read_text())
    splits = (_read(folder, name) for name in ("train", "validation", "test"))
    return Task(ModelArguments(**told["model"]), told["labels"], *splits, folder / "head.safetensors")


def short(name: str) -> str:
    """The last part of a Hub id or path: the same wherever the files lie."""
    return Path(name).name


def _write(path: Path, split: Split) -> None:
    size = split.__getitems__([0])[0]["pixel_values"].shape
    file = np.lib.format.open_memmap(path, "w+", np.float32, (len(split), *size))
    for start in tqdm(range(0, len(split), 256), desc=f"Pixels of {split.name}", unit="batch", leave=False):
        positions = range(start, min(start + 256, len(split)))
        file[start : start + 256] = np.stack([item["pixel_values"].numpy() for item in split.__getitems__(positions)])
    file.flush()


def _read(folder: Path, name: str) -> Pixels:
    return Pixels(name, np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}.labels.npy"))


# ------------------------------------------------------------------------------------------ fitted head


def head_layer(model: nn.Module, classes: int) -> nn.Linear | None:
    """The linear layer that the classifier head consists of; None if it is something else."""
    layers = [m for m in head_modules(model) if any(True for _ in m.parameters(recurse=False))]
    only = layers[0] if len(layers) == 1 else None
    return only if isinstance(only, nn.Linear) and only.out_features == classes else None


def fit_head(task: Task) -> None:
    """Logistic regression on the dense model's features, its strength chosen on the validation split.

    Written as the weight and bias of the head's linear layer; nothing if the head is no linear layer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = task.dense_model(0, "random", device)
    if head_layer(model, len(task.labels)) is None:
        return
    some = task.train.first(HEAD_IMAGES)
    features, held_out = (head_inputs(model, split) for split in (some, task.validation))
    probe = LinearProbe().fit(
        Examples(features, some.labels), Examples(held_out, task.validation.labels), len(task.labels)
    )
    scale = Standardise.of(features)
    solver = LogisticRegression(C=probe.chosen["C"], max_iter=300).fit(scale(features), some.labels)
    weight = np.zeros((len(task.labels), features.shape[1]))
    bias = np.full(len(task.labels), -1e4)  # a class without an example among those
    if len(solver.classes_) == 2:  # sklearn keeps the difference of the two
        weight[solver.classes_] = np.concatenate([-solver.coef_, solver.coef_]) / 2
        bias[solver.classes_] = np.concatenate([-solver.intercept_, solver.intercept_]) / 2
    else:
        weight[solver.classes_], bias[solver.classes_] = solver.coef_, solver.intercept_
    weight = weight / scale.deviation
    bias = bias - weight @ scale.mean
    save_file({"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}, task.head)


@torch.no_grad()
def set_head_(model: PreTrainedModel, path: Path) -> None:
    """Puts the fitted head into the model. **Raises** `TargetError` if there is none."""
    layer = head_layer(model, model.config.num_labels)
    if layer is None or layer.bias is None or not path.exists():
        raise px.TargetError(f"the head of {type(model).__name__} is no linear layer with a bias, so none was fitted.")
    head = load_file(path)
    layer.weight.copy_(head["weight"])
    layer.bias.copy_(head["bias"])

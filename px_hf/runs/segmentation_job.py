"""A run on images with a class for every pixel: the network, its data, its scores, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

import px_hf as px

from ..data import DataSource, read_dataset
from ..data.check import read_all
from ..data.embedded.scenes import SCENE_CLASSES, SIZE, VOID, scenes
from ..data.segmentation import MapSplit, SegmentationTask, count_classes, find_pair, segmentation_task
from ..downstream.figure import plot_segmentation
from ..evaluation.scores import segmentation_scores
from ..metrics.mean_iou.mean_iou import from_confusion
from .arguments import FineTuneArguments
from .console import ClosingTable
from .job import Job, MaskSource, Say, Scores
from .pruning_arguments import SparsityArguments
from .segmentation_model import load_map_processor, load_model
from .segmentation_trainer import ConfusionCounts, make_trainer, resized

SHOWN = 4
"""Images in the figure, at most; the saved model is compared on the same."""


@dataclass
class SegmentArguments(SparsityArguments):
    """The data and the sparse subnetwork. With no data named: the embedded scenes."""

    topic: ClassVar[str] = "data"
    topics: ClassVar[Mapping[str, Sequence[str]]] = {"pruning": ("scoring_images",)}

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset of the Hub, or a local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(default=None, metadata={"help": "Parquet file of training examples."})
    validation_file: str | None = field(default=None, metadata={"help": "Likewise, for validation."})
    test_file: str | None = field(default=None, metadata={"help": "Likewise, for the test at the end."})
    image_column_name: str | None = field(default=None, metadata={"help": "Default: found by type and name."})
    annotation_column_name: str | None = field(default=None, metadata={"help": "Default: found by type and name."})
    class_names_file: str | None = field(
        default=None,
        metadata={
            "help": "JSON list of class names, or id2label. Default: numbers, as many as the training maps have."
        },
    )
    ignore_index: int = field(default=255, metadata={"help": "The number of pixels that do not count."})
    reduce_labels: bool = field(default=False, metadata={"help": "0 does not count, and classes start with 1."})
    random_crop: bool = field(default=True, metadata={"help": "Train on random crops. Off for the scenes."})
    horizontal_flip: bool = field(default=True, metadata={"help": "Train on mirrored images too."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many examples."})
    sparsity: float = field(default=0.8, metadata={"help": "Fraction of the weights to prune, in [0, 1)."})
    scoring_images: int = field(default=50, metadata={"help": "Training images to score with."})
    examples_per_class: int = field(default=1, init=False)  # an image has many classes
    decoder_size: int = field(default=256, metadata={"help": "Channels of the decoder that a bare backbone gets."})
    compare_dense: bool = field(default=False, metadata={"help": "Train the unpruned network too. On for the scenes."})

    def source(self) -> DataSource:
        """The data source, false if none is named."""
        own = {f.name for f in fields(self)}
        return DataSource(**{f.name: getattr(self, f.name) for f in fields(DataSource) if f.name in own})

    def short_name(self) -> str:
        """The name of the data, without folders and extension."""
        return Path(self.dataset_name or self.train_file or "scenes").stem


@dataclass(eq=False)
class SegmentationJob(Job):
    """A segmentation model, or a backbone under a new decoder, and a data set of images and maps."""

    prune_args: SegmentArguments
    counts: ConfusionCounts = field(default_factory=ConfusionCounts)
    drawn: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Maps of the first images, by what has drawn them: "truth", "dense", "pruned"."""

    @cached_property
    def processor(self) -> BaseImageProcessor:
        own_size = None if self.prune_args.source() else {"height": SIZE, "width": SIZE}
        return load_map_processor(self.model_args, own_size)

    @cached_property
    def task(self) -> SegmentationTask:
        """Class names and splits, on at most as many examples as asked for."""
        args, seed = self.prune_args, self.training.seed
        source = args.source()
        with self.training.main_process_first():
            raw = read_dataset(source, self.model_args.cache_dir) if source else scenes()
        if args.class_names_file:
            labels = read_class_names(args.class_names_file)
            if len(labels) == args.ignore_index + 1:
                labels.pop()  # the name of the pixels that do not count
        elif not source:
            labels, args.ignore_index = SCENE_CLASSES, VOID
        else:
            _, annotation = find_pair(raw["train"].features, args.image_column_name, args.annotation_column_name)
            count = count_classes(raw, "train", annotation, args.ignore_index, args.reduce_labels)
            labels = [str(k) for k in range(count)]
        task = segmentation_task(
            raw,
            self.pixels,
            labels=labels,
            ignore_index=args.ignore_index,
            reduce_labels=args.reduce_labels,
            image_column=args.image_column_name,
            annotation_column=args.annotation_column_name,
            seed=seed,
        )
        return SegmentationTask(
            task.labels,
            task.train.sample(args.max_train_samples, seed),
            task.validation.sample(args.max_eval_samples, seed),
            None if task.test is None else task.test.sample(args.max_eval_samples, seed),
        )

    @property
    def held_out_splits(self) -> dict[str, MapSplit]:
        """The splits validation and, where there is one, test."""
        return {"validation": self.task.validation} | ({} if self.task.test is None else {"test": self.task.test})

    @property
    def shown(self) -> list[tuple[Image.Image, Image.Image]]:
        """The first images of the test split, or else the validation split, and their maps."""
        split = self.task.test or self.task.validation
        return [split.pair(position) for position in range(min(SHOWN, len(split)))]

    @property
    def example(self) -> Tensor:
        return self.task.validation[0]["pixel_values"][None]

    def load(self, say: Say) -> PreTrainedModel:
        task = self.task
        splits = [task.train, *self.held_out_splits.values()]
        read_all(splits, progress=not self.training.disable_tqdm)
        for split in splits:
            split.require_labels()
        model = self.network()
        say(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(task.labels)} classes")
        return model

    def network(self) -> PreTrainedModel:
        return load_model(self.model_args, self.prune_args.decoder_size, self.task.labels, self.training)

    def mask_source(self, model: PreTrainedModel, say: Say) -> MaskSource:
        args, training = self.prune_args, self.training
        images = self.task.train.sample(args.scoring_images, training.seed)
        provenance = args.describe() | {
            "calibration": {"split": images.name, "examples": len(images), "seed": training.seed},
            "base_model": self.model_args.short_name(),
            "dataset": args.short_name(),
            "seed": training.seed,
        }
        pixels = torch.stack([images[position]["pixel_values"] for position in range(len(images))])
        batches = [{"pixel_values": batch} for batch in pixels.split(args.scoring_batch_size)]

        def find() -> px.Masks:
            return args.find_masks(model, batches, args.sparsity, progress=not training.disable_tqdm)

        return MaskSource(provenance, find, batches)

    def trainer(self, model: nn.Module, training: FineTuneArguments, callbacks: list[TrainerCallback]) -> Trainer:
        train = self.task.train.augmented(self.prune_args.random_crop, self.prune_args.horizontal_flip)
        return make_trainer(model, replace(self.task, train=train), training, self.counts, callbacks)

    def evaluate(self, trainer: Trainer, name: str) -> dict[str, Any]:
        """Mean IoU with its interval and IoU by class, for each split."""
        found: dict[str, Any] = {}
        for split_name, split in self.held_out_splits.items():
            trainer.evaluate(split, metric_key_prefix=split_name)
            counts = self.counts.last
            assert counts is not None
            by_class = from_confusion(counts.sum(0))["per_category_iou"]
            found[split_name] = {
                "images": len(counts),
                **segmentation_scores(counts, seed=trainer.args.seed),
                "iou_by_class": [None if np.isnan(value) else value for value in by_class],
            }
        assert trainer.model is not None
        self.drawn[name] = self.predict(trainer.model)
        return found

    @torch.no_grad()
    def predict(self, model: nn.Module) -> list[np.ndarray]:
        """Maps [H, W] of the images that are shown."""
        split = self.task.test or self.task.validation
        items = [split[position] for position in range(min(SHOWN, len(split)))]
        images = torch.stack([item["pixel_values"] for item in items])
        labels = torch.stack([item["labels"] for item in items])
        logits = model.eval()(pixel_values=images.to(self.training.device)).logits.float()
        return list(resized(logits, labels).argmax(1).cpu().numpy())

    def held_out(self) -> Iterator[list[Image.Image]]:
        """The images that are shown."""
        yield [image for image, _ in self.shown]

    def stock(self, folder: Path) -> nn.Module:
        trust = self.model_args.trust_remote_code
        return AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=trust)

    def scores(self, pruned: Scores, dense: Scores | None) -> dict[str, Any]:
        return {"pruned": pruned, "dense": dense}

    def draw(self, out: Path, trainer: Trainer, found: px.Masks, results: Mapping[str, Any]) -> None:
        maps = {"truth": [np.array(drawn) for _, drawn in self.shown], **self.drawn}
        plot_segmentation([image for image, _ in self.shown], maps, self.task.labels, out / "segmentation.png")

    def table(self, out: Path, results: Mapping[str, Any]) -> Table:
        """Mean IoU, IoU by class, sparsity, times."""
        pruned, dense = results["pruned"], results["dense"]
        table = ClosingTable(out, compared=bool(dense))
        for split in pruned:
            scores = [_interval(found[split]["mean_iou"]) for found in (pruned, dense) if found]
            table.row(f"mean IoU, {split}, % [95 % interval]", *scores)
        last = list(pruned)[-1]
        table.section()
        for k, label in enumerate(self.task.labels):
            ious = [_percent(found[last]["iou_by_class"][k]) for found in (pruned, dense) if found]
            table.row(f"IoU of {label}, {last}", *ious)
        table.section()
        table.row("sparsity achieved", f"{100 * results['sparsity']:.4g} %", "-")
        table.row("prunable weights kept", f"{results['weights_kept']:,}", f"{results['weights']:,}")
        for name, seconds in results["seconds"].items():
            table.row(f"time, {name.lower()}", f"{seconds:.1f} s")
        return table.table


def _interval(score: Mapping[str, float]) -> str:
    return f"{100 * score['value']:.1f} [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"


def _percent(iou: float | None) -> str:
    return "-" if iou is None else f"{100 * iou:.1f}"


def read_class_names(file: str) -> list[str]:
    """A JSON list, a mapping of numbers 0 to K-1 to names, or either of them as "classes" or "id2label".

    Raises:
        InvalidArgumentError: the file is missing, no JSON, or something else.
    """
    try:
        content = json.loads(Path(file).read_text())
        if isinstance(content, dict):
            content = content.get("classes", content.get("id2label", content))
        if isinstance(content, dict):
            content = [content[str(k)] for k in range(len(content))]
        return [str(name) for name in content]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise px.InvalidArgumentError(
            f"Cannot read --class_names_file {file}: {type(error).__name__}: {error}"
        ) from error

"""Semantic segmentation: prune a backbone with PX, fine-tune it with its zeros kept, report mean IoU.

recipes/prune_segment.py says how it is run.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.table import Table
from transformers import (
    AutoModelForSemanticSegmentation,
    EvalPrediction,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import SaveStrategy

import px_hf as px

from ..data import DataSource, Preprocess, read_dataset
from ..data.check import read_all
from ..data.embedded.scenes import SCENE_CLASSES, SIZE, VOID, scenes
from ..data.segmentation import MapSplit, SegmentationTask, count_classes, find_pair, segmentation_task
from ..distributed import processes
from ..downstream.figure import plot_segmentation
from ..evaluation.scores import segmentation_scores
from ..metrics.mean_iou.mean_iou import from_confusion
from ..plots import plot_layer_sparsity
from ..runs.arguments import EXAMPLE_MODEL, FineTuneArguments, ModelArguments, ScoringArguments, parse_groups
from ..runs.console import Phases
from ..runs.folder import RUN_FILE, begin, check_same_run, claim, find_checkpoint, write_json
from ..runs.segment_model import load_map_processor, load_model
from ..scopes import check_sparsity


@dataclass
class SegmentArguments(ScoringArguments):
    """The data and the sparse subnetwork. With no data named: the embedded scenes."""

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


def main(argv: list[str]) -> None:
    main_process = processes().is_main  # first of all: a wrong launch must not write anything
    model_args, args, training = parse(argv)
    out, phases = Path(training.output_dir), Phases(quiet=not main_process)
    checkpoint = find_checkpoint(out, training.resume_from_checkpoint)
    claim(out, training.overwrite_output_dir, checkpoint)
    with phases("Load"):
        processor = load_map_processor(model_args)
        if not args.source():
            processor.size = {"height": SIZE, "width": SIZE}
        task = load_task(args, training, Preprocess(processor), model_args.cache_dir)
        splits = [split for split in (task.train, task.validation, task.test) if split is not None]
        read_all(splits, progress=not training.disable_tqdm)
        for split in splits:
            split.require_labels()
        model = load_model(model_args, args.decoder_size, task.labels, training)
        phases.say(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(task.labels)} classes")
    drawn = task.train.sample(args.scoring_images, training.seed)
    size = args.scoring_batch_size
    starts = range(0, len(drawn), size)
    batches = [
        {"pixel_values": torch.stack([drawn[i]["pixel_values"] for i in range(s, min(s + size, len(drawn)))])}
        for s in starts
    ]
    provenance = {
        "criterion": repr(args.criterion_object()),
        "sparsity_asked": args.sparsity,
        "rounds": args.rounds,
        "scope": args.scope or px.CRITERIA[args.criterion].scope,
        "min_layer_density": args.min_layer_density,
        "prune_head": args.prune_head,
        "calibration": {"split": drawn.name, "examples": len(drawn), "seed": training.seed},
        "base_model": model_args.short_name(),
        "dataset": Path(args.dataset_name or args.train_file or "scenes").stem,
        "seed": training.seed,
    }
    with phases("Prune"):
        if checkpoint:
            done = check_same_run(checkpoint, provenance)
            masks = px.Masks.from_pretrained(checkpoint)
        else:
            done = {"provenance": provenance}
            masks = px.prune(
                model,
                batches,
                args.criterion_object(),
                sparsity=args.sparsity,
                rounds=args.rounds,
                scope=args.scope,
                prune_head=args.prune_head,
                min_layer_density=args.min_layer_density,
                progress=not training.disable_tqdm,
            )
            if main_process:
                begin(out, done)
        phases.say(f"{masks.kept:,} of {masks.total:,} weights kept")

    train = task.train.augmented(args.random_crop, args.horizontal_flip)
    data = {"validation": task.validation} | ({"test": task.test} if task.test is not None else {})
    shown = {"truth": [np.array(data[min(data)].pair(i)[1]) for i in range(min(4, len(data[min(data)])))]}
    if args.compare_dense and "dense" not in done:
        with phases("Fine-tune dense"):
            unsaved = copy.copy(training)
            unsaved.save_strategy = SaveStrategy.NO
            dense = load_model(model_args, args.decoder_size, task.labels, training)
            trainer, counts = make_trainer(dense, train, task, unsaved)
            trainer.train()
            done["dense"] = evaluate(trainer, counts, data)
            shown["dense"] = predict(dense, data[min(data)], len(shown["truth"]))
            if main_process:
                write_json(out / RUN_FILE, done)
    with phases("Fine-tune"):
        masks.apply_(model)
        trainer, counts = make_trainer(model, train, task, training, [px.KeepMasks(masks)])
        trainer.train(resume_from_checkpoint=checkpoint)
    if main_process:
        with phases("Save"):
            px.save_pretrained(
                model, masks, out,
                image_processor=processor, provenance=provenance, overwrite=training.overwrite_output_dir,
            )  # fmt: skip
    with phases("Evaluate"):
        found = evaluate(trainer, counts, data)
        shown["pruned"] = predict(model, data[min(data)], len(shown["truth"]))
    if not main_process:
        return
    again = AutoModelForSemanticSegmentation.from_pretrained(out)
    if masks.revived(again):
        raise px.CheckpointError(f"Pruned weights are not zero in {out}: {masks.revived(again)}.")
    results = {
        **provenance,
        "pruned": found,
        "dense": done.get("dense"),
        **px.report(model, masks, batches[0]).to_dict(),
        "seconds": phases.seconds,
    }
    write_json(out / "all_results.json", results)
    plot_layer_sparsity(masks, out / "per_layer_sparsity.png")
    images = [data[min(data)].pair(i)[0] for i in range(len(shown["truth"]))]
    plot_segmentation(images, shown, task.labels, out / "segmentation.png")
    show(results, task.labels, out, phases)


def parse(argv: list[str]) -> tuple[ModelArguments, SegmentArguments, FineTuneArguments]:
    """The three groups. **Raises** `InvalidArgumentError`."""
    example = {
        "num_train_epochs": 10.0, "learning_rate": 3e-3, "random_crop": False, "compare_dense": True,
        "decoder_size": 48, "per_device_train_batch_size": 8, "scoring_images": 30, "rounds": 10, "sparsity": 0.5,
    }  # fmt: skip
    model_args, args, training = parse_groups(
        argv,
        (ModelArguments, SegmentArguments, FineTuneArguments),
        "accelerate launch recipes/prune_segment.py [--config file.yaml] [--name value ...]",
        lambda named: (
            {"output_dir": "outputs/{model}-segment"} | ({} if named.dataset_name or named.train_file else example)
        ),
    )
    check_sparsity(args.sparsity)
    if args.scoring_images < 1:
        raise px.InvalidArgumentError(f"--scoring_images must be at least 1, got {args.scoring_images}.")
    if not args.source() and model_args.model_name_or_path == EXAMPLE_MODEL:
        torch.set_num_threads(1)  # more cost more than they give for images this small, and round differently
    training.output_dir = training.output_dir.replace("{model}", Path(model_args.model_name_or_path).name)
    training.batch_eval_metrics = True  # counts, not all pixels, are kept
    return model_args, args, training


def load_task(
    args: SegmentArguments, training: FineTuneArguments, pixels: Preprocess, cache_dir: str | None
) -> SegmentationTask:
    """The splits, with class names from a file, the example, or the training maps."""
    source = args.source()
    with training.main_process_first():
        raw = read_dataset(source, cache_dir) if source else scenes()
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
        pixels,
        labels=labels,
        ignore_index=args.ignore_index,
        reduce_labels=args.reduce_labels,
        image_column=args.image_column_name,
        annotation_column=args.annotation_column_name,
        seed=training.seed,
    )
    held_out = [
        None if split is None else split.sample(args.max_eval_samples, training.seed)
        for split in (task.validation, task.test)
    ]
    train = task.train.sample(args.max_train_samples, training.seed)
    assert held_out[0] is not None
    return SegmentationTask(task.labels, train, held_out[0], held_out[1])


def read_class_names(file: str) -> list[str]:
    """A JSON list, a mapping of numbers 0 to K-1 to names, or either of them as "classes" or "id2label"."""
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


def make_trainer(
    model: PreTrainedModel,
    train: MapSplit,
    task: SegmentationTask,
    training: FineTuneArguments,
    callbacks: list[TrainerCallback] | None = None,
) -> tuple[Trainer, list[np.ndarray]]:
    """A Trainer, and the list that the counts [K, K] of each image go into when it evaluates."""
    counts: list[np.ndarray] = []
    classes = len(task.labels)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        logits = resized(outputs.logits.float(), labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch  # pixels that count

    def confusions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        predicted = resized(logits, labels).argmax(1)
        pairs = torch.where(labels < 0, classes * classes, labels * classes + predicted).flatten(1)
        return torch.stack([torch.bincount(p, minlength=classes**2 + 1)[:-1] for p in pairs]).view(
            -1, classes, classes
        )

    def add(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        counts.extend(np.asarray(prediction.predictions))
        if not compute_result:
            return {}
        found = from_confusion(np.sum(counts, 0))
        done.append(np.stack(counts))
        counts.clear()
        return {"mean_iou": found["mean_iou"], "overall_accuracy": found["overall_accuracy"]}

    done: list[np.ndarray] = []
    trainer = Trainer(
        model,
        training,
        train_dataset=train,
        eval_dataset=task.validation,
        compute_loss_func=loss,
        compute_metrics=add,
        preprocess_logits_for_metrics=confusions,
        callbacks=callbacks,
    )
    return trainer, done


def resized(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[N, K, h, w]` at the size of `labels` `[N, H, W]`."""
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)


def evaluate(trainer: Trainer, counts: list[np.ndarray], data: dict[str, MapSplit]) -> dict[str, Any]:
    """Mean IoU with its interval and IoU by class, for each split."""
    found: dict[str, Any] = {}
    for name, split in data.items():
        counts.clear()
        trainer.evaluate(split, metric_key_prefix=name)
        by_class = from_confusion(counts[-1].sum(0))["per_category_iou"]
        found[name] = {
            "images": len(counts[-1]),
            **segmentation_scores(counts[-1], seed=trainer.args.seed),
            "iou_by_class": [None if np.isnan(value) else value for value in by_class],
        }
    return found


@torch.no_grad()
def predict(model: PreTrainedModel, split: MapSplit, count: int) -> list[np.ndarray]:
    """Maps [H, W] of the first images."""
    model.eval()
    items = [split[position] for position in range(count)]
    images = torch.stack([item["pixel_values"] for item in items]).to(model.device)
    labels = torch.stack([item["labels"] for item in items])
    return list(resized(model(pixel_values=images).logits.float(), labels).argmax(1).cpu().numpy())


def show(results: dict[str, Any], labels: list[str], out: Path, phases: Phases) -> None:
    """The closing table."""
    models = [name for name in ("dense", "pruned") if results[name]]
    table = Table(title=str(out), title_justify="left")
    table.add_column()
    for name in models:
        table.add_column(name, justify="right")
    for split in results["pruned"]:
        scores = [results[name][split]["mean_iou"] for name in models]
        cells = (f"{100 * s['value']:.1f} [{100 * s['low']:.1f}, {100 * s['high']:.1f}]" for s in scores)
        table.add_row(f"mean IoU, {split}, % [95 % interval]", *cells)
    last = list(results["pruned"])[-1]
    table.add_section()
    for k, label in enumerate(labels):
        ious = [results[name][last]["iou_by_class"][k] for name in models]
        table.add_row(f"IoU of {label}, {last}", *("-" if iou is None else f"{100 * iou:.1f}" for iou in ious))
    table.add_section()
    table.add_row("sparsity achieved", *["-"] * (len(models) - 1), f"{100 * results['sparsity']:.4g} %")
    kept = [f"{results['weights']:,}"] * (len(models) - 1) + [f"{results['weights_kept']:,}"]
    table.add_row("prunable weights kept", *kept)
    for name, seconds in results["seconds"].items():
        table.add_row(f"time, {name.lower()}", *[""] * (len(models) - 1), f"{seconds:.1f} s")
    phases.console.print(table)

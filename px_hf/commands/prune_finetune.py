"""Prune a pretrained backbone with PX, fine-tune it with its zeros kept, save it, load it again.

recipes/prune_finetune.py says how it is run.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
)
from transformers.trainer_utils import SaveStrategy

import px_hf as px

from ..controls import apply_control_
from ..data import Augment, Preprocess, Split, calibration_set, classification_task, read_dataset
from ..data.embedded.characters import digits
from ..distributed import processes
from ..downstream.attached import is_about
from ..downstream.page import read_results
from ..hub.push import claim_repo
from ..plots import plot_layer_sparsity, plot_training
from ..runs.arguments import DataArguments, FineTuneArguments, ModelArguments, parse
from ..runs.backbone import load_model, load_processor
from ..runs.console import Phases
from ..runs.fine_tuning import make_trainer
from ..runs.folder import (
    RUN_FILE,
    UNITS_FILE,
    begin,
    check_same_run,
    claim,
    find_checkpoint,
    has_structure,
    write_json,
)
from ..runs.sparse_backbone import is_sparse, kept_masks
from ..scopes import as_scope, check_sparsity


def main(argv: list[str]) -> None:
    main_process = processes().is_main  # first of all: a wrong launch must not write anything
    model_args, data_args, prune_args, training = parse(argv)
    criterion, out = prune_args.criterion_object(), Path(training.output_dir)
    check_sparsity(prune_args.sparsity)
    units = as_scope(prune_args.scope).whole_units and not prune_args.keep_masks
    phases = Phases(quiet=not main_process)
    checkpoint = find_checkpoint(out, training.resume_from_checkpoint)
    claim(out, training.overwrite_output_dir, checkpoint)
    push, training.push_to_hub = training.push_to_hub, False  # else Trainer pushes too, at every checkpoint
    repo_id = training.hub_model_id or out.name
    if push and main_process:  # a token that may not is better known now than after the training
        repo_id = claim_repo(repo_id, private=training.hub_private_repo, token=training.hub_token)

    if not data_args.source():
        torch.set_num_threads(1)  # more cost more than they give for images this small, and round differently
    with phases("Load"):
        processor = load_processor(model_args)
        pixels = Preprocess(processor)
        labels, splits = load_data(model_args, data_args, training)
        augment = Augment(pixels, data_args.random_crop, data_args.horizontal_flip)
        data = {name: split.with_pixels(augment if name == "train" else pixels) for name, split in splits.items()}
        model = load_model(model_args, labels, training)
        phases.say(f"{model_args.model_name_or_path}: {model.num_parameters():,} parameters")
        phases.say(f"{', '.join(f'{len(data[name]):,} {name} images' for name in data)}, {len(labels)} classes")

    provenance = {
        "base_model": model_args.short_name(),
        "base_revision": model_args.commit(),
        "dataset": data_args.short_name(),
        "dataset_id": data_args.hub_id(),
        "seed": training.seed,
    }
    if prune_args.keep_masks:
        masks, how = kept_masks(model_args, model)
        batches = None
    else:
        if is_sparse(model.config):
            phases.say("The backbone is sparse already. It is pruned anew; --keep_masks would keep its masks.")
        batches = calibration_set(
            splits["train"],
            labels,
            pixels,
            examples_per_class=prune_args.examples_per_class,
            seed=training.seed,
            batch_size=prune_args.scoring_batch_size,
        )
        how = prune_args.describe() | {"calibration": batches.describe()}
    provenance |= how
    with phases("Prune"):
        if checkpoint:
            done = check_same_run(checkpoint, provenance)
            masks = (
                px.Masks.load(Path(checkpoint).parent / UNITS_FILE) if units else px.Masks.from_pretrained(checkpoint)
            )
            phases.say(f"the masks of {checkpoint}")
        else:
            done = {"provenance": provenance}
            if batches is not None:
                masks = px.prune(
                    model,
                    batches,
                    criterion,
                    sparsity=prune_args.sparsity,
                    rounds=prune_args.rounds,
                    scope=prune_args.scope,
                    prune_head=prune_args.prune_head,
                    min_layer_density=prune_args.min_layer_density,
                    progress=not training.disable_tqdm,
                )
                masks = apply_control_(prune_args.control, model, masks, training.seed)
            if main_process:
                begin(out, done)
                if units:
                    masks.save(out / UNITS_FILE)
        phases.say(f"{masks.kept:,} of {masks.total:,} weights kept")
        found, example = masks, data["validation"][0]["pixel_values"][None]
        report = px.report(model, masks, example)
        small: dict[str, Any] = {}
        if units:
            model, masks = px.shrink(model, masks, example)
            of_small = px.report(model, masks, example)
            small = {"effective_macs": of_small.macs, "parameters_kept": of_small.parameters}
            phases.say(f"whole units are taken out: {of_small.parameters:,} parameters are left")

    if prune_args.compare_dense and "dense" not in done:
        with phases("Fine-tune dense"):
            unsaved = copy.copy(training)
            unsaved.save_strategy = SaveStrategy.NO
            trainer = make_trainer(load_model(model_args, labels, training), data, unsaved)
            trainer.train()
            done["dense"] = evaluate_splits(trainer, data)
            if main_process:
                write_json(out / RUN_FILE, done)

    with phases("Fine-tune"):
        masks.apply_(model)
        trainer = make_trainer(model, data, training, processor, [px.KeepMasks(masks)])
        trainer.train(resume_from_checkpoint=checkpoint)
    if main_process:
        with phases("Save"):
            overwrite = training.overwrite_output_dir
            px.save_pretrained(
                model, masks, out, image_processor=processor, provenance=provenance, overwrite=overwrite
            )
    with phases("Evaluate"):
        results = evaluate_splits(trainer, data)
    if not main_process:
        return
    with phases("Load again"):
        difference = check_saved(out, model, masks, data.get("test", data["validation"]), model_args)
        by = "px_hf" if has_structure(out) else "stock transformers"
        phases.say(f"{by} loads {out}: zeros where promised, logits differ by {difference:.1g}")

    dense = done.get("dense", {})
    plot_layer_sparsity(found, out / "per_layer_sparsity.png")
    plot_training(
        trainer.state.log_history,
        out / "training_curve.png",
        title=f"{model_args.short_name()} on {data_args.short_name()}: {found.kept:,} of {found.total:,} weights",
        dense_accuracy=dense.get("eval_accuracy"),
    )
    metrics = results | {f"dense_{name}": value for name, value in dense.items()}
    saved = {
        "masks_sha256": masks.fingerprint(),
        "file_bytes": {
            file.relative_to(out).as_posix(): file.stat().st_size
            for pattern in ("*.safetensors", "sparse/*.safetensors")
            for file in sorted(out.glob(pattern))
        },
        "seconds": phases.seconds,
    }
    results = metrics | provenance | report.to_dict() | small | saved
    write_json(out / "all_results.json", results)
    phases.close(out, results)
    if push:
        with phases("Push"):
            phases.say(push_finished(model, masks, repo_id, training, processor, provenance, metrics, report))


def load_data(
    model_args: ModelArguments, data_args: DataArguments, training: FineTuneArguments
) -> tuple[list[str], dict[str, Split]]:
    """Class names, and the splits train, validation and, where the data has one, test."""
    source = data_args.source()
    with training.main_process_first():
        raw = read_dataset(source, model_args.cache_dir) if source else digits()
    task = classification_task(
        raw,
        image_column=data_args.image_column_name,
        label_column=data_args.label_column_name,
        train_split=data_args.train_split_name,
        validation_split=data_args.validation_split_name,
        test_split=None if data_args.test_split_name == "none" else data_args.test_split_name,
        validation_share=data_args.train_val_split,
        seed=training.seed,
    )
    splits = {"train": task.train.sample(data_args.max_train_samples, training.seed)}
    splits["validation"] = task.validation.sample(data_args.max_eval_samples, training.seed)
    if task.test is not None:
        splits["test"] = task.test.sample(data_args.max_eval_samples, training.seed)
    return task.labels, splits


def evaluate_splits(trainer: Trainer, data: dict[str, Split]) -> dict[str, float]:
    """Loss and accuracy on the validation split and, where there is one, the test split."""
    results: dict[str, float] = {}
    for prefix, name in (("eval", "validation"), ("test", "test")):
        if name in data:
            metrics = trainer.evaluate(data[name], metric_key_prefix=prefix)
            results |= {key: metrics[key] for key in (f"{prefix}_accuracy", f"{prefix}_loss")}
    return results


@torch.no_grad()
def check_saved(out: Path, model: PreTrainedModel, masks: px.Masks, split: Split, model_args: ModelArguments) -> float:
    """The largest difference of a logit between `model` and what stock transformers loads from `out`.

    A model whose structure no config can express is loaded by px_hf.

    **Raises** `CheckpointError` if a pruned weight is not zero there, or predictions differ.
    """
    trust = {"trust_remote_code": model_args.trust_remote_code}
    load = px.from_pretrained if has_structure(out) else AutoModelForImageClassification.from_pretrained
    loaded = load(out, **trust).to(model.device).eval()
    pixels = Preprocess(AutoImageProcessor.from_pretrained(out, **trust))
    if masks.revived(loaded):
        raise px.CheckpointError(f"Pruned weights are not zero in {out}: {masks.revived(loaded)}.")
    model.eval()
    difference = 0.0
    for start in range(0, min(len(split), 256), 32):
        positions = range(start, min(start + 32, len(split)))
        images = torch.stack([item["pixel_values"] for item in split.__getitems__(positions)]).to(model.device)
        again = pixels(split.images(positions)).to(model.device)
        expected, logits = model(pixel_values=images).logits, loaded(pixel_values=again).logits
        difference = max(difference, float((logits - expected).abs().max()))
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
            raise px.CheckpointError(f"The model loaded from {out} gives other logits, by up to {difference}.")
    return difference


def push_finished(
    model: PreTrainedModel,
    masks: px.Masks,
    repo_id: str,
    training: FineTuneArguments,
    processor: BaseImageProcessor,
    provenance: dict[str, Any],
    metrics: dict[str, float],
    report: px.Report,
) -> str:
    """Push to the Hub, and the address of the commit. **Raises** `HubError` with the way to push without training.

    A report of recipes/evaluate_downstream.py on this very model, in the output folder, goes along.
    """
    found = read_results(training.output_dir)
    try:
        commit = px.push_to_hub(
            model,
            masks,
            repo_id,
            image_processor=processor,
            provenance=provenance,
            results=metrics,
            model_report=report,
            evaluation=training.output_dir if found is not None and is_about(found, model, masks) else None,
            private=training.hub_private_repo,
            token=training.hub_token,
            revision=training.hub_revision,
        )
    except px.HubError as error:
        raise px.HubError(
            f"{error} The finished model is in {training.output_dir}. To push it without training again, run the same "
            "command with --resume_from_checkpoint true --overwrite_output_dir."
        ) from error
    return str(commit.commit_url)

"""Prune a pretrained backbone with PX, fine-tune it with its zeros kept, save it, load it again.

recipes/prune_finetune.py says how it is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import px_hf as px

from ..data import DataSource
from ..distributed import processes
from ..plan import SCHEDULES
from ..plots import plot_layer_sparsity
from ..repair.by_name import NONE
from ..runs.arguments import EXAMPLE, DataArguments, FineTuneArguments, ModelArguments, one_thread
from ..runs.classification_job import ClassificationJob
from ..runs.folder import write_json
from ..runs.help import Usage
from ..runs.html_report import write_report
from ..runs.job import Job
from ..runs.lora_arguments import LoraArguments
from ..runs.low_rank import ByLora
from ..runs.parsing import parse_groups
from ..runs.pruning_arguments import PruneArguments
from ..runs.pruning_run import PruningRun, size_of_smaller
from ..runs.schedules import BeforeTraining, WhileTraining

USAGE = Usage(
    "px-hf prune",
    "Prune a pretrained image classifier, fine-tune it with its zeros kept, save it, load it again. Without "
    "arguments: an embedded ResNet, pruned by 90 %, on handwritten digits, in a minute.",
    (
        "px-hf prune --model_name_or_path timm/resnet50.a1_in1k --train_dir photos/train --sparsity 0.8",
        "px-hf prune --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --config vit-90",
        "px-hf prune --num_processes 4 ...                   # on four GPUs",
    ),
    (
        *("model_name_or_path", "dataset_name", "train_dir", "validation_dir", "sparsity", "criterion", "scope"),
        *("schedule", "compare_dense", "num_train_epochs", "learning_rate", "per_device_train_batch_size", "bf16"),
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub"),
    ),
)


def main(argv: list[str]) -> None:
    processes()  # first of all: a wrong launch must not write anything
    model_args, data_args, prune_args, training = parse(argv)
    if not data_args.source():
        one_thread()
    prune_and_fine_tune(ClassificationJob(model_args, prune_args, training, data_args))


def prune_and_fine_tune(job: Job) -> None:
    """What a run does, in its order; the job knows the network, the data and the scores of its kind."""
    args, training, is_main = job.prune_args, job.training, processes().is_main
    run = PruningRun.claim(training)
    with run.phase("Load"):
        network = job.load(run.say)
        if args.gradual:
            args.fit_rounds(job.steps(network))
        source = job.mask_source(network, run.say)
    by_lora = isinstance(args, LoraArguments) and args.lora
    kind = WhileTraining if args.gradual else ByLora if by_lora else BeforeTraining
    pruning = kind(run, job, network, source)
    job.check_student(pruning.model)
    if args.compare_dense:
        run.train_dense(job)
    trainer = job.student(pruning.model, pruning.callbacks, run.teacher)
    if training.trains:
        with run.phase("Fine-tune"):
            pruning.fine_tune(trainer, run.checkpoint)
    model, masks = pruning.model, pruning.masks
    if args.int8:
        px.round_to_int8_(model)
        pruning.provenance = {**pruning.provenance, "int8": True}
    if is_main:
        with run.phase("Save"):
            run.save(job, model, masks, pruning.provenance)
    with run.phase("Evaluate"):
        pruned = job.evaluate(trainer if model is trainer.model else job.trainer(model, training, []), "pruned")
    if not is_main:
        return
    with run.phase("Load again"):
        run.check(job, model, masks)
    scores, report = job.scores(pruned, run.record.get("dense")), px.report(network, pruning.found, job.example)
    size = report.to_dict() | (size_of_smaller(model, masks, job.example) if args.takes_out_units else {})
    results = {**scores, **pruning.provenance, **size, "masks_sha256": masks.fingerprint(), **run.written()}
    write_json(run.out / "all_results.json", results)
    plot_layer_sparsity(pruning.found, run.out / "per_layer_sparsity.png")
    job.draw(run.out, trainer, pruning.found, results)
    said = {"dense": run.record.get("dense_said"), "pruned": job.guesses(model)}
    write_report(run.out, results, pruning.found, job.tiles({who: words for who, words in said.items() if words}))
    run.show(job.table(run.out, results))
    if run.repo_id:
        with run.phase("Push"):
            run.push(job, model, masks, provenance=pruning.provenance, results=scores, report=report)


def parse(argv: Sequence[str]) -> tuple[ModelArguments, DataArguments, PruneArguments, FineTuneArguments]:
    """The four groups from the command line and the files it names.

    Raises:
        InvalidArgumentError: an argument outside its range, or arguments that contradict each other.
    """
    model, data, prune, training = parse_groups(
        argv,
        (ModelArguments, DataArguments, PruneArguments, FineTuneArguments),
        USAGE,
        _defaults,
        pushes=True,
    )
    _check_schedule(prune)
    _check_repair(prune)
    if not training.trains and (prune.gradual or prune.distill is not None):
        what = f"--schedule {prune.schedule}" if prune.gradual else f"--distill {prune.distill}"
        raise px.InvalidArgumentError(f"{what} is a way to train, and --num_train_epochs 0 trains nothing.")
    if prune.keep_masks and prune.control != "none":
        raise px.InvalidArgumentError("--control changes masks, and --keep_masks keeps them. Leave one out.")
    if prune.dense and prune.distill_dense:
        raise px.InvalidArgumentError(
            "--distill dense teaches a pruned network, and --dense prunes none. Leave one out."
        )
    if prune.keep_masks and (prune.dense or prune.compare_dense):
        other = "--dense" if prune.dense else "--distill dense" if prune.distill_dense else "--compare_dense"
        raise px.InvalidArgumentError(
            f"{other} needs the unpruned network, and with --keep_masks there is only the sparse one. Leave one out."
        )
    prune.check_lora()
    if prune.takes_out_units and prune.control != "none":
        raise px.InvalidArgumentError(f"--control changes single weights, and --scope {prune.scope} whole units.")
    if prune.dense:
        prune.criterion, prune.power, prune.sparsity, prune.compare_dense = "magnitude", None, 0.0, False
        prune.min_layer_density, prune.control, prune.scope = 0.0, "none", None
    prune.scope = prune.scope or px.CRITERIA[prune.criterion_name].scope
    prune.check()
    training.name_output(model=Path(model.model_name_or_path).name, data=data.short_name(), mask=prune.short_name())
    return model, data, prune, training


def _defaults(named: argparse.Namespace) -> dict[str, Any]:
    """Those that depend on what was named: the embedded digits, or no training at all."""
    untrained = {"schedule": SCHEDULES[0]} if named.num_train_epochs == 0 else {}
    if any(getattr(named, f.name) for f in fields(DataSource)):
        return untrained
    return {**EXAMPLE, "compare_dense": not named.keep_masks, **untrained}


def _check_schedule(prune: PruneArguments) -> None:
    """A network that is pruned while it is fine-tuned has no masks before.

    Raises:
        InvalidArgumentError: an argument is about such masks.
    """
    if not prune.gradual:
        return
    about = {
        "--lora": (prune.lora, "trains adapters under masks that are found before"),
        "--keep_masks": (prune.keep_masks, "prunes nothing more"),
        "--dense": (prune.dense, "prunes nothing"),
        f"--control {prune.control}": (prune.control != "none", "changes masks that are found before training"),
    }
    for argument, (given, what) in about.items():
        if given:
            raise px.InvalidArgumentError(
                f"{argument} {what}, and --schedule {prune.schedule} prunes while it trains. Leave one out."
            )


def _check_repair(prune: PruneArguments) -> None:
    """A repair needs the dense weights, and something that was pruned.

    Raises:
        InvalidArgumentError: there are none of them.
    """
    if prune.repair != NONE and (prune.dense or prune.keep_masks):
        argument, what = (
            ("--dense", "prunes nothing") if prune.dense else ("--keep_masks", "has only the sparse weights")
        )
        raise px.InvalidArgumentError(f"{argument} {what}, so --repair {prune.repair} can do nothing. Leave one out.")

"""What a pruned model can still do, on tasks it was not pruned for, next to its dense parent and a random mask.

    accelerate launch recipes/evaluate_downstream.py

prunes 90 % of the embedded ResNet on the letters it was pretrained on, without training it, and evaluates three
models (dense, pruned, the same density at random in each layer) on handwritten digits and Greek letters by four
methods: k-NN, ridge regression and a linear probe on frozen features, and fine-tuning with the zeros kept. It takes
about 55 seconds on one CPU core, and no network, and writes outputs/downstream-resnet. Expected on the Greek letters,
linear probe and fine-tuned: dense 89 and 90 %, pruned 62 and 75 %, random 26 and 27 %.

    accelerate launch recipes/evaluate_downstream.py --model_name_or_path outputs/my-pruned-model \\
        --tasks beans cifar100 photos/ my_task.yaml --num_train_epochs 3
    accelerate launch recipes/evaluate_downstream.py --model_name_or_path timm/resnet50.a1_in1k \\
        --sparsity 0.5 0.7 0.9 --prune_on imagenet_sample.yaml --tasks beans --methods knn ridge linear

A task is an embedded one (digits, greek, letters), a dataset of the Hub, a local folder, or a YAML file of data
arguments (dataset_name, train_file, test_file, image_column_name, max_train_samples, ...; see --help of
recipes/prune_finetune.py). Probes are fitted on the training split, their one setting is chosen on the validation
split, and everything is reported on the test split, which nothing else sees; where there is no test split, the
validation split is it, and another is taken off the training split. Fine-tuning chooses nothing.

The output folder holds downstream.json, downstream.png, downstream.md (a section for a model card; --add_to_model
copies the three into the model's own folder), tasks/ and features/. An interrupted run continues where it stopped:
results are written task by task and model by model. A task that fails is in the report, the others run, and the exit
status is 1. Two processes without a GPU:

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/evaluate_downstream.py
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from arguments import (
    EXAMPLE,
    EXAMPLE_MODEL,
    FineTuneArguments,
    ModelArguments,
    ScoringArguments,
    parse_groups,
)
from backbone import load_processor
from fine_tuning import make_trainer
from output_folder import write_json
from rich.table import Table
from subjects import Subject, dense_and_pruned, pruned_here
from summary import Phases
from tasks import Task, find_tasks
from transformers import PrinterCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

import px_hf as px
from px_hf.data import Augment, ClassificationTask, Preprocess, calibration_set
from px_hf.distributed import on_main, processes
from px_hf.evaluation import PROBES, Examples, FeatureCache, classification_scores, head_inputs
from px_hf.evaluation.features import features_key
from px_hf.evaluation.figure import plot_downstream
from px_hf.evaluation.page import FIGURE_FILE, METHODS, PAGE_FILE, RESULTS_FILE, accuracy_rows, markdown
from px_hf.select import check_sparsity


@dataclass
class EvaluateArguments(ScoringArguments):
    """What is evaluated, on what, and how."""

    tasks: list[str] = field(
        default_factory=lambda: ["digits", "greek"],
        metadata={"help": "Embedded tasks, datasets of the Hub, local folders, YAML files of data arguments."},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Of {', '.join(METHODS)}.", "choices": list(METHODS)}
    )
    dense_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The dense parent. Default: the base model that a pruned model's config names."},
    )
    sparsity: list[float] = field(
        default_factory=list, metadata={"help": "Of a dense model: also evaluate it pruned so far, without training."}
    )
    prune_on: str | None = field(
        default=None, metadata={"help": "The task whose training images --sparsity prunes on."}
    )
    random_control: bool = field(
        default=True, metadata={"help": "Evaluate a random mask with the densities of each layer, too."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many examples a task."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Likewise for each other split."})
    add_to_model: bool = field(
        default=False, metadata={"help": "Copy the report into the model's own folder, for its model card."}
    )


def main(argv: list[str]) -> int:
    """The number of tasks that failed."""
    main_process = processes().is_main  # first of all: a wrong launch must not write anything
    model_args, args, training = parse(argv)
    out, phases = Path(training.output_dir), Phases(quiet=not main_process)
    tasks = find_tasks(args.tasks)
    for task in tasks:
        task.data.max_train_samples = args.max_train_samples or task.data.max_train_samples
        task.data.max_eval_samples = args.max_eval_samples or task.data.max_eval_samples
    with phases("Load"):
        pixels = Preprocess(load_processor(model_args))
        subjects, notes = dense_and_pruned(model_args, args.dense_model_name_or_path)
    if args.sparsity:
        with phases("Prune"):
            subjects += prune_here(model_args, args, training, subjects, pixels)
    if args.random_control:
        subjects += [control for subject in subjects if (control := subject.control(subjects)) is not None]
    for subject in subjects:
        phases.say(f"{subject.name}: {subject.model.model_name_or_path}")
    for note in notes:
        phases.say(f"Note: {note}")

    settings = settings_of(model_args, args, training, subjects)
    results: dict[str, Any] = {
        "model": model_args.short_name(),
        "subjects": [subject.describe() for subject in subjects],
        "methods": args.methods,
        "pruned_here": bool(args.sparsity),
        "settings": settings,
        "notes": [*notes, *how(args, training)],
        "tasks": {},
    }
    for task in tasks:
        with phases(task.name):
            file = out / "tasks" / f"{task.name}.json"
            record = on_main(partial(begin, file, settings, training.overwrite_output_dir))
            try:
                evaluate_task(task, record, file, subjects, args, training, model_args, pixels, phases)
            except Exception as error:
                if processes().world_size > 1 and not isinstance(error, px.PxError):
                    raise  # the other processes know nothing of it
                record["error"] = f"{type(error).__name__}: {error}"
                phases.say(f"Failed. {record['error']}")
            results["tasks"][task.name] = record
            if main_process:
                write_json(file, record)
    if main_process:
        write_json(out / RESULTS_FILE, results)
        plot_downstream(results, out / FIGURE_FILE)
        (out / PAGE_FILE).write_text(markdown(results))
        if args.add_to_model:
            for name in (RESULTS_FILE, FIGURE_FILE, PAGE_FILE):
                shutil.copy(out / name, Path(model_args.model_name_or_path, name))
        show(results, out, phases)
    return sum(record["error"] is not None for record in results["tasks"].values())


def parse(argv: list[str]) -> tuple[ModelArguments, EvaluateArguments, FineTuneArguments]:
    """The three groups. **Raises** `InvalidArgumentError`."""
    embedded = {key: value for key, value in EXAMPLE.items() if key in ("learning_rate", "num_train_epochs")}
    model_args, args, training = parse_groups(
        argv,
        (ModelArguments, EvaluateArguments, FineTuneArguments),
        "accelerate launch recipes/evaluate_downstream.py [--config file.yaml] [--name value ...]",
        lambda named: (
            {"output_dir": "outputs/downstream-{model}"}
            | ({**embedded, "num_train_epochs": 5.0} if named.model_name_or_path == EXAMPLE_MODEL else {})
        ),
    )
    if model_args.model_name_or_path == EXAMPLE_MODEL and not args.sparsity:
        args.sparsity = [0.9]
    if model_args.model_name_or_path.startswith(str(Path(EXAMPLE_MODEL).parent)):
        args.prune_on = args.prune_on or "letters"
        torch.set_num_threads(1)  # more cost more than they give for images this small, and round differently
    for sparsity in args.sparsity:
        check_sparsity(sparsity)
    if len({f"{sparsity:.3f}" for sparsity in args.sparsity}) < len(args.sparsity):
        raise px.InvalidArgumentError("--sparsity names the same sparsity twice.")
    if args.sparsity and not args.prune_on:
        raise px.InvalidArgumentError("--sparsity needs --prune_on: the task whose images the model is pruned on.")
    if args.add_to_model and not Path(model_args.model_name_or_path).is_dir():
        raise px.InvalidArgumentError("--add_to_model writes into the model's folder, and the model is none.")
    training.output_dir = training.output_dir.replace("{model}", Path(model_args.model_name_or_path).name)
    training.save_strategy, training.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    training.logging_strategy = IntervalStrategy.NO
    return model_args, args, training


def prune_here(
    model_args: ModelArguments,
    args: EvaluateArguments,
    training: FineTuneArguments,
    subjects: list[Subject],
    pixels: Preprocess,
) -> list[Subject]:
    """The dense model, pruned to each sparsity asked for on images of `--prune_on`."""
    if len(subjects) != 1 or subjects[0].masks is not None:
        raise px.InvalidArgumentError(f"{model_args.model_name_or_path} is pruned already: leave out --sparsity.")
    (source,) = find_tasks([args.prune_on or ""])
    task = source.load(training.seed, model_args.cache_dir)
    batches = calibration_set(
        task.train,
        task.labels,
        pixels,
        examples_per_class=args.examples_per_class,
        seed=training.seed,
        batch_size=args.scoring_batch_size,
    )
    return pruned_here(subjects[0], args, training, task.labels, batches)


def settings_of(
    model_args: ModelArguments, args: EvaluateArguments, training: FineTuneArguments, subjects: list[Subject]
) -> dict[str, Any]:
    """All that results depend on, beside the data."""
    return {
        "subjects": {subject.name: subject.describe() for subject in subjects},
        "revision": model_args.model_revision,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "batch_size": training.train_batch_size * training.gradient_accumulation_steps * processes().world_size,
        "max_train_samples": args.max_train_samples,
        "max_eval_samples": args.max_eval_samples,
        "seed": training.seed,
        "versions": {"px_hf": px.__version__, "torch": torch.__version__},
    }


def begin(file: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The record of a task so far, or a new one. **Raises** `OutputExistsError` for one with other settings."""
    fresh: dict[str, Any] = {"settings": settings, "error": None, "results": {}, "classes": None, "examples": {}}
    if overwrite or not file.is_file():
        return fresh
    known = json.loads(file.read_text())
    differing = [key for key, value in settings.items() if known["settings"].get(key) != json.loads(json.dumps(value))]
    if differing:
        raise px.OutputExistsError(
            f"{file} holds results with other settings ({', '.join(differing)}). Name another --output_dir, or pass "
            "--overwrite_output_dir."
        )
    return known | {"error": None}


def evaluate_task(
    task: Task,
    record: dict[str, Any],
    file: Path,
    subjects: list[Subject],
    args: EvaluateArguments,
    training: FineTuneArguments,
    model_args: ModelArguments,
    pixels: Preprocess,
    phases: Phases,
) -> None:
    """Fills `record["results"]`, and writes it to `file` after each model and method."""
    with training.main_process_first():
        data = task.load(training.seed, model_args.cache_dir)
    assert data.test is not None
    record["classes"], record["test_split"] = len(data.labels), data.test.name
    record["dataset"] = task.data.short_name() if task.data.source() else f"px_hf/{task.name}"
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    record["examples"] = {name: len(split) for name, split in splits.items()}
    phases.say(f"{', '.join(f'{count:,} {name}' for name, count in record['examples'].items())} images")
    for subject in subjects:
        done = record["results"].setdefault(subject.name, {})
        probes = [method for method in args.methods if method in PROBES and method not in done]
        try:
            examples = features_of(subject, data, training, pixels, Path(training.output_dir)) if probes else {}
            for method in probes:
                fit = partial(probe, method, examples, len(data.labels), training.seed)
                done[method] = on_main(fit)
                save(file, record)
            if "finetune" in args.methods and "finetune" not in done:
                done["finetune"] = finetune(subject, task, data, training, pixels)
                save(file, record)
        except px.PxError as error:
            named = "" if f"Task {task.name!r}" in str(error) else f"Task {task.name!r}, {subject.name}: "
            raise type(error)(f"{named}{error}") from error
        shown = (f"{METHODS[m]} {100 * done[m]['scores']['accuracy']['value']:.1f}" for m in args.methods)
        phases.say(f"{subject.name}: {', '.join(shown)}")


def save(file: Path, record: dict[str, Any]) -> None:
    if processes().is_main:
        write_json(file, record)


def features_of(
    subject: Subject, data: ClassificationTask, training: FineTuneArguments, pixels: Preprocess, out: Path
) -> dict[str, Examples]:
    """Features and classes of every split, on the main process; elsewhere nothing."""
    model = subject.load(data.labels, training)
    cache, batch_size = FeatureCache(out / "features"), training.per_device_eval_batch_size
    examples = {}
    for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
        assert split is not None
        split = split.with_pixels(pixels)
        key = on_main(partial(features_key, model, split, batch_size))
        found = cache.compute(
            key,
            lambda split=split: head_inputs(model, split, batch_size=batch_size, progress=not training.disable_tqdm),
        )
        if found is not None:
            examples[name] = Examples(found, split.labels)
    return examples


def probe(method: str, examples: dict[str, Examples], classes: int, seed: int) -> dict[str, Any]:
    """A probe fitted on train, chosen on validation, scored on test."""
    start = time.perf_counter()
    fitted = PROBES[method].fit(examples["train"], examples["validation"], classes)
    test = examples["test"]
    scores = classification_scores(
        fitted.scores(test.features), test.labels, probabilities=fitted.probabilities, seed=seed
    )
    return {
        "scores": scores,
        "chosen": fitted.chosen,
        "validation_accuracy": fitted.validation_accuracy,
        "note": fitted.note,
        "seconds": round(time.perf_counter() - start, 2),
    }


def finetune(
    subject: Subject, task: Task, data: ClassificationTask, training: FineTuneArguments, pixels: Preprocess
) -> dict[str, Any]:
    """Trained on train with the masks kept, scored on test."""
    start = time.perf_counter()
    model = subject.load(data.labels, training)
    augment = Augment(pixels, task.data.random_crop, task.data.horizontal_flip)
    splits = {"train": data.train.with_pixels(augment), "validation": data.validation.with_pixels(pixels)}
    masks = subject.masks_for(model)
    trainer = make_trainer(
        model, splits, copy.copy(training), callbacks=[] if masks is None else [px.KeepMasks(masks)]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert data.test is not None
    output = trainer.predict(data.test.with_pixels(pixels))
    logits = output.predictions[0] if isinstance(output.predictions, tuple) else output.predictions
    if masks is not None and (revived := masks.revived(model)):
        raise px.TargetError(f"{sum(revived.values())} pruned weights are not zero after training.")
    probabilities = torch.softmax(torch.from_numpy(np.asarray(logits, dtype=np.float64)), -1).numpy()
    scores = classification_scores(probabilities, np.asarray(output.label_ids), seed=training.seed)
    return {"scores": scores, "seconds": round(time.perf_counter() - start, 2)}


def how(args: EvaluateArguments, training: FineTuneArguments) -> list[str]:
    """What a reader must know to read the numbers."""
    probes = [METHODS[method] for method in args.methods if method in PROBES]
    told = [
        "Intervals are for other test images of the same kind, not for other training seeds: Wilson's for accuracy "
        "and top-5, a bootstrap of 1,000 resamples for macro F1 and balanced accuracy.",
        "Calibration error: expected, of the predicted class, 15 bins of equal width, no interval.",
    ]
    if probes:
        told.insert(
            0,
            f"{', '.join(probes)}: on frozen features, the input of the classifier head; fitted on the training "
            "split, their one setting chosen on the validation split.",
        )
    if "finetune" in args.methods:
        told.insert(
            len(told) - 2,
            f"Fine-tuned: {training.num_train_epochs:g} epochs at a learning rate of {training.learning_rate:g}, one "
            f"seed ({training.seed}), a new head, pruned weights kept at zero, nothing chosen.",
        )
    if args.random_control:
        told.append("Random: the dense model under a mask with the same density in each layer, drawn at random.")
    return told


def show(results: dict[str, Any], out: Path, phases: Phases) -> None:
    """The closing table."""
    table = Table(
        title=str(out), title_justify="left", caption_justify="left",
        caption="Test accuracy in % [95 % interval], then the share of the dense accuracy that is kept.",
    )  # fmt: skip
    table.add_column("task")
    table.add_column("model")
    for method in results["methods"]:
        table.add_column(METHODS[method], justify="right")
    for task, rows in accuracy_rows(results):
        for place, (name, cells) in enumerate(rows):
            table.add_row("" if place else task, name, *cells, end_section=place == len(rows) - 1)
    for task, record in results["tasks"].items():
        if record["error"]:
            table.add_row(task, "failed", *["-"] * len(results["methods"]), end_section=True)
    phases.console.print(table)
    for record in results["tasks"].values():
        if record["error"]:
            phases.say(record["error"])


if __name__ == "__main__":
    try:
        failed = main(sys.argv[1:])
    except px.PxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)

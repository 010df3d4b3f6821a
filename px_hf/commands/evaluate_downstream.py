"""What a pruned model can still do, on tasks it was not pruned for, next to its dense parent and a random mask.

recipes/evaluate_downstream.py says how it is run.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

import px_hf as px

from ..data import Preprocess
from ..distributed import processes
from ..downstream.attached import weights_fingerprint
from ..downstream.page import METHODS, REPORT_FILES
from ..hub.push import claim_repo
from ..runs.arguments import EXAMPLE, EXAMPLE_MODEL, FineTuneArguments, ModelArguments, parse_groups
from ..runs.backbone import load_model, load_processor
from ..runs.console import Phases
from ..runs.evaluate_tasks import Evaluation
from ..runs.pruning_source import Source, SourceArguments
from ..runs.subjects import Subject, dense_and_pruned, prune
from ..runs.tasks import find_tasks
from ..scopes import check_sparsity


@dataclass
class EvaluateArguments(SourceArguments):
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
    tasks = find_tasks(args.tasks, args.max_train_samples, args.max_eval_samples)
    push, training.push_to_hub = training.push_to_hub, False  # else Trainer pushes too
    with phases("Load"):
        pixels = Preprocess(load_processor(model_args))
        subjects, notes = dense_and_pruned(model_args, args.dense_model_name_or_path)
        saved = next((subject for subject in subjects if subject.masks is not None), None)
        if push and (saved is None or not Path(model_args.model_name_or_path).is_dir()):
            raise px.InvalidArgumentError("--push_to_hub publishes a pruned model from its folder, and this is none.")
    repo_id = training.hub_model_id or Path(model_args.model_name_or_path).absolute().name
    if push and main_process:  # a token that may not is better known now than after the evaluation
        repo_id = claim_repo(repo_id, private=training.hub_private_repo, token=training.hub_token)
    if args.sparsity:
        with phases("Prune"):
            pruned, how = prune_here(model_args, args, training, subjects, pixels)
            subjects, notes = [*subjects, *pruned], [*notes, how]
    if args.random_control:
        subjects += [control for subject in subjects if (control := subject.control(subjects)) is not None]
    for note in notes:
        phases.say(f"Note: {note}")

    evaluation = Evaluation(args.methods, training, pixels, out, phases, model_args.cache_dir)
    settings = {"max_train_samples": args.max_train_samples, "max_eval_samples": args.max_eval_samples}
    results: dict[str, Any] = {
        "model": model_args.short_name(),
        "pruned_here": bool(args.sparsity),
        "weights_sha256": None if saved is None else fingerprint(saved, model_args, training),
        "notes": [*notes, *evaluation.notes(random=any(subject.kind == "random" for subject in subjects))],
    }
    failed = evaluation.run(tasks, lambda *_: subjects, results, settings)
    if args.add_to_model and main_process:
        for name in REPORT_FILES:
            shutil.copy(out / name, Path(model_args.model_name_or_path, name))
    if push and main_process:
        with phases("Push"):
            phases.say(push_evaluated(model_args, training, repo_id, pixels))
    return failed


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
        pushes=True,
    )
    if model_args.model_name_or_path == EXAMPLE_MODEL and not args.sparsity:
        args.sparsity = [0.9]
    if model_args.model_name_or_path.startswith(str(Path(EXAMPLE_MODEL).parent)):
        args.prune_on = args.prune_on or (None if args.unlabelled_dir else "letters")
        torch.set_num_threads(1)  # more cost more than they give for images this small, and round differently
    for sparsity in args.sparsity:
        check_sparsity(sparsity)
    if len({f"{sparsity:.3f}" for sparsity in args.sparsity}) < len(args.sparsity):
        raise px.InvalidArgumentError("--sparsity names the same sparsity twice.")
    if args.sparsity and bool(args.prune_on) == bool(args.unlabelled_dir):
        raise px.InvalidArgumentError(
            "--sparsity needs either --prune_on, a task whose training images the model is pruned on, or "
            "--unlabelled_dir, a folder of images."
        )
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
) -> tuple[list[Subject], str]:
    """The dense model, pruned to each sparsity asked for on `--prune_on` or `--unlabelled_dir`, and a note on how."""
    if len(subjects) != 1 or subjects[0].masks is not None:
        raise px.InvalidArgumentError(f"{model_args.model_name_or_path} is pruned already: leave out --sparsity.")
    source = Source.read(args.prune_on, args, model_args, training, pixels)
    batches = source.batches()
    images = sum(len(batch["pixel_values"]) for batch in batches)
    how = f"Pruned by {args.criterion_object()!r} in {args.rounds} rounds on {images} images of {source.name}."
    return [prune(subjects[0], args, sparsity, training, source.labels, batches) for sparsity in args.sparsity], how


def fingerprint(subject: Subject, model_args: ModelArguments, training: FineTuneArguments) -> str:
    """Of the pruned model as it was saved, with its own head."""
    assert subject.masks is not None
    return weights_fingerprint(load_model(model_args, None, training), subject.masks)


def push_evaluated(model_args: ModelArguments, training: FineTuneArguments, repo_id: str, pixels: Preprocess) -> str:
    """Publishes the model's folder with the report in the output folder; the address of the commit.

    What the folder knows of the model's provenance and results goes along. **Raises** `HubError`.
    """
    folder = Path(model_args.model_name_or_path)
    trust = {"trust_remote_code": True} if model_args.trust_remote_code else {}
    known = folder / "all_results.json"
    results = json.loads(known.read_text()) if known.is_file() else {}
    commit = px.push_to_hub(
        px.from_pretrained(folder, **trust),
        px.Masks.from_pretrained(folder),
        repo_id,
        image_processor=pixels.processor,
        provenance=json.loads((folder / "config.json").read_text()).get("px"),
        results={key: value for key, value in results.items() if key.endswith(("_accuracy", "_loss"))},
        evaluation=training.output_dir,
        private=training.hub_private_repo,
        token=training.hub_token,
        revision=training.hub_revision,
    )
    return str(commit.commit_url)

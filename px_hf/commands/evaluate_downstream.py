"""What a pruned model can still do, on tasks it was not pruned for, next to its dense parent and a random mask.

recipes/evaluate_downstream.py says how it is run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import px_hf as px

from ..atomic import whole
from ..compact.agreement import check_copies
from ..data import Preprocess
from ..distributed import processes
from ..downstream.attached import weights_fingerprint
from ..downstream.page import METHODS, REPORT_FILES
from ..runs.arguments import DEMO_MODELS, EXAMPLE_MODEL, FineTuneArguments, ModelArguments, one_thread
from ..runs.backbone import load_model, load_processor
from ..runs.console import Phases
from ..runs.downstream_arguments import DownstreamArguments, parse_downstream
from ..runs.downstream_evaluation import DownstreamEvaluation
from ..runs.downstream_tasks import find_tasks
from ..runs.help import Usage
from ..runs.pruning_source import Source
from ..runs.publishing import claim_repository, publish
from ..runs.subjects import Subject, dense_and_pruned, prune
from ..scopes import check_sparsity

USAGE = Usage(
    "px-hf evaluate",
    "What can a pruned model still do on tasks that it was not pruned for, next to its dense parent and a random "
    "mask? Without arguments: the embedded ResNet, pruned by 90 %, on digits and Greek letters.",
    (
        "px-hf evaluate --model_name_or_path outputs/my-pruned-model --tasks beans cifar100 photos/",
        "px-hf evaluate --model_name_or_path timm/resnet50.a1_in1k --sparsity 0.5 0.9 --prune_on beans --tasks beans",
    ),
    (
        *("model_name_or_path", "tasks", "methods", "sparsity", "prune_on", "dense_model_name_or_path"),
        *("max_train_samples", "num_train_epochs", "learning_rate", "output_dir", "add_to_model", "push_to_hub"),
    ),
)


@dataclass
class EvaluateArguments(DownstreamArguments):
    """What is evaluated, on what, and how."""

    topic: ClassVar[str] = "tasks"

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
    add_to_model: bool = field(
        default=False, metadata={"help": "Copy the report into the model's own folder, for its model card."}
    )


def main(argv: list[str]) -> int:
    """The number of tasks that failed."""
    main_process = processes().is_main  # first of all: a wrong launch must not write anything
    model_args, args, training = parse(argv)
    out, phases = Path(training.output_dir), Phases(quiet=not main_process)
    tasks = find_tasks(args.tasks, **args.limits())
    with phases("Load"):
        pixels = Preprocess(load_processor(model_args))
        subjects, notes = dense_and_pruned(model_args, args.dense_model_name_or_path)
        saved = next((subject for subject in subjects if subject.masks is not None), None)
        if training.push_to_hub and (saved is None or not Path(model_args.model_name_or_path).is_dir()):
            raise px.InvalidArgumentError(
                f"--push_to_hub publishes a pruned model from its folder; {model_args.model_name_or_path} is not one."
            )
        if training.push_to_hub:
            check_copies(model_args.model_name_or_path)  # what is scored is the dense copy, and published the compact
    repo_id = claim_repository(training, Path(model_args.model_name_or_path).absolute().name)
    if args.sparsity:
        with phases("Prune"):
            pruned, how = prune_here(model_args, args, training, subjects, pixels)
            subjects, notes = [*subjects, *pruned], [*notes, how]
    if args.random_control:
        subjects += [control for subject in subjects if (control := subject.control(subjects)) is not None]
    for note in notes:
        phases.say(f"Note: {note}")

    evaluation = DownstreamEvaluation(args.methods, training, pixels, out, phases, model_args.cache_dir)
    results: dict[str, Any] = {
        "model": model_args.short_name(),
        "pruned_here": bool(args.sparsity),
        "weights_sha256": None if saved is None else fingerprint(saved, model_args, training),
        "notes": [*notes, *evaluation.notes(random=any(subject.kind == "random" for subject in subjects))],
    }
    failed = evaluation.run(tasks, lambda *_: subjects, results, args.limits())
    if args.add_to_model and main_process:
        for name in REPORT_FILES:
            with whole(Path(model_args.model_name_or_path, name)) as unfinished:
                shutil.copy(out / name, unfinished)
    if repo_id and main_process:
        with phases("Push"):
            phases.say(push_evaluated(model_args, training, repo_id, pixels))
    return failed


def parse(argv: Sequence[str]) -> tuple[ModelArguments, EvaluateArguments, FineTuneArguments]:
    """The three groups from the command line and the files it names.

    Raises:
        InvalidArgumentError: an argument outside its range, or one without the other that it needs.
    """
    model_args, args, training = parse_downstream(
        argv,
        EvaluateArguments,
        USAGE,
        "outputs/downstream-{model}",
        pushes=True,
    )
    if model_args.model_name_or_path == EXAMPLE_MODEL and not args.sparsity:
        args.sparsity = [0.9]
    if model_args.model_name_or_path.startswith(str(DEMO_MODELS)):
        args.prune_on = args.prune_on or (None if args.unlabelled_dir else "letters")
        one_thread()
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
        raise px.InvalidArgumentError(
            f"--add_to_model writes into the model's own folder; {model_args.model_name_or_path} is not a folder."
        )
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

    What the folder knows of the model's provenance and results goes along.

    Raises:
        HubError: nothing was pushed.
    """
    folder = Path(model_args.model_name_or_path)
    trust = {"trust_remote_code": True} if model_args.trust_remote_code else {}
    known = folder / "all_results.json"
    results = json.loads(known.read_text()) if known.is_file() else {}
    return publish(
        px.from_pretrained(folder, **trust),
        px.Masks.from_pretrained(folder),
        repo_id,
        training,
        image_processor=pixels.processor,
        provenance=json.loads((folder / "config.json").read_text()).get("px"),
        results={key: value for key, value in results.items() if key.endswith(("_accuracy", "_loss"))},
        evaluation=training.output_dir,
    )

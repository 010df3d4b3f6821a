"""Prune once, transfer many times: how much of each target's dense accuracy does one subnetwork keep?

recipes/transfer.py says how it is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markdown import Markdown

import px_hf as px

from ..atomic import whole
from ..data import ClassificationTask, Preprocess
from ..distributed import on_main, processes
from ..downstream.summary import (
    LINES_FILE,
    SUMMARY_FIGURE,
    SUMMARY_FILE,
    lines_of,
    plot_summary,
    read_runs,
    summary,
    write_lines,
)
from ..runs.arguments import EXAMPLE_MODEL, FineTuneArguments, ModelArguments, one_thread
from ..runs.backbone import load_processor
from ..runs.console import Phases
from ..runs.downstream_arguments import DownstreamArguments, parse_downstream
from ..runs.downstream_evaluation import DownstreamEvaluation
from ..runs.downstream_tasks import DownstreamTask, find_tasks
from ..runs.help import Usage
from ..runs.protocols import FILES as PROTOCOLS
from ..runs.protocols import Protocol
from ..runs.pruning_source import Source
from ..runs.schedule_arguments import ScheduleArguments
from ..runs.source_training import learned
from ..runs.subjects import PruningInTraining, Subject, prune

BASES = ("source", "target", "mix")
TASKS = BASES[:2]
"""What can be learned while the network is pruned."""
EXAMPLE_TARGETS = ("digits", "greek")
USAGE = Usage(
    "px-hf transfer",
    "Prune once, fine-tune on many tasks: how much of each task's dense accuracy does one subnetwork keep? Without "
    "arguments: the embedded ResNet, pruned on letters, for digits and Greek letters.",
    (
        "px-hf transfer --model_name_or_path timm/resnet50.a1_in1k --source imagenet_sample.yaml --targets beans",
        "px-hf transfer --model_name_or_path google/vit-base-patch16-224-in21k --unlabelled_dir photos "
        "--prune_on source --targets beans",
        "px-hf transfer --summarize outputs/seed0 outputs/seed1 outputs/seed2",
    ),
    (
        *("model_name_or_path", "source", "unlabelled_dir", "targets", "prune_on", "sparsity", "criterion"),
        *("max_train_samples", "num_train_epochs", "learning_rate", "output_dir"),
    ),
)


@dataclass
class TransferArguments(DownstreamArguments, ScheduleArguments):
    """Where from, where to, and when the network is pruned."""

    topic: ClassVar[str] = "tasks"

    source: str | None = field(
        default=None,
        metadata={"help": "The task to prune on once: an embedded one, a dataset, a folder, a YAML file."},
    )
    targets: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Tasks to fine-tune on, named likewise. Default: {', '.join(EXAMPLE_TARGETS)}; with --protocol, "
            "all of its tasks."
        },
    )
    prune_on: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"Whose images to compare. Default: {', '.join(BASES)}; with --schedule gradual, which learns the "
            "task that it prunes on, source and target.",
            "choices": list(BASES),
        },
    )
    random_control: bool = field(default=True, metadata={"help": "Fine-tune a random mask, too."})
    protocol: str | None = field(
        default=None,
        metadata={"help": "Fine-tune on the tasks of a published protocol, as it does.", "choices": list(PROTOCOLS)},
    )
    protocol_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the protocol's tasks, each a folder or a YAML file of its name."},
    )
    summarize: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Train nothing: one table and picture of the runs in these folders, such as seeds, sparsities and "
            "criteria, or of the results.jsonl that this writes beside them."
        },
    )

    def metrics(self) -> dict[str, str]:
        """What the tasks of the protocol are judged by; others, by accuracy."""
        return {} if self.protocol is None else Protocol.read(self.protocol).metrics

    def targets_of(self) -> tuple[Protocol | None, list[DownstreamTask]]:
        """The protocol, if there is one, and the tasks to fine-tune on.

        Raises:
            InvalidArgumentError: a task that is not there.
        """
        if self.protocol is None:
            return None, find_tasks(self.targets or list(EXAMPLE_TARGETS), **self.limits())
        protocol = Protocol.read(self.protocol)
        return protocol, protocol.find(Path(self.protocol_dir or "."), self.targets, **self.limits())


def main(argv: list[str]) -> int:
    """The number of targets that failed."""
    main_process = processes().is_main  # first of all: a wrong launch must not write anything
    model_args, args, training = parse(argv)
    if args.summarize:
        if main_process:
            text = summarize(read_runs(args.summarize), Path(training.output_dir), args.metrics())
            Console().print(Markdown(text))
        return 0
    protocol, targets = args.targets_of()
    phases, out = Phases(quiet=not main_process), Path(training.output_dir)
    dense = Subject("dense", "dense", model_args)

    with phases("Load"):
        processor = load_processor(model_args)
        pixels = Preprocess(processor)
        source = Source.read(args.source, args, model_args, training, pixels)
        if source.name in {task.name for task in targets}:
            raise px.InvalidArgumentError(f"{source.name!r} is the source and a target.")
    once: Subject | None = None
    if args.gradual and "source" in args.prune_on:
        with phases(f"Learn {source.name}, and prune"):
            once = learned(dense, args, source, args.limits(), training, processor, out)
    elif not args.gradual:
        with phases(f"Prune on {source.name}"):
            name = f"pruned on {source.name}"
            once = prune(dense, args, args.sparsity, training, source.labels, source.batches(), name)

    def pruned_on(basis: str, data: ClassificationTask) -> Subject:
        if basis == "source" and once is not None:
            return once
        if args.gradual:
            pruning = PruningInTraining(args, list(source.calibration(data)))
            return Subject("pruned while learning the target", "pruned", model_args, pruning=pruning)
        if basis == "target":
            batches, name = list(source.calibration(data)), "pruned on the target"
        else:
            batches, name = [*source.calibration(data, 2), *source.batches(2)], "pruned on both"
        return prune(dense, args, args.sparsity, training, data.labels, batches, name)

    def subjects_of(task: DownstreamTask, data: ClassificationTask) -> list[Subject]:
        subjects = [dense, *(pruned_on(basis, data) for basis in BASES if basis in args.prune_on)]
        control = once.control(subjects) if args.random_control and once is not None else None
        return subjects if control is None else [*subjects, control]

    evaluation = DownstreamEvaluation(["finetune"], training, pixels, out, phases, model_args.cache_dir, protocol)
    results: dict[str, Any] = {
        "model": model_args.short_name(),
        "pruned_here": True,
        "notes": [
            f"Pruned by {args.criterion_object()!r} to a sparsity of {args.sparsity:g}, {how(args, source)}.",
            *evaluation.notes(random=args.random_control and once is not None),
        ],
    }
    failed = evaluation.run(targets, subjects_of, results, args.limits())
    on_main(partial(summarize, lines_of(results), out, args.metrics()))
    return failed


def summarize(lines: list[dict[str, Any]], out: Path, metrics: dict[str, str]) -> str:
    """Writes the lines, their table and their picture; returns the table."""
    text = summary(lines, metrics)
    out.mkdir(parents=True, exist_ok=True)
    with whole(out / LINES_FILE) as unfinished:
        write_lines(lines, unfinished)
    with whole(out / SUMMARY_FILE) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    if lines:
        plot_summary(lines, out / SUMMARY_FIGURE, metrics)
    return text


def how(args: TransferArguments, source: Source) -> str:
    """When, and on which images."""
    if not args.gradual:
        return f"on training images of {source.name}, of the target, or half of each"
    told = f"in {args.rounds} rounds during the first {100 * args.until:g} % of a fine-tuning"
    if "source" in args.prune_on:
        told += f": on {source.name}, from where the sparse network goes on to each target, or on the target itself"
    return told


def parse(argv: Sequence[str]) -> tuple[ModelArguments, TransferArguments, FineTuneArguments]:
    """The three groups from the command line and the files it names.

    Raises:
        InvalidArgumentError: an argument outside its range, or a source that is missing or no use.
    """

    def defaults(named: argparse.Namespace) -> dict[str, Any]:
        if named.summarize:
            return {"output_dir": "outputs/transfer-summary"}
        return dict(Protocol.read(named.protocol).arguments) if named.protocol in PROTOCOLS else {}

    model_args, args, training = parse_downstream(
        argv,
        TransferArguments,
        USAGE,
        "outputs/transfer-{model}",
        defaults=defaults,
    )
    if args.summarize:
        return model_args, args, training
    if bool(args.protocol) != bool(args.protocol_dir):
        raise px.InvalidArgumentError("--protocol and --protocol_dir, where its tasks lie, go together.")
    if model_args.model_name_or_path == EXAMPLE_MODEL:
        one_thread()
        if args.unlabelled_dir is None:
            args.source = args.source or "letters"
    if bool(args.source) == bool(args.unlabelled_dir):
        raise px.InvalidArgumentError("Name either --source or --unlabelled_dir: what the network is pruned on once.")
    args.prune_on = args.prune_on or list(TASKS if args.gradual else BASES)
    if args.gradual and (set(args.prune_on) - set(TASKS) or ("source" in args.prune_on and not args.source)):
        raise px.InvalidArgumentError(
            f"--schedule {args.schedule} learns the task that it prunes on, with labels: --prune_on "
            f"{' '.join(TASKS) if args.source else TASKS[1]}."
        )
    if "mix" in args.prune_on and args.examples_per_class < 2:
        raise px.InvalidArgumentError("--prune_on mix needs --examples_per_class of 2 or more: half of them are used.")
    if "mix" in args.prune_on and args.criterion_object().needs_labels:
        raise px.InvalidArgumentError(
            f"{args.criterion_name} needs labels, and those of a mix belong to two heads: --prune_on source target."
        )
    args.check()
    return model_args, args, training

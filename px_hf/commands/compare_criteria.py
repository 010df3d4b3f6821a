"""Compare pruning criteria: methods × sparsities × seeds × (model, task), the same budget and data order for all.

recipes/compare_criteria.py says how it is run.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

import px_hf as px

from ..atomic import whole
from ..comparison.budget import Budget
from ..comparison.cell import Cell, run_cell
from ..comparison.figure import plot
from ..comparison.method import Method
from ..comparison.prepared_task import prepare, short
from ..comparison.results import append_line, read_lines, reported
from ..comparison.tables import markdown
from ..prune import ROUNDS
from ..runs.arguments import EXAMPLE_MODEL, embedded
from ..runs.help import Usage
from ..runs.parsing import parse_groups
from ..scopes import check_sparsity

USAGE = Usage(
    "px-hf compare",
    "Compare pruning criteria: methods x sparsities x seeds x (model, task), with the same budget and data order for "
    "all. Without arguments: four criteria on the embedded ResNet and digits.",
    (
        "px-hf compare --methods px-active px-active:power=0.5 magnitude:scope=layer --sparsities 0.8 0.9 0.95",
        "px-hf compare --model_name_or_path timm/resnet18.a1_in1k --dataset_name beans --seeds 0 1 2 --workers 2",
    ),
    (
        *("model_name_or_path", "dataset_name", "methods", "sparsities", "seeds", "num_train_epochs"),
        *("learning_rate", "report_on", "workers", "output_dir", "report_only"),
    ),
)


@dataclass
class CompareArguments:
    """What to compare, and the budget that all cells share."""

    config: str | None = field(default=None, metadata={"help": "YAML file of arguments; the command line overrides."})
    output_dir: str = field(default="outputs/comparison", metadata={"help": "Folder to write, or to go on with."})
    model_name_or_path: list[str] = field(
        default_factory=lambda: ["demo-resnet"],
        metadata={"help": "Backbones: ids of the Hub, local folders, or the embedded demo-resnet, demo-vit."},
    )
    dataset_name: list[str] = field(
        default_factory=lambda: ["digits"],
        metadata={"help": "Tasks: ids of the Hub, local folders, or the embedded digits, greek, letters."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models and data are kept."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the models. Only if you have read it."}
    )
    methods: list[str] = field(
        default_factory=lambda: ["px-active", "magnitude", "snip", "random"],
        metadata={
            "help": "Criteria, with settings: name:key=value:key=value, for example px-active:schedule=gradual."
        },
    )
    sparsities: list[float] = field(
        default_factory=lambda: [0.7, 0.95], metadata={"help": "Fractions of the weights to prune, in [0, 1)."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Of calibration images, head, data order and augmentation."}
    )
    workers: int = field(
        default=1, metadata={"help": "Processes that compute cells, one thread each; on GPUs they take turns."}
    )
    report_only: bool = field(default=False, metadata={"help": "Only write tables and plot of the cells there are."})
    report_on: str = field(
        default="test",
        metadata={"help": "Split of the tables; both are measured.", "choices": ["test", "validation"]},
    )
    train_val_split: float = field(
        default=0.15, metadata={"help": "Share of each class split off where there is no validation split."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many examples."})
    head: str = field(
        default="random",
        metadata={"help": "Classifier head that scoring and fine-tuning start from.", "choices": ["random", "fitted"]},
    )
    examples_per_class: int = field(default=10, metadata={"help": "Training images of each class to score with."})
    scoring_batch_size: int = field(default=50, metadata={"help": "Images scored at once."})
    rounds: int = field(default=ROUNDS, metadata={"help": "Rounds of criteria whose scores change as weights go."})
    recalibrate_batchnorm: bool = field(
        default=False,
        metadata={"help": "Estimate the BatchNorm statistics of the pruned network anew, on the calibration images."},
    )
    num_train_epochs: float = field(default=3.0, metadata={"help": "Epochs of fine-tuning; 0 for none."})
    batch_size: int = field(default=64, metadata={"help": "Of fine-tuning."})
    optimizer: str = field(
        default="adamw", metadata={"help": "SGD has Nesterov momentum 0.9.", "choices": ["adamw", "sgd"]}
    )
    learning_rate: list[float] = field(
        default_factory=lambda: [2e-3],
        metadata={
            "help": "Peak: a tenth of the steps up, then down on a cosine. Of several, each method takes the best "
            "on the validation split, at each sparsity."
        },
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of the optimizer."})
    random_shift: bool = field(default=False, metadata={"help": "Train on images shifted by up to an eighth."})
    horizontal_flip: bool = field(default=False, metadata={"help": "Train on mirrored images too. Not for digits."})
    bf16: bool = field(default=False, metadata={"help": "Fine-tune and evaluate under bfloat16 autocast."})

    def __post_init__(self) -> None:
        self.model_name_or_path = [embedded(name) for name in self.model_name_or_path]

    def budgets(self) -> list[Budget]:
        """One for each learning rate."""
        same = {f.name: getattr(self, f.name) for f in fields(Budget) if f.name != "learning_rate"}
        return [Budget(learning_rate=rate, **same) for rate in self.learning_rate]


def main(argv: list[str]) -> None:
    compare(argv, USAGE, px.CRITERIA, {})


def compare(argv: list[str], usage: Usage, criteria: Mapping[str, px.Criterion], defaults: Mapping[str, Any]) -> None:
    """Run the comparison; its methods are of ``criteria``, and ``defaults`` are the command's own."""
    (args,) = parse_groups(argv, (CompareArguments,), usage, lambda named: {**_example(named), **defaults})
    methods = [Method.parse(text, args.rounds, criteria) for text in args.methods]
    check(args, methods)
    cells = list(plan(args, methods))
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    quiet()
    torch.set_num_threads(1)  # also without workers, so that their number changes no result
    lines = read_lines(file)
    done = [line["key"] for line in lines]
    cells = [cell for cell in cells if cell.key() not in done]
    failed: list[str] = []
    if cells and not args.report_only:
        pairs = dict.fromkeys((cell.model, cell.dataset) for cell in cells)
        folders = {
            (short(model), short(data)): str(prepare(args, model, data))
            for model, data in itertools.product(args.model_name_or_path, args.dataset_name)
            if (short(model), short(data)) in pairs
        }
        ready = [replace(cell, folder=folders[cell.model, cell.dataset]) for cell in cells]
        progress = tqdm(total=len(ready) + len(done), initial=len(done), desc="Comparison", unit="cell")
        for cell, line in results(ready, args.workers):
            if isinstance(line, Exception):
                failed.append(f"{cell}: {type(line).__name__}: {line}")
                progress.write(failed[-1], file=sys.stderr)
            else:
                append_line(file, line)
            progress.update()
        progress.close()
    report(args, out)
    if failed:
        raise px.PxError(f"{len(failed)} cell(s) failed, the first: {failed[0]}. The others are kept; run again.")


def plan(args: CompareArguments, methods: Sequence[Method]) -> Iterator[Cell]:
    """All cells, one seed after the other, so that an unfinished run has whole rows."""
    tasks = list(itertools.product(args.model_name_or_path, args.dataset_name))
    for seed, (model, data), budget in itertools.product(args.seeds, tasks, args.budgets()):
        yield Cell(short(model), short(data), None, 0.0, seed, budget)
        for sparsity, method in itertools.product(args.sparsities, methods):
            yield Cell(short(model), short(data), method, sparsity, seed, budget)


def check(args: CompareArguments, methods: Sequence[Method]) -> None:
    """Refuses bad arguments before anything is computed.

    Raises:
        InvalidArgumentError: a number is out of its range, or something is named twice.
    """
    for sparsity in args.sparsities:
        check_sparsity(sparsity)
    for name in ("methods", "sparsities", "seeds", "model_name_or_path", "dataset_name", "learning_rate"):
        given = [short(value) if isinstance(value, str) else value for value in getattr(args, name)]
        if len(set(given)) < len(given):
            raise px.InvalidArgumentError(f"--{name} names the same twice: {' '.join(map(str, given))}.")
    for name, least in (("workers", 1), ("batch_size", 1), ("examples_per_class", 1), ("scoring_batch_size", 1)):
        if getattr(args, name) < least:
            raise px.InvalidArgumentError(f"--{name} is {getattr(args, name)}; expected at least {least}.")
    if args.num_train_epochs < 0 or not min(args.learning_rate) > 0:
        raise px.InvalidArgumentError("--num_train_epochs must be at least 0 and --learning_rate above 0.")
    gradual = [method.text for method in methods if method.gradual]
    if gradual and not args.num_train_epochs:
        raise px.InvalidArgumentError(
            f"{gradual[0]} prunes while the network is fine-tuned, and --num_train_epochs is 0. Leave one out."
        )


def results(cells: list[Cell], workers: int) -> Iterator[tuple[Cell, dict[str, Any] | Exception]]:
    """Each cell with its line, or with the error that it ended in, as they come."""
    if workers == 1:
        for cell in cells:
            yield cell, _attempt(cell)
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (context.Value("i", 0),)) as pool:
        waiting = {pool.submit(_attempt, cell): cell for cell in cells}
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except BrokenProcessPool:
                raise px.PxError(
                    "A worker was killed, perhaps for want of memory. What was finished is kept: run again, with "
                    "fewer --workers or a smaller --scoring_batch_size."
                ) from None


def _attempt(cell: Cell) -> dict[str, Any] | Exception:
    try:
        return run_cell(cell)
    except (px.PxError, RuntimeError, OSError) as error:
        return error


def _start_worker(started: Any) -> None:
    """One thread, one GPU where there are any, and an end when the parent ends, however it ends."""
    with started.get_lock():
        index, started.value = started.value, started.value + 1
    quiet()
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def quiet() -> None:
    """No report of every model that is loaded: that the head is new is the plan."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def report(args: CompareArguments, out: Path) -> None:
    """Tables and plot of all cells of these budgets, also of earlier commands."""
    budgets = [vars(budget).items() for budget in args.budgets()]
    lines = [line for line in read_lines(out / "results.jsonl") if any(own <= line["key"].items() for own in budgets)]
    if not lines:
        return
    lines = reported(lines, args.report_on)
    lines.sort(key=lambda line: (line["key"]["model"], line["key"]["dataset"], line["key"]["seed"]))
    text = markdown(lines)
    with whole(out / "results.md") as unfinished:
        unfinished.write_text(text)
    plot(lines, out / "comparison.png")
    Console().print(Markdown(text))


def _example(named: Any) -> dict[str, Any]:
    """Other defaults where the embedded example is what is compared."""
    small = [*map(embedded, named.model_name_or_path)] == [EXAMPLE_MODEL] and named.dataset_name == ["digits"]
    return {"num_train_epochs": 5.0, "scoring_batch_size": 100} if small else {}

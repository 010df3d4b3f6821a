"""Compare tickets of weights to tune: ways to choose × seeds, beside full fine-tuning and random rows.

recipes/compare_tickets.py says how it is run.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

import px_hf as px

from ..atomic import whole
from ..comparison.budget import Budget
from ..comparison.measures import accuracy
from ..comparison.prepared_task import PreparedTask, load, prepare, short
from ..comparison.results import append_line, read_lines
from ..comparison.tables import mean_and_spread
from ..comparison.training import fine_tune
from ..controls import shuffle_rows
from ..model.rows import rows
from ..model.targets import prunable
from ..runs.embedded_models import EXAMPLE_MODEL, embedded
from ..runs.help import Usage
from ..runs.parsing import parse_groups
from .compare_criteria import quiet

RANKINGS: dict[str, tuple[px.Criterion, bool]] = {
    "px": (px.CRITERIA["px-active"], False),
    "magnitude": (px.Magnitude(), False),
    "fisher": (px.Fisher(), False),
    "talos": (px.Fisher(labels="model"), True),
    "random": (px.Random(), False),
}
"""Name -> criterion, and whether its lowest rows are tuned."""

METHODS = ("full", "head", "norms", "ks", *RANKINGS)
CONTROL = ":random"
"""Behind the name of a method: as many rows of the same lengths, drawn at random."""


USAGE = Usage(
    "python recipes/compare_tickets.py",
    "Which weights are worth tuning: rows chosen by KS, PX or Fisher, beside as many random rows, the head and all.",
    ("python recipes/compare_tickets.py --dataset_name greek --fraction 0.1 --seeds 0 1 2 --learning_rate 1e-3 3e-3",),
    (
        *("model_name_or_path", "dataset_name", "methods", "fraction", "alpha", "seeds", "num_train_epochs"),
        *("learning_rate", "output_dir"),
    ),
)


@dataclass
class TicketArguments:
    """What to compare, and the budget that all share."""

    config: str | None = field(default=None, metadata={"help": "YAML file of arguments; the command line overrides."})
    output_dir: str = field(default="outputs/tickets", metadata={"help": "Folder to write, or to go on with."})
    model_name_or_path: str = field(default=EXAMPLE_MODEL, metadata={"help": "Backbone: id of the Hub or folder."})
    dataset_name: str = field(default="digits", metadata={"help": "Id of the Hub, folder, or digits, greek, letters."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models and data are kept."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the Python code that comes with the model."})
    methods: list[str] = field(
        default_factory=lambda: ["full", "head", "ks", "ks:random", "px", "fisher", "talos", "random"],
        metadata={"help": f"Of {', '.join(METHODS)}; with {CONTROL} behind: as many random rows."},
    )
    fraction: float = field(default=0.1, metadata={"help": "Part of the rows that is tuned, at most."})
    alpha: float = field(default=0.05, metadata={"help": "Of px.KS."})
    pilot_epochs: float = field(default=1.0, metadata={"help": "Epochs of the pilot of px.KS."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of head, data order and images."})
    train_val_split: float = field(default=0.15, metadata={"help": "Share split off where there is no validation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many examples."})
    head: str = field(
        default="random", metadata={"help": "Head that training starts from.", "choices": ["random", "fitted"]}
    )
    examples_per_class: int = field(default=10, metadata={"help": "Training images of each class to score with."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs of fine-tuning."})
    batch_size: int = field(default=64, metadata={"help": "Of fine-tuning."})
    learning_rate: list[float] = field(
        default_factory=lambda: [2e-3],
        metadata={"help": "Peak. Of several, each method takes the best on the validation split."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Of AdamW."})

    def __post_init__(self) -> None:
        self.model_name_or_path = embedded(self.model_name_or_path)

    def budget(self, rate: float) -> Budget:
        return Budget(
            self.max_train_samples, self.max_eval_samples, self.train_val_split, self.head, self.examples_per_class,
            scoring_batch_size=50, rounds=1, recalibrate_batchnorm=False, num_train_epochs=self.num_train_epochs,
            batch_size=self.batch_size, optimizer="adamw", learning_rate=rate, weight_decay=self.weight_decay,
            random_shift=False, horizontal_flip=False, bf16=False,
        )  # fmt: skip


def main(argv: list[str]) -> None:
    (args,) = parse_groups(argv, (TicketArguments,), USAGE, lambda named: {})
    check(args)
    quiet()
    torch.set_num_threads(1)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "results.jsonl"
    done = [line["key"] for line in read_lines(file)]
    cells = list(itertools.product(args.seeds, args.methods, args.learning_rate))
    todo = [cell for cell in cells if key(args, *cell) not in done]
    if todo:
        task = load(prepare(args, args.model_name_or_path, args.dataset_name))
        for seed, method, rate in todo:
            line = run_cell(task, args, seed, method, rate)
            append_line(file, line)
            print(json.dumps({**line["key"], **line["fine_tuned"]}), flush=True)
    mine = [key(args, *cell) for cell in cells]
    text = table(args, [line for line in read_lines(file) if line["key"] in mine])
    with whole(out / "results.md") as unfinished:
        unfinished.write_text(text)
    Console().print(Markdown(text))


def key(args: TicketArguments, seed: int, method: str, rate: float) -> dict[str, Any]:
    own = {name: getattr(args, name) for name in ("fraction", "alpha", "pilot_epochs")}
    names = {"model": short(args.model_name_or_path), "dataset": short(args.dataset_name)}
    return {**names, "seed": seed, "method": method, **own, **vars(args.budget(rate))}


def check(args: TicketArguments) -> None:
    """Refuses bad arguments before anything is computed.

    Raises:
        InvalidArgumentError: an unknown method, or a number out of its range.
    """
    unknown = [
        m for m in args.methods if m.removesuffix(CONTROL) not in METHODS or m in ("full:random", "head:random")
    ]
    if unknown or not args.methods:
        raise px.InvalidArgumentError(f"--methods {' '.join(unknown)}: expected some of {', '.join(METHODS)}.")
    px.KS(args.alpha)
    if not 0 < args.fraction <= 1 or args.pilot_epochs <= 0 or args.num_train_epochs <= 0:
        raise px.InvalidArgumentError("--fraction must be in (0, 1], --pilot_epochs and --num_train_epochs above 0.")


def run_cell(task: PreparedTask, args: TicketArguments, seed: int, method: str, rate: float) -> dict[str, Any]:
    """Choose, fine-tune, measure; the line of results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget = args.budget(rate)
    model = task.dense_model(seed, args.head, device)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ticket = choose(task, args, model, seed, method, budget)
    chosen = time.perf_counter()
    also = ("head", "norms") if method == "norms" else ("head",)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def freeze(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        return nullcontext() if ticket is None else px.tune_only(optimizer, model, ticket, also=also)

    fine_tune(model, freeze, task.train, budget, seed)
    trained = time.perf_counter()
    moved = sum(int((value != before[name]).sum()) for name, value in model.state_dict().items())
    flags = [rows(mask) for mask in ticket.tensors.values()] if ticket else []
    return {
        "key": key(args, seed, method, rate),
        "rows": sum(int(flag.any(1).sum()) for flag in flags),
        "of_rows": sum(len(flag) for flag in flags),
        "weights": ticket.kept if ticket else None,
        "moved": moved,
        "fine_tuned": {n: accuracy(model, data) for n, data in (("validation", task.validation), ("test", task.test))},
        "seconds": {"choose": round(chosen - start, 2), "fine_tune": round(trained - chosen, 2)},
    }


def choose(
    task: PreparedTask, args: TicketArguments, model: nn.Module, seed: int, method: str, budget: Budget
) -> px.Masks | None:
    """The ticket of a method; None for full fine-tuning."""
    name = method.removesuffix(CONTROL)
    if name == "full":
        return None
    if name in ("head", "norms"):
        return px.Masks({n: torch.zeros(p.shape, dtype=torch.bool) for n, p in prunable(model).items()})
    if name == "ks":
        pilot = copy.deepcopy(model)
        short_budget = replace(budget, num_train_epochs=args.pilot_epochs)
        fine_tune(pilot, lambda optimizer, steps: nullcontext(), task.train, short_budget, seed)
        ticket = px.select_trainable(model, [], px.KS(args.alpha), after=pilot, fraction=args.fraction)
    else:
        by, lowest = RANKINGS[name]
        batches = task.calibration(args.examples_per_class, seed, 50)
        by = replace(by, seed=seed) if isinstance(by, px.Random) else by
        ticket = px.select_trainable(model, batches, by, fraction=args.fraction, lowest=lowest)
    return shuffle_rows(ticket, seed) if method.endswith(CONTROL) else ticket


def table(args: TicketArguments, lines: list[dict[str, Any]]) -> str:
    """One row for each method: accuracy at the learning rate that is best on the validation split."""
    text = [
        f"### {short(args.model_name_or_path)} on {short(args.dataset_name)}\n",
        f"Test accuracy in %, mean ± standard deviation over {len(args.seeds)} seed(s); {args.num_train_epochs:g} "
        f"epochs, at most {100 * args.fraction:g} % of the rows.\n",
        "| method | accuracy | rows | weights tuned | learning rate |",
        "|---|---|---|---|---|",
    ]
    for method, found in _best(args, lines):
        tuned = statistics.mean(line["moved"] for line in found)
        share = [line["rows"] / line["of_rows"] for line in found if line["of_rows"]]
        part = f"{100 * statistics.mean(share):.1f} %" if share else "all"
        accuracies = mean_and_spread([line["fine_tuned"]["test"] for line in found])
        text.append(f"| {method} | {accuracies} | {part} | {tuned:,.0f} | {found[0]['key']['learning_rate']:g} |")
    return "\n".join(text) + "\n"


def _best(args: TicketArguments, lines: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for method in args.methods:
        by_rate = [
            [line for line in lines if line["key"]["method"] == method and line["key"]["learning_rate"] == rate]
            for rate in args.learning_rate
        ]
        merit: Callable[[list[dict[str, Any]]], float] = lambda some: statistics.mean(  # noqa: E731
            line["fine_tuned"]["validation"] for line in some
        )
        if all(by_rate):
            yield method, max(by_rate, key=merit)

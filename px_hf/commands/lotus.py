"""LOTUS: fine-tune a vision transformer on patch tickets, with sparse weights or dense, beside its controls.

recipes/lotus.py says how it is run.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import px_hf as px

from ..atomic import whole
from ..comparison.budget import Budget
from ..comparison.measures import accuracy
from ..comparison.pixels import Pixels
from ..comparison.prepared_task import PreparedTask, load, prepare, short
from ..comparison.results import append_line, read_lines
from ..comparison.tables import mean_and_spread
from ..comparison.training import fine_tune
from ..runs.embedded_models import EMBEDDED, embedded
from ..runs.help import Usage
from ..runs.parsing import parse_groups
from .compare_criteria import quiet

USAGE = Usage(
    "python recipes/lotus.py",
    "Patch tickets and pruned weights together: accuracy and time of a ViT that reads fewer patches and weights.",
    ("python recipes/lotus.py --dataset_name greek --keep 0.5 --criteria none px-active --sparsity 0.7 --seeds 0 1",),
    (
        *("model_name_or_path", "dataset_name", "keep", "layers", "criteria", "sparsity", "seeds"),
        *("num_train_epochs", "learning_rate", "equal_time", "output_dir"),
    ),
)
READING = ("all", "tickets", "random")


@dataclass
class LotusArguments:
    """The network, the data, and what is left out of both."""

    config: str | None = field(default=None, metadata={"help": "YAML file of arguments; the command line overrides."})
    output_dir: str = field(default="outputs/lotus", metadata={"help": "Folder to write, or to go on with."})
    model_name_or_path: str = field(
        default=EMBEDDED["demo-vit"], metadata={"help": "A ViT: id of the Hub, folder, demo-vit."}
    )
    dataset_name: str = field(default="digits", metadata={"help": "Id of the Hub, folder, or digits, greek, letters."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloaded models and data are kept."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the Python code that comes with the model."})
    keep: float = field(default=0.5, metadata={"help": "Part of the patches that is read, in (0, 1]."})
    layers: list[int] = field(
        default_factory=lambda: [2, 4, 6], metadata={"help": "Whose attention ranks the patches, counted from 1."}
    )
    criteria: list[str] = field(
        default_factory=lambda: ["none", "px-active", "magnitude"],
        metadata={"help": "What prunes the weights: none, or criteria of px_hf."},
    )
    sparsity: float = field(default=0.7, metadata={"help": "Fraction of the weights that criteria prune."})
    equal_time: bool = field(
        default=True, metadata={"help": "Also train on tickets for as long as on all patches takes."}
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Of head, data order and images."})
    train_val_split: float = field(default=0.15, metadata={"help": "Share split off where there is no validation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most so many examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on at most so many examples."})
    examples_per_class: int = field(default=10, metadata={"help": "Training images of each class to score with."})
    num_train_epochs: float = field(default=5.0, metadata={"help": "Epochs of fine-tuning."})
    batch_size: int = field(default=64, metadata={"help": "Of fine-tuning."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Peak."})

    def __post_init__(self) -> None:
        self.model_name_or_path = embedded(self.model_name_or_path)

    def budget(self) -> Budget:
        return Budget(
            self.max_train_samples, self.max_eval_samples, self.train_val_split, "random", self.examples_per_class,
            scoring_batch_size=50, rounds=10, recalibrate_batchnorm=False, num_train_epochs=self.num_train_epochs,
            batch_size=self.batch_size, optimizer="adamw", learning_rate=self.learning_rate, weight_decay=0.01,
            random_shift=False, horizontal_flip=False, bf16=False,
        )  # fmt: skip


def main(argv: list[str]) -> None:
    (args,) = parse_groups(argv, (LotusArguments,), USAGE, lambda named: {})
    tickets = px.PatchTickets(args.keep, args.layers)
    unknown = [name for name in args.criteria if name != "none" and name not in px.CRITERIA]
    if unknown or not args.criteria:
        raise px.InvalidArgumentError(f"--criteria {' '.join(unknown)}: expected none, or {', '.join(px.CRITERIA)}.")
    quiet()
    torch.set_num_threads(1)
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    done = [line["key"] for line in read_lines(out / "results.jsonl")]
    task = load(prepare(args, args.model_name_or_path, args.dataset_name))
    wanted = []
    for seed in args.seeds:
        keys = [key(args, seed, criterion, reading) for criterion in args.criteria for reading in readings(args)]
        wanted += keys
        if all(each in done for each in keys):
            continue
        patches = find(task, tickets, seed)
        speedup = images_per_second(task, args, patches["tickets"]) / images_per_second(task, args, None)
        for each in keys:
            if each not in done:
                line = run_cell(task, args, each, patches, speedup)
                append_line(out / "results.jsonl", line)
                print(json.dumps(line), flush=True)
    text = table(args, [line for line in read_lines(out / "results.jsonl") if line["key"] in wanted])
    with whole(out / "results.md") as unfinished:
        unfinished.write_text(text)
    Console().print(Markdown(text))


def readings(args: LotusArguments) -> list[str]:
    return [*READING, *(["tickets, equal time", "random, equal time"] if args.equal_time else [])]


def key(args: LotusArguments, seed: int, criterion: str, reading: str) -> dict[str, Any]:
    names = {"model": short(args.model_name_or_path), "dataset": short(args.dataset_name)}
    own = {"keep": args.keep, "layers": sorted(args.layers), "sparsity": 0.0 if criterion == "none" else args.sparsity}
    return {**names, **own, "seed": seed, "method": criterion, "reading": reading, **vars(args.budget())}


def find(task: PreparedTask, tickets: px.PatchTickets, seed: int) -> dict[str, dict[str, Tensor]]:
    """Reading -> split -> patches of its images, by attention and at random."""
    frozen = task.dense_model(seed, "random", torch.device("cpu"))
    splits = {"train": task.train, "validation": task.validation, "test": task.test}

    def batches(data: Pixels) -> list[Tensor]:
        return [data.batch(slice(start, start + 50))[0] for start in range(0, len(data), 50)]

    scores = {name: tickets.scores(frozen, batches(data)) for name, data in splits.items()}
    k = tickets.count(scores["train"].shape[1])
    return {
        "tickets": {name: each.argsort(dim=1, descending=True, stable=True)[:, :k] for name, each in scores.items()},
        "random": {name: tickets.random(len(each), each.shape[1], seed) for name, each in scores.items()},
    }


def images_per_second(task: PreparedTask, args: LotusArguments, patches: Mapping[str, Tensor] | None) -> float:
    """Of fine-tuning, in time of this process, by the fastest of several steps."""
    model = task.dense_model(0, "random", torch.device("cpu")).train()
    images, labels = task.train.batch(slice(0, args.batch_size))
    more = {} if patches is None else {"patches": patches["train"][: len(images)]}
    seconds = []
    with px.read_patches(model):
        for _ in range(4):
            start = time.process_time()
            model(pixel_values=images, labels=labels, **more).loss.backward()
            seconds.append(time.process_time() - start)
    return len(images) / min(seconds[1:])


def run_cell(
    task: PreparedTask,
    args: LotusArguments,
    cell: dict[str, Any],
    patches: Mapping[str, Mapping[str, Tensor]],
    speedup: float,
) -> dict[str, Any]:
    """Prune, fine-tune, measure; the line of results."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = task.dense_model(cell["seed"], "random", device)
    reading, _, longer = cell["reading"].partition(", ")
    read = patches.get(reading)
    budget = args.budget()
    if longer:
        budget = replace(budget, num_train_epochs=budget.num_train_epochs * speedup)
    masks = None
    if cell["method"] != "none":
        batches = task.calibration(args.examples_per_class, cell["seed"], 50)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = px.prune(
                model, batches, px.CRITERIA[cell["method"]], sparsity=args.sparsity, rounds=budget.rounds,
                progress=False,
            )  # fmt: skip
    start = time.process_time()
    with px.read_patches(model):
        fine_tune(
            model,
            lambda optimizer, steps: nullcontext() if masks is None else px.keep_masks(optimizer, model, masks),
            task.train,
            budget,
            cell["seed"],
            None if read is None else read["train"],
        )
        seconds = time.process_time() - start
        accuracies = {
            "validation": accuracy(model, task.validation, patches=None if read is None else read["validation"]),
            "test": accuracy(model, task.test, patches=None if read is None else read["test"]),
            "test on all patches": accuracy(model, task.test),
        }
        more = {} if read is None else {"patches": read["test"][:1]}
        image = task.test.batch(slice(0, 1), device)[0]
        with FlopCounterMode(display=False) as flops, torch.no_grad():
            model(pixel_values=image, **more)
    return {
        "key": cell,
        "fine_tuned": accuracies,
        "speedup": 1.0 if read is None else speedup,
        "epochs": budget.num_train_epochs,
        "macs": flops.get_total_flops() // 2,
        "seconds": round(seconds, 1),
    }


def table(args: LotusArguments, lines: list[dict[str, Any]]) -> str:
    text = [
        f"### {short(args.model_name_or_path)} on {short(args.dataset_name)}\n",
        f"Test accuracy in %, mean ± standard deviation over {len(args.seeds)} seed(s); tickets keep "
        f"{100 * args.keep:g} % of the patches, criteria prune {100 * args.sparsity:g} % of the weights (whose zeros "
        "save no time, and are multiplied in the MACs). Time of the process.\n",
        "| weights | patches | accuracy | on all patches | images/s, training | MACs per image | epochs | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for criterion in args.criteria:
        for reading in readings(args):
            own = [e for e in lines if e["key"]["method"] == criterion and e["key"]["reading"] == reading]
            if own:
                found = [mean_and_spread([e["fine_tuned"][n] for e in own]) for n in ("test", "test on all patches")]
                mean = {n: sum(e[n] for e in own) / len(own) for n in ("speedup", "epochs", "seconds")}
                text.append(
                    f"| {'dense' if criterion == 'none' else criterion} | {reading} | {found[0]} | {found[1]} | "
                    f"{mean['speedup']:.2f} × | {own[0]['macs']:,} | {mean['epochs']:.1f} | {mean['seconds']:.0f} |"
                )
    return "\n".join(text) + "\n"

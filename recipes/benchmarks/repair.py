"""What is a pruned model good for without training, and what does repair give back? The tables of docs/REPAIR.md.

    python recipes/benchmarks/repair.py

Two minutes on one CPU core, no network: the embedded ViT on the letters that it was trained on, Wanda at 50 and 60 %
sparsity, alone and after each repair. Expected: each row nearer to the dense model than the one before. Your own:

    python recipes/benchmarks/repair.py --model_name_or_path timm/vit_tiny_patch16_224 --dataset_name folder \\
        --fit "train[:400]" --test "validation[:1000]" --criteria wanda:scope=row px-balanced:rounds=5 \\
        --methods none layers blocks:epochs=10 --sparsities 0.5 0.6 --images 200 400 --seeds 0 1 2

Masks come from the first `--scoring_images` of `--fit`. Repairs see the first `--images` of these, or of other images:
`--repair_with` names a dataset with a split, such as `photos:train`, or `noise`, which is Gaussian noise of the mean
and deviation of each pixel's channel. Labels serve for the test alone. A seed other than 0 shuffles the rows of the
dataset first, so that other images are fitted to, and others test; 0 takes them as they are.

A method is `none`, `statistics`, or one of `px.reconstruct_` with its settings, `blocks:epochs=5:rate=3e-4`. With
`in=0.2,0.4` it is pruned to 20 % and repaired, to 40 % and repaired, and so to the sparsity asked for.

`OUTPUT_DIR/results.jsonl` grows by a line for each figure, the same command goes on where it stopped, and
`results.md` has the tables. Seconds are of the CPU and all threads: read their ratios. `error` is ‖f̂ - f‖ / ‖f‖ of the
logits (of what comes before, for a backbone without a classifier) on the test images.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor, nn
from transformers.utils import logging

import px_hf as px
from px_hf.atomic import whole
from px_hf.comparison.method import Method
from px_hf.comparison.results import Line, append_line, in_order, read_lines
from px_hf.data import DataSource, Preprocess, read_dataset
from px_hf.data.embedded.characters import EMBEDDED
from px_hf.data.split import to_rgb
from px_hf.data.task import find_image_column, find_label_column
from px_hf.model.inputs import Inputs, run
from px_hf.repair.by_name import REPAIRS
from px_hf.runs.arguments import ModelArguments
from px_hf.runs.backbone import load_processor
from px_hf.runs.embedded_models import embedded
from px_hf.runs.saved_model import load

Batches = list[dict[str, Tensor]]
ROWS = re.compile(r"([^\[\]]+)(?:\[(\d*):(\d*)\])?")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="demo-vit")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--dataset_name", default="letters", help="embedded, of the Hub, a folder, or a Parquet file")
    parser.add_argument("--fit", default="train[:400]", help="split and rows that masks come from, and repairs")
    parser.add_argument("--test", default="test", help="split and rows")
    parser.add_argument("--repair_with", help="other images for the repairs: DATASET:SPLIT, or noise")
    parser.add_argument("--criteria", nargs="+", default=["wanda"], help="as compare_criteria takes methods")
    parser.add_argument("--methods", nargs="+", default=["none", "statistics", "layers", "blocks"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6])
    parser.add_argument("--images", nargs="+", type=int, default=[200])
    parser.add_argument("--scoring_images", type=int, default=200)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/repair"))
    args = parser.parse_args(argv)
    criteria = [Method.parse(text, rounds=1) for text in args.criteria]
    for text in args.methods:
        settings_of(text)
    logging.set_verbosity_error()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results = args.output_dir / "results.jsonl"
    done = [line["key"] for line in read_lines(results)]
    model = load(embedded(args.model_name_or_path), args.trust_remote_code)
    given = ModelArguments(
        model_name_or_path=embedded(args.model_name_or_path), trust_remote_code=args.trust_remote_code
    )
    pixels = Preprocess(load_processor(given))
    for seed in args.seeds:
        task = Images(args, seed, pixels)
        for key, criterion in _keys(args, seed, criteria):
            if key not in done:
                line = {"key": key} | measured(model, task, criterion, key)
                append_line(results, line)
                print(json.dumps(line), flush=True)
    text = markdown(read_lines(results))
    with whole(args.output_dir / "results.md") as unfinished:
        unfinished.write_text(text)
    print(text)


def _keys(args: argparse.Namespace, seed: int, criteria: list[Method]) -> list[tuple[dict[str, Any], Method | None]]:
    """What identifies each figure, the dense model's first."""
    own = {"model": Path(args.model_name_or_path).name, "dataset": Path(args.dataset_name).name, "seed": seed}
    own |= {name: getattr(args, name) for name in ("fit", "test", "scoring_images", "batch_size")}
    found: list[tuple[dict[str, Any], Method | None]] = [({**own, "method": "dense"}, None)]
    for sparsity in args.sparsities:
        for criterion in criteria:
            pruned = own | {"criterion": criterion.text, "sparsity": sparsity}
            for method in args.methods:
                if method == "none":
                    found.append(({**pruned, "method": method}, criterion))
                    continue
                images = {"with": Path(args.repair_with or "task").name}
                found += [({**pruned, "method": method, "images": n} | images, criterion) for n in args.images]
    return found


class Images:
    """The images of one seed, as the model takes them, and what was pruned by them."""

    def __init__(self, args: argparse.Namespace, seed: int, pixels: Preprocess) -> None:
        raw = _read(args.dataset_name)
        self.size, self.scoring = args.batch_size, args.scoring_images
        self._masks: dict[str, px.Masks] = {}
        self.fit, _ = _pixels(raw, args.fit, seed, pixels, labelled=False)
        self.test, self.labels = _pixels(raw, args.test, seed, pixels, labelled=True)
        self.repair = self.fit
        if args.repair_with == "noise":
            mean, deviation = self.fit.mean((0, 2, 3), keepdim=True), self.fit.std((0, 2, 3), keepdim=True)
            noise = torch.randn(self.fit.shape, generator=torch.Generator().manual_seed(seed))
            self.repair = mean + deviation * noise
        elif args.repair_with:
            name, colon, rows = args.repair_with.rpartition(":")
            if not colon:
                raise px.InvalidArgumentError(f"--repair_with {args.repair_with}: expected DATASET:SPLIT, or noise.")
            self.repair, _ = _pixels(_read(name), rows, seed, pixels, labelled=False)

    def batches(self, images: Tensor, count: int | None = None) -> Batches:
        if count is not None and count > len(images):
            raise px.InvalidArgumentError(f"--images {count}: there are {len(images)} to repair with.")
        return [{"pixel_values": part} for part in images[:count].split(self.size)]

    def masks(self, model: nn.Module, criterion: Method, sparsity: float, after: str = "") -> px.Masks:
        """Those of the criterion, once for all repairs. `after` says what the model went through before."""
        key = f"{criterion.text} {sparsity} {after}"
        if key not in self._masks:
            batches = self.batches(self.fit[: self.scoring])
            self._masks = {key: px.prune(
                model, batches, criterion.criterion, sparsity=sparsity, rounds=criterion.rounds, scope=criterion.scope,
                min_layer_density=criterion.min_layer_density, progress=False,
            )}  # fmt: skip
        return self._masks[key]


def measured(model: nn.Module, task: Images, criterion: Method | None, key: dict[str, Any]) -> dict[str, Any]:
    """Accuracy, error of the logits, and CPU seconds of the repair."""
    if criterion is None:
        return scores(model, model, task)
    sparse = copy.deepcopy(model)
    seconds = 0.0
    if key["method"] == "none":
        task.masks(model, criterion, key["sparsity"]).apply_(sparse)
    else:
        name, settings, steps = settings_of(key["method"])
        batches = task.batches(task.repair, key["images"])
        for sparsity in (*steps, key["sparsity"]):
            first = sparsity == (*steps, key["sparsity"])[0]
            masks = task.masks(sparse, criterion, sparsity, "" if first else f"{key['method']} {key['images']}")
            start = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers with more inputs than samples
                if name == "statistics":
                    REPAIRS[name](sparse, masks, batches, False)
                else:
                    px.reconstruct_(sparse, masks, batches, method=name, progress=False, **settings)
            seconds += time.process_time() - start
            masks.apply_(sparse)
    return scores(sparse, model, task) | {"seconds": round(seconds, 1)}


def settings_of(text: str) -> tuple[str, dict[str, Any], list[float]]:
    """The name of a method, settings of `px.reconstruct_`, and sparsities on the way."""
    name, *given = text.split(":")
    if name not in ("none", *REPAIRS):
        raise px.InvalidArgumentError(f"Method {text!r}: expected none, {', '.join(REPAIRS)}, with settings or none.")
    settings = dict(setting.split("=") for setting in given)
    steps = [float(step) for step in settings.pop("in", "").split(",") if step]
    return name, {key: json.loads(value) for key, value in settings.items()}, steps


@torch.no_grad()
def scores(model: nn.Module, dense: nn.Module, task: Images) -> dict[str, Any]:
    """Accuracy, None without a classifier of these classes, and the relative error of the outputs."""
    right, gap, norm, classes = 0, 0.0, 0.0, 0
    for images, labels in zip(task.test.split(task.size), task.labels.split(task.size), strict=True):
        found, wanted = (run(each.eval(), Inputs(images)) for each in (model, dense))
        classes = wanted.shape[1]
        right += int((found.argmax(1) == labels).sum())
        gap += float((found - wanted).square().sum())
        norm += float(wanted.square().sum())
    known = classes > int(task.labels.max())
    return {"accuracy": right / len(task.labels) if known else None, "error": (gap / norm) ** 0.5}


def _read(name: str) -> DatasetDict:
    if name in EMBEDDED:
        return EMBEDDED[name]()
    return read_dataset(DataSource(train_file=name) if name.endswith(".parquet") else DataSource(dataset_name=name))


def _pixels(raw: DatasetDict, text: str, seed: int, pixels: Preprocess, labelled: bool) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and classes [N] of `split[start:stop]`."""
    match = ROWS.fullmatch(text)
    if match is None or match[1] not in raw:
        raise px.InvalidArgumentError(f"{text!r}: expected a split of {', '.join(raw)}, as in train or train[0:400].")
    split = raw[match[1]]
    rows = torch.arange(len(split))
    if seed:
        rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    rows = rows[slice(*(int(end) if end else None for end in match.groups()[1:]))]
    if not len(rows):
        raise px.InvalidArgumentError(f"{text!r}: no rows; the split has {len(split)}.")
    column = find_image_column(split.features)
    parts = []
    for part in rows.split(100):
        images = split.select(part.tolist())[column]
        parts.append(pixels([to_rgb(image) for image in images]))
    labels = split.select(rows.tolist())[find_label_column(split.features)] if labelled else [0] * len(rows)
    return torch.cat(parts), torch.tensor(labels)


def markdown(lines: list[Line]) -> str:
    """For each model and dataset a table: a row for each way, a column for each sparsity."""
    parts = []
    for place in in_order(lines, lambda line: (line["key"]["model"], line["key"]["dataset"])):
        here = [line for line in lines if (line["key"]["model"], line["key"]["dataset"]) == place]
        sparsities = sorted({line["key"]["sparsity"] for line in here if "sparsity" in line["key"]})
        dense = [line for line in here if line["key"]["method"] == "dense"]
        parts += [f"### {place[0]} on {place[1]}\n", f"Dense: {_cell(dense)}. In brackets: seeds, if several.\n"]
        heads = [f"{100 * s:g} %" for s in sparsities]
        parts.append(f"| criterion | repair | images | {' | '.join(heads)} | error | CPU seconds |")
        parts.append("|" + "---|" * (len(heads) + 5))
        for row in in_order(here, _row):
            if row[1] == "dense":
                continue
            own = [line for line in here if _row(line) == row]
            cells = [_cell([line for line in own if line["key"]["sparsity"] == s]) for s in sparsities]
            error = " ".join(
                f"{statistics.mean(found):.3f}"
                for s in sparsities
                if (found := [line["error"] for line in own if line["key"]["sparsity"] == s])
            )
            seconds = statistics.mean(line["seconds"] for line in own)
            parts.append(f"| {' | '.join((*row, *cells))} | {error} | {seconds:.0f} |")
        parts.append("")
    return "\n".join(parts)


def _row(line: Line) -> tuple[str, str, str]:
    key = line["key"]
    images = f"{key['images']} {key['with']}" if "images" in key else ""
    return key.get("criterion", ""), key["method"], images.removesuffix(" task")


def _cell(lines: list[Line]) -> str:
    values = [100 * line["accuracy"] for line in lines if line["accuracy"] is not None]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()

"""How time and memory grow with the number of weights and of images: the plot of docs/PERFORMANCE.md.

    OMP_NUM_THREADS=1 python recipes/benchmarks/growth.py --output_dir outputs/benchmark_growth

Five ViTs of 6 to 632 million weights with random values, each step in a process of its own: scoring two images of
64 × 64 (small, so that what grows with the weights is seen), selection, saving and loading, both of the dense file
and of the compact copy; then a ViT-S/16 on 1 to 32 images of 224 × 224. A quarter of an hour on one CPU core, 16 GB
of memory and 5 GB of disk, no network; what the machine has too little memory for is left out, and said. `--quick`:
seconds.

Expected: time and memory grow no faster than the weights, time linearly with the images, memory not at all with them.

Writes benchmark_growth.json and growth.png. Seconds are CPU seconds; memory is what a step adds to its process at the
peak, beside the model. Linux only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import process_memory
import torch
from random_models import VITS, vit
from scoring_measures import CRITERIA, build, peak_bytes, random_masks, seconds
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.utils import logging

import px_hf as px
from px_hf.drawing import DENSE, line_style, picture
from px_hf.runs.folder import write_json

SPARSITY = 0.9
PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["px_hf", "scoring_measures"])
SCORED = {f"score, {name}": name for name in CRITERIA}
STEPS = (*SCORED, "select", "save", "load dense", "load compact")
COPIES = dict(zip(STEPS, (2.2, 4.3, 1.6, 1.6, 1.3, 1.6), strict=True))
"""Of the weights, in float32, that a step needs with the model: about, to leave out what would not fit."""


def main() -> None:
    args = parse()
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    seer = args.models[min(1, len(args.models) - 1)]
    results: dict[str, Any] = {"weights": [], "images": [], "seen by": seer}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for name in args.models:
            for step in STEPS:
                row = {"model": name, "step": step, **measure(name, step, folder, 2, 64)}
                results["weights"].append(row)
                write_json(out / "benchmark_growth.json", results)
        for count in args.images:
            for step in SCORED:
                found = measure(seer, step, folder, count, 224)
                results["images"].append({"images": count, "step": step, **found})
                write_json(out / "benchmark_growth.json", results)
    print(table(results))
    draw(results, out / "growth.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(VITS), default=list(VITS), help="the second: of images")
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4, 16, 32])
    parser.add_argument("--quick", action="store_true", help="the two smallest ViTs, and few images: does it run?")
    parser.add_argument("--output_dir", default="outputs/benchmark_growth")
    args = parser.parse_args()
    if args.quick:
        args.models, args.images = list(VITS)[:2], [1, 2]
    return args


def measure(name: str, step: str, folder: str, images: int, side: int) -> dict[str, Any]:
    """What a process of its own says of one step; the reason alone, if the machine has too little memory for it."""
    weights = sum(p.numel() for p in network(name, side, "meta").parameters())
    needed = int(4 * weights * (1 + COPIES[step]))
    if needed > process_memory.available():
        found: dict[str, Any] = {"weights": weights, "left out": f"needs {needed / 1e9:.1f} GB of free memory"}
    else:
        with ProcessPoolExecutor(1, mp_context=PROCESSES) as process:
            found = {"weights": weights, **process.submit(child, name, step, folder, images, side).result()}
    print(f"{name}, {step}, {images} images: {json.dumps(found)}", file=sys.stderr)
    return found


def child(name: str, step: str, folder: str, images: int, side: int) -> dict[str, Any]:
    """Seconds and peak memory of one step. Saving leaves its folder for the loads."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tiny = build("tiny ViT", "cpu", "float32")  # what is loaded at the first use is nobody's
    for criterion in CRITERIA.values():
        criterion.score(tiny, [torch.randn(1, 3, 32, 32)])
    saved = Path(folder, name.replace("/", "-"))
    if step.startswith("load"):
        with torch.device("meta"):  # what is imported on the way is not the model's
            AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(saved))
        loader = px.from_pretrained if step == "load compact" else AutoModelForImageClassification.from_pretrained
        return cost(lambda: read(loader(saved)))
    model = network(name, side)
    if step in SCORED:
        x = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))
        return cost(lambda: CRITERIA[SCORED[step]].score(model, [x]))
    if step == "select":
        scores = px.Magnitude().score(model)
        return cost(lambda: px.select(scores, sparsity=SPARSITY))
    masks = random_masks(model, SPARSITY)
    masks.apply_(model)
    found = cost(lambda: px.save_pretrained(model, masks, saved))
    files = {"dense": saved / "model.safetensors", "compact": saved / "sparse" / "model.safetensors"}
    return {**found, **{f"{kind}, bytes": path.stat().st_size for kind, path in files.items()}}


def cost(function: Callable[[], Any]) -> dict[str, float]:
    took: list[float] = []
    held = peak_bytes(lambda: took.append(seconds(function, "cpu")), "cpu")
    return {"seconds": took[0], "bytes": held}


def read(model: nn.Module) -> None:
    """A dense file is mapped into memory, and read when its weights are."""
    for tensor in model.state_dict().values():
        tensor.sum()


def network(name: str, side: int, device: str = "cpu") -> nn.Module:
    """A ViT for images of that side, with values drawn faster than transformers draws them."""
    with torch.device("meta"):
        model = vit(1000, image_size=side, **VITS[name]).eval()
    if device == "cpu":
        model.to_empty(device=device)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.05, 0.05, generator=generator)
    return model


def table(results: Mapping[str, Any]) -> str:
    """Seconds and GB of each step, a row for each model."""
    lines = ["| model | weights | " + " | ".join(STEPS) + " |", "|---" * (len(STEPS) + 2) + "|"]
    for name in dict.fromkeys(row["model"] for row in results["weights"]):
        rows = {row["step"]: row for row in results["weights"] if row["model"] == name}
        told = [rows.get(step, {}) for step in STEPS]
        cells = [f"{r['seconds']:.2f} s, {r['bytes'] / 1e9:.2f} GB" if "seconds" in r else "" for r in told]
        weights = next(iter(rows.values()))["weights"]
        lines.append(f"| {name} | {weights / 1e6:.0f} M | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Time and memory against weights, and against images."""
    with picture(path, 11, 6.4) as figure:
        (time_left, time_right), (memory_left, memory_right) = figure.subplots(2, 2)
        for left, right, key, unit, label in (
            (time_left, time_right, "seconds", 1, "CPU seconds"),
            (memory_left, memory_right, "bytes", 1e9, "GB beside the model"),
        ):
            grown(left, results["weights"], "weights", key, unit)
            grown(right, results["images"], "images", key, unit)
            left.set(xlabel="weights", ylabel=label)
            right.set(xlabel=f"images of 224 × 224, {results['seen by']}", ylabel=label)
        time_left.legend(ncols=2)


def grown(axes: Any, rows: list[dict[str, Any]], x: str, key: str, unit: float) -> None:
    """A line for each step, and the slope of what grows in proportion."""
    at = sorted({row[x] for row in rows})
    least = min(row[key] for row in rows if key in row) / unit
    axes.plot(at, [least * n / at[0] for n in at], ":", color=DENSE, label="in proportion")
    for index, step in enumerate(STEPS):
        told = [row for row in rows if row["step"] == step and key in row]
        if told:
            axes.plot([r[x] for r in told], [r[key] / unit for r in told], label=step, **line_style(index))
    axes.set(xscale="log", yscale="log")
    axes.grid(which="major")


if __name__ == "__main__":
    main()

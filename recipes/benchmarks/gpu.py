"""What a GPU makes of it all: every row of the documentation that needs one, by one command.

    python recipes/benchmarks/gpu.py --output_dir outputs/benchmark_gpu

About twenty minutes and 40 GB of GPU memory for ResNet-50, ViT-B/16 and ViT-L/16 with random weights; no network, and
neither `datasets` nor `evaluate`. For each model:

- scoring in float32 and bfloat16: a round in dense forwards over the same images, and its peak memory;
- masks of three rounds: the share of weights in which they are those of the CPU, and a second time those of the first;
- `px.keep_masks`: what it adds to a training step with AdamW;
- inference in float16: dense, with 2:4 zeros in torch's own kernels, and compiled.

Writes benchmark_gpu.json and benchmark_gpu.md, after each row. A row that fails says why, and the others are measured.
`pytest -m cuda` has the tests. Without a GPU, `--device cpu --quick` goes through every row on tiny networks, in
seconds, to where only the device is missing.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import inference_runtimes
import scoring_measures as measures
import torch
import transformers
from random_models import MODELS

import px_hf as px
from px_hf.atomic import whole

DTYPES = ("float32", "bfloat16")
RUNTIMES = ("CUDA fp16", "CUDA fp16, 2:4", "CUDA fp16, torch.compile")
SPARSITY = 0.8
ROUNDS = 3

Row = dict[str, Any]
Measure = Callable[[], Row]


def main(argv: list[str]) -> None:
    args = parse(argv)
    out = Path(args.output_dir)
    results: dict[str, Any] = {"machine": machine(args), "rows": []}
    for model, what, measure in rows(args):
        row: Row = {"model": model, "what": what}
        try:
            row["found"] = measure()
        except Exception as error:  # of one row; also of a device that is missing or too small
            row["not measured"] = f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        results["rows"].append(row)
        print(json.dumps(row), file=sys.stderr)
        write(out / "benchmark_gpu.json", json.dumps(results, indent=2) + "\n")
        write(out / "benchmark_gpu.md", table(results))
        if args.device == "cuda":
            torch.cuda.empty_cache()
    print(table(results))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/benchmark_gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: ResNet-50, ViT-B/16, ViT-L/16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5, help="of each time; the median is shown")
    parser.add_argument("--quick", action="store_true", help="tiny networks and one repeat: does it run?")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU. --device cpu --quick goes through all rows without one.")
    if args.quick:
        args.batch_size, args.repeats = 4, 1
    args.models = args.models or (["tiny ResNet", "tiny ViT"] if args.quick else ["ResNet-50", "ViT-B/16", "ViT-L/16"])
    return args


def rows(args: argparse.Namespace) -> Iterator[tuple[str, str, Measure]]:
    """Model, what is measured of it, and how."""
    for name in args.models:
        for dtype in DTYPES:
            for what, measure in {"scoring": scoring, "masks": masks, "keep_masks": keeping}.items():
                yield name, f"{what}, {dtype}", partial(measure, name, dtype, args)
        for runtime in RUNTIMES:
            yield name, runtime, partial(inference, name, runtime, args)


def scoring(name: str, dtype: str, args: argparse.Namespace) -> Row:
    model = measures.build(name, args.device, dtype)
    images = measures.draw(model, name, args.batch_size)
    found: Row = measures.ratios(model, images, SPARSITY, args.repeats)
    whats = {"forward": 0.0, **dict.fromkeys(measures.CRITERIA, SPARSITY)}
    found["peak, MB"] = {
        what: round(measures.peak(model, images, what, sparsity, 1) / 1e6) for what, sparsity in whats.items()
    }
    found["weights, MB"] = round(sum(p.nbytes for p in model.parameters()) / 1e6)
    return found


def masks(name: str, dtype: str, args: argparse.Namespace) -> Row:
    """Masks of the device beside those of the CPU, and beside themselves."""
    found: Row = {}
    for label, criterion in {**measures.CRITERIA, "LAMP": px.LAMP()}.items():
        each = []
        for device in ("cpu", args.device, args.device):
            model = measures.build(name, device, dtype)
            images = measures.draw(model, name, min(4, args.batch_size))
            each.append(px.prune(model, [images], criterion, sparsity=SPARSITY, rounds=ROUNDS, progress=False))
        found[label] = {
            "as on the CPU": agreement(each[0], each[1]),
            "as the time before": agreement(each[1], each[2]),
        }
    return found


def agreement(one: px.Masks, other: px.Masks) -> float:
    """The share of the weights of which both say the same; 1 only if all of them are."""
    same = sum(int((one.tensors[name] == mask).count_nonzero()) for name, mask in other.tensors.items())
    return same / one.total


def keeping(name: str, dtype: str, args: argparse.Namespace) -> Row:
    model = measures.build(name, args.device, dtype)
    images = measures.draw(model, name, args.batch_size)
    return measures.keeping_masks(model, images, SPARSITY, args.repeats)


def inference(name: str, runtime: str, args: argparse.Namespace) -> Row:
    """Milliseconds of a batch, in turn with the plain runtime, and how far the outputs are apart."""
    model = measures.build(name, "cpu", "float32")
    px.prune(model, [], px.Magnitude(), sparsity=0.5, scope="2:4", progress=False).apply_(model)
    images = measures.draw(model, name, args.batch_size)
    if args.device == "cpu":
        raise inference_runtimes.Unavailable("torch finds no GPU, which this row is about")
    plain = inference_runtimes.prepare(RUNTIMES[0], copy.deepcopy(model), images)
    call = inference_runtimes.prepare(runtime, model, images)
    times: dict[str, list[float]] = {"plain": [], "own": []}
    for _ in range(5 * args.repeats):
        times["plain"].append(measures.seconds(lambda: plain(images), args.device))
        times["own"].append(measures.seconds(lambda: call(images), args.device))
    return {
        "milliseconds": 1e3 * statistics.median(times["own"]),
        "of dense": statistics.median(own / dense for own, dense in zip(times["own"], times["plain"], strict=True)),
    }


def machine(args: argparse.Namespace) -> Row:
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "batch size": args.batch_size,
        "sparsity": SPARSITY,
        "px_hf": px.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def write(file: Path, text: str) -> None:
    with whole(file) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def table(results: Row) -> str:
    about = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    lines = [f"{about}", "", "| model | what | measured |", "|---|---|---|"]
    for row in results["rows"]:
        if "found" not in row:
            lines.append(f"| {row['model']} | {row['what']} | not measured: {row['not measured']} |")
        lines += [f"| {row['model']} | {row['what']}, {key} | {value} |" for key, value in flat(row.get("found", {}))]
    return "\n".join(lines) + "\n"


def flat(found: Row, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in found.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}: ")
        elif isinstance(value, list):
            yield f"{before}{key}", " to ".join(f"{number:.4g}" for number in value)
        else:
            yield f"{before}{key}", f"{value:.6g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main(sys.argv[1:])

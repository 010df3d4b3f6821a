"""What scoring costs: the table of docs/PERFORMANCE.md.

    OMP_NUM_THREADS=1 python recipes/benchmarks/scoring.py --output_dir outputs/benchmark_scoring

An hour and 4 GB of memory for ResNet-50 and ViT-B/16 on one CPU core, no network; `--models ResNet-50` takes a
quarter, `--quick` with tiny networks a few seconds. On CUDA (`--device cuda`, the default where there is one)
minutes; add `--models ResNet-50 ViT-B/16 ViT-L/16` and `--dtype bfloat16`.

Expected, in dense inference forwards over the same 32 images of 224 × 224: a round of Eq. 9 at most 2.3, of
active paths at most 5. Peak memory, beside the model, at most 1.5 times that of such a forward plus one copy of the
weights; active paths on ViT-B/16 need more (docs/PERFORMANCE.md says why). Keeping masks adds at most 2 % to a
training step.

Writes benchmark_scoring.json and benchmark_scoring.png. Times are of one machine: read the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from random_models import MODELS
from scoring_measures import (
    CRITERIA,
    build,
    draw,
    keeping_masks,
    peak,
    phases,
    random_masks,
    ratios,
    share_of_a_process,
)

import px_hf as px
from px_hf.drawing import BLUE, VERMILION, picture
from px_hf.runs.folder import write_json

SECTIONS = ("ratios", "phases", "keeping", "memory", "processes")
TARGETS = {"Eq. 9": 2.3, "active": 5.0}


def main() -> None:
    args = parse()
    if args.child:
        print(json.dumps(child(json.loads(args.child))))
        return
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": machine(args), "models": {}}
    for name in args.models:
        results["models"][name] = measure(name, args)
        write_json(out / "benchmark_scoring.json", results)  # what is known is kept, should a later model fail
    print(table(results))
    draw_figure(results, out / "benchmark_scoring.png")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), help="default: ResNet-50 and ViT-B/16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.8, help="of the masks that a round is timed with")
    parser.add_argument("--repeats", type=int, default=3, help="of each time; the median is shown")
    parser.add_argument("--images", type=int, default=100, help="calibration images of the phases")
    parser.add_argument("--rounds_measured", type=int, default=3, help="from which 100 rounds are extrapolated")
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2], help="numbers of processes; none: skip")
    parser.add_argument("--skip", nargs="*", default=[], choices=SECTIONS)
    parser.add_argument("--quick", action="store_true", help="tiny networks and one repeat: does it run?")
    parser.add_argument("--output_dir", default="outputs/benchmark_scoring")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.batch_size, args.repeats, args.images, args.rounds_measured = 8, 1, 16, 2
    args.models = args.models or (["tiny ResNet", "tiny ViT"] if args.quick else ["ResNet-50", "ViT-B/16"])
    return args


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    settings = {"model": name, "device": args.device, "dtype": args.dtype, "batch_size": args.batch_size}

    def say(key: str, value: dict[str, Any]) -> None:
        found[key] = value
        print(f"{name}, {key}: {json.dumps(value)}", file=sys.stderr)

    model = build(name, args.device, args.dtype)
    if "ratios" not in args.skip:
        say("ratios", ratios(model, draw(model, name, args.batch_size), args.sparsity, args.repeats))
    if "phases" not in args.skip:
        images = draw(model, name, args.images)
        say("phases", phases(model, images, args.batch_size, args.rounds_measured, 100))
    if "keeping" not in args.skip:
        say("keeping masks", keeping_masks(model, draw(model, name, args.batch_size), args.sparsity, args.repeats))
    weights = sum(p.nbytes for p in model.parameters())
    del model
    if "memory" not in args.skip:
        say("memory", memory(settings | {"sparsity": args.sparsity}, weights))
    if "processes" not in args.skip and args.device == "cpu" and args.processes:
        say("processes", scaling(settings | {"images": args.batch_size * 4}, args.processes))
    return found


def memory(settings: Mapping[str, Any], weights: int) -> dict[str, Any]:
    """Peaks of processes of their own, in bytes, and as fractions of what is allowed."""
    what: dict[str, tuple[str, float, int]] = {"forward": ("forward", 0, 1)}
    for name in CRITERIA:
        what |= {f"{name}, dense": (name, 0, 1), f"{name}, pruned": (name, settings["sparsity"], 1)}
        what[f"{name}, pruned, 3 batches"] = (name, settings["sparsity"], 3)
    peaks = {
        row: run_child({**settings, "what": w, "sparsity": s, "batches": b}, 1)[0]["peak"]
        for row, (w, s, b) in what.items()
    }
    allowed = 1.5 * peaks["forward"] + weights
    return {
        "weights": weights,
        "allowed": allowed,
        "peak": peaks,
        "of allowed": {row: value / allowed for row, value in peaks.items() if row != "forward"},
    }


def scaling(settings: Mapping[str, Any], numbers: list[int]) -> dict[str, Any]:
    """One round of Eq. 9 over the same images on several processes of one thread each.

    Speedup is in CPU seconds of the busiest process, which other work on the machine does not upset, and in wall time.
    """
    found: dict[str, Any] = {}
    for number in numbers:
        ranks = run_child({**settings, "what": "process"}, number)
        found[str(number)] = {
            "cpu s of the busiest": max(rank["cpu"] for rank in ranks),
            "wall s": max(rank["wall"] for rank in ranks),
            "numbers sent by each": ranks[0]["sent"],
        }
    first = found[str(numbers[0])]
    for entry in found.values():
        for key in ("cpu s of the busiest", "wall s"):
            entry[f"speedup, {key[:4].strip()}"] = first[key] / entry[key]
    return found


def child(settings: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own measures."""
    name, batch_size = settings["model"], settings["batch_size"]
    model = build(name, settings["device"], settings["dtype"])
    if settings["what"] == "process":
        images = draw(model, name, settings["images"])
        return share_of_a_process(model, images, batch_size, random_masks(model, 0.8))
    images = draw(model, name, batch_size)
    return {"peak": peak(model, images, settings["what"], settings["sparsity"], settings["batches"])}


def run_child(settings: Mapping[str, Any], processes: int) -> list[dict[str, Any]]:
    """The answers of this script's child, one for each of its processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), __file__, "--child", json.dumps(settings)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": str(settings["device"] == "cpu").lower(),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def machine(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    versions = {"px_hf": px.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": args.dtype,
        "batch size": args.batch_size,
        "versions": versions | {"timm": timm.__version__, "python": platform.python_version()},
    }


def table(results: Mapping[str, Any]) -> str:
    lines = ["| model | what | measured | target |", "|---|---|---|---|"]
    for name, found in results["models"].items():
        for row, ratio in found.get("ratios", {}).get("ratio", {}).items():
            lines.append(f"| {name} | {row}, in dense forwards | {ratio:.2f} | {TARGETS[row.split(',')[0]]} |")
        for row, share in found.get("memory", {}).get("of allowed", {}).items():
            peak_mb = found["memory"]["peak"][row] / 1e6
            lines.append(f"| {name} | peak memory, {row} | {peak_mb:.0f} MB, {share:.2f} of allowed | 1 |")
        for row, share in found.get("phases", {}).get("share", {}).items():
            lines.append(f"| {name} | share of 100 rounds, {row} | {share:.1%} | |")
        for number, entry in found.get("processes", {}).items():
            lines.append(
                f"| {name} | speedup, {number} process(es), CPU time | {entry['speedup, cpu']:.2f} | {number} |"
            )
        if "keeping masks" in found:
            added = found["keeping masks"]
            lines.append(f"| {name} | keeping masks, end to end | {added['added, end to end']:+.2%} | 2 % |")
            lines.append(
                f"| {name} | keeping masks, in its hooks | {added['added, time inside the hooks']:+.2%} | 2 % |"
            )
    return "\n".join(lines)


def draw_figure(results: Mapping[str, Any], path: Path) -> None:
    """Ratios and memory beside their targets, and the phases."""
    with picture(path, 11, 1.5 + 1.9 * len(results["models"])) as figure:
        panels = figure.subplots(len(results["models"]), 3, squeeze=False)
        for (left, middle, right), (name, found) in zip(panels, results["models"].items(), strict=True):
            bars = found.get("ratios", {}).get("ratio", {})
            left.barh(list(bars), list(bars.values()), color=BLUE)
            for row, label in enumerate(bars):
                left.plot([TARGETS[label.split(",")[0]]] * 2, [row - 0.4, row + 0.4], color=VERMILION)
            left.set_title(f"{name}: a round, in dense forwards")
            bars = found.get("memory", {}).get("of allowed", {})
            middle.barh(list(bars), list(bars.values()), color=BLUE)
            middle.axvline(1, color=VERMILION)
            middle.set_title("peak memory, of what is allowed")
            bars = found.get("phases", {}).get("share", {})
            right.barh(list(bars), [100 * share for share in bars.values()], color=BLUE)
            right.set_title("100 rounds of Eq. 9, % of the time")
            for axes in (left, middle, right):
                axes.invert_yaxis()


if __name__ == "__main__":
    main()

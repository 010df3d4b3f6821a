"""How fast pruned models run, and in how much memory, next to their dense parent: latency, throughput, MACs.

    OMP_NUM_THREADS=1 python recipes/benchmarks/inference.py

takes the embedded ViT, a copy with 95 % of its weights at zero and one with 2:4 zeros, about three minutes on one CPU
core and no network, and writes outputs/inference/inference.json and inference.png. Expected: zeros alone save no time
in eager mode, torch.compile and ONNX Runtime. In larger models than this one the CSR kernels of px.accelerate_csr_ do
on a CPU, and those of px.accelerate_24_ on a GPU. Other models, by folder or id, in any runtime that is there:

    python recipes/benchmarks/inference.py --model_name_or_path outputs/pruned outputs/shrunken --batch_sizes 1 32
    python recipes/benchmarks/inference.py --architecture vit_base_patch16_224 --prune global=0.95 2:4=0.5

The dense parent is --dense_model_name_or_path, or what the first model's config says it was made from, or, since speed
does not depend on values, --architecture of timm with random weights. --prune makes pruned copies, by magnitude.

All models take turns in each runtime, so that other work on the machine meets all alike: read the ratios. A time is
the median over the rounds, a ratio that of the paired ratios. --clock cpu counts this process's CPU seconds instead of
the time that passes, for a busy machine. Peak memory, at the largest batch size, is that of a process that does
nothing else: weights, code of the runtime and activations, less what it held before (on a GPU: torch's peak there).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import process_memory
import timm
import torch
from inference_runtimes import RUNTIMES, Unavailable, prepare
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers.utils import CONFIG_NAME, logging

import px_hf as px
from px_hf.compact.files import find
from px_hf.drawing import DENSE as GREY
from px_hf.drawing import SERIES, picture
from px_hf.model.targets import prunable
from px_hf.runs.arguments import DEMO_MODELS
from px_hf.runs.folder import write_json
from px_hf.runs.saved_model import example, load

DEMO = str(DEMO_MODELS / "vit")
DENSE = "dense"
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main(argv: list[str]) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()
    if args.peak:
        print(peak_mib(args.peak[0], args.peak[1], args))
        return
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as temporary:
        folders = subjects(args, Path(temporary))
        models = {label: loaded(folder, args) for label, folder in folders.items()}
        described = [describe(label, model) for label, model in models.items()]
        rows: list[dict[str, Any]] = []
        notes: dict[str, str] = {}
        for family in dict.fromkeys(RUNTIMES[name].family for name in args.runtimes):
            names = [name for name in args.runtimes if RUNTIMES[name].family == family]
            console.print(family, highlight=False)
            rows += measured(names, models, args, notes)
        if not args.no_memory:
            console.print("peak memory", highlight=False)
            for row in rows:
                if row["batch_size"] == max(args.batch_sizes):
                    row["peak_memory_mib"] = peak_of(row, folders[row["model"]], argv)
    results = {"machine": machine(args), "clock": args.clock, "models": described, "rows": rows, "not_run": notes}
    write_json(args.output_dir / "inference.json", results)
    plot(rows, list(models), args.output_dir / "inference.png")
    show(results)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", nargs="+", default=[], help="pruned models: folders or ids of the Hub")
    parser.add_argument("--dense_model_name_or_path", help="their dense parent; default: the base model of the first")
    parser.add_argument("--architecture", help="instead: a model of timm with random weights")
    parser.add_argument("--prune", nargs="+", default=[], metavar="SCOPE=SPARSITY", help="pruned copies of the parent")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=list(RUNTIMES))
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--image_size", type=int, help="default: what the image processor or the config says")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--no_memory", action="store_true", help="leave out peak memory, which takes more processes")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs", "inference"))
    parser.add_argument("--peak", nargs=2, metavar=("RUNTIME", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not (args.model_name_or_path or args.dense_model_name_or_path or args.architecture):
        args.dense_model_name_or_path = DEMO
        args.prune = args.prune or ["global=0.95", "2:4=0.5"]
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            raise px.InvalidArgumentError(f"--{name} is {getattr(args, name)}, expected 1 or more.")
    if min(args.batch_sizes) < 1:
        raise px.InvalidArgumentError(f"--batch_sizes has {min(args.batch_sizes)}, expected 1 or more.")
    if args.architecture and not timm.is_model(args.architecture):
        raise px.InvalidArgumentError(f"--architecture {args.architecture} is no model of timm {timm.__version__}.")
    return args


def subjects(args: argparse.Namespace, temporary: Path) -> dict[str, str]:
    """Label -> folder or id of each model, the dense one first.

    Raises:
        InvalidArgumentError: a model is named twice, or the dense parent is not known.
    """
    wanted = dict(pair(text) for text in args.prune)
    dense = args.dense_model_name_or_path
    if args.architecture:
        model = timm.create_model(args.architecture).eval()
        dense = str(temporary / args.architecture)
        px.save_pretrained(model, px.Masks({name: p != 0 for name, p in prunable(model).items()}), dense)
    elif dense is None:
        dense = base_model(args.model_name_or_path[0])
    found = {DENSE: dense}
    for scope, sparsity in wanted.items():
        model = load(dense, args.trust_remote_code)
        masks = px.prune(model, [], px.Magnitude(), sparsity=sparsity, scope=scope, progress=False)
        masks.apply_(model)
        label = f"{scope} {100 * masks.sparsity:.4g} %"
        found[label] = str(temporary / label.replace(":", "_").replace(" ", ""))
        px.save_pretrained(model, masks, found[label])
    for name in args.model_name_or_path:
        label = Path(name).name if Path(name).name not in found else name
        if label in found:
            raise px.InvalidArgumentError(f"--model_name_or_path names {name} twice.")
        found[label] = name
    return found


def pair(text: str) -> tuple[str, float]:
    """Scope and sparsity of "scope=sparsity".

    Raises:
        InvalidArgumentError: the sparsity is no number.
    """
    scope, equals, sparsity = text.rpartition("=")
    try:
        return scope, float(sparsity) if equals else float("nan")
    except ValueError as error:
        raise px.InvalidArgumentError(f"--prune {text}: expected scope=sparsity, such as 2:4=0.5.") from error


def base_model(name: str) -> str:
    """What a pruned model was made from.

    Raises:
        InvalidArgumentError: its config does not say.
    """
    path = find(name, CONFIG_NAME)
    entry = {} if path is None else json.loads(path.read_text(encoding="utf-8")).get("px", {})
    told = str(entry.get("base_model") or "")
    if told and (Path(told).is_dir() or told.count("/") == 1):
        return told
    raise px.InvalidArgumentError(
        f"{name} does not say which model it was made from. Name --dense_model_name_or_path."
    )


def loaded(name: str, args: argparse.Namespace) -> nn.Module:
    """The model in float32, with one image as it takes them as `example`."""
    model = load(name, args.trust_remote_code).float()
    model.example = example(name, model, args.image_size)
    return model


def describe(label: str, model: nn.Module) -> dict[str, Any]:
    """Sizes of a model; its zeros are those of its weights, whoever made them."""
    masks = px.Masks({name: weight.detach() != 0 for name, weight in prunable(model, prune_head=True).items()})
    found = px.report(model, masks, example=model.example)
    return {
        "model": label,
        "parameters": found.parameters,
        "sparsity": found.sparsity,
        "macs": found.macs,
        "effective_macs": found.effective_macs,
    }


def measured(
    runtimes: list[str], models: dict[str, nn.Module], args: argparse.Namespace, notes: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """A row for each batch size, runtime of a family and model; why there is none goes to `notes`."""
    calls = {}
    for runtime in runtimes:
        for label, model in models.items():
            try:
                calls[runtime, label] = prepare(runtime, model, batch(model, args.batch_sizes[0]))
            except Unavailable as reason:
                notes[f"{runtime}, {label}"] = str(reason)
    for size in args.batch_sizes:
        images = {(runtime, label): batch(models[label], size) for runtime, label in calls}
        seconds = in_turn(calls, images, args)
        dense = seconds.get((runtimes[0], DENSE))
        for (runtime, label), taken in seconds.items():
            yield {
                "runtime": runtime,
                "model": label,
                "batch_size": size,
                "milliseconds": 1000 * statistics.median(taken),
                "images_per_second": size / statistics.median(taken),
                "of_dense": statistics.median(t / d for t, d in zip(taken, dense, strict=True)) if dense else None,
            }


def batch(model: nn.Module, size: int) -> Tensor:
    return torch.randn(size, *image_shape(model), generator=torch.Generator().manual_seed(0))


def image_shape(model: nn.Module) -> torch.Size:
    example = model.example
    assert isinstance(example, Tensor)
    return example.shape[1:]


def in_turn(calls: dict[Any, Any], images: dict[Any, Tensor], args: argparse.Namespace) -> dict[Any, list[float]]:
    """Seconds of one call of each, round by round. Fast calls are repeated, to be seen by the clock."""
    clock = CLOCKS[args.clock]
    repeats = {}
    for key, call in calls.items():
        call(images[key])
        start = time.perf_counter()
        call(images[key])
        repeats[key] = max(1, int(0.02 / max(1e-6, time.perf_counter() - start)))
    seconds: dict[Any, list[float]] = {key: [] for key in calls}
    for _ in range(args.rounds):
        for key, call in calls.items():
            start = clock()
            for _ in range(repeats[key]):
                call(images[key])
            seconds[key].append((clock() - start) / repeats[key])
    return seconds


def peak_of(row: dict[str, Any], folder: str, argv: list[str]) -> float | None:
    """What `peak_mib` says in a process of its own, None where it cannot say."""
    command = [sys.executable, __file__, *argv, "--batch_sizes", str(row["batch_size"])]
    done = subprocess.run([*command, "--peak", row["runtime"], folder], capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 and done.stdout.strip() else None


def peak_mib(runtime: str, name: str, args: argparse.Namespace) -> str:
    """Peak memory of running a model, in MiB; empty where the system does not tell (Linux does, CUDA does)."""
    size = args.batch_sizes[0]
    before = process_memory.now() if process_memory.is_told() else None
    model = loaded(name, args)
    images = torch.zeros(size, *image_shape(model))
    call = prepare(runtime, model, images)
    if RUNTIMES[runtime].family.startswith("CUDA"):
        torch.cuda.reset_peak_memory_stats()
        call(images)
        return f"{torch.cuda.max_memory_allocated() / 2**20:.1f}"
    if before is None:
        return ""
    if runtime not in ("eager", "torch.compile"):
        del model  # the runtime has weights of its own
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc keeps what was freed
        trim(0)
    process_memory.restart_peak()  # loading and compiling are not running
    call(images)
    return f"{(process_memory.peak() - before) / 2**20:.1f}"


def machine(args: argparse.Namespace) -> dict[str, Any]:
    """What the times depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": name,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": args.threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "px_hf": px.__version__,
    }


def show(results: dict[str, Any]) -> None:
    """The tables, and what did not run."""
    console = Console(highlight=False)
    models = Table("model", *(["parameters", "weights at zero", "MACs of an image", "without zeros"]))
    for model in results["models"]:
        macs = [f"{model[key]:,}" if model[key] is not None else "-" for key in ("macs", "effective_macs")]
        models.add_row(model["model"], f"{model['parameters']:,}", f"{model['sparsity']:.1%}", *macs)
    console.print(models)
    table = Table("runtime", "batch", "model", "latency", "images/s", "time of dense", "peak memory")
    for row in results["rows"]:
        memory, ratio = row.get("peak_memory_mib"), row["of_dense"]
        table.add_row(
            row["runtime"],
            str(row["batch_size"]),
            row["model"],
            f"{row['milliseconds']:.2f} ms",
            f"{row['images_per_second']:.1f}",
            "-" if ratio is None else f"{ratio:.2f}",
            "-" if memory is None else f"{memory:.0f} MiB",
        )
    console.print(table)
    for what, reason in results["not_run"].items():
        console.print(f"Not run: {what}: {reason}", markup=False)


def plot(rows: Sequence[Mapping[str, Any]], models: Sequence[str], path: Path) -> None:
    """Bars from top to bottom in the order of the rows, a colour for each model; rows without a ratio are left out."""
    shown = [row for row in rows if row["of_dense"] is not None]
    colours = [GREY, *SERIES]
    with picture(path, 8.5, 0.27 * len(shown) + 1.6) as figure:
        axes = figure.add_subplot()
        for index, model in enumerate(models):
            bars = [(y, row["of_dense"]) for y, row in enumerate(shown) if row["model"] == model]
            if bars:
                axes.barh(*zip(*bars, strict=True), color=colours[index % len(colours)], label=model)
        for y, row in enumerate(shown):
            axes.annotate(
                f"{row['of_dense']:.2f} ({row['milliseconds']:.3g} ms)",
                (row["of_dense"], y),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7,
                bbox={"color": "white", "pad": 0},  # hides the line
            )
        axes.axvline(1, color="black", linewidth=1, zorder=0)
        axes.set_yticks(range(len(shown)), [f"{row['runtime']}, batch {row['batch_size']}" for row in shown])
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set_xlim(left=0)
        axes.set_xlabel("time of the dense model in the same kind of runtime = 1")
        figure.legend(loc="outside upper center", ncols=min(4, len(models)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except px.PxError as error:
        sys.exit(f"{type(error).__name__}: {error}")

"""How small a compact copy is, and how long it takes to load: the tables of docs/COMPACT_FORMAT.md.

    OMP_NUM_THREADS=1 python recipes/benchmarks/size.py --output sizes.md

Ten minutes on two CPU cores, 3 GB of memory, 1 GB of disk, no network. ResNet-50 and ViT-B/16 of transformers get
random weights (sizes do not depend on their values) and are pruned by magnitude over all layers, whose densities then
differ, and at random. Expected: sizes at most 1.7 % above the entropy bound. Times are of one machine: read
the ratios.

Sizes. "bound" is `n·H(sparsity) + kept·bits` for the prunable weights plus all else as it is, with INT8 4 bytes more a
row, and the head in INT8 too; "zipped" is the dense
file as `zip` makes it (DEFLATE, level 6).

Times are seconds from the call until the logits of one image are there, because safetensors maps a dense file into
memory and reads none of it before the first forward. "cold": the file is not in the system's cache. "CPU": of all
threads together, which other work on the machine disturbs least. Each figure is the least of its repeats.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Collection
from pathlib import Path

import process_memory
import random_models
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageClassification
from transformers.utils import logging

import px_hf as px
from px_hf.atomic import whole

MODELS = ("ResNet-50", "ViT-B/16")
CRITERIA = {"magnitude": px.Magnitude(), "random": px.Random(seed=0)}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # bfloat16 takes what float16 takes
SIZES = {"fp32": torch.float32, "INT8": torch.float32, "fp16": torch.float16}  # INT8: px.round_to_int8_
LOADERS = {
    "dense": lambda folder: AutoModelForImageClassification.from_pretrained(folder),
    "compact, px_hf": lambda folder: px.from_pretrained(folder),
    "compact, transformers": lambda folder: AutoModelForImageClassification.from_pretrained(
        folder, subfolder="sparse"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.7, 0.9, 0.95, 0.98])
    parser.add_argument("--repeats", type=int, default=5, help="loads of each kind; the least is shown")
    parser.add_argument("--tables", nargs="+", default=["sizes", "loads"], choices=["sizes", "loads"])
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    parser.add_argument("--peak", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.peak:
        print(peak_mib(*args.peak))
        return
    sizes = ["| model | pruned by | dtype | sparsity | bound | compact | over bound | dense | dense, zipped |"]
    sizes += ["|" + "---|" * 9]
    loads = [
        "| model | dtype | sparsity | loaded | logits | cold | CPU | to dense | cold | CPU | peak memory | to dense |"
    ]
    loads += ["|" + "---|" * 12]
    for name in args.models:
        for sparsity in args.sparsities:
            for criterion in CRITERIA if "sizes" in args.tables else ():
                sizes += size_rows(name, criterion, sparsity)
            for dtype in DTYPES if "loads" in args.tables else ():
                loads += load_rows(name, dtype, sparsity, args.repeats)
    text = "\n".join([*sizes, "", *loads]) + "\n"
    print(text)
    if args.output:
        with whole(args.output) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def pruned(name: str, criterion: str, sparsity: float) -> tuple[nn.Module, px.Masks]:
    torch.manual_seed(0)
    model = random_models.MODELS[name]().eval()
    masks = px.prune(model, [], CRITERIA[criterion], sparsity=sparsity, progress=False)
    masks.apply_(model)
    return model, masks


def size_rows(name: str, criterion: str, sparsity: float) -> list[str]:
    model, masks = pruned(name, criterion, sparsity)
    rows = []
    for short, dtype in SIZES.items():
        model.to(dtype)
        coded = px.round_to_int8_(model) if short == "INT8" else {}

        def stored(name: str, tensor: Tensor, count: int, coded: Collection[str] = tuple(coded)) -> int:
            return count + 4 * len(tensor) if name in coded else count * tensor.itemsize

        with tempfile.TemporaryDirectory() as folder:
            px.save_pretrained(model, masks, Path(folder, "out"))
            dense, compact = Path(folder, "out/model.safetensors"), Path(folder, "out/sparse/model.safetensors")
            state = model.state_dict()
            others = sum(stored(key, tensor, tensor.numel()) for key, tensor in state.items() if key not in masks)
            values = sum(stored(key, state[key], int(mask.sum())) for key, mask in masks.items())
            bound = others + masks.total * entropy(masks.sparsity) / 8 + values
            size = compact.stat().st_size
            zipped = f"{zipped_bytes(dense) / 1e6:.2f} MB" if criterion == "magnitude" else ""
            rows.append(
                f"| {name} | {criterion} | {short} | {sparsity:.0%} | {bound / 1e6:.2f} MB | {size / 1e6:.2f} MB "
                f"| {size / bound - 1:+.2%} | {dense.stat().st_size / 1e6:.1f} MB | {zipped} |"
            )
        print(rows[-1], file=sys.stderr)
    return rows


def load_rows(name: str, dtype: str, sparsity: float, repeats: int) -> list[str]:
    model, masks = pruned(name, "magnitude", sparsity)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        px.save_pretrained(model.to(DTYPES[dtype]), masks, out)
        del model, masks
        times: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in LOADERS}
        for _ in range(repeats + 1):
            for kind in LOADERS:  # in turn, so that the machine's other work meets all alike
                evict(out)
                cold, _ = timed(kind, out)
                warm, cpu = timed(kind, out)
                times[kind].append((warm, cold, cpu))
        rows: list[str] = []
        dense: tuple[list[float], int] | None = None
        for kind, seconds in times.items():
            least = [min(column) for column in zip(*seconds[1:], strict=True)]
            command = [sys.executable, __file__, "--peak", kind, str(out)]
            peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            dense = dense or (least, peak)
            ratios = " | ".join(f"{mine / other:.2f}" for mine, other in zip(least, dense[0], strict=True))
            rows.append(
                f"| {name} | {dtype} | {sparsity:.0%} | {kind} | {' | '.join(f'{value:.3f} s' for value in least)} "
                f"| {ratios} | {peak} MiB | {peak / dense[1]:.2f} |"
            )
            print(rows[-1], file=sys.stderr)
    return rows


@torch.inference_mode()
def timed(kind: str, folder: Path) -> tuple[float, float]:
    """Seconds until the first logits are there, by the clock and of CPU."""
    image = torch.zeros(1, 3, 224, 224)
    start, cpu = time.perf_counter(), time.process_time()
    model = LOADERS[kind](folder)
    model(image.to(model.dtype))
    return time.perf_counter() - start, time.process_time() - cpu


def peak_mib(kind: str, folder: str) -> int:
    """What loading a model and reading all its weights adds to this process's memory at the peak, in MiB.

    Pages of a file that is mapped into memory count, though the system may drop them. Linux only.
    """
    with torch.device("meta"):  # what is imported on the way is not the model's
        AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))
    process_memory.restart_peak()
    before = process_memory.now()
    model = LOADERS[kind](folder)
    for tensor in model.state_dict().values():
        tensor.sum()
    return (process_memory.peak() - before) // 2**20


def entropy(probability: float) -> float:
    """Of a coin, in bits."""
    rest = 1 - probability
    return sum(-p * math.log2(p) for p in (probability, rest) if p)


def zipped_bytes(file: Path) -> int:
    stream, size = zlib.compressobj(6), 0
    with file.open("rb") as content:
        while block := content.read(2**20):
            size += len(stream.compress(block))
    return size + len(stream.flush())


def evict(folder: Path) -> None:
    """Ask the system to forget the cached content of all files in `folder`."""
    if not hasattr(os, "posix_fadvise"):  # not on this platform: "cold" is then warm
        return
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()

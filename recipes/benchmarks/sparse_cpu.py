"""Do torch's own sparse kernels beat its dense ones on a CPU? The tables of docs/SPEED.md.

    OMP_NUM_THREADS=1 python recipes/benchmarks/sparse_cpu.py --output sparse.md

Three minutes on one CPU core. Layers of ViT-B/16 and ResNet-50 with random zeros, as shares of the time of the dense
layer (`F.linear`, `F.conv2d`), the median of paired ratios of CPU seconds. Kernels of torch:

- CSR: `torch.sparse_csr` @ dense, by MKL, over all rows at once, with the transposes that a layer needs;
- CSR, 64 rows: the same on 64 rows at a time, which is `px.accelerate_csr_`;
- F.linear(CSR): the same product as torch calls it for a sparse weight;
- COO: `torch.sparse_coo` @ dense, with the transposes;
- BSR 4×4: blocks of 4 × 4, nearly all of which hold a non-zero where zeros are not in blocks.

Where zeros are whole blocks of 32 × 32 (`scope="block:32"`):

- BSR 32×32: torch's own product of such a matrix;
- blocks of 32: a dense product for each row of blocks, which is `px.accelerate_blocks_`.

Convolutions: `F.unfold` to columns, then CSR @ columns, image by image.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from px_hf.atomic import whole
from px_hf.kernels.blocks import BlockLinear
from px_hf.kernels.csr import CSRLinear

Ways = dict[str, Callable[[], Tensor]]

LINEAR = ((768, 768), (3072, 768), (768, 3072))  # outputs, inputs
TOKENS = (197, 8 * 197)  # of 1 and 8 images
CONVOLUTIONS = ((64, 3, 56), (128, 3, 28), (256, 3, 14), (512, 3, 7))  # channels, kernel, height and width
IMAGES = (1, 8)
BLOCK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Sparse .* tensor support is in beta", UserWarning)
    lines = header("linear layer, outputs × inputs", "rows", args.sparsities)
    with torch.inference_mode():
        for outputs, inputs in LINEAR:
            for rows in TOKENS:
                for ways in (linear, in_blocks):
                    lines += table_rows(f"{outputs} × {inputs}", rows, args, partial(ways, outputs, inputs, rows))
        lines += ["", *header("convolution, channels, kernel, size", "images", args.sparsities)]
        for channels, kernel, size in CONVOLUTIONS:
            for images in IMAGES:
                name = f"{channels}, {kernel} × {kernel}, {size} × {size}"
                lines += table_rows(name, images, args, partial(convolution, channels, kernel, size, images))
    text = "\n".join(lines) + "\n"
    print(text)
    if args.output:
        with whole(args.output) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def header(first: str, second: str, sparsities: list[float]) -> list[str]:
    columns = [first, second, "dense", "kernel", *(f"{sparsity:.0%}" for sparsity in sparsities)]
    return ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]


def zeroed(*shape: int, sparsity: float) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape) * (torch.rand(shape) >= sparsity)


def linear(outputs: int, inputs: int, rows: int, sparsity: float) -> Ways:
    """The dense layer first, then the ways to compute the same."""
    weight, x = zeroed(outputs, inputs, sparsity=sparsity), torch.randn(rows, inputs)
    layer = nn.Linear(inputs, outputs)
    layer.weight.copy_(weight)
    bias, sliced = layer.bias.detach(), CSRLinear(layer)
    csr, coo, bsr = weight.to_sparse_csr(), weight.to_sparse(), weight.to_sparse_bsr((4, 4))
    return {
        "dense": lambda: F.linear(x, weight, bias),
        "CSR": lambda: (csr @ x.t()).t().add(bias),
        "CSR, 64 rows": lambda: sliced(x),
        "F.linear(CSR)": lambda: F.linear(x, csr).add_(bias),
        "COO": lambda: torch.sparse.mm(coo, x.t().contiguous()).t().add(bias),
        "BSR 4×4": lambda: (bsr @ x.t()).t().add(bias),
    }


def in_blocks(outputs: int, inputs: int, rows: int, sparsity: float) -> Ways:
    """Likewise, of a weight whose zeros are whole blocks."""
    mask = zeroed(outputs // BLOCK, inputs // BLOCK, sparsity=sparsity) != 0
    weight = torch.randn(outputs, inputs) * mask.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    x, layer = torch.randn(rows, inputs), nn.Linear(inputs, outputs)
    layer.weight.copy_(weight)
    bias, blocks, bsr = layer.bias.detach(), BlockLinear(layer, BLOCK), weight.to_sparse_bsr((BLOCK, BLOCK))
    return {
        "dense": lambda: F.linear(x, weight, bias),
        f"BSR {BLOCK}×{BLOCK}": lambda: (bsr @ x.t()).t().add(bias),
        f"blocks of {BLOCK}": lambda: blocks(x),
    }


def convolution(channels: int, kernel: int, size: int, images: int, sparsity: float) -> Ways:
    """Stride 1, as many outputs as inputs."""
    weight = zeroed(channels, channels, kernel, kernel, sparsity=sparsity)
    x, csr = torch.randn(images, channels, size, size), weight.flatten(1).to_sparse_csr()

    def by_columns() -> Tensor:
        columns = F.unfold(x, kernel, padding=kernel // 2)
        return torch.stack([csr @ image for image in columns]).view(x.shape)

    return {"dense": lambda: F.conv2d(x, weight, padding=kernel // 2), "im2col, CSR": by_columns}


def table_rows(name: str, count: int, args: argparse.Namespace, ways: Callable[[float], Ways]) -> list[str]:
    ratios: dict[str, list[str]] = {}
    dense = 0.0
    for sparsity in args.sparsities:
        calls = ways(sparsity)
        expected = calls["dense"]()
        for call in calls.values():
            torch.testing.assert_close(call(), expected, rtol=1e-3, atol=1e-2)
        seconds = in_turn(calls, args.rounds)
        dense = statistics.median(seconds["dense"])
        for kind in calls.keys() - {"dense"}:
            ratio = statistics.median(t / d for t, d in zip(seconds[kind], seconds["dense"], strict=True))
            ratios.setdefault(kind, []).append(f"{ratio:.2f}")
        order = [kind for kind in calls if kind != "dense"]
    return [f"| {name} | {count} | {1000 * dense:.1f} ms | {kind} | {' | '.join(ratios[kind])} |" for kind in order]


def in_turn(calls: Ways, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each call, round by round."""
    seconds: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(rounds):
        for kind, call in calls.items():
            start = time.process_time()
            call()
            seconds[kind].append(time.process_time() - start)
    return seconds


if __name__ == "__main__":
    main()

"""Bytes on the wire and in memory when a sharded model is pruned: the formulae of docs/SCALE.md beside counts.

    python recipes/benchmarks/sharded.py --processes 2 4

A minute on a CPU, no network. A small ViT with random weights is sharded by `fully_shard` over processes that talk by
gloo; each collective is counted as it is called, by what this process hands in or gets. Prints a table of the formula
and the count, per process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from random_models import vit
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import px_hf as px
from px_hf.distributed import Processes, processes
from px_hf.model.targets import prunable

SHAPE: dict[str, Any] = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 256,
}
ROUNDS = 3
HISTOGRAM = 2**16 * 8
"""Bytes of one histogram of a digit, int64."""

Counts = dict[str, int]


@contextmanager
def counting() -> Iterator[Counts]:
    """Bytes of what collectives give this process (gathered), or of what they add up.

    Checks that all agree, of a hundred bytes each, go another way and are left out.
    """
    counts: Counts = {"gathered": 0, "added up": 0}
    full, gather, reduce = DTensor.full_tensor, dist.all_gather, dist.all_reduce

    def counted_full(tensor: Any, **settings: Any) -> Tensor:
        found = full(tensor, **settings)
        counts["gathered"] += found.nbytes
        return found

    def counted_gather(parts: list[Tensor], tensor: Tensor, **settings: Any) -> Any:
        counts["gathered"] += sum(part.nbytes for part in parts)
        return gather(parts, tensor, **settings)

    def counted_reduce(tensor: Tensor, *arguments: Any, **settings: Any) -> Any:
        counts["added up"] += tensor.nbytes
        return reduce(tensor, *arguments, **settings)

    with (
        mock.patch.object(DTensor, "full_tensor", counted_full),
        mock.patch.object(dist, "all_gather", counted_gather),
        mock.patch.object(dist, "all_reduce", counted_reduce),
    ):
        yield counts


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(Path(args.child))
        return
    print("| processes | what | bytes | formula | counted |\n|---|---|---|---|---|")
    for number in args.processes:
        for row in launched(number):
            print("| " + " | ".join(str(cell) for cell in (number, *row)) + " |")


def launched(processes: int) -> list[list[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.json")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *launch, __file__, "--child", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows: list[list[Any]] = json.loads(file.read_text())
        return rows


def child(file: Path) -> None:
    torch.set_num_threads(1)
    group = processes()
    rows = counted(group)
    if group.is_main:
        file.write_text(json.dumps(rows))
    gc.collect()
    dist.destroy_process_group()


def counted(group: Processes) -> list[list[Any]]:
    """What, key, formula, count of this process."""
    torch.manual_seed(0)
    model = vit(10, **SHAPE).eval()
    all_weights = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() for p in prunable(model).values())
    mesh = init_device_mesh("cpu", (group.world_size,))
    for layer in model.get_submodule("vit.layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batches = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    rows: list[list[Any]] = []

    def row(what: str, key: str, formula: int, count: int) -> None:
        rows.append([what, key, formula, count])

    def prune(criterion: px.Criterion) -> tuple[px.Masks, Counts]:
        with counting() as counts:
            masks = px.prune(model, batches, criterion, sparsity=0.8, rounds=ROUNDS, progress=False)
        return masks, counts

    masks, counts = prune(px.Magnitude())
    row("prune, Magnitude", "gathered", 4 * weights, counts["gathered"])
    row("prune, Magnitude", "added up", 2 * HISTOGRAM, counts["added up"])
    _, counts = prune(px.PX())
    row("prune, Eq. 9, 3 rounds", "gathered", 2 * 4 * all_weights + (ROUNDS - 1) * weights, counts["gathered"])
    row("prune, Eq. 9, 3 rounds", "added up", ROUNDS * 2 * HISTOGRAM, counts["added up"])
    _, counts = prune(px.PX("active", power=0.25))
    row("prune, active, 3 rounds", "gathered", 2 * 4 * all_weights + (ROUNDS - 1) * weights, counts["gathered"])
    row("prune, active, 3 rounds", "added up", ROUNDS * (8 * weights + 2 * HISTOGRAM), counts["added up"])
    masks.apply_(model)
    assert isinstance(masks, px.ShardedMasks)
    row("masks", "held", weights // group.world_size, sum(part.nbytes for part in masks.parts.values()))
    with px.keep_masks(torch.optim.SGD(model.parameters(), lr=0.1), model, masks) as keeper:
        row("keep_masks", "held", 4 * weights // group.world_size, sum(b.nbytes for b in keeper._kept_bits.values()))
    with tempfile.TemporaryDirectory() as folder, counting() as counts:
        px.save_pretrained(model, masks, Path(folder, "model"))
    row("save_pretrained", "gathered", 4 * all_weights + weights, counts["gathered"])
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])

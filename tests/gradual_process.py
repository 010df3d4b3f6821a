"""What each process of `test_gradual.py` runs under torchrun. Imports no more than it needs."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import px_hf as px


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip


def train(folder: Path, data: str) -> None:
    """Prune in four rounds of six steps, all processes on the same images, or each on its own."""
    group = px.distributed.processes()
    model = network()
    called = DistributedDataParallel(model) if group.world_size > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    batches = [images(4, seed=1), images(3, seed=2)]
    criterion = px.PX() if data == "own" else px.PX("active", power=0.25)  # the first has its g from each process
    pruning = px.gradual_pruning(optimizer, called, batches, criterion, sparsity=0.8, total_steps=6, rounds=4)
    for step in range(6):
        called.train()
        own = group.rank if data == "own" else 0
        seen = images(4, seed=100 + 10 * step + own) * 3**own  # so that statistics differ by more than a little
        nn.functional.cross_entropy(called(seen), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not pruning.masks.revived(model)
    pruning.remove()
    pruning.masks.save(folder / f"{data} {group.rank} of {group.world_size}.safetensors")
    torch.save(model.state_dict(), folder / f"{data} {group.rank} of {group.world_size}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for kind in sys.argv[2:]:
        train(Path(sys.argv[1]), kind)
        gc.collect()  # DDP holds the group
    dist.destroy_process_group()

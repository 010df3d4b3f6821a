"""What each process of `test_statistics.py` runs under torchrun. Imports no more than it needs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import px_hf as px

X = torch.randn(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BATCHES = [X[:4], X[4:]]

REPAIRS = {
    "batchnorm": lambda model, masks: px.recalibrate_batchnorm_(model, BATCHES),
    "correct": lambda model, masks: px.correct_(model, masks, BATCHES, scale=True),
    "fold": lambda model, masks: px.fold_removed_(model, masks, BATCHES),
}


def repaired(name: str) -> nn.Module:
    """A network whose masks remove channels, repaired."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 5),
    )  # fmt: skip
    mask = torch.ones(8, 8, 3, 3) > 0
    mask[:, [2, 5]] = False
    REPAIRS[name](model, px.Masks({"3.weight": mask}))
    return model


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = px.distributed.processes()
    torch.save([repaired(name).state_dict() for name in REPAIRS], Path(sys.argv[1]) / f"{group.rank}.pt")
    dist.destroy_process_group()

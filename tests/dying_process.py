"""What each process of `test_dying.py` runs, without a launcher that would end the others. Imports little."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import px_hf as px


class Dying(px.PX):
    """Process 1 does not survive its second round."""

    def score(self, *arguments: Any, **settings: Any) -> dict[str, Tensor]:
        global scored
        scored += 1
        if scored == 2 and group.rank == 1:
            if sys.argv[2] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk with the images is gone")
        return super().score(*arguments, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    group, scored = px.distributed.processes(), 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5))
    batches = [torch.randn(2, 3, 2, 2) for _ in range(4)]
    masks = px.prune(model, batches, Dying(paths=sys.argv[3]), sparsity=0.5, rounds=4, progress=False)
    masks.save(Path(sys.argv[1]) / "masks.safetensors")

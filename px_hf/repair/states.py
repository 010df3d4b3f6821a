"""What flows between the parts of a network, for many images: on the disk, so that memory does not grow with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class States:
    """Lists of tensors under keys, each in a file of a folder."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def put(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Keep them, in place of what was kept under that key."""
        contents = {str(i): t.detach().to("cpu", copy=True).contiguous() for i, t in enumerate(tensors)}
        save_file(contents, self._folder / key)

    def get(self, key: str, device: torch.device) -> list[Tensor]:
        """What was kept, as new tensors."""
        contents = load_file(self._folder / key)
        return [contents[str(i)].to(device) for i in range(len(contents))]

"""Images as a model takes them, computed once and kept in files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data import Split


@dataclass(frozen=True)
class Pixels(torch.utils.data.Dataset):
    """Images as the model takes them, float32 [N, 3, H, W] in a memory-mapped file, with classes int64 [N]."""

    name: str
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, positions: np.ndarray | slice, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(np.array(self.images[positions]))
        return images.to(device), torch.from_numpy(np.array(self.labels[positions])).to(device)

    def __getitems__(self, positions: range) -> list[dict[str, Any]]:
        images, labels = self.batch(slice(positions.start, positions.stop))
        return [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]

    def first(self, count: int) -> Pixels:
        return Pixels(self.name, self.images[:count], self.labels[:count])


def write_pixels(split: Split, folder: Path, name: str) -> None:
    """Computes the pixels of a split and writes them to two files of that name."""
    path = folder / f"{name}.npy"
    size = split.__getitems__([0])[0]["pixel_values"].shape
    file = np.lib.format.open_memmap(path, "w+", np.float32, (len(split), *size))
    for start in tqdm(range(0, len(split), 256), desc=f"Pixels of {split.name}", unit="batch", leave=False):
        positions = range(start, min(start + 256, len(split)))
        file[start : start + 256] = np.stack([item["pixel_values"].numpy() for item in split.__getitems__(positions)])
    file.flush()
    np.save(folder / f"{name}.labels.npy", split.labels)


def read_pixels(folder: Path, name: str) -> Pixels:
    """What `write_pixels` wrote, the images memory-mapped."""
    return Pixels(name, np.load(folder / f"{name}.npy", mmap_mode="r"), np.load(folder / f"{name}.labels.npy"))

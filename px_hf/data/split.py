"""One split: rows of a dataset with checked labels, read lazily."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from ..errors import DataError

Pixels = Callable[[list[Image.Image]], torch.Tensor]
"""From n RGB images to `[n, 3, H, W]`."""


@dataclass(frozen=True)
class Split(torch.utils.data.Dataset):
    """Labelled images; an item is `{"pixel_values": float tensor [3, H, W], "labels": int}`.

    `rows` holds the undecoded images in the column `image`; `indices` says which of its rows belong to
    the split (a validation split may be a share of `train`), and `labels[i]` is the class of row
    `indices[i]`. Errors count rows as the user's dataset does.
    """

    name: str
    rows: Dataset
    image: str
    indices: np.ndarray
    labels: np.ndarray
    pixels: Pixels | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def select(self, positions: np.ndarray) -> Split:
        """The part of the split at these positions (not row numbers)."""
        return replace(self, indices=self.indices[positions], labels=self.labels[positions])

    def sample(self, limit: int | None, seed: int) -> Split:
        """At most `limit` examples, drawn at random."""
        if limit is None or limit >= len(self):
            return self
        return self.select(np.sort(np.random.default_rng(seed).permutation(len(self))[:limit]))

    def with_pixels(self, pixels: Pixels) -> Split:
        """The same examples, turned into tensors by `pixels`."""
        return replace(self, pixels=pixels)

    def images(self, positions: Sequence[int]) -> list[Image.Image]:
        """RGB images.

        Raises:
            DataError: one is unreadable; names split and row.
        """
        rows = [int(self.indices[position]) for position in positions]
        return [self._read(row, value) for row, value in zip(rows, self.rows[rows][self.image], strict=True)]

    def _read(self, row: int, value: dict[str, Any] | None) -> Image.Image:
        try:
            return to_rgb(ImageFeature().decode_example(value))
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, its own, ... for bad files
            path = (value or {}).get("path")
            raise DataError(
                f"Unreadable image in split {self.name!r} at index {row}{f' ({path})' if path else ''}, column "
                f"{self.image!r}: "
                f"{type(error).__name__}: {error}. Repair or remove that example."
            ) from error

    def __getitem__(self, position: int) -> dict[str, Any]:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """A whole batch: `DataLoader` calls this where it exists, and processors are faster on batches."""
        if self.pixels is None:
            raise DataError(f"Split {self.name!r} has no transform: call with_pixels(...) first.")
        images = self.images(positions)
        try:
            pixel_values = self.pixels(images)
        except DataError as error:
            raise DataError(f"Split {self.name!r}, column {self.image!r}: {error}") from error
        labels = self.labels[list(positions)].tolist()
        return [{"pixel_values": image, "labels": label} for image, label in zip(pixel_values, labels, strict=True)]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB: the only place where modes are converted.

    Transparent pixels are shown on white, as in a viewer; 16-bit grayscale is scaled, where Pillow's own
    conversion clips it to white.
    """
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel
        values = np.asarray(image, dtype=np.float32)
        top = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0.0) > 255.0 else 255.0
        image = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

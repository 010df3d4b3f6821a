"""The embedded segmentation task: rendered scenes of four shapes on a textured ground. Needs no network.

Colours say nothing about the class; only the outline does. Later shapes hide earlier ones.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from datasets import Dataset, DatasetDict, Features, Image
from PIL import Image as Pillow
from PIL import ImageDraw

SIZE = 64
SCENE_CLASSES = ["ground", "disc", "square", "triangle", "star"]
VOID = 255
_COUNTS = {"train": 400, "validation": 60, "test": 200}
_SCALE = 4  # drawn so much larger, then averaged


@cache
def scenes() -> DatasetDict:
    """Columns `image` (RGB, 64 × 64) and `annotation` (mode L, classes of `SCENE_CLASSES`; 255 where shapes touch)."""
    features = Features({"image": Image(), "annotation": Image()})
    splits = {}
    for seed, (split, count) in enumerate(_COUNTS.items()):
        rng = np.random.default_rng([20, seed])
        drawn = [scene(rng) for _ in range(count)]
        columns = {"image": [image for image, _ in drawn], "annotation": [classes for _, classes in drawn]}
        splits[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(splits)


def scene(rng: np.random.Generator) -> tuple[Pillow.Image, Pillow.Image]:
    """An image and its map of classes."""
    side = SIZE * _SCALE
    waves = rng.normal(size=(2, 3)) * 0.25
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    ripple = np.sin(x[..., None] * waves[0] + y[..., None] * waves[1])
    ground = rng.integers(40, 216, 3) + 30 * ripple
    image = Pillow.fromarray(ground.clip(0, 255).astype(np.uint8)).resize((side, side), Pillow.Resampling.NEAREST)
    classes = Pillow.new("L", (side, side), 0)
    for _ in range(rng.integers(1, 4)):
        label = int(rng.integers(1, len(SCENE_CLASSES)))
        outline = _outline(label, rng)
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        ImageDraw.Draw(image).polygon(outline, fill=colour)
        ImageDraw.Draw(classes).polygon(outline, fill=label, outline=VOID, width=_SCALE)
    small = np.asarray(image.resize((SIZE, SIZE), Pillow.Resampling.BOX), dtype=np.float64)
    noisy = small + rng.normal(scale=8, size=small.shape)
    image = Pillow.fromarray(noisy.clip(0, 255).round().astype(np.uint8))
    return image, classes.resize((SIZE, SIZE), Pillow.Resampling.NEAREST)


def _outline(label: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """The corners of a shape at a random place, of random size and rotation."""
    radius, turn = _SCALE * rng.uniform(11, 18), rng.uniform(0, 2 * math.pi)
    centre = _SCALE * rng.uniform(12, SIZE - 12, 2)
    corners, radii = {1: (40, [1.0]), 2: (4, [1.0]), 3: (3, [1.1]), 4: (10, [1.2, 0.45])}[label]
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    return [
        (
            centre[0] + radius * radii[i % len(radii)] * math.cos(a),
            centre[1] + radius * radii[i % len(radii)] * math.sin(a),
        )
        for i, a in enumerate(angles)
    ]

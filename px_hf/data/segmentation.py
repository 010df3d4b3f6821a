"""Images with a class for every pixel: columns, splits, checks, and the transform of both together.

raw = read_dataset(DataSource(train_file="train.parquet", test_file="test.parquet"))
task = segmentation_task(raw, Preprocess(processor), labels=["road", "car"], ignore_index=255)
task.train[0]    # {"pixel_values": [3, H, W], "labels": int64 [H, W], -100 where a pixel does not count}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import crop, hflip

from ..errors import DataError
from .columns import names_in, only_column, require_column, rows_of, table, validation_split_of
from .split import to_rgb
from .transform import Preprocess

IGNORED = -100
"""The label of pixels that do not count: what torch's cross-entropy and transformers' Trainer leave out."""

_IMAGE_NAMES = ("image", "images", "img", "pixel_values")
_ANNOTATION_NAMES = (
    "annotation", "annotations", "mask", "masks", "label", "labels", "segmentation", "segmentation_mask",
    "semantic_segmentation",
)  # fmt: skip


@dataclass(frozen=True)
class MapSplit(torch.utils.data.Dataset):
    """Images and maps of classes; an item is `{"pixel_values": [3, H, W], "labels": int64 [H, W]}`.

    `rows` holds both columns undecoded; `indices` says which of its rows belong to the split. The map is resized to
    the processor's H × W by its nearest pixels. `reduce_labels`: 0 does not count, and classes start with 1.
    """

    name: str
    rows: Dataset
    image: str
    annotation: str
    indices: np.ndarray
    num_labels: int
    ignore_index: int
    reduce_labels: bool
    pixels: Preprocess
    random_crop: bool = False
    horizontal_flip: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, limit: int | None, seed: int) -> MapSplit:
        """At most `limit` examples, drawn at random."""
        if limit is None or limit >= len(self):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:limit])
        return replace(self, indices=self.indices[chosen])

    def augmented(self, random_crop: bool, horizontal_flip: bool) -> MapSplit:
        """With a random crop (25 to 100 % of the area) and a random mirror image, of image and map alike."""
        return replace(self, random_crop=random_crop, horizontal_flip=horizontal_flip)

    def pair(self, position: int) -> tuple[Image.Image, Image.Image]:
        """The RGB image and its map, int32 with `IGNORED`, of the same size.

        Raises:
            DataError: one is unreadable, of two sizes, has no single number a pixel, or a number that is no class;
                names split, row and column.
        """
        row = int(self.indices[position])
        values = self.rows[row]
        image = to_rgb(self._decoded(values, self.image, row))
        drawn = self._decoded(values, self.annotation, row)
        where = f"split {self.name!r} at index {row}, column {self.annotation!r}"
        classes = np.asarray(drawn).astype(np.int32)
        if classes.ndim != 2:
            raise DataError(
                f"The map of {where}, is a picture of mode {drawn.mode}; expected one class number for each pixel "
                "(modes L, P, I). Convert colours to classes first."
            )
        if drawn.size != image.size:
            raise DataError(f"The map of {where}, is {drawn.size}, its image {image.size} (width, height).")
        ignored = classes == self.ignore_index
        if self.reduce_labels:
            ignored |= classes == 0
            classes = classes - 1
        classes[ignored] = IGNORED
        counted = classes[~ignored]
        if counted.size and (counted.min() < 0 or counted.max() >= self.num_labels):
            found = sorted(set(counted[(counted < 0) | (counted >= self.num_labels)].tolist()))
            raise DataError(
                f"The map of {where}, has the classes {names_in(found)}, expected 0 to {self.num_labels - 1}, or "
                f"{self.ignore_index} for pixels that do not count{' (after reduce_labels)' * self.reduce_labels}."
            )
        return image, Image.fromarray(classes)

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        image, drawn = self._vary(*self.pair(position))
        pixel_values = self.pixels([image])[0]
        size = (pixel_values.shape[-1], pixel_values.shape[-2])
        labels = np.array(drawn.resize(size, Image.Resampling.NEAREST), dtype=np.int64)
        return {"pixel_values": pixel_values, "labels": torch.from_numpy(labels)}

    def _vary(self, image: Image.Image, drawn: Image.Image) -> tuple[Image.Image, Image.Image]:
        if self.random_crop:
            window = RandomResizedCrop.get_params(image, scale=[0.25, 1.0], ratio=[3 / 4, 4 / 3])
            image, drawn = crop(image, *window), crop(drawn, *window)
        if self.horizontal_flip and torch.rand(()) < 0.5:
            image, drawn = hflip(image), hflip(drawn)
        return image, drawn

    def require_labels(self) -> None:
        """Some pixel of the split must count: otherwise there is nothing to learn or to measure.

        Raises:
            DataError: none does.
        """
        if not any(bool((np.asarray(self.pair(position)[1]) >= 0).any()) for position in range(len(self))):
            raise DataError(
                f"No pixel of split {self.name!r}, column {self.annotation!r}, counts: all are {self.ignore_index}"
                f"{' or 0' * self.reduce_labels}. If the maps of that split are not published, leave it out."
            )

    def _decoded(self, values: dict[str, Any], column: str, row: int) -> Image.Image:
        if values[column] is None:
            raise DataError(
                f"No {'map' if column == self.annotation else 'image'} in split {self.name!r} at index {row}, column "
                f"{column!r}. Remove that example; if the maps of the split are not published, leave the split out."
            )
        try:
            return ImageFeature().decode_example(values[column])
        except Exception as error:  # Pillow raises many kinds for bad files
            raise DataError(
                f"Unreadable image in split {self.name!r} at index {row}, column {column!r}: {type(error).__name__}: "
                f"{error}. Repair or remove that example."
            ) from error


@dataclass(frozen=True)
class SegmentationTask:
    """Class names in label order, and splits that share no example; `test` is None if there is none."""

    labels: list[str]
    train: MapSplit
    validation: MapSplit
    test: MapSplit | None


def segmentation_task(
    raw: DatasetDict,
    pixels: Preprocess,
    *,
    labels: Sequence[str],
    ignore_index: int = 255,
    reduce_labels: bool = False,
    image_column: str | None = None,
    annotation_column: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = "test",
    validation_share: float = 0.15,
    seed: int = 0,
) -> SegmentationTask:
    """Finds columns by type and name; takes a random share of the training split for validation if there is none.

    Raises:
        DataError: no such column or split, an empty split, fewer than two classes, a processor that crops or pads, so
            that maps would not fit its images.
    """
    _require_alignment(pixels)
    if len(labels) < 2:
        raise DataError(f"{len(labels)} classes ({names_in(labels)}), expected at least 2.")
    validation_split = validation_split_of(raw, train_split, validation_split)
    image, annotation = find_pair(raw[train_split].features, image_column, annotation_column)

    def split(name: str) -> MapSplit:
        rows = rows_of(raw, name, {image, annotation})
        for column in (image, annotation):
            rows = rows.cast_column(column, ImageFeature(decode=False))
        rows = rows.select_columns([image, annotation])
        indices = np.arange(len(rows))
        return MapSplit(name, rows, image, annotation, indices, len(labels), ignore_index, reduce_labels, pixels)

    train = split(train_split)
    if validation_split is not None:
        validation = split(validation_split)
    else:
        if len(train) < 2 or not 0 < validation_share < 1:
            raise DataError(f"A share {validation_share} of {len(train)} examples cannot be taken off for validation.")
        order = np.random.default_rng(seed).permutation(len(train))
        count = min(max(1, round(validation_share * len(train))), len(train) - 1)
        validation = replace(train, indices=np.sort(order[:count]))
        train = replace(train, indices=np.sort(order[count:]))
    test = split(test_split) if test_split is not None and test_split in raw else None
    return SegmentationTask(list(labels), train, validation, test)


def _require_alignment(pixels: Preprocess) -> None:
    """Two ramps, left to right and top to bottom, must come out as such from edge to edge."""
    height, width = 120, 160
    across = np.tile(np.linspace(0, 255, width), (height, 1))
    down = np.tile(np.linspace(0, 255, height)[:, None], (1, width))
    pictures = [np.zeros((height, width)), np.full((height, width), 255), across, down]
    black, white, *ramps = pixels([Image.fromarray(picture.astype(np.uint8)).convert("RGB") for picture in pictures])
    for ramp, axis in zip(ramps, (-1, -2), strict=True):
        shown = ((ramp - black) / (white - black)).mean(0).mean(-2 if axis == -1 else -1)
        size = width if axis == -1 else height
        centres = (torch.arange(len(shown)) + 0.5) / len(shown) * size - 0.5  # of the new pixels, in old ones
        expected = centres.clamp(0, size - 1) / (size - 1)
        if not float((shown - expected).abs().max()) < 0.04:
            raise DataError(
                f"{type(pixels.processor).__name__} crops or pads images, so their maps would not fit. Switch that "
                "off in the model's preprocessor_config.json: do_center_crop, do_pad or crop_pct."
            )


def find_pair(features: Features, image: str | None = None, annotation: str | None = None) -> tuple[str, str]:
    """The columns of images and of maps: of type Image, told apart by their usual names."""
    pictures = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    for name, kind in ((image, "image"), (annotation, "annotation")):
        if name is not None:
            require_column(name, features, kind)
            if name not in pictures:
                raise DataError(f"Column {name!r} for the {kind} holds no images. Columns: {table(features)}.")
    if image is None:
        others = [column for column in pictures if column != annotation]
        candidates = [column for column in others if column not in _ANNOTATION_NAMES] or others
        image = only_column(candidates, _IMAGE_NAMES, "image", "of type Image", features)
    if annotation is None:
        others = [column for column in pictures if column != image]
        annotation = only_column(others, _ANNOTATION_NAMES, "annotation", "of type Image beside the images", features)
    return image, annotation


def count_classes(raw: DatasetDict, split: str, annotation: str, ignore_index: int, reduce_labels: bool) -> int:
    """One more than the highest class in the maps of a split, all of which are read."""
    highest = -1
    for value in raw[split].cast_column(annotation, ImageFeature(decode=False))[annotation]:
        found = np.unique(np.asarray(ImageFeature().decode_example(value))).astype(np.int64)
        counted = found[found != ignore_index]
        highest = max(highest, int(counted.max(initial=-1)) - reduce_labels)
    return highest + 1

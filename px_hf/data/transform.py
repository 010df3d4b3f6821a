"""From RGB images to `pixel_values`, by the model's own image processor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.functional import crop, hflip
from transformers import BaseImageProcessor

from ..errors import DataError


@dataclass(frozen=True)
class Preprocess:
    """`[n, 3, H, W]` exactly as whoever loads the model with its image processor will compute it.

    Any processor will do: `ViTImageProcessor`, `ConvNextImageProcessor`, `TimmWrapperImageProcessor`, ...
    """

    processor: BaseImageProcessor

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        try:
            return self.processor(images, return_tensors="pt")["pixel_values"]
        except (ValueError, RuntimeError) as error:
            sizes = sorted({image.size for image in images})  # (width, height)
            raise DataError(
                f"{type(self.processor).__name__} cannot make one batch of images of {len(sizes)} sizes, "
                f"{sizes[0]} to {sizes[-1]}. If it does not resize, set do_resize and size in "
                "the model's preprocessor_config.json."
            ) from error


@dataclass(frozen=True)
class Augment:
    """Light training augmentation in front of `preprocess`: a random crop and a random mirror image.

    The crop has an area of 25 to 100 % and an aspect ratio of 3:4 to 4:3; `preprocess` brings it to the
    model's size, so that one augmentation fits every image processor. Both are wrong for some data: a
    mirrored digit or sign is another one, or none.
    """

    preprocess: Preprocess
    random_crop: bool = True
    horizontal_flip: bool = True

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        return self.preprocess([self._vary(image) for image in images])

    def _vary(self, image: Image.Image) -> Image.Image:
        if self.random_crop:
            image = crop(image, *RandomResizedCrop.get_params(image, scale=[0.25, 1.0], ratio=[3 / 4, 4 / 3]))
        if self.horizontal_flip and torch.rand(()) < 0.5:
            image = hflip(image)
        return image

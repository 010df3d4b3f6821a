"""Random crops and mirror images of images that are tensors already: a few hundred are seen as many more."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_AREA = (0.4, 1.0)
_RATIO = 4 / 3


def views(images: Tensor, seed: int) -> Tensor:
    """Of each image [N, C, H, W] a crop, brought to [H, W], and with probability ½ its mirror image.

    A crop has 40 to 100 % of the area, and stretches one side against the other by at most 4:3. The same ``seed``
    gives the same views, on whatever device.
    """
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([_view(image, draw) for image in images.split(1)])


def _view(image: Tensor, draw: torch.Generator) -> Tensor:
    height, width = image.shape[2:]
    area, stretch, top, left, mirrored = torch.rand(5, generator=draw).tolist()
    share = _AREA[0] + (_AREA[1] - _AREA[0]) * area
    root = _RATIO ** (stretch - 0.5)  # the square root of the ratio, which lies between 3:4 and 4:3
    h = min(height, max(1, round(height * math.sqrt(share) / root)))
    w = min(width, max(1, round(width * math.sqrt(share) * root)))
    y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
    crop = image[:, :, y : y + h, x : x + w]
    if (h, w) != (height, width):
        crop = F.interpolate(crop, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return crop.flip(3) if mirrored < 0.5 else crop

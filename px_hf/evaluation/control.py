"""The control that every mask must beat: a random one of the same density in each layer."""

from __future__ import annotations

import zlib

import torch

from ..masks import Masks


def shuffled(masks: Masks, seed: int = 0) -> Masks:
    """`masks` with the entries of each tensor permuted at random; each keeps as many weights as before.

    The permutation of a tensor depends on `seed` and its name alone.
    """
    found = {}
    for name, mask in masks.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        found[name] = mask.flatten()[torch.randperm(mask.numel(), generator=generator)].reshape(mask.shape)
    return Masks(found)

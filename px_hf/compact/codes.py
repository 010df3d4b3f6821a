"""Weights on a grid of 8 bits: each is an integer from -127 to 127 times a scale of its row, exactly.

A row is all that shares the first index. A scale has at most 16 significant bits, so that every product with a code is
a float32 without rounding: whoever multiplies gets the same weights, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LARGEST = 127
_UNUSED_BITS = 0xFF
"""Those of a float32 beyond 16 significant ones."""


class Codes(NamedTuple):
    """`codes`: int8, in the shape asked for. `scales`: float32 `[rows]`."""

    codes: Tensor
    scales: Tensor


def on_grid(weight: Tensor) -> Codes:
    """The nearest codes to a float32 weight, by rows; the largest of each row becomes ±127.

    `scale = max|w| / 127`, to 16 significant bits; `code = round(w / scale)`, half to even.
    """
    rows = weight.reshape(len(weight), -1)
    exact = (rows.abs().amax(1).double() / LARGEST).float()
    scales = ((exact.view(torch.int32) + (_UNUSED_BITS + 1) // 2) & ~_UNUSED_BITS).view(torch.float32)
    divisors = scales.double().where(scales > 0, 1.0)[:, None]
    codes = (rows.double() / divisors).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return Codes(codes.reshape(weight.shape), scales)


def weights_of(found: Codes) -> Tensor:
    """The float32 weights that codes stand for."""
    rows = found.codes.reshape(len(found.scales), -1)
    return (rows.float() * found.scales[:, None]).reshape(found.codes.shape)


def codes_of(weight: Tensor, kept: Tensor | None) -> Codes | None:
    """The codes that give back a float32 weight bit for bit, flat, of what is `kept`; None if there are none.

    None too if they would take more bytes than the numbers themselves.
    """
    if weight.dtype != torch.float32 or weight.dim() < 2 or not weight.numel():
        return None
    if kept is not None:
        weight = weight.masked_fill(~kept, 0)
    if not _gives_back(weight[:1]):  # nearly always seen at once
        return None
    found = _gives_back(weight)
    if found is None:
        return None
    codes = found.codes.reshape(-1) if kept is None else found.codes[kept]
    return Codes(codes, found.scales) if codes.numel() + found.scales.nbytes < 4 * codes.numel() else None


def _gives_back(weight: Tensor) -> Codes | None:
    if not bool(weight.isfinite().all()):
        return None
    found = on_grid(weight)
    return found if torch.equal(weights_of(found).view(torch.int32), weight.contiguous().view(torch.int32)) else None


def check_scales(scales: Tensor) -> None:
    """Raise ValueError unless these are scales: finite, not negative, of 16 significant bits."""
    bits = scales.view(torch.int32)
    if bool((bits & _UNUSED_BITS).any()) or bool(scales.signbit().any()) or not bool(scales.isfinite().all()):
        raise ValueError("its scales are not finite numbers ≥ 0 of 16 significant bits")


def decoded(codes: NDArray[np.int8], positions: NDArray[np.int64], scales: Tensor, row: int) -> NDArray[np.int32]:
    """The bits of the float32 weights at `positions` of a flat tensor with `row` weights a row."""
    products: NDArray[np.float32] = codes * scales.numpy()[positions // row]
    return products.view(np.int32)

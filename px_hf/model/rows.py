"""Rows of a parameter: the values that belong to one thing.

| parameter | shape | rows | a row is |
|---|---|---|---|
| weight of a linear layer or convolution | [o, i, ...] | o | what one output unit reads, d = i·... values |
| embedding | [v, d] | v | one entry |
| position embedding, class token | [1, n, d] | n | one position |
| bias, norm | [d] | 1 | all of it |
"""

from __future__ import annotations

from torch import Tensor


def rows(parameter: Tensor) -> Tensor:
    """A view [R, d] of a parameter, or of what has its shape; the row-major order of its entries is kept."""
    if parameter.dim() < 2:
        return parameter.reshape(1, -1)
    if parameter.dim() == 3 and parameter.shape[0] == 1:
        return parameter.reshape(parameter.shape[1], -1)
    return parameter.reshape(parameter.shape[0], -1)

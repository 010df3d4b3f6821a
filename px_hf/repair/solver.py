"""Least squares on the support of a mask, all rows at once.

For each row i of a weight, with the inputs' Gram matrix G = X̂ᵀX̂ and the cross products C = RᵀX̂ of what is missing
at the output, R, the change δ of the kept weights minimises

    ‖R_i − X̂ δ‖² + Σ_j λ_j δ_j²,        δ_j = 0 where the mask is 0,

whose normal equations are m ⊙ ((G + Λ) δ) = m ⊙ C_i. Conjugate gradients solve them for all rows together: one
product with G an iteration, instead of a Cholesky factor, d³, and a copy of G for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def solve(
    gram: Tensor, cross: Tensor, mask: Tensor, ridge: Tensor, iterations: int, tolerance: float = 1e-4
) -> Tensor:
    """δ [G, o, d] for ``gram`` [G, d, d], ``cross`` [G, o, d], ``mask`` [G, o, d] and ``ridge`` λ [G, d].

    The diagonal of G + Λ is scaled to one, which is the preconditioner. It stops when in each row the residual is
    ``tolerance`` times the right-hand side, or after so many iterations.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1) + ridge
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    matrix = gram * scale[:, :, None] * scale[:, None, :]
    matrix.diagonal(dim1=-2, dim2=-1).add_(ridge * scale.square())
    mask = mask & (diagonal > 0)[:, None, :]
    residual = torch.where(mask, cross * scale[:, None, :], 0.0)
    delta = torch.zeros_like(residual)
    direction = residual.clone()
    square = residual.square().sum(-1, keepdim=True)
    enough = square * tolerance**2
    for _ in range(iterations):
        if bool((square <= enough).all()):
            break
        image = torch.where(mask, direction @ matrix, 0.0)
        curvature = (direction * image).sum(-1, keepdim=True)
        step = torch.where((square > enough) & (curvature > 0), square / curvature, 0.0)
        delta.addcmul_(direction, step)
        residual.addcmul_(image, -step)
        new = residual.square().sum(-1, keepdim=True)
        direction = torch.where(step > 0, residual + direction * (new / torch.where(square > 0, square, 1.0)), 0.0)
        square = new
    return delta * scale[:, None, :]

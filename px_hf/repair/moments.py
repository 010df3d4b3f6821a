"""Sums over images whose last bit does not depend on the number of processes, and what they say of channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import processes


class ExactSum:
    """A sum of float32 tensors, or of float64 tensors to 48 bits, that is the same in any order.

    Sums of float32 numbers in float64 are exact, as `px_hf.scoring.sums.sum_aligned_` says. A float64 term is split
    into two float32 numbers.
    """

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float64) -> None:
        """Zero; ``dtype`` is that of the terms."""
        self._parts = torch.zeros(2 if dtype == torch.float64 else 1, *shape, dtype=torch.float64, device=device)

    def add_(self, term: Tensor) -> None:
        """Add a term."""
        upper = term.float()
        self._parts[0] += upper
        if len(self._parts) > 1:
            self._parts[1] += (term - upper).float()

    def add_up_(self) -> None:
        """Add the sums of the other processes, once."""
        if processes().world_size > 1:
            dist.all_reduce(self._parts)

    @property
    def value(self) -> Tensor:
        """The sum, float64."""
        return self._parts.sum(0)


class Moments:
    """Count, mean and variance of each channel over all that was seen, float64 [C]."""

    def __init__(self, channels: int, device: torch.device) -> None:
        self._sums = ExactSum((3, channels), device)

    def add_(self, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Add values whose channels are along ``dim``; returns their own mean and (biased) variance, float64 [C].

        The variance is Σ (x − x̄)² / n; the sums of the batches give that of all by the law of total variance,
        Var x = E[Var(x | batch)] + Var(E[x | batch]).
        """
        rows = values.detach().movedim(dim, 0).flatten(1).double()
        variance, mean = torch.var_mean(rows, dim=1, correction=0)
        count = rows.shape[1]
        self._sums.add_(count * torch.stack((torch.ones_like(mean), mean, variance + mean.square())))
        return mean, variance

    def add_up_(self) -> None:
        """Add what the other processes saw, once."""
        self._sums.add_up_()

    @property
    def count(self) -> int:
        """How many values of each channel."""
        return int(self._sums.value[0, 0])

    @property
    def mean(self) -> Tensor:
        count, total, _ = self._sums.value
        return total / count

    def variance(self, correction: int = 0) -> Tensor:
        """Σ (x − x̄)² / (n − correction); n of a single value is not corrected."""
        count, total, squares = self._sums.value
        deviations = (squares - total.square() / count).clamp(min=0)
        return deviations / (count - correction).clamp(min=1)

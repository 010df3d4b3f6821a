"""The scope "n:m": at most n of every m consecutive weights are kept, in NVIDIA's order and reading.

"Consecutive" is along the inputs of one output. A linear weight [out, in] has the groups `weight[i, m·k : m·(k+1)]`. A
convolution weight [out, in/groups, height, width] has them along its input channels, at each place of the kernel:
`weight[i, m·k : m·(k+1), y, x]`. That is the order in which its kernels multiply (implicit GEMM over
height × width × channels, channels innermost), and what TensorRT and NVIDIA's ASP (`apex.contrib.sparsity`) ask for.
torch's `to_sparse_semi_structured` takes matrices, whose rows are the groups of a linear weight.

A weight with fewer inputs than m has no group at all: the first convolution of a ResNet (3 colours), depthwise
convolutions (1). It has no mask and stays dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, TargetError, listed
from .base import Scope, Step
from .ranking import Tensors, count_to_keep, keep_top
from .weights import Global

_CHUNK = 2**22  # weights sorted at a time

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class NOfM(Scope):
    """At most ``n`` of every ``m`` inputs in a row: exactly n at sparsity 1 - n/m; at a higher one those of them that
    rank highest over all weights.

    On the way there, in rounds of lower sparsity, the n best of each group are kept in any case and the rest of the
    budget is ranked over all weights, so that later rounds find n of every m.

    Raises:
        InvalidArgumentError: not 0 < n < m.
    """

    n: int
    m: int
    texts: ClassVar[tuple[str, ...]] = ("n:m, such as 2:4",)

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise InvalidArgumentError(
                f"scope={self.name!r}: n:m keeps n of every m weights and needs 0 < n < m, as in '2:4' or '4:8'."
            )

    @classmethod
    def parse(cls, text: str) -> Scope | None:
        found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
        return cls(*map(int, found.groups())) if found else None

    @property
    def name(self) -> str:
        return f"{self.n}:{self.m}"

    def targets(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that have groups of m; the others have fewer than m inputs each.

        Raises:
            TargetError: the inputs of a weight are m or more and cannot be divided by m, a weight is of a transposed
                convolution (whose groups no kernel defines), or no weight has groups.
        """
        transposed = {id(p) for layer in model.modules() if isinstance(layer, _TRANSPOSED) for p in layer.parameters()}
        if names := [name for name, weight in weights.items() if id(weight) in transposed]:
            raise TargetError(f"n:m is not defined for transposed convolutions: {listed(names)}. Use another scope.")
        found = {name: weight for name, weight in weights.items() if weight.shape[1] >= self.m}
        if not found:
            raise TargetError(
                f"No prunable weight has {self.m} inputs, so none has groups of {self.m}. Use a smaller m."
            )
        _check_shapes(found, self.m)
        return found

    def check_budget(self, targets: Mapping[str, Tensor], sparsity: float, min_layer_density: float) -> None:
        """Whether ``sparsity`` leaves no more weights than the pattern allows.

        Raises:
            InvalidArgumentError: it leaves more.
        """
        if count_to_keep(targets, 1 - Fraction(repr(float(sparsity)))) > self._most(targets):
            raise InvalidArgumentError(
                f"sparsity={sparsity!r} is less than scope={self.name!r} prunes in any case. Use "
                f"{1 - self.n / self.m:.6g} for exactly {self.n} of every {self.m} weights, or more, to prune over "
                "all layers within that pattern."
            )

    def keep(self, step: Step) -> dict[str, Tensor]:
        scores, within = step.scores, step.within
        _check_shapes(scores, self.m)
        if step.final:
            self.check_budget(scores, step.sparsity, step.min_layer_density)
        best = best_of_groups(scores, within, self.n, self.m)
        count = count_to_keep(scores, step.density)
        if count <= self._most(scores):
            return Global().keep(replace(step, within=best))
        rest = {name: ~mask & within[name] if within else ~mask for name, mask in best.items()}
        count -= sum(int(mask.count_nonzero()) for mask in best.values())
        return {name: mask | best[name] for name, mask in keep_top(scores, count, rest).items()}

    def _most(self, tensors: Tensors) -> int:
        return sum(tensor.numel() // self.m * self.n for tensor in tensors.values())


def _check_shapes(tensors: Mapping[str, Tensor], m: int) -> None:
    """Every tensor has inputs, its second axis, in groups of m.

    Raises:
        TargetError: one has not.
    """
    misfits = [
        f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if tensor.dim() < 2 or tensor.shape[1] % m
    ]
    if misfits:
        raise TargetError(
            f"{len(misfits)} weights do not have inputs (the second axis) in whole groups of {m}: {listed(misfits)}. "
            "Use an m that divides them, or another scope."
        )


def best_of_groups(scores: Mapping[str, Tensor], within: Mapping[str, Tensor], n: int, m: int) -> dict[str, Tensor]:
    """Masks of the n weights of each group with the highest scores; of equal ones, the earlier are kept.

    `within`: what may be kept; no entry = everything. Groups with fewer than n such weights keep these.
    """
    masks = {}
    for name, score in scores.items():
        groups = score.detach().movedim(1, -1).reshape(-1, m)
        allowed = within[name].to(groups.device).movedim(1, -1).reshape(-1, m) if within else None
        mask = torch.zeros(groups.shape, dtype=torch.bool)
        for start in range(0, len(groups), max(1, _CHUNK // m)):
            rows = slice(start, start + max(1, _CHUNK // m))
            values = groups[rows].abs()  # -0.0 is 0.0
            if allowed is not None:
                values = values.masked_fill_(~allowed[rows], -1)
            best = values.sort(dim=1, stable=True, descending=True).indices[:, :n]
            chosen = torch.zeros_like(values, dtype=torch.bool).scatter_(1, best, True) & (values >= 0)
            mask[rows] = chosen.cpu()
        masks[name] = mask.view(score.movedim(1, -1).shape).movedim(-1, 1).contiguous()
    return masks

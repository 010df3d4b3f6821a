"""The scope "n:m": at most n of every m consecutive weights are kept, in NVIDIA's order and reading.

    parse("2:4") == (2, 4); parse("global") is None

"Consecutive" is along the inputs of one output. A linear weight [out, in] has the groups `weight[i, m·k : m·(k+1)]`. A
convolution weight [out, in/groups, height, width] has them along its input channels, at each place of the kernel:
`weight[i, m·k : m·(k+1), y, x]`. That is the order in which its kernels multiply (implicit GEMM over
height × width × channels, channels innermost), and what TensorRT and NVIDIA's ASP (`apex.contrib.sparsity`) ask for.
torch's `to_sparse_semi_structured` takes matrices, whose rows are the groups of a linear weight.

A weight with fewer inputs than m has no group at all: the first convolution of a ResNet (3 colours), depthwise
convolutions (1). `in_groups` leaves it out, so that it stays dense.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError, TargetError

_CHUNK = 2**22  # weights sorted at a time

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def parse(scope: str) -> tuple[int, int] | None:
    """(n, m) of a scope "n:m"; None for a scope of another kind. InvalidArgumentError unless 0 < n < m."""
    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", scope) if isinstance(scope, str) else None
    if found is None:
        return None
    n, m = map(int, found.groups())
    if not 0 < n < m:
        raise InvalidArgumentError(
            f"scope={scope!r}: n:m keeps n of every m weights and needs 0 < n < m, as in '2:4' or '4:8'."
        )
    return n, m


def in_groups(model: nn.Module, targets: Mapping[str, Tensor], m: int) -> dict[str, Tensor]:
    """Those of the weights `targets` of `model` that have groups of m; the others have fewer than m inputs each.

    Raises TargetError if the inputs of a weight are m or more and cannot be divided by m, if a weight is of a
    transposed convolution (whose groups no kernel defines), or if no weight has groups.
    """
    transposed = {id(p) for layer in model.modules() if isinstance(layer, _TRANSPOSED) for p in layer.parameters()}
    if names := [name for name, weight in targets.items() if id(weight) in transposed]:
        raise TargetError(f"n:m is not defined for transposed convolutions: {_listed(names)}. Use another scope.")
    found = {name: weight for name, weight in targets.items() if weight.shape[1] >= m}
    if not found:
        raise TargetError(f"No prunable weight has {m} inputs, so none has groups of {m}. Use a smaller m.")
    check_shapes(found, m)
    return found


def check_shapes(tensors: Mapping[str, Tensor], m: int) -> None:
    """TargetError if the second axis of a tensor, its inputs, cannot be divided into groups of m."""
    misfits = [
        f"{name} {list(tensor.shape)}" for name, tensor in tensors.items() if tensor.dim() < 2 or tensor.shape[1] % m
    ]
    if misfits:
        raise TargetError(
            f"{len(misfits)} weights do not have inputs (the second axis) in whole groups of {m}: {_listed(misfits)}. "
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


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")

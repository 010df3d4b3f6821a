"""The scope "block:b": square blocks of b × b weights of linear layers, which go or stay whole.

A weight [out, in] is divided into the blocks `weight[b·i : b·(i+1), b·j : b·(j+1)]`. The score of a block is the
sum of the scores of its weights; all blocks have b² weights, so it is their mean as well. With PX at power 1 that is
the path flow through the block: every path uses at most one weight of a layer, so the flows of a block's weights add
up.

Dense arithmetic runs on what is left (`px_hf.accelerate_blocks_`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ..criteria import Criterion
from ..errors import InvalidArgumentError, TargetError, listed
from ..model.inputs import Batches
from .base import Scope, Step, check_adds_up
from .weights import Global


@dataclass(frozen=True)
class Blocks(Scope):
    """All blocks of ``size`` × ``size`` weights compete; ``min_layer_density`` keeps the best of each layer's.

    The sparsity is reached to half a block, over all layers that have blocks. The others have no masks.

    Args:
        size: b, at least 2.
        power: the score of a block adds up the scores of its weights to that power; `px_hf.prune` takes the
            criterion's ``unit_power``.

    Raises:
        InvalidArgumentError: ``size`` is no whole number above 1.
    """

    size: int
    power: int = 1
    texts: ClassVar[tuple[str, ...]] = ("block:b, such as block:32",)

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 2:
            raise InvalidArgumentError(
                f"scope='block:{self.size}': a block has 2 × 2 weights or more, as in 'block:32'. For single weights "
                "use scope='global'."
            )

    @classmethod
    def parse(cls, text: str) -> Scope | None:
        found = re.fullmatch(r"block:(\d{1,6})", text)
        return cls(int(found.group(1))) if found else None

    @property
    def name(self) -> str:
        return f"block:{self.size}"

    def check_criterion(self, criterion: Criterion) -> None:
        check_adds_up(criterion, self, "blocks")

    def targets(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of linear layers that hold a block; smaller ones and convolutions stay dense.

        Raises:
            TargetError: a weight cannot be divided into blocks, or none holds one.
        """
        found = {name: w for name, w in weights.items() if w.dim() == 2 and min(w.shape) >= self.size}
        if not found:
            raise TargetError(
                f"scope={self.name!r}: no prunable linear layer has {self.size} inputs and outputs. Use smaller "
                "blocks, or for convolutions another scope."
            )
        self._check_shapes(found)
        return found

    def begin(self, model: nn.Module, batches: Batches, targets: Mapping[str, Tensor], criterion: Criterion) -> Scope:
        return replace(self, power=criterion.unit_power or 1)

    def keep(self, step: Step) -> dict[str, Tensor]:
        self._check_shapes(step.scores)
        sums = {}
        for name, score in step.scores.items():
            powers = score.detach().double().pow(self.power)
            if step.within:
                powers = powers * step.within[name].to(powers.device)
            sums[name] = self._divided(powers).sum((1, 3))
        allowed = {name: self._divided(mask).any(3).any(1) for name, mask in step.within.items()}
        chosen = Global().keep(replace(step, scores=sums, within=allowed))
        masks = {
            name: mask.repeat_interleave(self.size, 0).repeat_interleave(self.size, 1) for name, mask in chosen.items()
        }
        return {name: mask & step.within[name] if step.within else mask for name, mask in masks.items()}

    def _divided(self, tensor: Tensor) -> Tensor:
        """[out, in] -> [out / b, b, in / b, b], the entries of block (i, j) at [i, :, j, :]."""
        return tensor.unflatten(1, (-1, self.size)).unflatten(0, (-1, self.size))

    def _check_shapes(self, tensors: Mapping[str, Tensor]) -> None:
        misfits = [
            f"{name} {list(tensor.shape)}"
            for name, tensor in tensors.items()
            if tensor.dim() != 2 or tensor.shape[0] % self.size or tensor.shape[1] % self.size
        ]
        if misfits:
            raise TargetError(
                f"{len(misfits)} weights cannot be divided into blocks of {self.size} × {self.size}: "
                f"{listed(misfits)}. Use a size that divides outputs and inputs, or another scope."
            )

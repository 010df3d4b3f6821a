"""Wanda, pruning by weights and activations (Sun, Liu, Bair, Kolter, ICLR 2024, arXiv 2306.11695).

    S_ij = |W_ij| · ‖X_j‖₂                                                                (Eq. 1)

with ‖X_j‖₂ the norm of input j over all examples and tokens, compared within each output i: the scope of
this criterion is ``"row"``. For a convolution, input j of an output is one entry of the patch under its
kernel, and the norm is taken over all positions.

The norms need no gradient of the network. That of the layer itself, which is linear, gives them for any
linear layer or convolution at once: ∂/∂W Σ op(x², W) holds Σ x_j² in every row.

The paper prunes layer by layer in one pass, each with the inputs that the layers pruned before it leave;
here all inputs are those of the network as it is, and further rounds see what the earlier ones left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import TargetError, listed
from ..model.inputs import Inputs
from ..ops.registry import DECOMPOSITIONS, SHAPE_OPS
from ..scoring.given import Given
from ..scoring.masked_network import Tensors, finite_logits
from .base import Criterion

_LAYERS = {F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}


@dataclass(frozen=True)
class Wanda(Criterion):
    """``S_ij = |W_ij| · ‖X_j‖₂``, meant for scope ``"row"``; the batches need no labels.

    Cost: that of three forward passes per image and round.
    """

    scope: ClassVar[str] = "row"

    def formula(self, given: Given) -> dict[str, Tensor]:
        """``|W_ij| · ‖X_j‖₂`` for each weight.

        Raises:
            TargetError: a weight that no linear layer or convolution multiplies its input by.
        """
        network = given.network()

        def squares(inputs: Inputs, batch: int, part: int) -> Tensors:
            leaves = network.leaves()
            with torch.no_grad(), _InputSquares() as sums:
                finite_logits(network, inputs, leaves, batch)
            if not sums.terms:
                return {}
            return network.gradients(torch.stack(sums.terms).sum(), leaves)

        with network.scoring():
            total = network.total(given.batches, squares)
        if network.left_out:
            raise TargetError(
                f"no linear layer or convolution was called with the weight(s) {listed(network.left_out)}, so "
                "their inputs are unknown. Use a criterion that needs no inputs (Magnitude)."
            )
        return network.scores({name: network.weights[name].abs() * t.sqrt() for name, t in total.items()})


class _InputSquares(TorchFunctionMode):
    """Adds up Σ op(x², W) over the layers that run under it; their own results stay what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: list[Tensor] = []

    def __torch_function__(
        self, op: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if op in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[op](*args, **kwargs)
        if op in _LAYERS:
            self._add(op, *args, **kwargs)
        # Parts of a weight (those of a fused projection) must know where they come from.
        with torch.set_grad_enabled(op in SHAPE_OPS):
            return op(*args, **kwargs)

    def _add(
        self, op: Callable[..., Any], input: Tensor, weight: Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        if weight.requires_grad:
            with torch.enable_grad():
                self.terms.append(op(input.detach().square(), weight, None, *args, **kwargs).sum())

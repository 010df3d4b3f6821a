"""GraSP, gradient signal preservation (Wang, Zhang, Grosse, ICLR 2020, arXiv 2002.07376).

    S(−θ) = −θ ⊙ H g,    g = ∂L/∂θ,  H = ∂²L/∂θ²

is the change of the gradient's norm ‖g‖² (halved, to first order) when a weight is taken away; the
weights with the highest S(−θ) are pruned, those whose removal hurts the gradient flow most, S(−θ)
lowest, are kept. L is the cross-entropy of ``logits / temperature``; the published code has 200
(github.com/alecwangcq/GraSP), which makes the softmax almost uniform.

A criterion of px_hf keeps the highest scores, which are non-negative, so the score is the place of
θ ⊙ H g among all float32 numbers, counted from the lowest: a map that keeps every order and makes no
ties. The values themselves mean nothing.

GraSP is a single shot: it asks for the gradient flow at initialisation, so rounds are not repeated.
Where this differs: eval mode, and the whole calibration set, summed, in both g and H.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..model.inputs import Inputs
from ..scoring.given import Given
from ..scoring.masked_network import Tensors
from .base import Criterion
from .snip import loss_gradient


@dataclass(frozen=True)
class GraSP(Criterion):
    """Ranks by ``θ · (H g)``, highest kept; the batches need labels.

    Args:
        temperature: logits are divided by it, in (0, ∞).

    Cost: that of four forward and backward passes per image, and the memory of a second derivative.

    Raises:
        InvalidArgumentError: a temperature that is not positive and finite.
    """

    temperature: float = 200.0
    iterative: ClassVar[bool] = False
    unit_power: ClassVar[int | None] = None
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InvalidArgumentError(f"GraSP(temperature={self.temperature!r}): expected a number > 0.")

    def formula(self, given: Given) -> dict[str, Tensor]:
        """Whole numbers below 2^32, in float64."""
        network = given.network()

        def gradient(inputs: Inputs, batch: int, part: int) -> Tensors:
            return loss_gradient(network, inputs, batch, self.temperature)

        def curvature(inputs: Inputs, batch: int, part: int) -> Tensors:
            leaves = network.leaves()
            of_batch = loss_gradient(network, inputs, batch, self.temperature, leaves)
            product = torch.stack([(of_batch[name] * g).sum() for name, g in whole.items()]).sum()
            # A weight that enters linearly, and whose gradient no other weight changes, has none.
            return {n: torch.zeros_like(leaves[n]) for n in whole} | network.gradients(product, leaves)

        with network.scoring():
            whole = {name: g.to(network.dtype) for name, g in network.total(given.batches, gradient).items()}
            kept = dict(network.left_out)
            product = network.total(given.batches, curvature)
            network.left_out = kept
        signed = network.scores({name: network.weights[name] * hg for name, hg in product.items()})
        return {name: place_among_floats(s) for name, s in signed.items()}


def place_among_floats(values: Tensor) -> Tensor:
    """How many float32 numbers are below each value: in [0, 2^32), increasing, in float64. −0 counts as 0.

    The bit pattern of a non-negative float increases with it, and that of a negative one decreases.
    """
    bits = (values.to(torch.float32) + 0.0).view(torch.int32).to(torch.int64)
    lowest = torch.iinfo(torch.int32).min
    return torch.where(bits >= 0, bits, lowest - bits).sub(lowest).to(torch.float64)

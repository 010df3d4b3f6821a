"""NTK-trace: each weight's own share of the trace of the neural tangent kernel.

    S(θ) = θ² Σ_n Σ_k (∂f_k(x_n)/∂θ)²

The sum over n and k alone is the weight's diagonal entry of Tr Θ = Σ_n Σ_k ‖∂f_k(x_n)/∂θ‖² (Jacot et al.,
NeurIPS 2018, arXiv 1806.07572); times θ² it is, to second order, how far the outputs move when the weight is
taken away: Optimal Brain Damage (LeCun, Denker, Solla, 1990) with the Gauss-Newton curvature of a squared
loss. PX bounds this trace through paths (Eq. 6).

Per-example gradients of all K outputs cost K backward passes per image. With ``probes=P`` the sum over
k is replaced by an unbiased estimate from P random sign vectors,

    Σ_k (∂f_k/∂θ)² = E_v (∂(vᵀf)/∂θ)²,    v ∈ {−1, +1}^K                                (Hutchinson, 1990)

which costs P: with 100 classes and hundreds of images, what one probe per image gives ranks weights much as
the exact sum does.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..model.inputs import Inputs
from ..scoring.given import Given
from ..scoring.squared_gradients import squared_gradients
from .base import Criterion


@dataclass(frozen=True)
class NTKTrace(Criterion):
    """``S(θ) = θ² Σ_n Σ_k (∂f_k(x_n)/∂θ)²``; the batches need no labels.

    Args:
        probes: None for the exact sum over all K outputs, or P ≥ 1 random sign vectors per image.
        seed: of the sign vectors.

    Cost: K (or P) forward and backward passes per image and round.

    Raises:
        InvalidArgumentError: ``probes`` is not None and not a whole number ≥ 1.
    """

    probes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.probes is not None and (
            isinstance(self.probes, bool) or not isinstance(self.probes, int) or self.probes < 1
        ):
            raise InvalidArgumentError(f"NTKTrace(probes={self.probes!r}): expected None or a whole number ≥ 1.")

    def formula(self, given: Given) -> dict[str, Tensor]:
        network = given.network()
        total = squared_gradients(network, given.batches, self._directions)
        return network.scores({name: network.weights[name].double().square() * t for name, t in total.items()})

    def _directions(self, logits: Tensor, inputs: Inputs, batch: int, part: int) -> Tensor:
        """Vectors v of shape [N, K or P, K], K the number of outputs of an image."""
        n, k = logits.flatten(1).shape
        if self.probes is None:
            return torch.eye(k).to(logits).expand(n, k, k)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{batch}:{part}".encode()))
        signs = torch.randint(0, 2, (n, self.probes, k), generator=generator) * 2 - 1
        return signs.to(logits) / self.probes**0.5

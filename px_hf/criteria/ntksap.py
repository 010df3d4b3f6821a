"""NTK-SAP (Wang, Li, Sun, ICLR 2023, arXiv 2304.02840).

    S(m) = | ∂/∂m  E_{x, Δ} ‖f(x; θ ⊙ m) − f(x; (θ + Δ) ⊙ m)‖² |,    Δ ~ N(0, ε² I)

a finite-difference estimate of |∂ ‖Θ‖_tr/∂m|, with Θ the neural tangent kernel, since
E_Δ ‖f(θ + Δ) − f(θ)‖² ≈ ε² Tr Θ. The inputs x are Gaussian noise, as in the paper; there is one fresh
draw of noise and of Δ for each image and batch ("new input, new weight"). Rounds matter; the paper uses 20.

Where this differs: the paper also draws new initial weights θ for every batch, to find a subnetwork for
any weights. A pretrained network has its weights, so θ stays. BatchNorm is in eval mode with its own
statistics (the published code estimates them on the noise), so ``inputs="data"`` may suit it better.
Noise is drawn on the CPU from ``seed``, the batch and the name of the weight: the same anywhere.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..model.inputs import Inputs
from ..scoring.given import Given
from ..scoring.masked_network import Tensors, finite_logits
from .base import Criterion


@dataclass(frozen=True)
class NTKSAP(Criterion):
    """``S(m) = |∂/∂m E ‖f(x; θ⊙m) − f(x; (θ+Δ)⊙m)‖²|``; the batches need no labels.

    Args:
        epsilon: standard deviation of Δ, in (0, ∞); the published code has 0.01.
        inputs: ``"noise"``, Gaussian images as many and as large as those of the batches, or ``"data"``.
        seed: of all noise.

    Cost: two forward and backward passes per image and round.

    Raises:
        InvalidArgumentError: an unknown ``inputs``, or an ``epsilon`` that is not positive and finite.
    """

    epsilon: float = 0.01
    inputs: Literal["noise", "data"] = "noise"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise InvalidArgumentError(f"NTKSAP(epsilon={self.epsilon!r}): expected a number > 0.")
        if self.inputs not in ("noise", "data"):
            raise InvalidArgumentError(f"NTKSAP(inputs={self.inputs!r}): expected 'noise' or 'data'.")

    def formula(self, given: Given) -> dict[str, Tensor]:
        network = given.network()

        def gradient(inputs: Inputs, batch: int, part: int) -> Tensors:
            place = f"{self.seed}:{batch}:{part}"
            x = inputs
            if self.inputs == "noise":
                x = inputs.with_images(noise(inputs.images, f"{place}:images"))
            kept = {name: torch.ones_like(w).requires_grad_(True) for name, w in network.weights.items()}
            # Where m = 0 already, neither θ ⊙ m nor (θ + Δ) ⊙ m may come back.
            moved = {
                name: w + self.epsilon * noise(w, f"{place}:{name}") * network.masks.get(name, torch.ones(())).to(w)
                for name, w in network.weights.items()
            }
            here = finite_logits(network, x, {name: w * kept[name] for name, w in network.weights.items()}, batch)
            there = network.logits(x, {name: w * kept[name] for name, w in moved.items()})
            return network.gradients((here - there).square().sum(), kept)

        with network.scoring():
            total = network.total(given.batches, gradient)
        return network.scores({name: g.abs() for name, g in total.items()})


def noise(like: Tensor, key: str) -> Tensor:
    """Standard Gaussian numbers of the shape, dtype and device of ``like``, fixed by ``key``."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(like.shape, generator=generator).to(like)

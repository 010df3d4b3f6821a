"""SynFlow (Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020, arXiv 2006.05467) and its squared form.

    R = 1ᵀ (Π_l |θ^[l]|) 1                                                                (Eq. 2)
    S(θ) = ∂R/∂θ ⊙ θ = ∂R/∂|θ| ⊙ |θ|

The sum over all paths of the product of |θ| on them: an input of ones, all gates open, no data.
`SynFlowL2` has θ² for |θ| (Gebhart, Saxena, Schrater, 2021, arXiv 2101.10552), the g of PX's
Eq. 9 alone:

    R = Σ_k g_k(1, θ²),    S(θ) = ∂R/∂θ² ⊙ θ²

The paper speaks of networks of linear layers and ReLU. What else there is goes by the rules of
`px_hf.ops`: BatchNorm in eval mode counts as a weight, |γ|/√(σ² + ε), so that scores are those of the
network with BatchNorm folded in; attention averages over tokens; biases start no path. The published
code (github.com/ganguli-lab/Synaptic-Flow) takes the absolute value of everything that the network
stores, biases and running means included, and runs it as it is, which at initialisation is the same.

SynFlow is meant to be iterated: the paper uses 100 rounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..model.inputs import inputs_of
from ..model.modes import evaluating
from ..ops import ABSOLUTE, G, Reading
from ..scoring.given import Given
from ..scoring.path_network import PathScores
from .base import Criterion


@dataclass(frozen=True)
class SynFlow(Criterion):
    """``S(θ) = |θ| · ∂R/∂|θ|``, R the sum of |θ|-products over all paths.

    Of the batches only the size of the first image is used. Scores are float32 (float64 for a float64
    model), those of the equation unless these lie far outside the range; then all are multiplied by one
    power of two. Cost: one forward and backward pass of one image per round.
    """

    reading: ClassVar[Reading] = ABSOLUTE

    def formula(self, given: Given) -> dict[str, Tensor]:
        """Which weights get no score, and errors, as in `PX.formula`."""
        network = given.paths(self.reading.order)
        probe = next(inputs_of(given.batches, given.model)).probe()
        with evaluating(given.model):
            ones = probe.images.to(network.dtype)
            _, paths, met = network.path_sums(probe, ones, self.reading, network.squared())
            scores = PathScores(network, 1.0)
            network.each_gradient(scores.take, paths.data, torch.ones_like(paths.data), met, probe)
        network.warn_of_left_out()
        return scores.result(int(paths.exponent))


@dataclass(frozen=True)
class SynFlowL2(SynFlow):
    """``S(θ) = θ² · ∂R/∂θ²``, R the sum of θ²-products over all paths. Otherwise as `SynFlow`."""

    reading: ClassVar[Reading] = G

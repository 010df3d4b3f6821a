"""Instant Soup Pruning (Jaiswal, Liu, Chen, Ding, Wang, ICML 2023, arXiv 2306.10460): a vote of cheap masks.

The paper replaces the long trainings of iterative magnitude pruning by many short ones: each gives a weak mask, and
what they have in common is the ticket. Here

    S(θ) = Σ_c Σ_s 1[θ is among the top s of |θ_c|] + |θ̄|/max |θ̄| / 2,    θ_c: after a short training of cook c

counts in how many masks a weight is, over cooks c and densities s, and tells equal counts apart by the mean magnitude.

Chosen here: a cook takes ``steps`` steps of SGD with momentum 0.9, each on a random half of the calibration set, with
a learning rate that is drawn around the given one; a step of 1 is as large as the weights of the layer are, since
pretrained networks differ in sizes. The paper draws data, training length and sparsity; it
averages weights too, for which a criterion has no place: the weights stay the pretrained ones.
"""

from __future__ import annotations

import math
import random
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidArgumentError
from ..model.inputs import Inputs, classes_of
from ..scoring.given import Given
from ..scoring.masked_network import MaskedNetwork, Tensors, finite_logits
from ..scoring.masking import masked
from .base import Criterion

_DENSITIES = (0.5, 0.3, 0.2, 0.1, 0.05)


@dataclass(frozen=True)
class InstantSoup(Criterion):
    """Votes of the masks of several short trainings; the batches need labels.

    Args:
        cooks: short trainings, ≥ 1.
        steps: of each, ≥ 1.
        learning_rate: relative size of a step, in (0, 1); each cook draws its own from half to twice that.
        seed: of what the cooks draw.

    Cost: ``cooks · steps`` forward and backward passes per image and round.

    Raises:
        InvalidArgumentError: a setting outside its range.
    """

    cooks: int = 5
    steps: int = 4
    learning_rate: float = 0.02
    seed: int = 0
    needs_labels: ClassVar[bool] = True
    unit_power: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        for name in ("cooks", "steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(f"InstantSoup({name}={value!r}): expected a whole number ≥ 1.")
        if not (math.isfinite(self.learning_rate) and 0 < self.learning_rate < 1):
            raise InvalidArgumentError(f"InstantSoup(learning_rate={self.learning_rate!r}): expected one in (0, 1).")

    def formula(self, given: Given) -> dict[str, Tensor]:
        network = given.network()
        votes: dict[str, Tensor] = {}
        mean: dict[str, Tensor] = {}
        with network.scoring():
            for cook in range(self.cooks):
                cooked = self._cook(network, given, random.Random(f"{self.seed}:{cook}"))
                for name, ballots in _ballots(cooked).items():
                    votes[name] = votes.get(name, 0) + ballots
                    mean[name] = mean.get(name, 0) + cooked[name].double() / self.cooks
        largest = max(float(each.abs().max()) for each in mean.values()) or 1.0
        return network.scores({name: votes[name] + mean[name].abs() / largest / 2 for name in votes})

    def _cook(self, network: MaskedNetwork, given: Given, draw: random.Random) -> Tensors:
        """The weights after a short training."""
        rate = self.learning_rate * 2 ** draw.uniform(-1, 1)
        weights, momentum = dict(network.weights), dict[str, Tensor]()
        for _ in range(self.steps):
            salt, variables = draw.random(), {name: w.clone().requires_grad_(True) for name, w in weights.items()}

            def term(
                inputs: Inputs, batch: int, part: int, salt: float = salt, variables: Tensors = variables
            ) -> Tensors:
                logits = finite_logits(network, inputs, variables, batch)
                losses = F.cross_entropy(logits, classes_of(inputs, logits, batch), reduction="none")
                generator = torch.Generator().manual_seed(zlib.crc32(f"{salt}:{batch}:{part}".encode()))
                drawn = torch.rand(len(losses), generator=generator) < 0.5
                return network.gradients((losses * drawn.to(losses)).sum(), variables)

            for name, gradient in network.total(given.batches, term).items():
                momentum[name] = momentum.get(name, 0) * 0.9 + masked(gradient, given.masks.get(name))
            for name, direction in momentum.items():
                size = weights[name].double().abs().mean() / direction.abs().mean().clamp(min=1e-300)
                weights[name] = (weights[name] - rate * size * direction).to(network.dtype)
        return {name: weights[name] for name in momentum}


def _ballots(weights: Tensors) -> dict[str, Tensor]:
    """In how many of the masks each weight is, float64; the masks of `_DENSITIES` over all weights together."""
    sizes = {name: weight.abs().double() for name, weight in weights.items()}
    ordered = torch.cat([size.flatten() for size in sizes.values()]).sort(descending=True).values
    borders = [ordered[max(1, round(density * len(ordered))) - 1] for density in _DENSITIES]
    return {name: sum(((size >= b) & (size > 0)).double() for b in borders) for name, size in sizes.items()}  # type: ignore[misc]

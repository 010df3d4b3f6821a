"""Gem-Miner (Sreenivasan et al., Rare Gems, NeurIPS 2022, arXiv 2202.12002): scores learnt on frozen weights.

    minimise over p ∈ [0, 1]^d    L(θ ⊙ q ⊙ r(p)) + λ ‖p‖²,      r(p) = 1[p > 1/2]

by gradient descent that goes straight through the rounding r and clips p to [0, 1]. Every so often the
lowest p are frozen at zero, q, until the sparsity is reached; the kept weights are q alone. Here that
freezing is what `px.prune` does between rounds: a round is one period, and p goes on from round to round.

This is the expensive rival: it trains, with labels, if not the weights. One round costs ``epochs`` forward
and backward passes over all batches, one step a batch; the published ResNet-18 has 10 rounds of 20 epochs of
the whole training set. Report that cost beside its accuracy.

Chosen here: Adam, learning rate 0.01 and λ = 3·10⁻⁶ as in the published ResNet-18 settings (there on a cosine;
github.com/ksreenivasan/pruning_is_enough), constant within and over rounds since the end is not known. Adam's
steps do not depend on the scale of weights and logits, which a pretrained network brings along.
BatchNorm in train mode, on copies of its statistics, everything else in eval mode; p starts uniform at random as
in the paper, or with ``start="magnitude"``, meant for pretrained weights, at 1/2 + half the quantile of |θ| in its
layer, so that nothing is missing at first. Equal p, of which clipping makes many, are told apart by |θ|.

Steps are taken one after the other, so every process takes all of them: more processes do not make it
faster. The scores of the first process count.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..distributed import processes
from ..errors import InvalidArgumentError
from ..model.inputs import Batches, Inputs, classes_of, inputs_of
from ..model.wrappers import named_buffers
from ..scoring.given import Given
from ..scoring.masked_network import MaskedNetwork, Tensors, finite_logits
from .base import Criterion


@dataclass(frozen=True)
class GemMiner(Criterion):
    """Scores p ∈ [0, 1] learnt for each weight; the batches need labels.

    Args:
        epochs: passes over the batches in each round, ≥ 1.
        learning_rate: of Adam, in (0, ∞).
        regularization: λ of λ ‖p‖², in [0, ∞).
        start: ``"uniform"``, or ``"magnitude"``.
        seed: of the uniform start.

    Raises:
        InvalidArgumentError: a setting outside its range.
    """

    epochs: int = 5
    learning_rate: float = 0.01
    regularization: float = 3e-6
    start: Literal["uniform", "magnitude"] = "uniform"
    seed: int = 0
    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise InvalidArgumentError(f"GemMiner(epochs={self.epochs!r}): expected a whole number ≥ 1.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InvalidArgumentError(f"GemMiner(learning_rate={self.learning_rate!r}): expected a number > 0.")
        if not (math.isfinite(self.regularization) and self.regularization >= 0):
            raise InvalidArgumentError(f"GemMiner(regularization={self.regularization!r}): expected a number ≥ 0.")
        if self.start not in ("uniform", "magnitude"):
            raise InvalidArgumentError(f"GemMiner(start={self.start!r}): expected 'uniform' or 'magnitude'.")

    def begin(self) -> Criterion:
        return _Mining(self)

    def formula(self, given: Given) -> dict[str, Tensor]:
        """One round, from the start. In [0, 1 + 2⁻³⁰], float64."""
        return self.begin().formula(given)


@dataclass
class _Mining(Criterion):
    """One pruning with Gem-Miner: p, which rounds hand on."""

    settings: GemMiner
    p: Tensors = field(default_factory=dict)

    def memory(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.p.items()}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        self.p = {name: p.detach().clone().requires_grad_(True) for name, p in memory.items()}

    def formula(self, given: Given) -> dict[str, Tensor]:
        network = given.network()
        with network.scoring():
            if not self.p:
                self.p = {name: self._start(name, w) for name, w in network.weights.items()}
            self._learn(network, given.batches)
        return network.scores({n: p.detach().double() + _by_magnitude(network.weights[n]) for n, p in self.p.items()})

    def _start(self, name: str, weight: Tensor) -> Tensor:
        if self.settings.start == "magnitude":
            places = weight.abs().flatten().argsort(stable=True).argsort().view(weight.shape)
            p = 0.5 + 0.5 * (places + 1).to(weight.dtype) / weight.numel()
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.settings.seed}:{name}".encode()))
            p = torch.rand(weight.shape, generator=generator).to(weight)
        return p.requires_grad_(True)

    def _learn(self, network: MaskedNetwork, batches: Batches) -> None:
        """``epochs`` passes over the batches, one step each."""
        settings = self.settings
        optimizer = torch.optim.Adam(self.p.values(), settings.learning_rate, weight_decay=2 * settings.regularization)
        statistics = {
            name: value.to(network.dtype if value.is_floating_point() else value.dtype, copy=True)
            for name, value in named_buffers(network.model).items()
        }
        for _ in range(settings.epochs):
            for index, inputs in enumerate(inputs_of(batches, network.model)):
                _normalise_by_batch(network.model, inputs)
                weights = {name: network.weights[name] * _rounded(p) for name, p in self.p.items()}
                logits = finite_logits(network, inputs, {**statistics, **weights}, index)
                loss = F.cross_entropy(logits, classes_of(inputs, logits, index))
                found = network.gradients(loss, self.p)
                for name in network.left_out:
                    self.p.pop(name, None)
                for name, p in self.p.items():
                    p.grad = found[name]
                optimizer.step()
                with torch.no_grad():
                    for p in self.p.values():
                        p.clamp_(0, 1)
        if processes().world_size > 1:
            for p in self.p.values():
                dist.broadcast(p.detach(), src=0)


def _rounded(p: Tensor) -> Tensor:
    """1[p > 1/2], with the gradient of p."""
    return p + ((p > 0.5).to(p.dtype) - p).detach()


def _by_magnitude(weight: Tensor) -> Tensor:
    """Too small to order different p, except next to 0."""
    largest = weight.abs().max().double()
    return weight.abs().double() / torch.where(largest > 0, largest, 1.0) * 2.0**-30


def _normalise_by_batch(model: nn.Module, inputs: Inputs) -> None:
    """BatchNorm in train mode, where there is a batch to speak of. `MaskedNetwork.scoring` undoes it."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.train(len(inputs.images) > 1)

"""Sums of squared per-example gradients: what `NTKTrace` and `Fisher` have in common.

Σ_n Σ_p (∂(v_{n,p}ᵀ f(x_n)) / ∂θ)²    for directions v_{n,p} in the space of outputs
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vmap

from ..model.inputs import Batches, Inputs
from .masked_network import MaskedNetwork, Tensors, finite_logits

_GRADIENTS_AT_A_TIME = 2**26
"""Numbers in the per-example gradients that are held at once (256 MB in float32), or those of one example."""

Directions = Callable[[Tensor, Inputs, int, int], Tensor]
"""Logits [N, K, ...], inputs, number of the batch, number of its part -> v [N, P, K·...]."""


def squared_gradients(network: MaskedNetwork, batches: Batches, directions: Directions) -> Tensors:
    """The sum for each weight, in float64; P forward and backward passes per image.

    A weight that the output does not depend on has none.
    """
    size = max(1, _GRADIENTS_AT_A_TIME // sum(w.numel() for w in network.weights.values()))

    def squares(inputs: Inputs, batch: int, part: int) -> Tensors:
        leaves = network.leaves()
        logits = finite_logits(network, inputs, leaves, batch)
        used = network.gradients(logits.sum(), leaves).keys()
        weights = {name: network.weights[name] for name in used}
        rest = {name: w for name, w in network.weights.items() if name not in used}

        def output(weights: Tensors, image: Tensor, others: Tensors, direction: Tensor) -> Tensor:
            one = Inputs(image[None], {name: other[None] for name, other in others.items()})
            return network.logits(one, {**rest, **weights}).flatten() @ direction

        images, others = inputs.images, dict(inputs.others)
        v = directions(logits, inputs, batch, part)
        places = torch.arange(len(images)).repeat_interleave(v.shape[1]).to(images.device)
        total = {name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()}
        for some, each in zip(places.split(size), v.flatten(0, 1).split(size), strict=True):
            found = vmap(grad(output), in_dims=(None, 0, 0, 0))(
                weights, images[some], {name: other[some] for name, other in others.items()}, each
            )
            for name, gradient in found.items():
                total[name] += gradient.square().sum(0)
        # One float32 number for each batch, as any other term: sums of these are exact.
        return {name: t.to(network.dtype) for name, t in total.items()}

    with network.scoring():
        return network.total(batches, squares)

"""SNIP, single-shot network pruning (Lee, Ajanthan, Torr, ICLR 2019, arXiv 1810.02340).

    S(θ) = |∂L/∂m|  at  f(x; θ ⊙ m), m = 1;  that is  |θ · ∂L/∂θ|

with L the cross-entropy over the calibration set: the change of the loss, to first order, when the
weight is taken away. The paper divides by the sum of all scores, which no ranking sees.

``px.prune(..., px.SNIP(), rounds=1)`` is the paper's single shot; with more rounds, each scoring what
the last one left, it is iterative SNIP (de Jorge et al., ICLR 2021, arXiv 2006.09081; Verdenius et
al., 2020, arXiv 2006.00896), which survives sparsities where the single shot empties layers.

Where this differs: the paper scores a freshly initialised network on one mini-batch with BatchNorm in
train mode; here the network is pretrained, so it runs in eval mode, on the whole calibration set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..model.inputs import Inputs, classes_of
from ..scoring.given import Given
from ..scoring.masked_network import MaskedNetwork, Tensors, finite_logits
from .base import Criterion


@dataclass(frozen=True)
class SNIP(Criterion):
    """``S(θ) = |θ · ∂L/∂θ|``, with L the summed cross-entropy over the batches, which need labels.

    Cost: one forward and backward pass per image and round.
    """

    needs_labels: ClassVar[bool] = True

    def formula(self, given: Given) -> dict[str, Tensor]:
        network = given.network()

        def gradient(inputs: Inputs, batch: int, part: int) -> Tensors:
            return loss_gradient(network, inputs, batch)

        with network.scoring():
            total = network.total(given.batches, gradient)
        return network.scores({name: (network.weights[name] * g).abs() for name, g in total.items()})


def loss_gradient(
    network: MaskedNetwork, inputs: Inputs, batch: int, temperature: float = 1.0, leaves: Tensors | None = None
) -> Tensors:
    """∂L/∂θ of the cross-entropy of ``logits / temperature``, summed over the images.

    With ``leaves`` the gradient can be differentiated again with respect to them.
    """
    variables = network.leaves() if leaves is None else leaves
    logits = finite_logits(network, inputs, variables, batch)
    loss = F.cross_entropy(logits / temperature, classes_of(inputs, logits, batch), reduction="sum")
    return network.gradients(loss, variables, create_graph=leaves is not None)

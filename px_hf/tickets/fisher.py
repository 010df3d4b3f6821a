"""The diagonal of the Fisher information: how much the network's answers depend on a weight.

    F(θ) = Σ_n (∂ log p(y_n | x_n) / ∂θ)²,      p = softmax(f)

With the labels of the data it is the empirical Fisher of FISH Mask (Sung, Nair, Raffel, NeurIPS 2021, arXiv
2111.09839), which tunes where it is highest. With labels that the network itself draws, y_n ~ p(· | x_n), it is the
Fisher information of the pretrained network, and says how sensitive its behaviour is to a weight: TaLoS (Iurada,
Ciccone, Tommasi, ICLR 2025) tunes where that is lowest, so that what the network can do already is kept.

∂ log p(y | x)/∂θ is the gradient of vᵀf in the direction v = e_y − p(x): see `px_hf.scoring.squared_gradients`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..criteria import Criterion
from ..errors import InvalidArgumentError
from ..model.inputs import Inputs, classes_of
from ..scoring.given import Given
from ..scoring.squared_gradients import squared_gradients


@dataclass(frozen=True)
class Fisher(Criterion):
    """``F(θ) = Σ_n (∂ log p(y_n | x_n)/∂θ)²``, a ranking for `px.select_trainable`.

    ```python
    px.select_trainable(model, batches, px.Fisher(), fraction=0.1)                             # FISH
    px.select_trainable(model, batches, px.Fisher(labels="model"), fraction=0.1, lowest=True)  # as TaLoS
    ```

    Args:
        labels: ``"given"``, those of the batches, or ``"model"``, drawn from the network's own answers.
        seed: of the drawn labels.

    Cost: one forward and backward pass per image.

    Raises:
        InvalidArgumentError: unknown ``labels``.
    """

    labels: Literal["given", "model"] = "given"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.labels not in ("given", "model"):
            raise InvalidArgumentError(f"Fisher(labels={self.labels!r}): expected 'given' or 'model'.")

    def formula(self, given: Given) -> dict[str, Tensor]:
        network = given.network()
        return network.scores(squared_gradients(network, given.batches, self._directions))

    def _directions(self, logits: Tensor, inputs: Inputs, batch: int, part: int) -> Tensor:
        """e_y − p(x), [N, 1, K]."""
        p = logits.detach().softmax(1)
        if self.labels == "given":
            y = classes_of(inputs, logits, batch)
        else:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{batch}:{part}".encode()))
            y = torch.multinomial(p.cpu().double(), 1, generator=generator)[:, 0].to(p.device)
        return (torch.nn.functional.one_hot(y, p.shape[1]).to(p) - p)[:, None]

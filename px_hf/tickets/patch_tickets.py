"""Patch tickets: which patches of an image a frozen pretrained vision transformer looks at.

    patches = PatchTickets(keep=0.5).select(pretrained, batches)      # [N, k]

The data half of LOTUS (Upadhyay, arXiv 2405.00906), after Shen et al. (Data Level Lottery Ticket Hypothesis for Vision
Transformers, IJCAI 2023, arXiv 2211.01484): the score of patch p is the attention that it gets,

    s_p = mean over layers and heads of A[class token, p]              (with a class token)
    s_p = mean over layers, heads and queries q of A[q, p]             (without)

and the k = round(keep · P) patches with the highest are the ticket. `px.read_patches` lets a network read these alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from ..errors import InvalidArgumentError, NonFiniteError
from ..model.inputs import Batches, Inputs, inputs_of
from ..model.modes import evaluating
from ..model.wrappers import unwrap
from .attention import Weights, attention_weights
from .tokens import Tokens, patches_of

_NUMBERS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class PatchTickets:
    """The patches of each image that get most attention.

    ```python
    patches = px.PatchTickets(keep=0.5).select(pretrained, DataLoader(dataset, batch_size=64))
    dataset = dataset.add_column("patches", patches.tolist())     # kept with the data
    ```

    Args:
        keep: the part of the patches that is read, in (0, 1].
        layers: whose attention counts, from 1 to the depth of the network.

    Raises:
        InvalidArgumentError: a setting outside its range.
    """

    keep: float = 0.9
    layers: Sequence[int] = (3, 6, 9)

    def __post_init__(self) -> None:
        number = isinstance(self.keep, (int, float)) and not isinstance(self.keep, bool)
        if not (number and 0 < self.keep <= 1):
            raise InvalidArgumentError(f"PatchTickets(keep={self.keep!r}): expected a part of the patches, in (0, 1].")
        whole = isinstance(self.layers, (tuple, list)) and all(type(layer) is int for layer in self.layers)
        if not whole or not self.layers or min(self.layers) < 1 or len(set(self.layers)) < len(self.layers):
            raise InvalidArgumentError(
                f"PatchTickets(layers={self.layers!r}): expected different whole numbers from 1, such as (3, 6, 9)."
            )
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    def select(self, model: nn.Module, batches: Batches) -> Tensor:
        """The patches to read, int64 [N, k]: for each image, in the order of the batches, ascending places.

        Patch i is the one in row i // w and column i % w of the grid of w columns. Of equal scores the earlier patch
        is taken. The model is run in eval mode, and left as it was; one forward pass per image. With a head for
        another task it gives the same.

        Raises:
            TargetError: the model has no patches, or no attention weights.
            InvalidArgumentError: ``keep`` leaves no patch, ``layers`` names one that is not there, or ``batches`` is a
                DataLoader that shuffles: the order says which image is which.
            DataError: see `px_hf.model.inputs`.
            NonFiniteError: an attention weight is NaN or infinite.
        """
        if isinstance(getattr(batches, "sampler", None), RandomSampler):
            raise InvalidArgumentError(
                "batches are shuffled: patches are told apart by their order. Use shuffle=False."
            )
        scores = self.scores(model, batches)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, : self.count(scores.shape[1])]
        return best.sort(dim=1).values

    @torch.no_grad()
    def scores(self, model: nn.Module, batches: Batches) -> Tensor:
        """The attention that each patch gets, float64 [N, P]; errors are those of `select`."""
        model = unwrap(model)
        tokens = Tokens.of(model)
        counts: list[int] = []
        hook = tokens.convolution.register_forward_hook(lambda _, __, maps: counts.append(patches_of(maps)))
        try:
            with evaluating(model), torch.no_grad(), attention_weights(model, tokens, self.layers) as weights:
                found = [
                    self._received(weights, part, tokens, counts)
                    for inputs in inputs_of(batches, model)
                    for part in inputs.parts(_NUMBERS_AT_A_TIME)
                ]
        finally:
            hook.remove()
        return torch.cat(found)

    def _received(self, weights: Weights, part: Inputs, tokens: Tokens, counts: list[int]) -> Tensor:
        layers = weights(part)
        patches = counts[-1]
        self.count(patches)
        prefix = layers[0].shape[-1] - patches
        queries = slice(0, 1) if tokens.has_class_token(prefix) else slice(prefix, None)
        each = [layer[:, :, queries, prefix:].double().mean((1, 2)).cpu() for layer in layers]
        received = torch.stack(each).mean(0)
        if not bool(received.isfinite().all()):
            raise NonFiniteError(
                "attention weights are NaN or infinite. Check the images, and whether the model can run in its dtype."
            )
        return received

    def count(self, patches: int) -> int:
        """k = round(keep · P).

        Raises:
            InvalidArgumentError: it is 0.
        """
        k = math.floor(self.keep * patches + 0.5)
        if k < 1:
            raise InvalidArgumentError(
                f"PatchTickets(keep={self.keep!r}) leaves none of {patches} patches. Keep at least {1 / patches:.3g}."
            )
        return k

    def random(self, images: int, patches: int, seed: int = 0) -> Tensor:
        """As many patches of each image, drawn at random: the control, int64 [images, k]."""
        generator: Any = torch.Generator().manual_seed(seed)
        drawn = torch.rand(images, patches, generator=generator).argsort(dim=1)[:, : self.count(patches)]
        return drawn.sort(dim=1).values

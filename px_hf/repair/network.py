"""The whole network at once: it learns from the dense network what that makes of unlabelled images.

With h_l what block l of the dense network returns, l = 1 ... L, and ĥ_l what it returns in the repaired one,
`px_hf.repair.adam` minimises over all that was repaired, all biases, norms and scales

    (1/L) Σ_l ‖ĥ_l − h_l‖² / ‖h_l‖²,

where a class token counts as in `px_hf.repair.blocks`, or that of the outputs (`px_hf.model.outputs`) where a network
has no repeated blocks. This is distillation of the network into itself (SquareHead, Kurtic et al. 2023, arXiv
2310.06927): it needs gradients through the network, and no labels. Each epoch sees other `views` of the images. Logits
are left out on purpose: a few hundred images show a part of the classes, and a network that is drawn to the logits of
these forgets the others (docs/notes/repair.md).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..model.inputs import Inputs, run
from .blocks import relative_square, trainable
from .images import Part
from .views import views
from .walk import Walk, tensors_in


class Whole:
    """The network, as an `Objective`: the outputs of its ``blocks``, or its own if there are none."""

    name = "(network)"

    def __init__(self, walk: Walk, blocks: Sequence[str], augment: bool, class_token: bool) -> None:
        self._walk = walk
        self._class_token = class_token
        self._blocks = blocks
        self._augment = augment
        self.trained: Sequence[str] = trainable(walk.networks["sparse"])

    def distance(self, part: Part, epoch: int | None = None) -> Tensor:
        """The loss of the images of a part, or of views of them, times their number."""
        inputs = part.inputs(self._walk.states, self._walk.device)
        if epoch is not None and self._augment and inputs.images.dim() == 4:
            inputs = inputs.with_images(views(inputs.images, zlib.crc32(f"{part.key} {epoch}".encode())))
        with torch.no_grad():
            targets = self._outputs("dense", inputs)
        pairs = zip(self._outputs("sparse", inputs), targets, strict=True)
        errors = [relative_square(output, target, self._class_token) for output, target in pairs]
        return part.images * torch.stack(errors).mean()

    def _outputs(self, which: str, inputs: Inputs) -> list[Tensor]:
        network = self._walk.networks[which]
        found: list[Tensor] = []

        def left(module: nn.Module, args: Any, output: Any) -> None:
            found.append(tensors_in(output)[0])

        with ExitStack() as hooks:
            for path in self._blocks:
                hooks.callback(network.model.get_submodule(path).register_forward_hook(left).remove)
            output = network.run(lambda: run(network.model, inputs))
        return found or [output]

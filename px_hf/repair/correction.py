"""Means, and deviations, of what each layer returns, brought back to those of the dense network.

With y the output of channel c of a masked layer in the dense network, ŷ in the pruned one, over all images and places:

    bias   b̂_c ← b̂_c + E[y] − E[ŷ]
    scale  ŵ_c ← s ŵ_c,  b̂_c ← s b̂_c + E[y] − s E[ŷ],    s = √(Var y / Var ŷ)

Source: bias correction of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV
2019, arXiv 1906.04721, section 4.2, the empirical form); here what is left out by pruning takes the place of what is
left out by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, listed
from ..masks import Masks
from ..model.inputs import Batches, Inputs, call, run_with
from ..model.targets import require_whole
from ..model.wrappers import unwrap
from ..scoring.masking import masked
from .affine import Affine, affine_layers, parent_of
from .moments import Moments
from .passes import after, measuring, shares


@dataclass(frozen=True)
class CorrectionReport:
    """What `px_hf.correct_` returns.

    Attributes:
        images: how many images the means are of.
        corrected: the weights of the layers that were changed, in running order.
        skipped: the other masked weights -> why their layers were left as they are.
    """

    images: int
    corrected: tuple[str, ...]
    skipped: dict[str, str]


@torch.no_grad()
def correct_(
    model: nn.Module, masks: Masks, batches: Batches, dense: nn.Module | None = None, *, scale: bool = False
) -> CorrectionReport:
    """Match mean (and deviation, if ``scale``) of each pruned layer's output to the dense network's. In place.

    ```python
    report = px.correct_(model, masks, batches)                # masks.apply_(model), and the biases changed
    report = px.correct_(model, masks, batches, dense=parent)  # of a model whose pruned weights are zero already
    ```

    Biases change; where a layer has none, the running mean of the BatchNorm that reads it, which is the same.
    ``scale`` multiplies the kept weights of each output by one number. Pruned weights are zero afterwards.

    Both networks run each batch once, in eval mode, and each layer is measured with the layers before it corrected:
    inside a batch by the figures of that batch, in the end by those of all. With one batch, the pruned network then
    has the dense one's means on these images exactly; with several, as far as batches resemble each other.

    N processes that are given the same batches share them, and end with the numbers that one finds.

    Args:
        model: any wrapper is looked through, but for adapters of peft.
        masks: those of the pruned network.
        batches: as for `px_hf.prune`; labels are not used.
        dense: the network before it was pruned. None: the model itself, whose pruned weights must still be there.
        scale: match standard deviations too.

    Raises:
        InvalidArgumentError: ``dense`` is missing, and the model is pruned already.
        TargetError: the masks do not fit, or the model holds adapters.
        DataError: the batches are empty or of no known form.
        NonFiniteError: the output of a layer is not finite; then nothing was changed.
    """
    parent = parent_of(model, masks, dense, "px.correct_")
    model = unwrap(model)
    require_whole(model)
    measured = _Measured(model, parent, masks, scale)
    with measuring(batches, model, parent):
        measured.run(batches)
    changes = measured.changes()
    masks.apply_(model)
    for layer in measured.layers:
        factor, constant = changes[layer.name]
        if layer.bias is not None:
            constant = constant + (factor - 1) * layer.bias.double()
        if scale:
            factors = factor.view(-1, *[1] * (layer.weight.dim() - 1))
            layer.weight.copy_(layer.weight.double() * factors)
        layer.add_(constant)
    return CorrectionReport(measured.images, tuple(layer.name for layer in measured.layers), measured.skipped)


class _Measured:
    """Both networks on the images: what each layer returns, the layers before it corrected."""

    def __init__(self, model: nn.Module, parent: nn.Module, masks: Masks, scale: bool) -> None:
        self.model, self.parent, self.masks, self.scale = model, parent, masks, scale
        self.pruned = {name: masked(p, masks.tensors[name]) for name, p in masks.match(model).items()}
        self.images = 0
        self.layers: list[Affine] = []
        self.skipped: dict[str, str] = {}
        self._sums: dict[str, tuple[Moments, Moments]] = {}
        """Of each layer in the dense network and in the pruned one."""

    def run(self, batches: Batches) -> None:
        for inputs, mine in shares(batches, self.model):
            if not self.images:
                self._begin(next(inputs.parts(1)))
            self.images += len(inputs.images)
            if mine:
                self._run(inputs)

    def _begin(self, one: Inputs) -> None:
        layers, self.skipped = affine_layers(self.model, self.masks, one)
        parents, left = affine_layers(self.parent, self.masks, one)
        runs = {layer.name: layer.module for layer in parents}
        for layer in layers:
            if layer.name not in runs:
                self.skipped[layer.name] = f"in the dense network {left[layer.name]}"
            elif layer.takes_constants or self.scale:
                self.layers.append(layer)
                device = layer.weight.device
                self._sums[layer.name] = Moments(len(layer.weight), device), Moments(len(layer.weight), device)
            else:
                self.skipped[layer.name] = "it has no bias, and no BatchNorm reads its output"
        self._dense = {name: runs[name] for name in self._sums}

    def _run(self, inputs: Inputs) -> None:
        targets: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(layer: Affine) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                targets[layer.name] = self._sums[layer.name][0].add_(output, layer.dim)

            return hook

        def correct(layer: Affine) -> Callable[..., Tensor]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                found = self._sums[layer.name][1].add_(output, layer.dim)
                factor, constant = self._change(layer, targets[layer.name], found)
                shape = [1] * output.dim()
                shape[layer.dim] = -1
                return (output.double() * factor.view(shape) + constant.view(shape)).to(output.dtype)

            return hook

        with after({self._dense[layer.name]: keep(layer) for layer in self.layers}):
            call(self.parent, inputs)
        with after({layer.module: correct(layer) for layer in self.layers}):
            run_with(self.model, self.pruned, inputs)

    def _change(
        self, layer: Affine, target: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Factor and constant that take the mean and variance found to those of the target."""
        factor = torch.ones_like(found[0])
        if self.scale:
            alive = (found[1] > 0) & (target[1] > 0)
            factor = torch.where(alive, (target[1] / found[1].where(alive, 1.0)).sqrt(), 1.0)
        constant = target[0] - factor * found[0]
        return factor, constant if layer.takes_constants else torch.zeros_like(constant)

    def changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight -> factor and constant of each output, by all images.

        Raises:
            NonFiniteError: they are not finite.
        """
        for both in self._sums.values():
            for moments in both:
                moments.add_up_()
        changes = {}
        for layer in self.layers:
            target, found = ((m.mean, m.variance()) for m in self._sums[layer.name])
            changes[layer.name] = self._change(layer, target, found)
        broken = [name for name, both in changes.items() if not all(bool(torch.isfinite(t).all()) for t in both)]
        if broken:
            raise NonFiniteError(
                f"what {len(broken)} layer(s) return is not finite: {listed(broken)}. Check the images and the "
                "weights for NaN and infinity; nothing was changed."
            )
        return changes

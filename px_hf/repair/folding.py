"""What removed units said, told by those that stay: folded into the weights and the bias of the layer that reads them.

A layer with weight W reads x = (x_K, x_R), of which the inputs R are pruned whole: no kept weight reads them. On the
images they are predicted from the others by ridge regression,

    x_R ≈ A x_K + c,    A = C_RK (C_KK + λ I)⁻¹,    c = E[x_R] − A E[x_K],    λ = ridge · mean diag C_KK,

C being the covariance over images and tokens or pixels in the dense network, and what they would have contributed is
folded into what is kept:

    Ŵ_K = W_K + W_R A,    b̂ = b + W_R c.

A = 0 is the mean alone. Since ridge regression is linear in its targets, W_R A is also that of the outputs themselves:
their error on the images is never larger than with the mean alone, nor that larger than without.

Source: mean replacement and ridge reconstruction are the plain forms of bias compensation for pruned channels (He et
al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, arXiv 1707.06168, section 3.1, solves for
all of W_K instead).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, NonFiniteError
from ..masks import Masks
from ..model.inputs import Batches, Inputs, call
from ..model.targets import require_whole
from ..model.wrappers import unwrap
from .affine import Affine, affine_layers, parent_of
from .moments import ExactSum
from .passes import before, measuring, shares

METHODS = ("ridge", "mean")


@dataclass(frozen=True)
class Folded:
    """One layer that reads removed units.

    Attributes:
        name: of its weight.
        removed: how many of its inputs are pruned whole.
        kept: how many are not.
        error_before: what the removed inputs contributed to the output, relative to the output without its bias, as a
            ratio of root mean squares over the images. Of a kernel of several taps each tap counts by itself.
        error_after: likewise, what of it is missing now.
    """

    name: str
    removed: int
    kept: int
    error_before: float
    error_after: float


@dataclass(frozen=True)
class FoldingReport:
    """What `px_hf.fold_removed_` returns.

    Attributes:
        images: how many images the regressions are of.
        layers: those that read removed units, in running order.
        skipped: other weights that read removed units -> why they were left as they are.
    """

    images: int
    layers: tuple[Folded, ...]
    skipped: dict[str, str]


@torch.no_grad()
def fold_removed_(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    dense: nn.Module | None = None,
    *,
    compensate: str = "ridge",
    ridge: float = 0.01,
) -> FoldingReport:
    """Fold what the pruned inputs of each layer contributed into its other weights and its bias. In place.

    ```python
    masks = px.prune(model, batches, px.PX(paths="active"), sparsity=0.3, scope="structured")
    px.fold_removed_(model, masks, batches)      # a few hundred images, no labels; the masks stay what they are
    small, masks = px.shrink(model, masks)
    ```

    An input of a linear layer or convolution is removed if all weights that read it are pruned: hidden units, heads
    and channels of ``scope="structured"``, whole columns of any other. It takes one forward pass of the dense
    network. Pruned weights are zero afterwards: where masks prune single weights of inputs that stay, what would be
    folded into those is left out.

    Without a bias the constant goes to the running mean of the BatchNorm that reads the output. Where there is none
    either, the regression goes through the origin (c = 0, second moments for C), and ``compensate="mean"`` leaves the
    layer as it is. For a convolution the regression is over pixels; what it pads with zeros then gets no constant,
    so that at the border the fold is not exact.

    The second moments are float64 numbers [inputs, inputs] for each such layer, whatever the number of images. N
    processes that are given the same batches share them, and end with the weights that one finds.

    Args:
        model: any wrapper is looked through, but for adapters of peft.
        masks: those of the pruned network.
        batches: as for `px_hf.prune`; labels are not used.
        dense: the network before it was pruned. None: the model itself, whose pruned weights must still be there.
        compensate: ``"ridge"``, or ``"mean"`` for the constants alone.
        ridge: λ relative to the mean variance of the inputs that stay, > 0.

    Raises:
        InvalidArgumentError: a setting outside its range; ``dense`` is missing, and the model is pruned already.
        TargetError: the masks do not fit, or the model holds adapters.
        DataError: the batches are empty or of no known form.
        NonFiniteError: the input of a layer is not finite; then nothing was changed.
    """
    if compensate not in METHODS:
        raise InvalidArgumentError(f"compensate={compensate!r}: expected one of {', '.join(METHODS)}.")
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 < ridge < float("inf"):
        raise InvalidArgumentError(f"ridge={ridge!r}: expected a number > 0, relative to the inputs' variance.")
    parent = parent_of(model, masks, dense, "px.fold_removed_")
    model = unwrap(model)
    require_whole(model)
    seen = _Seen(model, parent, masks)
    with measuring(batches, model, parent):
        seen.run(batches)
    folds = [_fold(reader, *seen.moments(reader), ridge if compensate == "ridge" else None) for reader in seen.readers]
    masks.apply_(model)
    for reader, (change, constant, _) in zip(seen.readers, folds, strict=True):
        weight = reader.layer.weight
        mask = masks.tensors[reader.layer.name].to(weight.device)
        weight.copy_((weight.double() + change).masked_fill(~mask, 0))
        reader.layer.add_(constant)
    return FoldingReport(seen.images, tuple(told for _, _, told in folds), seen.skipped)


@dataclass(frozen=True)
class _Reader:
    """A layer that reads removed units, in the model and in the dense network; which of its inputs stay, bool [in]."""

    layer: Affine
    dense: Affine
    stays: Tensor


class _Seen:
    """The moments of what each reader is given in the dense network."""

    def __init__(self, model: nn.Module, parent: nn.Module, masks: Masks) -> None:
        self._model, self._parent, self._masks = model, parent, masks
        self.images = 0
        self.readers: list[_Reader] = []
        self.skipped: dict[str, str] = {}
        self._sums: dict[str, tuple[ExactSum, ExactSum]] = {}
        """Of each reader Σ x xᵀ, and Σ (x, 1)."""

    def run(self, batches: Batches) -> None:
        for inputs, mine in shares(batches, self._model):
            if not self.images:
                self._begin(next(inputs.parts(1)))
            self.images += len(inputs.images)
            if mine and self.readers:
                with before({reader.dense.module: self._adding(reader) for reader in self.readers}):
                    call(self._parent, inputs)

    def _begin(self, one: Inputs) -> None:
        columns = {n: m.reshape(*m.shape[:2], -1).any(2).any(0) for n, m in self._masks.tensors.items() if m.dim() > 1}
        stays = {name: some for name, some in columns.items() if not bool(some.all())}
        layers, left = affine_layers(self._model, self._masks, one)
        dense, elsewhere = affine_layers(self._parent, self._masks, one)
        parents = {layer.name: layer for layer in dense}
        self.skipped = {name: why for name, why in left.items() if name in stays}
        for layer in layers:
            if layer.name not in stays:
                continue
            if getattr(layer.module, "groups", 1) != 1:
                self.skipped[layer.name] = "it is a grouped convolution"
            elif layer.name not in parents:
                self.skipped[layer.name] = f"in the dense network {elsewhere[layer.name]}"
            else:
                weight = parents[layer.name].weight
                count, device = weight.shape[1], weight.device
                self.readers.append(_Reader(layer, parents[layer.name], stays[layer.name]))
                self._sums[layer.name] = (
                    ExactSum((count, count), device, _kind(weight)), ExactSum((count + 1,), device)
                )  # fmt: skip

    def _adding(self, reader: _Reader) -> Callable[..., None]:
        products, sums = self._sums[reader.layer.name]

        def hook(module: nn.Module, args: Any) -> None:
            rows = args[0].movedim(reader.dense.dim, -1).flatten(0, -2)
            rows = rows.to(_kind(rows))
            products.add_(rows.T @ rows)
            sums.add_(torch.cat((rows.sum(0, dtype=torch.float64), rows.new_tensor([len(rows)]).double())))

        return hook

    def moments(self, reader: _Reader) -> tuple[Tensor, Tensor]:
        """E[x xᵀ] and E[x] over the images of all processes.

        Raises:
            NonFiniteError: they are not finite.
        """
        products, sums = self._sums[reader.layer.name]
        products.add_up_()
        sums.add_up_()
        count = sums.value[-1]
        second, mean = products.value / count, sums.value[:-1] / count
        if not bool(torch.isfinite(second).all()):
            raise NonFiniteError(
                f"the inputs of the layer of {reader.layer.name} are not finite, or too large to be squared. Check "
                "the images and the weights for NaN and infinity; nothing was changed."
            )
        return second, mean


def _kind(tensor: Tensor) -> torch.dtype:
    """Products are computed in float32, or in float64 where the network is."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fold(reader: _Reader, second: Tensor, mean: Tensor, ridge: float | None) -> tuple[Tensor, Tensor, Folded]:
    """The change of the weight [out, in, ...], the constant [out], and what is told of it; ``ridge`` None: A = 0."""
    layer, stays = reader.layer, reader.stays.to(second.device)
    constants = layer.takes_constants
    kept, removed = stays.nonzero().flatten(), (~stays).nonzero().flatten()
    c = second - torch.outer(mean, mean) if constants else second
    inside, across = c[kept][:, kept], c[removed][:, kept]
    a = torch.zeros_like(across)
    level = float(inside.diagonal().mean()) if len(kept) else 0.0
    if ridge is not None and level > 0:
        inside.diagonal().add_(ridge * level)
        a = torch.linalg.solve(inside, across, left=False)
    dense = reader.dense.weight.double()
    weight = dense.index_select(1, removed)  # [out, removed, ...]
    change = torch.zeros_like(dense)
    change.index_copy_(1, kept, torch.einsum("or...,rk->ok...", weight, a))
    constant = mean[removed] - a @ mean[kept] if constants else torch.zeros_like(mean[removed])
    constant = weight.reshape(*weight.shape[:2], -1).sum(2) @ constant

    # x_R − A x_K − c as a linear function of x, and the same without any of it
    missing = torch.zeros(len(removed), len(mean), dtype=torch.float64, device=mean.device)
    missing[torch.arange(len(removed)), removed] = 1
    given, whole = _power(weight, missing, second), _power(dense, torch.eye(len(mean)).to(second), second)
    missing[:, kept] = -a
    error = _power(weight, missing, c)
    told = Folded(layer.name, len(removed), len(kept), _ratio(given, whole), _ratio(error, whole))
    return change, constant, told


def _power(weight: Tensor, function: Tensor, moments: Tensor) -> float:
    """E‖W F x‖² over the outputs and taps of W [out, r, ...], for F [r, in] and the moments of x."""
    products = function @ moments @ function.T
    taps = weight.flatten(2) if weight.dim() > 2 else weight[..., None]
    return float(torch.einsum("ort,rs,ost->", taps, products, taps).clamp(min=0))


def _ratio(part: float, whole: float) -> float:
    return (part / whole) ** 0.5 if whole > 0 else 0.0

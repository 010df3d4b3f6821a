"""BatchNorm statistics of a pruned network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import NonFiniteError, listed
from ..model.inputs import Batches, call
from ..model.targets import require_whole
from ..model.wrappers import unwrap
from .moments import Moments
from .passes import before, measuring, shares


@torch.no_grad()
def recalibrate_batchnorm_(model: nn.Module, batches: Batches) -> int:
    """Set the BatchNorm statistics to those of what the model, as it is now, makes of the images. In place.

    ```python
    masks.apply_(model)
    px.recalibrate_batchnorm_(model, batches)  # a few hundred images, no labels
    ```

    Returns how many BatchNorm layers have new statistics: 0 if the model has none, or none that keeps statistics; then
    nothing is run. A layer that the forward does not reach keeps its own.

    ``running_mean`` and ``running_var`` become mean and variance (that of a sample, as torch computes it) over all
    values of all images, of whatever batch size: Var x = E[Var(x | batch)] + Var(E[x | batch]), in float64. As in
    torch's train mode each batch goes through once, and is normalised by its own statistics on its way: so a layer's
    statistics are measured with new ones in front of it. With one batch, they are exactly those of the network that
    results; with several, as far as batches resemble each other, so use 32 images or more in each. The weights do not
    change, nor momentum, ``num_batches_tracked``, and the mode of any module; dropout is off.

    N processes that are given the same batches share them, and end with the statistics that one finds.

    Args:
        model: any wrapper is looked through.
        batches: as for `px_hf.prune`; labels are not used.

    Raises:
        DataError: the batches are empty or of no known form.
        NonFiniteError: what a layer is given is not finite; then nothing was changed.
    """
    model = unwrap(model)
    require_whole(model)
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }
    if not norms:
        return 0
    moments = {name: Moments(norm.num_features, _mean(norm).device) for name, norm in norms.items()}
    own = {name: (_mean(norm).clone(), _variance(norm).clone()) for name, norm in norms.items()}
    try:
        with measuring(batches, model), before({norms[name]: _by_its_own(moments[name]) for name in norms}):
            for inputs, mine in shares(batches, model):
                if mine:
                    call(model, inputs)
    finally:
        for name, (mean, variance) in own.items():
            _mean(norms[name]).copy_(mean)
            _variance(norms[name]).copy_(variance)
    for each in moments.values():
        each.add_up_()
    found = {name: (each.mean, each.variance(correction=1)) for name, each in moments.items() if each.count}
    broken = [name for name, both in found.items() if not all(bool(torch.isfinite(t).all()) for t in both)]
    if broken:
        raise NonFiniteError(
            f"what {len(broken)} BatchNorm layer(s) are given is not finite: {listed(broken)}. Check the images and "
            "the weights for NaN and infinity; nothing was changed."
        )
    for name, (mean, variance) in found.items():
        _mean(norms[name]).copy_(mean)
        _variance(norms[name]).copy_(variance)
    return len(found)


def _by_its_own(moments: Moments) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that adds a batch to ``moments`` and has the layer normalise it by its own statistics."""

    def hook(norm: Any, args: tuple[Any, ...]) -> None:
        mean, variance = moments.add_(args[0], dim=1)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    return hook


def _mean(norm: _BatchNorm) -> Tensor:
    assert norm.running_mean is not None
    return norm.running_mean


def _variance(norm: _BatchNorm) -> Tensor:
    assert norm.running_var is not None
    return norm.running_var

"""Repairs by the names that commands and comparisons call them. One more needs a line in `REPAIRS`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from torch import nn

from ..masks import Masks
from ..model.inputs import Batches
from .batchnorm import recalibrate_batchnorm_
from .correction import correct_
from .folding import fold_removed_
from .reconstruct import reconstruct_

NONE: Final = "none"


def statistics_(model: nn.Module, masks: Masks, batches: Batches, progress: bool = False) -> None:
    """Removed units folded, or else means corrected; then BatchNorm measured anew.

    Units that are whole have told the others what they can: correcting the means too made that worse (ViT-Ti, 20 % of
    the hidden units: 67.7 % folded, 66.7 % with both, 54.3 % with neither).
    """
    if removes_units(masks):
        fold_removed_(model, masks, batches)
    else:
        correct_(model, masks, batches)
    recalibrate_batchnorm_(model, batches)


def _reconstruct_(method: str, model: nn.Module, masks: Masks, batches: Batches, progress: bool = False) -> None:
    """Least squares layer by layer, then, if asked for, whole blocks, or the network."""
    reconstruct_(model, masks, batches, method=method, progress=progress)


def removes_units(masks: Masks) -> bool:
    """Whether all that is pruned are whole rows and whole columns."""
    for mask in masks.tensors.values():
        flat = mask.flatten(2).movedim(2, 0) if mask.dim() > 2 else mask[None]
        rows, columns = flat.any(2).any(0), flat.any(1).any(0)
        if not bool((flat == rows[:, None] & columns).all()):
            return False
    return masks.kept < masks.total


REPAIRS: Final[dict[str, Callable[[nn.Module, Masks, Batches, bool], None]]] = {
    "statistics": statistics_,
    "layers": partial(_reconstruct_, "layers"),
    "blocks": partial(_reconstruct_, "blocks"),
    "network": partial(_reconstruct_, "network"),
}
"""Each takes the dense model, applies the masks, and changes what stays; whether to show a progress bar comes last."""

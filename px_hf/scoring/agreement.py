"""Before processes work together: do they hold the same model and see the same batches?"""

from __future__ import annotations

import hashlib

from torch import nn

from ..distributed import same_everywhere
from ..errors import DataError, LaunchError
from ..model.inputs import Batches, inputs_of


def require_agreement(model: nn.Module, batches: Batches | None) -> None:
    """Every process must hold the same weights and see the same batches: a fresh head drawn without a
    common seed, or a DataLoader that shuffles or is already split, would give other results on each.

    Raises:
        LaunchError: the weights differ.
        DataError: the batches differ.
    """
    weights = hashlib.sha256()
    for name, p in model.named_parameters():
        weights.update(f"{name}{tuple(p.shape)}{float(p.detach().double().sum())!r}".encode())
    if not same_everywhere(weights.digest(), model):
        raise LaunchError(
            "the processes hold models with different weights. Seed every process alike before a head is drawn at "
            "random (accelerate.utils.set_seed), or load the same checkpoint everywhere."
        )
    if batches is None:
        return
    data = hashlib.sha256()
    for inputs in inputs_of(batches, model):
        images = inputs.images
        data.update(f"{tuple(images.shape)}{float(images.double().sum())!r}{float(images.flatten()[0])!r}".encode())
    if not same_everywhere(data.digest(), model):
        raise DataError(
            "the processes were given different batches. Give all of them to every process, in the same order: "
            "a DataLoader without shuffle that has not gone through accelerator.prepare. px_hf shares them out."
        )

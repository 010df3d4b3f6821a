"""Which weights the output of a backbone depends on: the others are no part of what is pruned.

A pooler that was never trained, the text tower of CLIP, the decoder of a detector whose encoder is asked for: a weight
that the output does not depend on has no score, and by its size alone it would be pruned like any other. So it stays
dense.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from ..errors import DataError, TargetError, listed
from .example import example_of
from .inputs import Batches, run_with
from .modes import evaluating, full_precision
from .outputs import Output, has_no_classifier, text_of


def reached(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Batches, output: Output, *, warn: bool = False
) -> dict[str, nn.Parameter]:
    """Those of `weights` that the output depends on; all of them, where the output is that of a classifier.

    The model runs once, on the first image of `batches`, or on zeros of the size that its configuration names; where
    there is neither, nothing is left out. `warn`: name what is left out.

    Raises:
        TargetError: the output depends on none of them.
    """
    if not has_no_classifier(model, output):
        return dict(weights)
    try:
        readable = isinstance(batches, Iterable) and not isinstance(batches, Iterator)
        inputs = example_of(model, next(iter(batches), None) if readable else None)
    except DataError:
        if batches or output is not None:
            raise
        return dict(weights)
    with torch.inference_mode(False), evaluating(model), torch.enable_grad():
        leaves = {name: weight.detach().clone().requires_grad_(True) for name, weight in weights.items()}
        with full_precision(inputs.images.device):
            found = run_with(model, leaves, inputs, output)
        gradients: Iterable[object] = [None] * len(leaves)
        if found.requires_grad:
            gradients = torch.autograd.grad(found.sum(), list(leaves.values()), allow_unused=True)
    kept = {name: weights[name] for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}
    what = f"the output {text_of(output)!r}" if output is not None else "the output"
    if not kept:
        raise TargetError(
            f"{what} of {type(model).__name__} depends on none of its prunable weights: {listed(weights)}."
        )
    if warn and (left_out := [name for name in weights if name not in kept]):
        warnings.warn(
            f"{len(left_out)} weight(s) stay dense and have no masks, because {what} of {type(model).__name__} does "
            f"not depend on them: {listed(left_out)}. Name another with output=, if they are to be pruned.",
            stacklevel=5,
        )
    return kept

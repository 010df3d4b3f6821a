"""Round the weights of a network to a grid of 8 bits, so that its compact copy takes a byte for each kept weight."""

from __future__ import annotations

import torch
from torch import nn

from .compact.codes import on_grid, weights_of
from .errors import NonFiniteError, TargetError, listed
from .model.adapters import require_merged
from .model.targets import prunable


@torch.no_grad()
def round_to_int8_(model: nn.Module) -> dict[str, float]:
    """Round the weights of all linear layers and convolutions to multiples of a scale, in place.

    ```python
    masks.apply_(model)
    px.round_to_int8_(model)                # evaluate it again now
    px.save_pretrained(model, masks, "out")  # sparse/ holds a byte for each kept weight
    ```

    In each row (all that belongs to one output) ``w`` becomes ``s · round(w / s)`` with ``s = max|w| / 127``, as
    symmetric INT8 does; ``s`` has at most 16 significant bits, so that each product is an exact float32. Zeros stay
    zeros. The model stays an ordinary one in float32 and computes in float32: this is about the size of what is
    saved. `save_pretrained` notices by itself that weights are on the grid. Rounding twice changes nothing. Biases,
    norms and embeddings, the patch embedding too, stay as they are.

    Round last: a training step takes weights off the grid.

    Returns:
        Name of each weight -> ‖w' - w‖ / ‖w‖, 0 if it is zero.

    Raises:
        TargetError: the model has no such weights, or not in float32, or they are quantized, sharded, adapted by peft
            or computed from other parameters.
        NonFiniteError: a weight is not finite; nothing was changed.
    """
    require_merged(model, "px.round_to_int8_")
    weights = prunable(model, prune_head=True)
    if others := [name for name, weight in weights.items() if weight.dtype != torch.float32]:
        raise TargetError(
            f"px.round_to_int8_ rounds weights of float32, and {len(others)} are of another dtype: "
            f"{listed(others, 3)}. Call model.float() first."
        )
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise NonFiniteError(f"{listed(broken, 3)}: not all weights are finite, and none was rounded.")
    errors = {}
    for name, weight in weights.items():
        rounded = weights_of(on_grid(weight.detach()))
        norm = float(weight.double().norm())
        errors[name] = float((rounded.double() - weight.double()).norm()) / norm if norm else 0.0
        weight.copy_(rounded)
    return errors

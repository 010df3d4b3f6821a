"""Which weights to keep: scores in, masks out.

masks = select({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}, sparsity=1 / 3)
# keeps a[0] and b[0]
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .masks import Masks
from .scopes import Scope, as_scope


def select(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    scope: str | Scope = "global",
    within: Masks | None = None,
    min_layer_density: float = 0.0,
) -> Masks:
    """The masks that keep the weights with the highest scores.

    Args:
        scores: parameter name -> float tensor (16, 32 or 64 bit, any device), non-negative and finite.
        sparsity: the fraction to prune, in [0, 1), read as the decimal number it prints as: of n weights,
            ``sparsity * n`` rounded half to even are pruned, but one weight is always kept.
        scope: ``"global"`` counts over all weights, ``"layer"`` over each tensor by itself, ``"row"`` over each row of
            a tensor (its first axis: the weights of one output) by itself. ``"n:m"``, such as ``"2:4"``, keeps at most
            n of every m consecutive weights along the inputs: exactly n with sparsity 1 - n/m, and with a higher one
            those of them that rank highest over all weights. Or an object of `px_hf.scopes`. Scopes of whole units
            need a model: see `px_hf.prune`.
        within: only weights kept there may be kept. The sparsity still counts over all weights; if ``within`` leaves
            fewer than are to be kept, all of them are.
        min_layer_density: with scope ``"global"``, the fraction of each tensor, in [0, 1 - sparsity], that is kept in
            any case: its own best weights. The rest of the budget is ranked over all weights as ever.

    Raises:
        InvalidArgumentError: a setting out of range (with ``"n:m"`` also a sparsity below 1 - n/m), negative scores,
            or scores that are no float tensors.
        NonFiniteError: NaN or infinite scores.
        TargetError: ``within`` is about other weights, or ``"n:m"`` does not divide the inputs.
    """
    return as_scope(scope).choose(scores, sparsity, within=within, min_layer_density=min_layer_density)

"""Which weights to keep: scores in, masks out.

    masks = select({"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([2.0])}, sparsity=1 / 3)
    # keeps a[0] and b[0]

The weights with the highest scores are kept. How many is exact, so equal scores at the border are told
apart by their place: the earlier in the mapping, then in the flattened tensor, is kept. The result
depends on the values of the scores only, not on their device or dtype.

No sort and no copy of all scores: non-negative floats are ordered as their bit patterns are, so the
border is found digit by digit (16 bits each) from histograms, two passes for 32-bit floats and four for
float64, a chunk at a time. Time is linear in the number of weights; beside the masks the memory is that of
a few chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from . import select_nm
from .errors import InvalidArgumentError, NonFiniteError, TargetError
from .masks import Masks

_CHUNK = 2**22  # weights at a time: 16 MiB for each temporary of 32 bits
_DIGIT_BITS = 16
_DIGITS = 2**_DIGIT_BITS
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_Tensors = Mapping[str, Tensor]


def select(
    scores: Mapping[str, Tensor],
    *,
    sparsity: float,
    scope: str = "global",
    within: Masks | None = None,
    min_layer_density: float = 0.0,
) -> Masks:
    """The masks that keep the weights with the highest scores.

    `scores`: parameter name -> float tensor (16, 32 or 64 bit, any device), non-negative and finite.
    `sparsity`: the fraction to prune, in [0, 1), read as the decimal number it prints as: of n weights,
    `sparsity * n` rounded half to even are pruned, but one weight is always kept.
    `scope`: "global" counts over all weights, "layer" over each tensor by itself, "row" over each row of a tensor
    (its first axis: the weights of one output) by itself. Rows of a tensor may differ by one weight, so that
    the tensor as a whole has the count of "layer". "n:m", such as "2:4", keeps at most n of every m consecutive
    weights along the inputs (`px_hf.select_nm` says how): exactly n with sparsity 1 - n/m, and with a higher one
    those of them that rank highest over all weights.
    `within`: only weights kept there may be kept. The sparsity still counts over all weights; if `within`
    leaves fewer than are to be kept, all of them are.

    `min_layer_density`: with scope "global", the fraction of each tensor, in [0, 1 - sparsity], that is kept
    in any case: its own best weights. The rest of the budget is ranked over all weights as ever.

    Raises InvalidArgumentError for a setting out of range (with "n:m" also a sparsity below 1 - n/m), negative
    scores, or scores that are no float tensors; NonFiniteError for NaN or infinite scores; TargetError if `within` is
    about other weights, or "n:m" does not divide the inputs.
    """
    return select_step(scores, sparsity, scope, within, min_layer_density, final=True)


def select_step(
    scores: Mapping[str, Tensor],
    sparsity: float,
    scope: str,
    within: Masks | None,
    min_layer_density: float,
    *,
    final: bool,
) -> Masks:
    """`select`, or, unless `final`, a step on the way to a higher sparsity: with scope "n:m" it may be below 1 - n/m.

    Then the n best of each group are kept in any case and the rest of the budget is ranked over all weights, so
    that later steps find n of every m.
    """
    density = 1 - Fraction(repr(check_sparsity(sparsity)))
    method = _method(scope)
    _check_scores(scores)
    if pattern := select_nm.parse(scope):
        select_nm.check_shapes(scores, pattern[1])
        if final:
            check_count(scope, sparsity, scores)
    if within is not None:
        _check_within(within, scores)
    floor = Fraction(repr(check_min_layer_density(min_layer_density, sparsity)))
    return Masks(method(scores, density, {} if within is None else within.tensors, floor))


def check_selection(scope: str) -> None:
    """InvalidArgumentError unless `scope` is one of `SCOPES` or "n:m" with 0 < n < m."""
    _method(scope)


def check_count(scope: str, sparsity: float, tensors: Mapping[str, Tensor]) -> None:
    """InvalidArgumentError if `sparsity` would keep more of the weights than scope "n:m" allows."""
    if pattern := select_nm.parse(scope):
        n, m = pattern
        allowed = sum(tensor.numel() // m * n for tensor in tensors.values())
        if _count(tensors, 1 - Fraction(repr(float(sparsity)))) > allowed:
            raise InvalidArgumentError(
                f"sparsity={sparsity!r} is less than scope={scope!r} prunes in any case. Use {1 - n / m:.6g} for "
                f"exactly {n} of every {m} weights, or more, to prune over all layers within that pattern."
            )


def check_sparsity(sparsity: float) -> float:
    """`sparsity` as a float in [0, 1); InvalidArgumentError if it is not one."""
    try:
        value = float(sparsity)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value < 1 or isinstance(sparsity, bool):
        raise InvalidArgumentError(
            f"sparsity is the fraction of weights to prune and must be in [0, 1), got {sparsity!r}. "
            "To keep 10 % of the weights use 0.9."
        )
    return value


def check_min_layer_density(min_layer_density: float, sparsity: float) -> float:
    """`min_layer_density` as a float in [0, 1 - sparsity]; InvalidArgumentError if it is not one."""
    try:
        value = float(min_layer_density)
    except (TypeError, ValueError):
        value = float("nan")
    if not 0 <= value <= 1 - sparsity + 1e-12:
        raise InvalidArgumentError(
            f"min_layer_density={min_layer_density!r}: expected a fraction in [0, {1 - sparsity:.6g}]: no layer can "
            f"be sure of more than sparsity={sparsity!r} leaves of the whole."
        )
    return value


def _global(scores: _Tensors, density: Fraction, within: _Tensors, floor: Fraction) -> dict[str, Tensor]:
    count = _count(scores, density)
    if not floor:
        return _keep_top(scores, count, within)
    masks = _layer(scores, floor, within, floor)
    count -= sum(int(mask.count_nonzero()) for mask in masks.values())
    rest = {name: ~mask & within[name] if within else ~mask for name, mask in masks.items()}
    for name, mask in _keep_top(scores, max(0, count), rest).items():
        masks[name] |= mask
    return masks


def _layer(scores: _Tensors, density: Fraction, within: _Tensors, floor: Fraction) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for name, score in scores.items():
        masks |= _keep_top({name: score}, _count({name: score}, density), within)
    return masks


def _row(scores: _Tensors, density: Fraction, within: _Tensors, floor: Fraction) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for name, score in scores.items():
        outputs = score.shape[0] if score.dim() else 1
        rows = score.detach().abs().reshape(outputs, score.numel() // max(1, outputs))
        if within:
            rows = rows.masked_fill(~within[name].to(rows.device).view_as(rows), -1)
        place = rows.argsort(stable=True, dim=1, descending=True).argsort(dim=1)
        each, more = divmod(_count({name: score}, density), max(1, outputs))
        counts = each + (torch.arange(outputs, device=rows.device) < more).to(torch.int64)
        masks[name] = ((place < counts[:, None]) & (rows >= 0)).view(score.shape).cpu()
    return masks


def _n_of_m(
    n: int, m: int, scores: _Tensors, density: Fraction, within: _Tensors, floor: Fraction
) -> dict[str, Tensor]:
    best = select_nm.best_of_groups(scores, within, n, m)
    count = _count(scores, density)
    if count <= sum(score.numel() // m * n for score in scores.values()):
        return _global(scores, density, best, floor)
    rest = {name: ~mask & within[name] if within else ~mask for name, mask in best.items()}
    count -= sum(int(mask.count_nonzero()) for mask in best.values())
    return {name: mask | best[name] for name, mask in _keep_top(scores, count, rest).items()}


_Method = Callable[[_Tensors, Fraction, _Tensors, Fraction], dict[str, Tensor]]

SCOPES: dict[str, _Method] = {
    "global": _global,
    "layer": _layer,
    "row": _row,
}
"""Scope -> (checked scores, fraction to keep, what may be kept; no entry = everything, fraction of each
tensor to keep in any case) -> masks. Beside these there is "n:m"."""


def _method(scope: str) -> _Method:
    if pattern := select_nm.parse(scope):
        return partial(_n_of_m, *pattern)
    if scope not in SCOPES:
        raise InvalidArgumentError(
            f"Unknown scope {scope!r}, expected one of {', '.join(map(repr, SCOPES))}, or 'n:m', such as '2:4'; "
            "px.prune also takes 'structured' and 'structured:uniform'."
        )
    return SCOPES[scope]


def _count(scores: _Tensors, density: Fraction) -> int:
    """How many weights to keep, at least one."""
    total = sum(score.numel() for score in scores.values())
    # Rounding the pruned count half to even, as documented, not the kept one.
    return max(1, total - round((1 - density) * total))


def _keep_top(scores: _Tensors, count: int, within: _Tensors) -> dict[str, Tensor]:
    """Masks with the `count` weights of all `scores` together that have the top scores."""
    total = sum(score.numel() for score in scores.values())
    if within:
        count = min(count, sum(int(within[name].count_nonzero()) for name in scores))
    masks = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    if total == 0 or count == 0:
        return masks

    double = any(score.dtype == torch.float64 for score in scores.values())
    border, ties_to_keep = _border(scores, within, count, double)
    for name, start, keys in _chunks(scores, within, double):
        keep = keys > border
        if ties_to_keep:
            ties = keys == border
            found = int(ties.count_nonzero())
            if found > ties_to_keep:
                ties &= ties.cumsum(0) <= ties_to_keep
            ties_to_keep -= min(found, ties_to_keep)
            keep |= ties
        masks[name].view(-1)[start : start + keep.numel()] = keep.cpu()
    return masks


def _border(scores: _Tensors, within: _Tensors, count: int, double: bool) -> tuple[int, int]:
    """The key of the weight in place `count` from the top, and how many weights of that key to keep.

    `count` is at least 1 and at most the number of weights that may be kept.
    """
    bits = 64 if double else 32
    border = 0
    for shift in range(bits - _DIGIT_BITS, -1, -_DIGIT_BITS):
        histogram = torch.zeros(_DIGITS, dtype=torch.int64)
        first = shift == bits - _DIGIT_BITS
        for _, _, keys in _chunks(scores, within, double):
            if not first:
                keys = keys[keys >> (shift + _DIGIT_BITS) == border]
            digits = (keys >> shift).bitwise_and_(_DIGITS - 1)
            histogram += torch.bincount(digits, minlength=_DIGITS).cpu()
        if first:
            # Only the keys -1, which must not be kept, have this first digit: other keys are >= 0.
            histogram[-1] = 0
        from_top = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, count))
        digit = _DIGITS - 1 - place
        count -= int(from_top[place] - histogram[digit])
        border = border << _DIGIT_BITS | digit
    return border, count


def _chunks(scores: _Tensors, within: _Tensors, double: bool) -> Iterator[tuple[str, int, Tensor]]:
    """Name, position in the flattened tensor, and keys of successive chunks of all scores.

    A key is the bit pattern of the score as a float64 or float32, which holds every score exactly, and
    -1 for a weight that must not be kept. Keys are ordered as the scores are.
    """
    value, key = (torch.float64, torch.int64) if double else (torch.float32, torch.int32)
    for name, score in scores.items():
        flat = score.detach().reshape(-1)
        allowed = within[name].view(-1) if within else None
        for start in range(0, flat.numel(), _CHUNK):
            # abs() copies, and makes -0.0 the same key as 0.0.
            keys = flat[start : start + _CHUNK].to(value).abs().view(key)
            if allowed is not None:
                keys.masked_fill_(~allowed[start : start + _CHUNK].to(keys.device), -1)
            yield name, start, keys


def _check_scores(scores: Mapping[str, Tensor]) -> None:
    if not isinstance(scores, Mapping) or not scores:
        raise InvalidArgumentError("select needs a mapping of parameter name to scores, with an entry or more.")
    for name, score in scores.items():
        if not isinstance(score, Tensor) or score.dtype not in _FLOATS:
            found = score.dtype if isinstance(score, Tensor) else type(score).__name__
            raise InvalidArgumentError(f"The scores of {name!r} must be a float tensor, got {found}.")
        for chunk in score.detach().reshape(-1).split(_CHUNK):
            if chunk.numel() == 0:
                continue
            low, high = (float(bound) for bound in chunk.aminmax())
            if not (low > -float("inf") and high < float("inf")):
                count = int((~score.isfinite()).count_nonzero())
                raise NonFiniteError(
                    f"{count} of the {score.numel()} scores of {name!r} are NaN or infinite. Look for NaN "
                    "in the weights and the batches; if there is none, score in a wider dtype."
                )
            if low < 0:
                count = int((score < 0).count_nonzero())
                raise InvalidArgumentError(
                    f"{count} of the {score.numel()} scores of {name!r} are negative (one is {low:g}). A "
                    "score says how much a weight matters, from 0 up: take abs() if the sign means nothing."
                )


def _check_within(within: Masks, scores: Mapping[str, Tensor]) -> None:
    if not isinstance(within, Masks):
        raise InvalidArgumentError(f"within must be Masks or None, got {type(within).__name__}.")
    misfits = [
        name
        for name in {**scores, **within.tensors}
        if name not in scores or name not in within or scores[name].shape != within.tensors[name].shape
    ]
    if misfits:
        raise TargetError(
            f"within and scores must have the same names and shapes. They differ in {len(misfits)}: "
            f"{', '.join(map(repr, misfits[:10]))}."
        )

"""The weights with the highest scores, exactly as many as asked for.

Equal scores at the border are told apart by their place: the earlier in the mapping, then in the flattened tensor, is
kept. The result depends on the values of the scores only, not on their device or dtype.

No sort and no copy of all scores: non-negative floats are ordered as their bit patterns are, so the border is found
digit by digit (16 bits each) from histograms, two passes for 32-bit floats and four for float64, a chunk at a time.
Time is linear in the number of weights; beside the masks the memory is that of a few chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, NonFiniteError, TargetError, listed
from ..masks import Masks

Tensors = Mapping[str, Tensor]

_CHUNK = 2**22  # weights at a time: 16 MiB for each temporary of 32 bits
_DIGIT_BITS = 16
_DIGITS = 2**_DIGIT_BITS
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Held:
    """Who holds the scores: this process, all of them. `px_hf.scopes.sharded` has those that are sharded."""

    def numel(self, name: str, score: Tensor) -> int:
        """How many scores the whole tensor has."""
        return score.numel()

    def total(self, counts: Tensor) -> Tensor:
        """What all processes have counted, int64 on the CPU."""
        return counts

    def shares(self, counts: dict[str, int], number: int) -> dict[str, int]:
        """How many of ``number`` this process takes of each tensor that has so many of them, the first ones first."""
        shares = {}
        for name, count in counts.items():
            shares[name] = min(count, number)
            number -= shares[name]
        return shares


HERE = Held()


def count_to_keep(scores: Tensors, density: Fraction, held: Held = HERE) -> int:
    """How many weights to keep, at least one."""
    total = sum(held.numel(name, score) for name, score in scores.items())
    # Rounding the pruned count half to even, as documented, not the kept one.
    return max(1, total - round((1 - density) * total))


def keep_top_of_each(scores: Tensors, density: Fraction, within: Tensors, held: Held = HERE) -> dict[str, Tensor]:
    """Masks with the top scores of each tensor by itself, the fraction `density` of it."""
    masks: dict[str, Tensor] = {}
    for name, score in scores.items():
        masks |= keep_top({name: score}, count_to_keep({name: score}, density, held), within, held)
    return masks


def keep_top(scores: Tensors, count: int, within: Tensors, held: Held = HERE) -> dict[str, Tensor]:
    """Masks with the `count` weights of all `scores` together that have the top scores."""
    total = sum(held.numel(name, score) for name, score in scores.items())
    if within:
        count = min(count, kept(within, scores, held))
    masks = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    if total == 0 or count == 0:
        return masks

    double = any(score.dtype == torch.float64 for score in scores.values())
    border, ties_to_keep = _border(scores, within, count, double, held)
    ties = dict.fromkeys(scores, 0)
    for name, start, keys in _chunks(scores, within, double):
        masks[name].view(-1)[start : start + keys.numel()] = (keys > border).cpu()
        ties[name] += int((keys == border).count_nonzero())
    shares = {name: share for name, share in held.shares(ties, ties_to_keep).items() if share}
    for name, start, keys in _chunks({name: scores[name] for name in shares}, within, double):
        tied = keys == border
        tied &= tied.cumsum(0) <= shares[name]
        shares[name] -= int(tied.count_nonzero())
        masks[name].view(-1)[start : start + keys.numel()] |= tied.cpu()
    return masks


def kept(masks: Tensors, names: Iterable[str], held: Held = HERE) -> int:
    """How many weights masks of those names keep."""
    return int(held.total(torch.tensor(sum(int(masks[name].count_nonzero()) for name in names))))


def _border(scores: Tensors, within: Tensors, count: int, double: bool, held: Held) -> tuple[int, int]:
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
        histogram = held.total(histogram)
        if first:
            # Only the keys -1, which must not be kept, have this first digit: other keys are >= 0.
            histogram[-1] = 0
        from_top = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, count))
        digit = _DIGITS - 1 - place
        count -= int(from_top[place] - histogram[digit])
        border = border << _DIGIT_BITS | digit
    return border, count


def _chunks(scores: Tensors, within: Tensors, double: bool) -> Iterator[tuple[str, int, Tensor]]:
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


def check_scores(scores: Mapping[str, Tensor]) -> None:
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


def check_within(within: Masks, scores: Mapping[str, Tensor]) -> None:
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
            f"{listed(map(repr, misfits))}."
        )

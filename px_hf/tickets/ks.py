"""KS-Lottery (Yuan, Ma, Yuan, Sun, Li, NAACL 2025, arXiv 2402.02801): tune the rows that a pilot has shifted.

For each row of d values, `before` and `after` a short fine-tuning, the two-sample Kolmogorov-Smirnov statistic

    D = max_t |F_before(t) − F_after(t)|,      F(t) = #{values ≤ t} / d

and the row is a ticket if    D > √(−½ ln(α/2)) · √(2/d).

Training then starts again from the pretrained weights, and moves the tickets alone.

What D sees: the values of a row as an unordered set. Exchange two values and D is 0, though the layer computes
something else. What it certifies: for independent samples of one continuous distribution, D exceeds the border with
probability about α, for large d. The values after a pilot are those before it, moved: the samples are not independent,
α is no error rate, and the border sorts rows by how much their distribution changed. It does not certify that tuning
these rows is enough. The paper tunes embeddings of language models; rows of other layers are our reading of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, NonFiniteError, TargetError, listed
from ..masks import Masks
from ..model.rows import rows
from ..model.targets import head_modules
from ..model.wrappers import named_parameters, unwrap

State = Mapping[str, Tensor]

_VALUES_AT_A_TIME = 2**22


@dataclass(frozen=True)
class KS:
    """Rows whose distribution of values shifts by more than the Kolmogorov-Smirnov border.

    ```python
    pilot = copy.deepcopy(model)
    ...                                                                  # fine-tune the pilot for a few steps
    ticket = px.select_trainable(model, batches, px.KS(alpha=0.05), after=pilot)
    ticket = px.KS(alpha=0.05).select(model.state_dict(), pilot.state_dict())          # the same of plain states
    ```

    Args:
        alpha: α of the border, in (0, 1). Smaller: fewer rows.

    Raises:
        InvalidArgumentError: ``alpha`` is not in (0, 1).
    """

    alpha: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not (isinstance(self.alpha, (int, float)) and 0 < self.alpha < 1):
            raise InvalidArgumentError(f"KS(alpha={self.alpha!r}): expected a number in (0, 1), such as 0.05.")

    def border(self, d: Tensor | int) -> Tensor:
        """√(−½ ln(α/2)) · √(2/d), float64; infinite for d = 0."""
        size = torch.as_tensor(d, dtype=torch.float64)
        return math.sqrt(-0.5 * math.log(self.alpha / 2)) * (2 / size).sqrt()

    def select(
        self,
        before: State | nn.Module,
        after: State | nn.Module,
        *,
        within: Masks | None = None,
        fraction: float | None = None,
    ) -> Masks:
        """The rows that pass the border, as masks of all parameters that were compared.

        Args:
            before: the pretrained weights: a model, whose head is left out, or tensors by name, all of which count.
            after: the same after the pilot; what it has beside them is not looked at.
            within: masks of a pruned model. Pruned weights are no values of a row, and in no ticket.
            fraction: at most this part of the rows, in (0, 1]: those furthest above the border.

        Raises:
            TargetError: a parameter is missing in ``after`` or has another shape, or no row passes the border.
            NonFiniteError: a value is NaN or infinite.
            InvalidArgumentError: ``fraction`` is outside its range.
        """
        excess = self._excess(_values(before), _values(after), within)
        ratios = torch.cat(list(excess.values()))
        lowest = torch.tensor(1.0, dtype=torch.float64)  # D = border is no ticket
        if fraction is not None:
            kept = int(as_fraction(fraction) * len(ratios))
            # Rows that are equal at the end are left out together: at most so many.
            ends = [torch.tensor(math.inf), *ratios.sort(descending=True).values, torch.tensor(0.0)]
            lowest = torch.maximum(lowest, ends[kept + 1])
        if not bool((ratios > lowest).any()):
            raise TargetError(
                f"none of {len(ratios)} rows passes the border of KS(alpha={self.alpha:g}): the largest D is "
                f"{float(ratios.max()):.2f} of it. Train the pilot for longer, or at a higher learning rate, raise "
                "alpha, or rank rows instead: px.select_trainable(model, batches, px.Fisher(), fraction=0.1)."
            )
        values = _values(before)
        masks = {}
        for name, ratio in excess.items():
            like = rows(values[name])
            chosen = (ratio > lowest)[:, None].expand(like.shape).reshape(values[name].shape)
            masks[name] = chosen & within.tensors[name] if within is not None and name in within else chosen
        return Masks(masks)

    def _excess(self, before: State, after: State, within: Masks | None) -> dict[str, Tensor]:
        """D over its border for each row of each parameter, float64 [R]."""
        wrong = [name for name, value in before.items() if name not in after or after[name].shape != value.shape]
        if wrong or not before:
            raise TargetError(
                f"the pilot's weights do not match those before it: {len(wrong)} of {len(before)} are missing or of "
                f"another shape: {listed(map(repr, wrong))}. Expected the same network after a short fine-tuning."
            )
        found = {}
        for name, value in before.items():
            allowed = rows(within.tensors[name]) if within is not None and name in within else None
            old, new = (rows(each).detach().cpu() for each in (value, after[name]))
            if not bool(old.isfinite().all() and new.isfinite().all()):
                raise NonFiniteError(f"{name} has values that are NaN or infinite. Lower the pilot's learning rate.")
            sizes = torch.full((len(old),), old.shape[1]) if allowed is None else allowed.sum(1)
            found[name] = statistics(old, new, allowed) / self.border(sizes)
        return found


def as_fraction(fraction: float) -> float:
    """``fraction`` as a float in (0, 1].

    Raises:
        InvalidArgumentError: it is not one.
    """
    try:
        value = float(fraction)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1 or isinstance(fraction, bool):
        raise InvalidArgumentError(f"fraction={fraction!r}: expected the part to tune, in (0, 1], such as 0.1.")
    return value


def statistics(before: Tensor, after: Tensor, allowed: Tensor | None = None) -> Tensor:
    """D of each row of two matrices [R, d] of finite values: float64 [R]; only ``allowed`` entries count, if given.

    In the sorted values of both, one step up for each of `before` and down for each of `after`: D is the largest
    height at the end of a run of equal values, over d. Exact, since heights are whole numbers.
    """
    found = []
    size = max(1, _VALUES_AT_A_TIME // max(1, before.shape[1]))
    for start in range(0, len(before), size):
        pair = [each[start : start + size].double() for each in (before, after)]
        counts = torch.full((len(pair[0]),), before.shape[1])
        if allowed is not None:
            counts = allowed[start : start + size].sum(1)
            pair = [each.masked_fill(~allowed[start : start + size], math.inf) for each in pair]
        values, order = torch.cat(pair, dim=1).sort(dim=1)
        heights = torch.where(order < before.shape[1], 1, -1).cumsum(1).abs()
        last = torch.ones_like(values, dtype=torch.bool)
        last[:, :-1] = values[:, 1:] != values[:, :-1]
        found.append((heights * last).amax(1).double() / counts.clamp(min=1))
    return torch.cat(found)


def _values(state: State | nn.Module) -> dict[str, Tensor]:
    """The floating values of more than one number, by name; without a model's head."""
    if isinstance(state, nn.Module):
        head = {p for module in head_modules(unwrap(state)) for p in module.parameters(recurse=False)}
        state = {name: p for name, p in named_parameters(state).items() if p not in head}
    return {name: v for name, v in state.items() if v.is_floating_point() and v.numel() > 1}

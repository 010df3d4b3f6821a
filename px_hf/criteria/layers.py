"""Scores of a model that no process holds whole: one layer after the other, for criteria that look at no other.

```python
for name, scores in each_layer(px.LAMP(), model, weights): ...
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..scoring.given import Given
from ..scoring.masking import masked
from .base import Criterion


@dataclass(frozen=True)
class _OneLayer(Given):
    """A model of which one weight is at hand."""

    held: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def targets(self) -> dict[str, nn.Parameter]:
        return dict(self.held)


@torch.no_grad()
def each_layer(
    criterion: Criterion,
    model: nn.Module,
    weights: Mapping[str, Callable[[], Tensor]],
    mask: Callable[[str], Tensor | None],
) -> Iterator[tuple[str, Tensor]]:
    """Name and scores of each weight, as of the whole model; one of them is held at a time.

    Args:
        criterion: one that goes ``by_layer``.
        model: what the weights are of.
        weights: name -> what gets the weight.
        mask: what gets the whole mask of a name; None where it is dense.
    """
    for name, weight in weights.items():
        own = mask(name)
        masks = {} if own is None else {name: own}
        given = _OneLayer(model, (), masks, True, held={name: nn.Parameter(weight(), requires_grad=False)})
        for found, scores in criterion.formula(given).items():
            yield found, masked(scores, own)

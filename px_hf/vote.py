"""Masks of several runs merged into one.

masks = vote([first, second, third], rule="majority")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .errors import InvalidArgumentError, TargetError
from .masks import Masks

RULES = ("union", "majority", "intersection")


def vote(masks: Sequence[Masks], *, rule: str = "majority", at_least: int | None = None) -> Masks:
    """The weights that enough of the masks keep.

    Of n masks, ``"union"`` asks for 1 vote, ``"majority"`` for more than n/2, ``"intersection"`` for n; ``at_least``
    asks for that many instead of a rule. How many weights that leaves depends on how far the masks agree: for an exact
    sparsity use the criterion `InstantSoup`, which ranks by votes.

    Raises:
        InvalidArgumentError: there are no masks, the rule is unknown, or ``at_least`` is no number of votes.
        TargetError: the masks are about different weights.
    """
    masks = list(masks)
    if not masks or not all(isinstance(each, Masks) for each in masks):
        raise InvalidArgumentError("vote needs a sequence of Masks, with one or more.")
    if rule not in RULES:
        raise InvalidArgumentError(f"rule={rule!r}: expected one of {', '.join(map(repr, RULES))}.")
    if at_least is None:
        at_least = {"union": 1, "majority": len(masks) // 2 + 1, "intersection": len(masks)}[rule]
    if isinstance(at_least, bool) or not isinstance(at_least, int) or not 1 <= at_least <= len(masks):
        raise InvalidArgumentError(f"at_least={at_least!r}: expected a whole number from 1 to {len(masks)}.")
    first = masks[0].tensors
    for number, each in enumerate(masks[1:], start=2):
        shapes = {name: mask.shape for name, mask in each.tensors.items()}
        if shapes != {name: mask.shape for name, mask in first.items()}:
            raise TargetError(
                f"masks 1 and {number} are about different weights: {masks[0]!r} and {each!r}. Expected masks of one "
                "model, found with the same targets."
            )
    return Masks({name: torch.stack([each.tensors[name] for each in masks]).sum(0) >= at_least for name in first})

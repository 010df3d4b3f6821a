"""Which weights to tune: a ranking of rows or single weights, or the rows that a pilot has shifted.

ticket = select_trainable(model, batches, PX(), fraction=0.1)
ticket = select_trainable(model, batches, KS(), after=pilot)
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn

from ..criteria import Criterion, Random
from ..errors import InvalidArgumentError
from ..masks import Masks
from ..model.inputs import Batches
from ..model.rows import rows
from ..select import select
from .ks import KS, as_fraction

FRACTION = 0.1


def select_trainable(
    model: nn.Module,
    batches: Batches,
    by: Criterion | KS,
    *,
    fraction: float | None = None,
    granularity: Literal["row", "weight"] = "row",
    lowest: bool = False,
    within: Masks | None = None,
    after: Mapping[str, Tensor] | nn.Module | None = None,
) -> Masks:
    """The weights of `model` to tune, for `px.tune_only` and `px.TuneOnly`: True = tuned. The model is not changed.

    ```python
    ticket = px.select_trainable(model, batches, px.Fisher(), fraction=0.1)
    trainer = Trainer(model, ..., callbacks=[px.TuneOnly(ticket)])
    ```

    Args:
        batches: see `px.prune`; `KS` does not look at them.
        by: what ranks the weights, any criterion (`PX`, `Magnitude`, `Fisher`, ...), or `KS`.
        fraction: the part of the rows, or of the single weights, in (0, 1], to one row or weight. Without it 0.1, and
            with `KS` all that pass; with it `KS` gives at most so many.
        granularity: ``"row"``, all that an output unit reads, ranked by its mean score, or ``"weight"``. `KS` knows
            rows only.
        lowest: tune what ranks lowest, as TaLoS does with ``Fisher(labels="model")``.
        within: masks of a pruned model: the rest is scored as zero and is in no ticket.
        after: for `KS`, the network, or its weights by name, after a short fine-tuning (the pilot).

    Rankings speak about what `px.prune` could prune, weights of convolutions and linear layers; `KS` also about
    biases, norms, class tokens and position embeddings. The classifier head is in neither: `px.tune_only` trains it
    whole. A random ticket of as many rows of the same sizes: `px_hf.controls.shuffle_rows(ticket)`.

    Raises:
        InvalidArgumentError: a setting out of range, `KS` without ``after`` or with settings of a ranking.
        TargetError: as of `Criterion.score` and `KS.select`.
    """
    if isinstance(by, KS):
        if after is None or granularity != "row" or lowest:
            raise InvalidArgumentError(
                "KS compares rows before and after a pilot: fine-tune a copy of the model for a few steps and pass it "
                "as after=pilot; granularity='weight' and lowest=True are for rankings."
            )
        return by.select(model, after, within=within, fraction=fraction)
    if not isinstance(by, Criterion):
        raise InvalidArgumentError(f"by={by!r}: expected a criterion, such as px.PX(), or px.KS().")
    if after is not None or granularity not in ("row", "weight"):
        raise InvalidArgumentError(
            f"granularity={granularity!r}: expected 'row' or 'weight'. after= is for px.KS() alone."
        )
    part = as_fraction(FRACTION if fraction is None else fraction)
    sparsity = float(1 - Fraction(repr(part)))
    masks = None if within is None else within.tensors
    scores = by.score(model, batches, masks=masks)
    allowed = {
        n: masks[n] if masks and n in masks else torch.ones(s.shape, dtype=torch.bool) for n, s in scores.items()
    }
    ranked = {name: score.detach().cpu().double() for name, score in scores.items()}
    if granularity == "row":
        ranked = {name: _of_rows(score, allowed[name], isinstance(by, Random)) for name, score in ranked.items()}
    if lowest:
        top = max(float(score.max()) for score in ranked.values())
        ranked = {name: top - score for name, score in ranked.items()}
    if granularity == "weight":
        return select(ranked, sparsity=sparsity, within=Masks(allowed))
    free = Masks({name: rows(mask).any(1) for name, mask in allowed.items()})
    chosen = select(ranked, sparsity=sparsity, within=free)
    return Masks(
        {
            name: rows(mask).logical_and(chosen.tensors[name][:, None]).reshape(mask.shape)
            for name, mask in allowed.items()
        }
    )


def _of_rows(score: Tensor, allowed: Tensor, random: bool) -> Tensor:
    """The mean score of the allowed weights of each row, [R]; of random ones the first: their means are all alike."""
    if random:
        return rows(score)[:, 0]
    return rows(score * allowed).sum(1) / rows(allowed).sum(1).clamp(min=1)

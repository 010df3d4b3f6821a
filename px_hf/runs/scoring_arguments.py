"""The arguments of scoring: by what weights are ranked, and on which images."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

import px_hf as px

from ..model.inputs import Batches
from ..prune import ROUNDS
from ..scopes import as_scope

CRITERION = "px-active"
"""By default, before training."""


@dataclass
class ScoringArguments:
    """How weights are ranked for pruning."""

    topic: ClassVar[str] = "pruning"

    criterion: str | None = field(
        default=None,
        metadata={"help": f"How weights are scored. Default: {CRITERION}.", "choices": list(px.CRITERIA)},
    )
    power: float | None = field(
        default=None, metadata={"help": "Exponent of the path flow in the px criteria: 1 = the paper, 0 = magnitude."}
    )
    rounds: int | None = field(
        default=None, metadata={"help": f"Rounds of scoring and pruning. Default: {ROUNDS}. The paper uses 100."}
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "Rank all weights together (global), within each layer or each output (row), or n:m, as in 2:4: "
            "keep at most n of m inputs in a row; structured takes out whole units, which are hidden units, heads and "
            "channels, structured:uniform the same share of every layer and no heads. Default: the criterion's own.",
        },
    )
    min_layer_density: float = field(
        default=0.0,
        metadata={
            "help": "With scope global: the fraction of each layer that is kept in any case; structured: of its units."
        },
    )
    prune_head: bool = field(default=False, metadata={"help": "Prune the classifier head too."})
    examples_per_class: int = field(default=10, metadata={"help": "Training images of each class to score with."})
    scoring_batch_size: int = field(
        default=16, metadata={"help": "Images scored at once. Smaller saves memory; scores do not depend on it."}
    )

    def __post_init__(self) -> None:
        if self.scope is not None:
            as_scope(self.scope)
        if self.rounds is None:
            self.rounds = self.default_rounds()

    def default_rounds(self) -> int:
        """How many rounds there are where nobody says it."""
        return ROUNDS

    @property
    def criterion_name(self) -> str:
        """What weights are scored by, also where nobody says it."""
        return self.criterion or CRITERION

    @property
    def takes_out_units(self) -> bool:
        """Whether the scope is one of whole units, which leave a smaller model."""
        return self.scope is not None and as_scope(self.scope).whole_units

    def criterion_object(self) -> px.Criterion:
        """The criterion of that name, with `power`.

        Raises:
            InvalidArgumentError: `power` for a criterion that takes none.
        """
        criterion = px.CRITERIA[self.criterion_name]
        if self.power is None:
            return criterion
        if not isinstance(criterion, px.PX):
            raise px.InvalidArgumentError(f"--power is for the px criteria, and --criterion is {self.criterion_name}.")
        return replace(criterion, power=self.power)

    def find_masks(self, model: nn.Module, batches: Batches, sparsity: float, progress: bool) -> px.Masks:
        """Those that `px.prune` finds with these settings."""
        return px.prune(
            model, batches, self.criterion_object(), sparsity=sparsity, progress=progress, **self._settings()
        )

    def _settings(self) -> dict[str, Any]:
        """What `px.prune` and `px.GradualPruning` are both told."""
        return {
            "rounds": self.rounds,
            "scope": self.scope,
            "prune_head": self.prune_head,
            "min_layer_density": self.min_layer_density,
        }

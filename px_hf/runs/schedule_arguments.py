"""The arguments of a schedule: how far a network is pruned, before it is fine-tuned or in rounds while it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import px_hf as px

from ..model.inputs import Batches
from ..plan import ROUNDS as GRADUAL_ROUNDS
from ..plan import SCHEDULES, UNTIL, check_until, most_rounds
from ..prune import ROUNDS
from ..scopes import check_sparsity
from .scoring_arguments import CRITERION, ScoringArguments

ONE_SHOT, GRADUAL = SCHEDULES
GRADUAL_CRITERION = "px-balanced"
"""By default, while training: docs/RESULTS.md."""


@dataclass
class ScheduleArguments(ScoringArguments):
    """How far a network is pruned, and when."""

    topic: ClassVar[str] = "pruning"

    criterion: str | None = field(
        default=None,
        metadata={
            "help": f"How weights are scored. Default: {CRITERION}, with --schedule gradual {GRADUAL_CRITERION}.",
            "choices": list(px.CRITERIA),
        },
    )
    rounds: int | None = field(
        default=None,
        metadata={
            "help": f"Rounds of scoring and pruning. Default: {ROUNDS}, with --schedule gradual {GRADUAL_ROUNDS}. The "
            "paper uses 100."
        },
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "Prune gradually, in rounds during the first part of fine-tuning, or once before it (one-shot). "
            "Gradually is far better at high sparsity. Default: see the page of the command, docs/FINETUNING.md.",
            "choices": list(SCHEDULES),
        },
    )
    until: float = field(
        default=UNTIL,
        metadata={"help": "With --schedule gradual: the share of the training steps after which the last round is."},
    )
    sparsity: float = field(default=0.9, metadata={"help": "Fraction of the weights to prune, in [0, 1)."})

    def __post_init__(self) -> None:
        self.schedule = self.schedule or self.default_schedule()
        self._rounds_by_default = self.rounds is None
        super().__post_init__()

    def default_schedule(self) -> str:
        """When the network is pruned where nobody says it."""
        return ONE_SHOT

    @property
    def gradual(self) -> bool:
        """Whether the network is pruned while it is fine-tuned."""
        return self.schedule == GRADUAL

    def fit_rounds(self, total_steps: int) -> None:
        """Of a training of few steps: as many rounds as fit into it, unless their number was given."""
        if self._rounds_by_default:
            self.rounds = min(self.default_rounds(), most_rounds(self.until, total_steps))

    def default_rounds(self) -> int:
        return GRADUAL_ROUNDS if self.gradual else ROUNDS

    @property
    def criterion_name(self) -> str:
        return self.criterion or (GRADUAL_CRITERION if self.gradual else CRITERION)

    def check(self) -> None:
        """Find out before any work what `px.prune` would refuse.

        Raises:
            InvalidArgumentError: a sparsity or a setting of the criterion or the schedule outside its range.
        """
        check_sparsity(self.sparsity)
        check_until(self.until)
        if self.until != UNTIL and not self.gradual:
            raise px.InvalidArgumentError("--until says when --schedule gradual ends. Pass that too, or leave it out.")
        self.criterion_object()

    def gradual_pruning(self, batches: Batches) -> px.GradualPruning:
        """The callback that prunes with these settings while Trainer trains.

        Raises:
            InvalidArgumentError: a setting outside its range.
        """
        return px.GradualPruning(
            self.criterion_object(), batches, sparsity=self.sparsity, until=self.until, **self._settings()
        )

    def describe(self) -> dict[str, Any]:
        """The settings that the masks depend on, as JSON can say them."""
        schedule = {"schedule": self.schedule, "until": self.until} if self.gradual else {}
        return schedule | {
            "criterion": repr(self.criterion_object()),
            "sparsity_asked": self.sparsity,
            "rounds": self.rounds,
            "scope": self.scope or px.CRITERIA[self.criterion_name].scope,
            "min_layer_density": self.min_layer_density,
            "prune_head": self.prune_head,
        }

"""The arguments of pruning: how weights are scored, how far a network is pruned, what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

import px_hf as px

from ..controls import CONTROLS
from ..model.inputs import Batches
from ..scopes import as_scope, check_sparsity


@dataclass
class ScoringArguments:
    """How weights are ranked for pruning."""

    criterion: str = field(
        default="px-active", metadata={"help": "How weights are scored.", "choices": list(px.CRITERIA)}
    )
    power: float | None = field(
        default=None, metadata={"help": "Exponent of the path flow in the px criteria: 1 = the paper, 0 = magnitude."}
    )
    rounds: int = field(default=20, metadata={"help": "Rounds of scoring and pruning. The paper uses 100."})
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

    @property
    def takes_out_units(self) -> bool:
        """Whether the scope is one of whole units, which leave a smaller model."""
        return self.scope is not None and as_scope(self.scope).whole_units

    def criterion_object(self) -> px.Criterion:
        """The criterion of that name, with `power`.

        Raises:
            InvalidArgumentError: `power` for a criterion that takes none.
        """
        criterion = px.CRITERIA[self.criterion]
        if self.power is None:
            return criterion
        if not isinstance(criterion, px.PX):
            raise px.InvalidArgumentError(f"--power is for the px criteria, and --criterion is {self.criterion}.")
        return replace(criterion, power=self.power)

    def find_masks(self, model: nn.Module, batches: Batches, sparsity: float, progress: bool) -> px.Masks:
        """Those that `px.prune` finds with these settings."""
        return px.prune(
            model,
            batches,
            self.criterion_object(),
            sparsity=sparsity,
            rounds=self.rounds,
            scope=self.scope,
            prune_head=self.prune_head,
            min_layer_density=self.min_layer_density,
            progress=progress,
        )


@dataclass
class SparsityArguments(ScoringArguments):
    """How far one network is pruned, and whether the unpruned one is trained beside it."""

    sparsity: float = field(default=0.9, metadata={"help": "Fraction of the weights to prune, in [0, 1)."})
    compare_dense: bool = field(
        default=False,
        metadata={"help": "Train the unpruned network as well, with the same settings. On for the digits."},
    )

    def check(self) -> None:
        """Find out before any work what `px.prune` would refuse.

        Raises:
            InvalidArgumentError: a sparsity or a setting of the criterion outside its range.
        """
        check_sparsity(self.sparsity)
        self.criterion_object()

    def describe(self) -> dict[str, Any]:
        """The settings that the masks depend on, as JSON can say them."""
        return {
            "criterion": repr(self.criterion_object()),
            "sparsity_asked": self.sparsity,
            "rounds": self.rounds,
            "scope": self.scope or px.CRITERIA[self.criterion].scope,
            "min_layer_density": self.min_layer_density,
            "prune_head": self.prune_head,
        }


@dataclass
class PruneArguments(SparsityArguments):
    """The sparse subnetwork of a classifier."""

    keep_masks: bool = field(
        default=False,
        metadata={"help": "The backbone is sparse, by px_hf: prune nothing more, and keep exactly its masks."},
    )
    control: str = field(
        default="none",
        metadata={
            "help": "Instead of the found mask: the same in random order within each layer (a random mask of the "
            "found layer densities), the same with units permuted, or the same on weights drawn anew.",
            "choices": list(CONTROLS),
        },
    )
    dense: bool = field(default=False, metadata={"help": "Prune nothing: train the ceiling to compare with."})

    @property
    def takes_out_units(self) -> bool:
        return super().takes_out_units and not self.keep_masks

    def short_name(self) -> str:
        """As in the name of the output folder: px-active90, magnitude80-shuffle, dense, kept."""
        if self.keep_masks or self.dense:
            return "kept" if self.keep_masks else "dense"
        name = f"{self.criterion}{100 * self.sparsity:g}"
        name += f"-{self.scope}".replace(":", "-") if self.takes_out_units else ""
        return name if self.control == "none" else f"{name}-{self.control}"

    def describe(self) -> dict[str, Any]:
        criterion = {"criterion": "none (dense)"} if self.dense else {}
        return super().describe() | criterion | {"control": self.control}

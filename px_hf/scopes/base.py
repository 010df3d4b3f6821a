"""What every scope has in common, and the settings that all of them take."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from torch import Tensor, nn

from ..criteria import Criterion
from ..errors import InvalidArgumentError
from ..masks import Masks
from ..model.inputs import Batches
from .ranking import HERE, Held, Tensors, check_scores, check_within


@dataclass(frozen=True)
class Step:
    """One choice: checked scores, and how many of them may stay.

    Attributes:
        scores: parameter name -> scores of its shape, non-negative, finite.
        sparsity: the fraction to prune, in [0, 1).
        within: what may be kept, name -> bool tensor; empty = everything.
        min_layer_density: the fraction of each layer that is kept in any case.
        final: False on the way to a higher sparsity; such a step need not look as the last one must.
        held: who holds the scores; with a scope that goes ``by_counts`` each process may hold some rows of them.
    """

    scores: Tensors
    sparsity: float
    within: Tensors
    min_layer_density: float
    final: bool
    held: Held = HERE

    @property
    def density(self) -> Fraction:
        """The fraction to keep, exactly: a sparsity is the decimal number that it prints as."""
        return 1 - Fraction(repr(self.sparsity))


class Scope(ABC):
    """What competes with what when weights are chosen: scores in, masks out. Subclasses are frozen dataclasses.

    `px_hf.prune` asks, in this order: `check_criterion`, `targets`, `begin`, `check_budget`, and once a round
    `choose`. Only ``texts`` and `keep` have to be written; docs/SCOPES.md shows a whole scope.

    Attributes:
        texts: how users write the scope, for error messages: ``("global",)``, ``("n:m, such as 2:4",)``.
        whole_units: whether whole units are pruned, which `px_hf.shrink` can take out.
        by_counts: whether `keep` looks at counts over ``step.held`` alone, so that no process need hold all scores.
    """

    texts: ClassVar[tuple[str, ...]]
    whole_units: ClassVar[bool] = False
    by_counts: ClassVar[bool] = False

    @classmethod
    def parse(cls, text: str) -> Scope | None:
        """The scope that a text names; None for a text of another scope.

        Raises:
            InvalidArgumentError: the text is of this scope, and its numbers make no sense.
        """
        return cls() if text in cls.texts else None

    @property
    def name(self) -> str:
        """The text that `parse` turns into this scope."""
        return self.texts[0]

    def check_criterion(self, criterion: Criterion) -> None:  # noqa: B027  (most take any)
        """Whether the scope can use the scores of a criterion.

        Raises:
            InvalidArgumentError: it cannot.
        """

    def targets(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the prunable weights of ``model`` that the scope chooses from; the others stay dense.

        Raises:
            TargetError: there are none, or a weight has a shape that the scope is not defined for.
        """
        return dict(weights)

    def begin(self, model: nn.Module, batches: Batches, targets: Mapping[str, Tensor], criterion: Criterion) -> Scope:
        """What chooses in the rounds of one pruning: a scope that has to look at the model returns an object that
        has; any other is its own."""
        return self

    def check_budget(self, targets: Mapping[str, Tensor], sparsity: float, min_layer_density: float) -> None:  # noqa: B027
        """Whether ``sparsity`` of the weights can be pruned.

        Raises:
            InvalidArgumentError, TargetError: it cannot.
        """

    def choose(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        *,
        within: Masks | None = None,
        min_layer_density: float = 0.0,
        final: bool = True,
    ) -> Masks:
        """The masks that keep what has the highest scores.

        Args:
            scores: parameter name -> scores of its shape, non-negative, finite.
            sparsity: the fraction to prune, in [0, 1).
            within: only weights kept there may be kept.
            min_layer_density: the fraction of each layer that is kept in any case, in [0, 1 - sparsity].
            final: False for a step on the way to a higher sparsity.

        Raises:
            InvalidArgumentError, NonFiniteError, TargetError: see `px_hf.select`.
        """
        sparsity = check_sparsity(sparsity)
        check_scores(scores)
        if within is not None:
            check_within(within, scores)
        floor = check_min_layer_density(min_layer_density, sparsity)
        return Masks(self.keep(Step(scores, sparsity, {} if within is None else within.tensors, floor, final)))

    @abstractmethod
    def keep(self, step: Step) -> dict[str, Tensor]:
        """The masks of one step: name -> bool tensor, True = kept.

        Raises:
            InvalidArgumentError, TargetError: the step is not one that the scope can take.
        """


def check_adds_up(criterion: Criterion, scope: Scope, groups: str) -> None:
    """Whether the scores of weights add up to those of groups of them, such as units.

    Raises:
        InvalidArgumentError: they are ranks.
    """
    if criterion.unit_power is None:
        raise InvalidArgumentError(
            f"the scores of {type(criterion).__name__} rank weights and cannot be added up to those of {groups}, "
            f"which scope={scope.name!r} needs. Use another criterion, such as px.PX()."
        )


def as_number(setting: object) -> float:
    """A setting as a float; NaN, which lies in no range, if it is no number."""
    try:
        return float(setting)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def check_sparsity(sparsity: float) -> float:
    """``sparsity`` as a float in [0, 1).

    Raises:
        InvalidArgumentError: it is not one.
    """
    value = as_number(sparsity)
    if not 0 <= value < 1 or isinstance(sparsity, bool):
        raise InvalidArgumentError(
            f"sparsity is the fraction of weights to prune and must be in [0, 1), got {sparsity!r}. "
            "To keep 10 % of the weights use 0.9."
        )
    return value


def check_min_layer_density(min_layer_density: float, sparsity: float) -> float:
    """``min_layer_density`` as a float in [0, 1 - sparsity].

    Raises:
        InvalidArgumentError: it is not one.
    """
    value = as_number(min_layer_density)
    if not 0 <= value <= 1 - sparsity + 1e-12:
        raise InvalidArgumentError(
            f"min_layer_density={min_layer_density!r}: expected a fraction in [0, {1 - sparsity:.6g}]: no layer can "
            f"be sure of more than sparsity={sparsity!r} leaves of the whole."
        )
    return value

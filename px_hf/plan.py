"""What gradual pruning is to do: by what, how far, in how many rounds, and after which steps."""

from __future__ import annotations

from dataclasses import dataclass, is_dataclass
from fractions import Fraction
from typing import Any, Final

from .criteria import Criterion
from .errors import InvalidArgumentError
from .model.outputs import Output, text_of
from .prune import check_settings
from .scopes import Scope, as_number

SCHEDULES: Final = ("one-shot", "gradual")
"""Pruned before fine-tuning, or in rounds during its first part."""

ROUNDS: Final = 8
UNTIL: Final = 0.5
"""Defaults, chosen on validation splits: docs/RESULTS.md."""


@dataclass(frozen=True)
class Plan:
    """The settings of `px_hf.gradual_pruning`, which has their meaning and ranges.

    Raises:
        InvalidArgumentError: a setting is outside its range.
    """

    criterion: Criterion
    sparsity: float
    rounds: int = ROUNDS
    until: float = UNTIL
    scope: str | Scope | None = None
    prune_head: bool = False
    min_layer_density: float = 0.0
    output: Output = None

    def __post_init__(self) -> None:
        check_settings(self.criterion, self.sparsity, self.rounds, self.scope, self.min_layer_density, self.output)
        check_until(self.until)

    def steps(self, total_steps: int) -> tuple[int, ...]:
        """How many steps have been made at each round, see `round_steps`."""
        return round_steps(self.rounds, self.until, total_steps)

    def describe(self, scope: Scope, total_steps: int) -> dict[str, Any]:
        """All that the masks of a training depend on, as JSON can say it."""
        criterion = self.criterion
        return {
            "criterion": repr(criterion) if is_dataclass(criterion) else type(criterion).__name__,
            "sparsity": self.sparsity,
            "rounds": self.rounds,
            "until": self.until,
            "scope": scope.name,
            "prune_head": self.prune_head,
            "min_layer_density": self.min_layer_density,
            "output": text_of(self.output),
            "total_steps": total_steps,
        }


def check_until(until: float) -> float:
    """`until` as a float in (0, 1].

    Raises:
        InvalidArgumentError: it is not one.
    """
    value = as_number(until)
    if not 0 < value <= 1 or isinstance(until, bool):
        raise InvalidArgumentError(
            f"until={until!r}: expected the share of the training steps after which the last round is made, in (0, 1]."
        )
    return value


def most_rounds(until: float, total_steps: int) -> int:
    """How many rounds fit into a training of so many steps, if each but the first needs a step."""
    return min(_last(until, total_steps) + 1, total_steps)


def _last(until: float, total_steps: int) -> int:
    return int(Fraction(repr(float(until))) * total_steps)


def round_steps(rounds: int, until: float, total_steps: int) -> tuple[int, ...]:
    """How many steps have been made at each round, rising from 0 to `⌊until · total_steps⌋`; for one round (0,).

    `until` is read as the decimal number it prints as.

    Raises:
        InvalidArgumentError: a setting is out of range, or two rounds would fall on the same step.
    """
    check_until(until)
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise InvalidArgumentError(f"total_steps={total_steps!r}: expected a whole number of optimizer steps ≥ 1.")
    if rounds == 1:
        return (0,)
    last = _last(until, total_steps)
    if rounds > most_rounds(until, total_steps):
        raise InvalidArgumentError(
            f"rounds={rounds} do not fit into training: until={until!r} of total_steps={total_steps} leaves {last} "
            f"step(s) between the first round and the last, and each round but the first needs one. Expected at most "
            f"{most_rounds(until, total_steps)} rounds: use fewer, train longer, or raise until."
        )
    return tuple(t * last // (rounds - 1) for t in range(rounds))

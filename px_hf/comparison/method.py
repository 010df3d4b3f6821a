"""The methods that are compared, as text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import px_hf as px

from ..controls import CONTROLS
from ..plan import ROUNDS, SCHEDULES, UNTIL, check_until
from ..repair.by_name import NONE, REPAIRS
from ..scopes import as_scope

DENSE = "dense"
"""The name of no method: nothing is pruned."""

_COLON = re.compile(r":(?!\d|uniform)")
"""Between settings. The colons inside scope=2:4 and scope=structured:uniform divide nothing."""


@dataclass(frozen=True)
class Method:
    """`name:key=value:...`: a criterion with settings of its own and of its pruning.

    Keys are the fields of the criterion (`px-active:power=0.5`), and the fields that follow it here. One more of these
    needs its check below, and its use in `px_hf.comparison.cell.prune_`.
    """

    text: str
    criterion: px.Criterion
    rounds: int
    scope: str
    min_layer_density: float = 0.0
    control: str = "none"
    schedule: str = SCHEDULES[0]
    until: float = UNTIL
    repair: str = NONE

    @classmethod
    def parse(cls, text: str, rounds: int, criteria: Mapping[str, px.Criterion] = px.CRITERIA) -> Method:
        """The method of that text, with ``rounds`` unless it says its own, or is gradual.

        Raises:
            InvalidArgumentError: an unknown name, key or value.
        """
        name, *given = _COLON.split(text)
        if name not in criteria:
            raise px.InvalidArgumentError(f"Method {text!r}: no criterion {name!r}; there are {', '.join(criteria)}.")
        criterion: Any = criteria[name]
        own = sorted(f.name for f in fields(criterion))
        pruning = [f.name for f in fields(cls) if f.name not in ("text", "criterion")]
        settings: dict[str, Any] = {}
        for setting in given:
            key, equals, value = setting.partition("=")
            if key not in own + pruning or not equals:
                raise px.InvalidArgumentError(
                    f"Method {text!r}: {setting!r} is no setting of it; expected key=value with a key of "
                    f"{', '.join(own + pruning)}."
                )
            settings[key] = _value(value)
        criterion = replace(criterion, **{key: value for key, value in settings.items() if key in own})
        gradual = settings.get("schedule") == SCHEDULES[1]
        found = {"rounds": ROUNDS if gradual else rounds, "scope": criterion.scope}
        found |= {key: value for key, value in settings.items() if key not in own}
        return cls(text, criterion, **found)

    def __post_init__(self) -> None:
        try:
            as_scope(self.scope)
        except px.InvalidArgumentError as error:
            raise px.InvalidArgumentError(f"Method {self.text!r}: {error}") from error
        if self.control not in CONTROLS:
            raise px.InvalidArgumentError(f"Method {self.text!r}: expected a control of {', '.join(CONTROLS)}.")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise px.InvalidArgumentError(f"Method {self.text!r}: rounds must be a whole number ≥ 1.")
        if self.schedule not in SCHEDULES:
            raise px.InvalidArgumentError(f"Method {self.text!r}: expected a schedule of {', '.join(SCHEDULES)}.")
        if self.gradual and self.control != CONTROLS[0]:
            raise px.InvalidArgumentError(
                f"Method {self.text!r}: a control changes masks before training, which schedule={self.schedule} makes "
                "during it. Leave one out."
            )
        if self.repair not in (NONE, *REPAIRS):
            raise px.InvalidArgumentError(f"Method {self.text!r}: expected a repair of {', '.join((NONE, *REPAIRS))}.")
        if self.gradual and self.repair != NONE:
            raise px.InvalidArgumentError(
                f"Method {self.text!r}: repair={self.repair} is for a network that is pruned before training. Leave "
                f"out one of it and schedule={self.schedule}."
            )
        check_until(self.until)

    @property
    def gradual(self) -> bool:
        """Whether the network is pruned while it is fine-tuned."""
        return self.schedule == SCHEDULES[1]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

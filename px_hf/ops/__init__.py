"""Path rules: what each operation does to path sums.

`RULES` is the table; the families below fill it. `Tracer` applies it to a running network, and
`Reading` says which factors of a path product are read.
"""

from __future__ import annotations

from .companions import ABSOLUTE, ACTIVE, G, H, Paths, Reading, Weight
from .gates import ForgottenError
from .registry import RULES, add_rule, rule
from .rules import activation, arithmetic, attention, linear, norm, pooling, shape
from .tracer import Tracer

__all__ = [
    "ABSOLUTE",
    "ACTIVE",
    "RULES",
    "ForgottenError",
    "G",
    "H",
    "Paths",
    "Reading",
    "Tracer",
    "Weight",
    "activation",
    "add_rule",
    "arithmetic",
    "attention",
    "linear",
    "norm",
    "pooling",
    "rule",
    "shape",
]  # fmt: skip

"""What competes with what when weights are chosen, one scope a file. docs/SCOPES.md compares them."""

from __future__ import annotations

from ..errors import InvalidArgumentError
from .base import Scope, Step, as_number, check_min_layer_density, check_sparsity
from .blocks import Blocks
from .n_of_m import NOfM
from .units import Units
from .weights import Global, Layer, Row

SCOPES: tuple[type[Scope], ...] = (Global, Layer, Row, NOfM, Blocks, Units)
"""A new scope is a file beside these and a row here."""


def as_scope(scope: str | Scope) -> Scope:
    """The scope that a text names, such as "global" or "2:4"; an object is returned as it is.

    Raises:
        InvalidArgumentError: there is no such scope.
    """
    if isinstance(scope, Scope):
        return scope
    for known in SCOPES if isinstance(scope, str) else ():
        if (found := known.parse(scope)) is not None:
            return found
    texts = ", ".join(repr(text) for known in SCOPES for text in known.texts)
    raise InvalidArgumentError(f"Unknown scope {scope!r}, expected one of {texts}, or an object of px_hf.scopes.")


__all__ = [
    "SCOPES",
    "Blocks",
    "Global",
    "Layer",
    "NOfM",
    "Row",
    "Scope",
    "Step",
    "Units",
    "as_number",
    "as_scope",
    "check_min_layer_density",
    "check_sparsity",
]

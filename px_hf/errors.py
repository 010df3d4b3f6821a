"""Errors of px_hf. Each is also the builtin that a caller would catch.

A message says what happened, where, what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class PxError(Exception):
    """Base class of every error that px_hf raises on purpose."""


class InvalidArgumentError(PxError, ValueError):
    """A setting outside its range: a sparsity of 1.2, zero rounds, an unknown scope."""


class DataError(PxError, ValueError):
    """Batches or a dataset that cannot be used: empty, wrong shape, missing labels or columns."""


class TargetError(PxError, ValueError):
    """The model and the masks, or the model and the criterion, do not fit: no prunable weights, a wrong shape."""


class UnsupportedOpError(PxError, NotImplementedError):
    """The forward uses operations without a path rule. Lists all of them, with their modules."""


class NonFiniteError(PxError, ValueError):
    """An activation, a path sum or a score is NaN or infinite."""


class LaunchError(PxError, RuntimeError):
    """Several processes were launched but each believes to be the only one."""


class CheckpointError(PxError, ValueError):
    """A saved folder or file is missing, incomplete, damaged, or belongs to something else."""


class OutputExistsError(PxError, FileExistsError):
    """An output folder already holds a model and overwriting was not asked for."""


class HubError(PxError, OSError):
    """Nothing was pushed: no token, no permission, the Hub refuses or does not answer, no room on the disk."""


class DependencyError(PxError, ImportError):
    """An optional library is not installed; the message names the extra that has it."""


def listed(names: Iterable[object], most: int = 8, separator: str = ", ") -> str:
    """The first names, as a message shows them: `a, b, c and 5 more`."""
    shown = [str(name) for name in names]
    return separator.join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")

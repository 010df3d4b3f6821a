"""Registers the compact format with transformers, without importing transformers.

If transformers is there already, now; otherwise as soon as `transformers.quantizers` is imported. Python's way to be
told of an import is a finder on `sys.meta_path`; this one finds what Python's own would find, and registers when the
module has been executed.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_AWAITED = "transformers.quantizers"


def register() -> None:
    """Register now, or when transformers is imported; once."""
    if _AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    try:
        importlib.import_module("px_hf.compact.quantizer")
    except ImportError as error:  # of a name that another transformers does not have: that one must still work
        warnings.warn(
            f"px_hf cannot tell this transformers about its compact copies ({error}). px_hf.from_pretrained reads "
            "them without.",
            stacklevel=2,
        )


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _AWAITED else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec

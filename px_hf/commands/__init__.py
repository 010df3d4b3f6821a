"""The programs of recipes/, one command a file."""

from __future__ import annotations

import sys
from collections.abc import Callable

from ..errors import PxError


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run a command on the arguments of this process; an error of px_hf ends it with its text and no traceback.

    A command that returns how many of its parts failed ends with exit code 1 if any did.
    """
    try:
        failed = main(sys.argv[1:])
    except PxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.exit(1 if failed else 0)

"""The programs of recipes/ and of the command `px-hf`, one a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ..errors import PxError

INTERRUPTED = 130
"""The exit code that shells give a program that was stopped by Ctrl-C."""


def run(main: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run a program on ``argv``, by default the arguments of this process, and end the process.

    An error of px_hf ends it with its text and no traceback, Ctrl-C with one line. A program that returns how many of
    its parts failed ends with exit code 1 if any did.
    """
    try:
        failed = main(list(sys.argv[1:] if argv is None else argv))
    except PxError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(1 if failed else 0)

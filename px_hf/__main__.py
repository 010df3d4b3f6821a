"""`python -m px_hf` is the command `px-hf`."""

from __future__ import annotations

from .commands.cli import main

if __name__ == "__main__":
    main()

"""What a command shows while it runs and at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table


class Phases:
    """Headings on the console, and the seconds that each phase took."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(quiet=quiet, highlight=False)
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.console.rule(f"[bold]{name}", align="left")
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 2)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)


class ClosingTable:
    """The table at the end of a run: a column for the pruned network and, if `compared`, one for the dense one."""

    def __init__(self, out: Path, *, compared: bool, caption: str | None = None, show_header: bool = True) -> None:
        self.compared = compared
        self.table = Table(
            title=str(out), title_justify="left", caption=caption, caption_justify="left", show_header=show_header
        )
        self.table.add_column()
        for name in ("dense", "pruned") if compared else ("pruned",):
            self.table.add_column(name, justify="right")

    def row(self, label: str, pruned: str, dense: str = "") -> None:
        self.table.add_row(*([label, dense, pruned] if self.compared else [label, pruned]))

    def section(self) -> None:
        """A line under what is there so far."""
        self.table.add_section()

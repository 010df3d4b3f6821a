"""What a recipe shows while it runs and at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..scopes import as_scope

_CAPTIONS = {
    False: "Effective: what a sparse runtime could skip. Dense kernels do not get faster.",
    True: "Effective: of the smaller model that was saved.",
}
"""By whether whole units were taken out."""


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

    def close(self, out: Path, results: Mapping[str, Any]) -> None:
        """The closing table: accuracy, sparsity, sizes, times. `results` are those of all_results.json."""
        compared = "dense_eval_accuracy" in results
        table = Table(
            title=str(out),
            title_justify="left",
            caption=_CAPTIONS["scope" in results and as_scope(results["scope"]).whole_units],
            caption_justify="left",
            show_header=compared,
        )
        table.add_column()
        if compared:
            table.add_column("dense", justify="right")
        table.add_column("pruned", justify="right")

        def row(label: str, pruned: str, dense: str = "") -> None:
            table.add_row(*([label, dense, pruned] if compared else [label, pruned]))

        for name, key in (("test", "test_accuracy"), ("validation", "eval_accuracy")):
            if key in results:
                dense = f"{results[f'dense_{key}']:.2%}" if compared else ""
                row(f"accuracy, {name}", f"{results[key]:.2%}", dense)
        table.add_section()
        row("sparsity asked", f"{100 * results['sparsity_asked']:.6g} %")
        row("sparsity achieved", f"{100 * results['sparsity']:.6g} %")
        row("prunable weights kept", f"{results['weights_kept']:,}", f"{results['weights']:,}")
        row("parameters kept", f"{results['parameters_kept']:,}", f"{results['parameters']:,}")
        row("MACs per image, effective", f"{results['effective_macs']:,}", f"{results['macs']:,}")
        table.add_section()
        for label, size in results["file_bytes"].items():
            row(label, f"{size / 1e6:.2f} MB")
        table.add_section()
        for name, seconds in self.seconds.items():
            row(f"time, {name.lower()}", f"{seconds:.1f} s")
        self.console.print(table)

"""What a saved model is, and whether its zeros hold: `px-hf inspect`. The model is not built, nor any code of it run.

    px-hf inspect outputs/resnet-digits-px-active90
    px-hf inspect me/vit-b16-cifar100-px90 --json

The exit code is 1 if a pruned weight is not zero, or if copies of the model do not agree.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..hub.inspection import InspectedLayer, Inspection


def main(argv: list[str]) -> int:
    """1 if the model is not what it says, else 0."""
    parser = argparse.ArgumentParser(
        "px-hf inspect",
        description="What a saved model is, without running it: sparsity, layers, sizes, how it was pruned; whether "
        "its zeros hold and its copies agree. The exit code is 1 if they do not.",
        epilog="example: px-hf inspect outputs/resnet-digits-px-active90",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="folder-or-id", help="a local folder, an id of the Hub, demo-resnet, demo-vit"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the Hub")
    parser.add_argument("--subfolder", help="where in the folder or repository")
    parser.add_argument("--token", help="access token for private repositories; default: the one you logged in with")
    parser.add_argument("--cache_dir", help="where downloaded files are kept")
    parser.add_argument("--layers", action="store_true", help="list every layer, not groups of like layers")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")
    args = parser.parse_args(argv)

    import px_hf as px

    from ..runs.embedded_models import embedded

    names = ("revision", "subfolder", "token", "cache_dir")
    download = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    found = px.inspect(embedded(args.model), **download)
    if args.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        _show(found, args.layers)
    return len(found.problems)


def _show(found: Inspection, every_layer: bool) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, emoji=False)

    def say(text: str, style: str = "") -> None:
        console.print(Text(text, style), soft_wrap=True)

    title = found.source + (f", commit {found.commit}" if found.commit else "")
    say(_plain(f"{title}: {found.architecture}"), "bold")
    if found.pruned:
        say(f"{100 * found.sparsity:.4g} % sparse: {found.kept:,} of {found.weights:,} prunable weights kept")
    for key, value in _origin(found.provenance):
        say(f"  {key}: {_plain(value)}")
    for name, size in {**found.dense_bytes, **found.compact_bytes}.items():
        say(f"  {_plain(name)}: {size / 1e6:.2f} MB")
    if found.pruned:
        groups = _grouped(found.layers, every_layer)
        table = Table(box=None, pad_edge=False)
        table.add_column(
            "layer", min_width=max((len(name) for name, _ in groups), default=0)
        )  # never cut: names are to be copied
        for heading in ("layers", "weights", "kept", "density"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, layers in groups:
            weights, kept = sum(each.weights for each in layers), sum(each.kept for each in layers)
            row = [str(len(layers)), f"{weights:,}", f"{kept:,}", _densities(layers)]
            table.add_row(Text(_plain(name)), *row)
        console.print(table, crop=False)
    for note in found.notes:
        say(f"Note: {_plain(note)}")
    for problem in found.problems:
        say(f"Problem: {_plain(problem)}", "bold red")
    if not found.pruned and not found.problems:
        say("px_hf has not pruned it: there is no compact copy, no masks file, and no entry in its config.")
    elif found.pruned and not found.problems:
        say("Every pruned weight is zero, and all copies are the same model.", "green")


_SAID_FIRST = ("criterion", "schedule", "rounds", "until", "scope", "sparsity_asked", "base_model", "dataset")


def _origin(provenance: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What is said of it, the settings of pruning first."""
    if "criterion" in provenance and "schedule" not in provenance:
        provenance = {**provenance, "schedule": "one-shot"}
    for key in [*_SAID_FIRST, *sorted(provenance.keys() - set(_SAID_FIRST))]:
        value = provenance.get(key)
        if isinstance(value, dict):
            value = ", ".join(f"{name} {each}" for name, each in value.items() if name != "sha256")
        if value not in (None, "", False, "none"):
            yield key.replace("_", " "), str(value)[:200]


def _grouped(layers: Iterable[InspectedLayer], every: bool) -> list[tuple[str, list[InspectedLayer]]]:
    """Layers whose names differ in numbers alone, in their order: `layer.3.fc.weight` is in `layer.*.fc.weight`."""
    groups: dict[str, list[InspectedLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.name if every else re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name), []).append(layer)
    return [(found[0].name if len(found) == 1 else name, found) for name, found in groups.items()]


def _densities(layers: list[InspectedLayer]) -> str:
    found = sorted(100 * each.kept / each.weights for each in layers if each.weights)
    if not found:
        return ""
    low, high = f"{found[0]:.3g}", f"{found[-1]:.3g}"
    return f"{low} %" if low == high else f"{low} - {high} %"


def _plain(text: str) -> str:
    """Without what a terminal would obey: anybody may have written the names in a repository."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)

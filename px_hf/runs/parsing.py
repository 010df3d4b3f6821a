"""Arguments from the command line and a YAML file.

Defaults < the embedded example's settings (when no data is named) < `--config file.yaml` < command line.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType

import px_hf as px

from .help import Usage, asked, help_text, options_of


def parse_groups(
    argv: Sequence[str],
    groups: Sequence[type],
    usage: Usage,
    example: Callable[[argparse.Namespace], Mapping[str, Any]],
    pushes: bool = False,
) -> list[Any]:
    """One object for each of the dataclasses `groups`; `example` tells other defaults, given what was named.

    `--help` and `--help <topic>` print a page, and end the process.

    Raises:
        InvalidArgumentError: an unknown argument or topic of help, an unreadable `--config`, or `--push_to_hub` in a
            command that does not push.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    topic = asked(argv)
    config = first.parse_known_args(argv)[0].config
    given = [*(_read_config(config) if config else []), *argv] if topic is None else []

    parser = HfArgumentParser(
        [DataClassType(group) for group in groups],
        allow_abbrev=False,
        add_help=False,
        usage=f"{usage.line}\nMore: {usage.command} --help",
    )
    defaults = example(parser.parse_known_args(given)[0])
    parser.set_defaults(**{name: value for name, value in defaults.items() if topic is None or name == "output_dir"})
    if topic is not None:
        print(help_text(usage, topic, options_of(groups, parser._actions)), end="")
        sys.exit()
    *found, unknown = parser.parse_args_into_dataclasses(given, True, look_for_args_file=False)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        close = difflib.get_close_matches(unknown[0], known, n=1)
        raise px.InvalidArgumentError(
            f"Unknown arguments: {' '.join(unknown)}." + (f" Did you mean {close[0]}?" if close else "")
        )
    if not pushes and any(getattr(group, "push_to_hub", False) for group in found):
        raise px.InvalidArgumentError(
            "--push_to_hub is for px-hf prune, which pushes the model that it trains, and px-hf evaluate. Push "
            "another saved model with px.push_to_hub(model, masks, repo_id)."
        )
    return found


PRESETS = {file.stem: file for file in sorted(Path(__file__).with_name("presets").glob("*.yaml"))}
"""Settings that come with px_hf, by the names that `--config` takes beside paths: docs/RESULTS.md supports them."""


def _read_config(path: str) -> list[str]:
    """A YAML mapping as command-line words, so that it is checked by the same parser."""
    try:
        content = yaml.safe_load(PRESETS.get(path, Path(path)).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise px.InvalidArgumentError(
            f"Cannot read --config {path}: {error}. Expected a YAML file, or one of {', '.join(PRESETS)}."
        ) from error
    if not isinstance(content, dict):
        raise px.InvalidArgumentError(f"--config {path} is no YAML mapping of argument names to values.")
    words: list[str] = []
    for name, value in content.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *(_word(item) for item in values)]
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, bool)) else str(value)

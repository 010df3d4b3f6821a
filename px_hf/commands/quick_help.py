"""Help without the seconds that torch and transformers take to import: what the programs say of themselves, in a file.

    python -m px_hf.commands.quick_help      # writes the file anew, after an option was changed; a test asks for it

Of the options of `transformers.TrainingArguments` it has the most used only: for `--help training`, `--help saving`
and `--help all` the program itself is asked.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.help import ALL, JSON, Option, Usage, asked, help_text

FILE = Path(__file__).with_name("help.json")
PROGRAMS = {
    "prune": "prune_finetune",
    "evaluate": "evaluate_downstream",
    "transfer": "transfer",
    "segment": "prune_segment",
    "compare": "compare_criteria",
}
"""Those whose arguments are dataclasses; the others tell theirs quickly by themselves."""

_NOT_STORED = ("training", "saving", ALL, JSON)


def stored_page(name: str, words: Sequence[str]) -> str | None:
    """The page of help that the words ask for; None if they ask for none, or for one that is not stored.

    Raises:
        InvalidArgumentError: there is no such topic.
    """
    topic = asked(words)
    if topic is None or topic in _NOT_STORED or name not in PROGRAMS or not FILE.is_file():
        return None
    said = json.loads(FILE.read_text(encoding="utf-8"))[name]
    options = [Option(**option) for option in said.pop("options")]
    return help_text(Usage(**said), topic, options)


def described() -> dict[str, Any]:
    """What the file should hold: program -> its usage and options, as `--help json` prints them."""
    found = {}
    for name, module in PROGRAMS.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            importlib.import_module(f".{module}", __package__).main(["--help", JSON])
        said = json.loads(printed.getvalue())
        firsts = {option["topic"]: option["name"] for option in reversed(said["options"])}  # so that no topic is lost
        chosen = {*said["common"], *(first for topic, first in firsts.items() if topic)}
        found[name] = said | {
            "options": [
                option
                for option in said["options"]
                if option["name"] in chosen or (option["topic"] and option["topic"] not in _NOT_STORED)
            ]
        }
    return found


if __name__ == "__main__":
    FILE.write_text(json.dumps(described(), indent=1) + "\n", encoding="utf-8")

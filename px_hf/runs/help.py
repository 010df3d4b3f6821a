"""Help that fits a screen: what a command does, its most used options, and one page of options for each topic.

A dataclass of arguments names its topic, `topic: ClassVar[str]`, or those of single options, `topics`. What has none
is shown by `--help all`.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import px_hf as px

ALL = "all"
_COLUMN = 30
"""Where the texts begin."""


@dataclass(frozen=True)
class Usage:
    """What a command says of itself: its name, one sentence, command lines to try, its most used options."""

    command: str
    summary: str
    examples: tuple[str, ...] = ()
    common: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """How the command is called."""
        return f"{self.command} [--config file.yaml] [--name value ...]"


def asked(argv: Sequence[str]) -> str | None:
    """The topic that `--help` asks for, "" if it names none; None if it is not asked for."""
    for place, word in enumerate(argv):
        if word in ("-h", "--help"):
            after = argv[place + 1 : place + 2]
            return after[0] if after and not after[0].startswith("-") else ""
    return None


def help_text(
    usage: Usage, topic: str, groups: Sequence[type], actions: Sequence[argparse.Action], width: int | None = None
) -> str:
    """The page of a topic: "" for the most used options, "all" for all of them.

    Raises:
        InvalidArgumentError: there is no such topic.
    """
    width = width or max(60, min(shutil.get_terminal_size().columns, 110))
    options = {action.dest: action for action in reversed(actions)}  # the first: the second would be --no_random_crop
    found = topics_of(groups)
    known = dict.fromkeys(name for name in found.values() if name)
    more = f"{usage.command} --help {' | '.join([*known, ALL])}"
    if topic == "":
        lines = [f"usage: {usage.line}", "", *textwrap.wrap(usage.summary, width), ""]
        lines += [f"  {example}" for example in usage.examples]
        lines += ["", "Most used options:", *_shown(options, usage.common, width, brief=True), "", f"More: {more}"]
        return "\n".join(lines) + "\n"
    if topic != ALL and topic not in known:
        raise px.InvalidArgumentError(f"There is no help on {topic!r}. There is: {more}")
    chosen = [name for name in dict.fromkeys(action.dest for action in actions) if topic in (ALL, found.get(name))]
    title = f"{usage.command}: all options" if topic == ALL else f"{usage.command}: options of {topic}"
    return "\n".join([title, "", *_shown(options, chosen, width, whole=topic == ALL), "", f"More: {more}"]) + "\n"


def topics_of(groups: Sequence[type]) -> dict[str, str | None]:
    """Option -> its topic: that of the table of its group, or that of the class that first declares it."""
    found: dict[str, str | None] = {}
    for group in groups:
        table: Mapping[str, str] = {
            name: topic for topic, names in getattr(group, "topics", {}).items() for name in names
        }
        for each in fields(group):
            declared = [base for base in group.__mro__ if each.name in vars(base).get("__annotations__", {})]
            first = vars(declared[-1]).get("topic") if declared else None
            found[each.name] = table.get(each.name) or first
    return found


def _shown(
    options: Mapping[str, argparse.Action],
    names: Sequence[str],
    width: int,
    *,
    brief: bool = False,
    whole: bool = False,
) -> Iterator[str]:
    for name in names:
        action = options[name]
        head = f"  {action.option_strings[0]}{_value(action)}"
        text = _text(action, brief, whole)
        wrapped = textwrap.wrap(text.replace("%%", "%"), width - _COLUMN, break_on_hyphens=False) or [""]
        if len(head) > _COLUMN - 2:
            yield head
        else:
            wrapped[0] = f"{head:{_COLUMN}}{wrapped[0]}".rstrip()
        start = 0 if len(head) > _COLUMN - 2 else 1
        yield from wrapped[:start]
        yield from (" " * _COLUMN + line for line in wrapped[start:])


def _sentence(text: str) -> str:
    return text.split(". ")[0].strip().rstrip(".") + "."


def _value(action: argparse.Action) -> str:
    if action.nargs == "?" or isinstance(action.default, bool):  # a switch
        return ""
    kind = getattr(action.type, "__name__", "")
    word = {"int": "N", "float": "X"}.get(kind, "NAME")
    return f" {word} ..." if action.nargs in ("+", "*") else f" {word}"


def _text(action: argparse.Action, brief: bool, whole: bool) -> str:
    text = (action.help or "").strip()
    if brief or (not whole and len(text) > 240):  # those of transformers are paragraphs
        text = _sentence(text)
    if action.choices and not brief and len(list(action.choices)) <= 16:
        text += f" One of {', '.join(str(choice) for choice in action.choices)}."
    default = action.default
    if default is None or default is False or default == "" or default == [] or "Default:" in text:
        return text
    words = ", ".join(map(str, default)) if isinstance(default, list) else "on" if default is True else str(default)
    return f"{text} [{words}]"

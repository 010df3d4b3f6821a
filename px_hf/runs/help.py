"""Help that fits a screen: what a command does, its most used options, and one page of options for each topic.

A dataclass of arguments names its topic, `topic: ClassVar[str]`, or those of single options, `topics`. What has none
is shown by `--help all`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import px_hf as px

ALL = "all"
JSON = "json"
"""As a topic: everything that help knows of a command, for programs."""

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


@dataclass(frozen=True)
class Option:
    """What help knows of one option. `value`: what stands after the flag; `default`: as it is shown."""

    name: str
    flag: str
    value: str
    text: str
    choices: tuple[str, ...]
    default: str
    topic: str | None


def asked(argv: Sequence[str]) -> str | None:
    """The topic that `--help` asks for, "" if it names none; None if it is not asked for."""
    for place, word in enumerate(argv):
        if word in ("-h", "--help"):
            after = argv[place + 1 : place + 2]
            return after[0] if after and not after[0].startswith("-") else ""
    return None


def options_of(groups: Sequence[type], actions: Sequence[argparse.Action]) -> list[Option]:
    """The options of a parser that was made of these groups, in its order."""
    topics = topics_of(groups)
    first = {action.dest: action for action in reversed(actions)}  # the second would be --no_random_crop
    return [_option(first[name], topics.get(name)) for name in dict.fromkeys(action.dest for action in actions)]


def help_text(usage: Usage, topic: str, options: Sequence[Option], width: int | None = None) -> str:
    """The page of a topic: "" for the most used options, "all" for all of them, "json" for all that is known.

    Raises:
        InvalidArgumentError: there is no such topic.
    """
    if topic == JSON:
        return json.dumps({**asdict(usage), "options": [asdict(option) for option in options]}, indent=1) + "\n"
    width = width or max(60, min(shutil.get_terminal_size().columns, 110))
    known = dict.fromkeys(option.topic for option in options if option.topic)
    more = f"{usage.command} --help {' | '.join([*known, ALL])}"
    if topic == "":
        lines = [f"usage: {usage.line}", "", *textwrap.wrap(usage.summary, width), ""]
        lines += [f"  {example}" for example in usage.examples]
        lines += [
            "",
            "Most used options:",
            *_shown(_named(options, usage.common), width, brief=True),
            "",
            f"More: {more}",
        ]
        return "\n".join(lines) + "\n"
    if topic != ALL and topic not in known:
        raise px.InvalidArgumentError(f"There is no help on {topic!r}. There is: {more}")
    chosen = [option for option in options if topic in (ALL, option.topic)]
    title = f"{usage.command}: all options" if topic == ALL else f"{usage.command}: options of {topic}"
    return "\n".join([title, "", *_shown(chosen, width, whole=topic == ALL), "", f"More: {more}"]) + "\n"


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


def _named(options: Sequence[Option], names: Sequence[str]) -> list[Option]:
    by_name = {option.name: option for option in options}
    return [by_name[name] for name in names]


def _shown(options: Sequence[Option], width: int, *, brief: bool = False, whole: bool = False) -> Iterator[str]:
    for option in options:
        head = f"  {option.flag}{option.value}"
        text = _text(option, brief, whole)
        wrapped = textwrap.wrap(text, width - _COLUMN, break_on_hyphens=False) or [""]
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


def _option(action: argparse.Action, topic: str | None) -> Option:
    default = action.default
    if default is None or default is False or default in ("", []):
        words = ""
    else:
        words = (
            ", ".join(map(str, default)) if isinstance(default, list) else "on" if default is True else str(default)
        )
    return Option(
        action.dest,
        action.option_strings[0],
        _value(action),
        (action.help or "").strip().replace("%%", "%"),
        tuple(str(choice) for choice in action.choices or ()),
        words,
        topic,
    )


def _text(option: Option, brief: bool, whole: bool) -> str:
    text = option.text
    if brief or (not whole and len(text) > 240):  # those of transformers are paragraphs
        text = _sentence(text)
    if option.choices and not brief and len(option.choices) <= 16:
        text += f" One of {', '.join(option.choices)}."
    return text if not option.default or "Default:" in text else f"{text} [{option.default}]"

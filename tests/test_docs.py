"""The documentation: links lead somewhere, snippets are Python and name what exists, the README stays short."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

import px_hf as px

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(kept.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_files_that_exist(page: Path) -> None:
    for name in re.findall(r"\b(?:recipes|px_hf|tests)/[\w/]+\.(?:py|md)\b", page.read_text(encoding="utf-8")):
        if page.name != "CHANGELOG.md":  # which also names what was
            assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_snippets_are_python_and_name_what_exists(page: Path) -> None:
    for snippet in re.findall(r"```python\n(.*?)\s*```", page.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(textwrap.dedent(snippet))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "px":
                assert hasattr(px, node.attr), f"{page.name} names px.{node.attr}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_laboratory_notes_are_linked_from_their_own_page() -> None:
    """So that none is lost."""
    index = (ROOT / "docs" / "notes" / "README.md").read_text(encoding="utf-8")
    notes = {page.name for page in (ROOT / "docs" / "notes").glob("*.md")} - {"README.md"}
    assert notes == set(re.findall(r"\]\((\w+\.md)\)", index))

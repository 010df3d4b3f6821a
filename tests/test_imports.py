"""The architecture: rooms import from the rooms below them, and nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "px_hf"

FLOORS = [
    ["errors", "version", "atomic", "lazy", "metrics"],
    ["distributed", "drawing"],
    ["model", "plots"],
    ["ops"],
    ["compact", "masks_file"],
    ["masks"],
    ["sharded_masks"],
    ["masked_steps"],
    ["scoring", "report", "controls", "data", "keep", "tune", "vote", "lora", "distillation", "export", "kernels"],
    ["criteria", "structured", "evaluation", "repair", "int8"],
    ["scopes", "downstream"],
    ["select", "sharded_round"],
    ["prune", "tickets"],
    ["plan"],
    ["gradual"],
    ["hub"],
    ["trainer"],
    ["runs"],
    ["comparison"],
    ["commands"],
    ["__main__"],
    [""],
]
"""Top-level modules and packages of px_hf, from the ground up; "" is `px_hf/__init__.py`."""

FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name below px_hf -> file."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(name: str, *, when_loaded: bool = False) -> Iterator[str]:
    """The modules of px_hf that a module imports anywhere, or only while it is being loaded."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]

    def walk(node: ast.AST) -> Iterator[ast.ImportFrom | ast.Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ImportFrom, ast.Import)):
                yield child
            later = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if not (when_loaded and (later or typing)):
                yield from walk(child)

    for node in walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            start = ".".join(parts[: len(parts) - node.level + 1])
            base = f"{start}.{node.module or ''}".strip(".")
            found = [base if f"{base}.{a.name}".strip(".") not in MODULES else f"{base}.{a.name}" for a in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "px_hf":
            found = [str(node.module)[len("px_hf.") :]]
        elif isinstance(node, ast.Import):
            found = [a.name[len("px_hf.") :] for a in node.names if a.name.split(".")[0] == "px_hf"]
        else:
            found = []
        yield from (target.strip(".") for target in found)


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_room_has_a_floor() -> None:
    assert {room(name) for name in MODULES} == FLOOR.keys()


PUBLIC = {"runs", "comparison", "commands"}
"""They are written as users write: `import px_hf as px`."""


@pytest.mark.parametrize("name", MODULES)
def test_no_import_runs_upward(name: str) -> None:
    """Neither when it is loaded, nor later, nor for the type checker."""
    own = FLOOR[room(name)]
    upward = {
        target
        for target in imports(name)
        if room(target) != room(name) and FLOOR[room(target)] >= own and not (target == "" and room(name) in PUBLIC)
    }
    assert not upward, f"px_hf.{name} imports from its own floor or above: {sorted(upward)}"


def circles(graph: dict[str, set[str]]) -> list[str]:
    """What is left when modules that import nothing, and then those that import only such, are taken away."""
    graph = {name: set(targets) for name, targets in graph.items()}
    while free := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in free:
            del graph[name]
    return sorted(graph)


def test_no_circle_of_imports() -> None:
    graph = {
        name: {target for target in imports(name, when_loaded=True) if target not in (name, "")} for name in MODULES
    }
    assert circles(graph) == []


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]

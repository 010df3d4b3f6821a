"""The package itself: its names, and that importing it stays cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import px_hf as px


@pytest.mark.parametrize("name", px.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(px, name) is not None
    assert name == "__version__" or getattr(px, name).__doc__


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prine'"):
        _ = px.prine


def test_names_of_submodules_stay_functions_after_their_import() -> None:
    script = "import px_hf.report, px_hf.prune, px_hf.select, px_hf as px\n"
    script += "assert all(map(callable, (px.report, px.prune, px.select)))"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_import_is_light() -> None:
    script = "import sys, px_hf; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["transformers", "timm", "torchvision", "datasets", "evaluate", "accelerate", "matplotlib"]
    done = subprocess.run(
        [sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"

"""The package itself: its names, and that importing it stays cheap."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import px_hf as px
from px_hf import version


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
    heavy = ["torch", "transformers", "timm", "torchvision", "datasets", "evaluate", "accelerate", "matplotlib"]
    done = subprocess.run(
        [sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_training_with_masks_needs_no_transformers(tmp_path: Path) -> None:
    script = """
import sys, torch, px_hf as px
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)
optimizer = torch.optim.AdamW(model.parameters())
with px.keep_masks(optimizer, model, masks):
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
masks.save(sys.argv[1])
assert px.Masks.load(sys.argv[1]) == masks and not masks.revived(model)
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, tmp_path / "masks.safetensors"], check=True, timeout=120)


def test_names_of_evaluation_are_loaded_when_used() -> None:
    script = "import sys, px_hf.evaluation as e; print([m for m in sys.argv[1:] if m in sys.modules])\n"
    script += "assert all(getattr(e, name) is not None for name in e.__all__); e.PROBES['ridge'].fit"
    heavy = ["sklearn", "scipy", "datasets", "evaluate", "transformers", "torchvision"]
    done = subprocess.run(
        [sys.executable, "-c", script, *heavy], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_the_commit_is_that_of_the_checkout_or_of_the_installation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    file = tmp_path / "px_hf" / "version.py"
    file.parent.mkdir()
    file.write_text("")
    monkeypatch.setattr(version, "__file__", str(file))
    installed = SimpleNamespace(read_text=lambda _: json.dumps({"vcs_info": {"commit_id": "a" * 40}}))
    monkeypatch.setattr(version, "distribution", lambda _: installed)
    found = version.commit.__wrapped__
    assert found() == "a" * 40
    installed.read_text = lambda _: None
    assert found() is None
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "v1")
    assert found() == git("rev-parse", "HEAD")
    file.write_text("changed")
    assert found() == git("rev-parse", "HEAD") + "-dirty"


def test_modules_are_names_of_the_package() -> None:
    """As with `import px_hf as px; px.scopes.Global()`; a private name or one of nothing is none."""
    shown = "px.scopes.Global().name, hasattr(px, '_no'), hasattr(px, 'no_such'), px.prune.__name__"
    code = f"import px_hf as px; print({shown})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["global", "False", "False", "prune"]

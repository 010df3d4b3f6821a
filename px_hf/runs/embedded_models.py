"""The small pretrained backbones that come with px_hf, and the names by which commands take them."""

from __future__ import annotations

from pathlib import Path

DEMO_MODELS = Path(__file__).resolve().parents[1] / "demo"
"""Where they are, wherever px_hf is installed."""

EMBEDDED = {"demo-resnet": str(DEMO_MODELS / "resnet"), "demo-vit": str(DEMO_MODELS / "vit")}

EXAMPLE_MODEL = EMBEDDED["demo-resnet"]


def embedded(name: str) -> str:
    """The folder of an embedded model; any other name as it is."""
    return EMBEDDED.get(name, name)

"""Metric scripts for `evaluate` that load without the network."""

from __future__ import annotations

from pathlib import Path


def metric_path(name: str) -> str:
    """The folder of a metric script that ships with px_hf, for `evaluate.load`: `metric_path("accuracy")`."""
    return str(Path(__file__).parent / name)

"""The report of a run that people look at: one HTML file with all in it, no scripts, nothing loaded from elsewhere.

Names of classes, models and layers may be anybody's: all text is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

import px_hf as px

from ..atomic import whole

REPORT_FILE = "report.html"
TILE = 104
"""Pixels of a side of an image in the grid."""

FIGURES = {
    "training_curve.png": "Training",
    "per_layer_sparsity.png": "Sparsity of the layers",
    "segmentation.png": "Maps",
}
"""Files of the output folder that the report holds, where they are there."""


@dataclass(frozen=True)
class Tile:
    """An image, its true class, and what each network says of it, by the name of the network."""

    image: Image.Image
    truth: str
    said: Mapping[str, str]


def write_report(out: Path, results: Mapping[str, Any], masks: px.Masks, tiles: Sequence[Tile] = ()) -> None:
    """Write `report.html` into the output folder of a run, of what is in its all_results.json and its figures.

    The file is whole or absent.
    """
    compared = any(key.startswith("dense_") for key in results)
    here = {out / name: heading for name, heading in FIGURES.items() if (out / name).is_file()}
    figures = [(heading, _address(file.read_bytes())) for file, heading in here.items()]
    template = (Path(__file__).with_name("templates") / REPORT_FILE).read_text(encoding="utf-8")
    text = (
        Environment(autoescape=True, undefined=StrictUndefined)
        .from_string(template)
        .render(
            title=f"{results['base_model']} on {results['dataset']}: {100 * masks.sparsity:.4g} % sparse",
            compared=compared,
            rows=list(_rows(results, compared)),
            tiles=[{"image": _address(_png(tile.image)), "truth": tile.truth, "said": tile.said} for tile in tiles],
            figures=figures,
            layers=list(_layers(masks)),
            settings=list(_settings(results)),
            version=px.__version__,
        )
    )
    with whole(out / REPORT_FILE) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


_SCORES = {"accuracy": "accuracy", "mean_iou": "mean IoU", "overall_accuracy": "pixels right"}
_SPLITS = {"test": "test", "eval": "validation"}


def _rows(results: Mapping[str, Any], compared: bool) -> Iterator[tuple[str, str, str]]:
    """Label, dense, pruned; the latter with "of" the dense number where that has no column of its own."""

    def counted(label: str, dense: int, pruned: int) -> tuple[str, str, str]:
        return label, f"{dense:,}", f"{pruned:,}" if compared else f"{pruned:,} of {dense:,}"

    for split, said in _SPLITS.items():
        for score, label in _SCORES.items():
            key = f"{split}_{score}"
            if isinstance(results.get(key), float):
                dense = results.get(f"dense_{key}")
                yield f"{label}, {said}", "" if dense is None else f"{dense:.2%}", f"{results[key]:.2%}"
    yield counted("prunable weights", results["weights"], results["weights_kept"])
    yield counted("parameters", results["parameters"], results["parameters_kept"])
    if results.get("macs"):
        yield counted("MACs per image, effective", results["macs"], results["effective_macs"])
    for name, size in results["file_bytes"].items():
        yield name, "", f"{size / 1e6:.2f} MB"


def _layers(masks: px.Masks) -> Iterator[tuple[str, str, str, str]]:
    for name, mask in masks.tensors.items():
        kept = int(mask.count_nonzero())
        yield name, f"{mask.numel():,}", f"{kept:,}", f"{kept / mask.numel():.2%}"


_SETTINGS = (
    *("criterion", "schedule", "rounds", "until", "scope", "sparsity_asked", "min_layer_density", "prune_head"),
    *("control", "int8", "lora", "distilled_from", "masks_from", "base_model", "base_revision", "dataset"),
    *("dataset_id", "calibration", "seed", "masks_sha256"),
)


def _settings(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in _SETTINGS:
        value = results.get(name)
        if value not in (None, "", "none"):
            said = ", ".join(f"{key} {each}" for key, each in value.items()) if isinstance(value, dict) else str(value)
            yield name.replace("_", " "), said


def _png(image: Image.Image) -> bytes:
    image = image.convert("RGB")
    scale = TILE / max(image.size)
    resampling = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    sizes = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    written = io.BytesIO()
    image.resize(sizes, resampling).save(written, "PNG")
    return written.getvalue()


def _address(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def spread(length: int, most: int = 24) -> list[int]:
    """At most so many places in a sequence of that length, at equal distances."""
    count = min(length, most)
    return [place * length // count for place in range(count)]

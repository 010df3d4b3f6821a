"""report.html: all of a run in one file that loads nothing, runs nothing, and escapes what anybody may have named."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import px_hf as px
from px_hf.plots import plot_layer_sparsity
from px_hf.runs.html_report import Tile, spread, write_report

HOSTILE = "<script>document.title='owned'</script>\"'&<img src=x onerror=alert(1)>"
MASKS = px.Masks(
    {"a.weight": torch.tensor([[True, False]]), f"{HOSTILE}.weight": torch.tensor([[False, False, True]])}
)
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def results(**more: Any) -> dict[str, Any]:
    told: dict[str, Any] = {
        "base_model": HOSTILE, "dataset": HOSTILE, "criterion": "PX()", "calibration": {"examples": 5}, "seed": 42,
        "test_accuracy": 0.5, "weights": 5, "weights_kept": 2, "parameters": 9, "parameters_kept": 6, "macs": 100,
        "effective_macs": 40, "file_bytes": {"model.safetensors": 2_000_000},
    }  # fmt: skip
    return told | more


def tiles() -> list[Tile]:
    picture = Image.new("L", (8, 6), 99)
    return [
        Tile(picture, HOSTILE, {"dense": HOSTILE, "pruned": "b"}),
        Tile(picture, "b", {"dense": "b", "pruned": "b"}),
    ]


class Reader(HTMLParser):
    """Collects tags and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    plot_layer_sparsity(MASKS, tmp_path / "per_layer_sparsity.png")
    write_report(tmp_path, results(dense_test_accuracy=0.75), MASKS, tiles())
    return tmp_path / "report.html"


def test_it_loads_and_runs_nothing(written: Path) -> None:
    text = written.read_text()
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert not [name for name in reader.attributes if name.startswith("on")]
    assert reader.addresses
    assert all(address.startswith("data:image/png;base64,") for address in reader.addresses)
    assert not re.search(r"https?://|url\(|@import", text)
    assert reader.tags.count("img") == 3
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_it_says_what_the_run_found(written: Path) -> None:
    text = written.read_text()
    for said in ("75.00%", "50.00%", "60 % sparse", "2.00 MB", "33.33%", "examples 5", "true class"):
        assert said in text
    assert text.count('class="right"') == 3
    assert text.count('class="wrong"') == 1


def test_without_a_dense_network_and_images(tmp_path: Path) -> None:
    write_report(tmp_path, results(macs=None), MASKS)
    text = (tmp_path / "report.html").read_text()
    assert ">dense<" not in text
    assert f">{MASKS.kept:,} of {MASKS.total:,}<" in text
    assert "figure>" not in text


def test_images_are_spread() -> None:
    assert spread(3) == [0, 1, 2]
    assert spread(100, 4) == [0, 25, 50, 75]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_browser_shows_it(written: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shot = tmp_path / "shot.png"
    subprocess.run(
        [BROWSER, *options, "--window-size=900,1200", f"--screenshot={shot}", written.as_uri()],
        check=True, timeout=120, capture_output=True,
    )  # fmt: skip
    with Image.open(shot) as picture:
        assert picture.size == (900, 1200)
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50  # not blank: text and figures
    shown = subprocess.run(
        [BROWSER, *options, "--dump-dom", written.as_uri()], check=True, timeout=120, capture_output=True, text=True
    ).stdout
    assert "owned</title>" not in shown
    assert shown.count("<img") == 3

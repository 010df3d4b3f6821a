"""Rendered letters: the pretraining task of the demo backbones.

Letters of the text fonts that ship with matplotlib, drawn at random sizes, positions, rotations, shears, elastic
distortions, stroke widths, contrasts and noise; a share of them passes through an 8 × 8 raster. No digits.
The 52 letters form 37 classes: upper and lower case are one class where only their size tells them apart, with the
merges of EMNIST's "balanced" split (Cohen et al., 2017, arXiv 1702.05373).

Every letter is kept as a signed distance field, so that a whole batch is one `grid_sample`, and stroke width and
blur are a shift and a slope of the same field.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, grid_sample, interpolate

IMAGE_SIZE = 32
COARSE_SHARE = 0.6  # of the letters pass through an 8 × 8 raster
MERGED_WITH_CAPITAL = "cijklmopsuvwxyz"
CLASSES = sorted(set(string.ascii_letters) - set(MERGED_WITH_CAPITAL))
GREEK = "ΓΔΛΞΣΩβγδεζηθλμξπσφψω"  # those that no Latin letter and no other of them looks like

FONTS = [
    *(f"DejaVu{family}" for family in ("Sans", "SansMono", "Serif")),
    *(f"DejaVu{family}-Bold" for family in ("Sans", "SansMono", "Serif")),
    *(f"DejaVu{style}" for style in ("Sans-Oblique", "SansMono-Oblique", "Serif-Italic")),
    *(f"DejaVu{style}" for style in ("Sans-BoldOblique", "SansMono-BoldOblique", "Serif-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10"),
]

_FIELD_SIZE = 64  # pixels of a distance field; the letter's longer side is half of it
_DRAWN_SIZE = 128  # pixels of the bitmap from which the field is computed


def letters(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` random letters: images uint8 `[count, 32, 32]`, labels int64 `[count]`, indices into `CLASSES`."""
    return render(count, generator, *_distance_fields())


def greek(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same with Greek letters unlike any of the Latin ones; labels are indices into `GREEK`."""
    return render(count, generator, *_greek_fields())


def render(count: int, generator: torch.Generator, fields: Tensor, field_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Draw `count` of the glyphs of `fields` `[F, 1, 64, 64]` at random.

    Returns:
        images: uint8 `[count, 32, 32]`, bright ink on dark paper in most of them.
        labels: int64 `[count]`, those of the glyphs drawn.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def chance(probability: float) -> Tensor:
        return torch.rand(count, 1, 1, 1, generator=generator) < probability

    choice = torch.randint(len(fields), (count,), generator=generator)

    # Size, place, rotation and shear: the map from image to letter coordinates.
    size, aspect = uniform(0.65, 1.1), uniform(0.7, 1.3)
    angle, shear = uniform(-0.35, 0.35), uniform(-0.4, 0.4)
    width, height = size * aspect.clamp(max=1), size / aspect.clamp(min=1)
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    slant = torch.eye(2).repeat(count, 1, 1)
    slant[:, 0, 1] = shear
    # A letter spans half of its field, so a letter as large as the image is a zoom by 1/2.
    zoom = torch.diag_embed(torch.stack([0.5 / width, 0.5 / height], -1))
    offset = uniform(-1, 1, 2, 1) * (1.15 - size)[:, None, None]
    linear = zoom @ slant @ rotation
    grid = affine_grid(
        torch.cat([linear, -linear @ offset], -1), [count, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
    )
    # Elastic distortion: a smooth random displacement.
    waves = torch.randn(count, 2, 4, 4, generator=generator) * uniform(0, 0.08, 1, 1, 1)
    grid = grid + interpolate(waves, size=IMAGE_SIZE, mode="bicubic").permute(0, 2, 3, 1)

    # Ink: the distance, shifted by the stroke width and cut off over the width of the blur (in pixels).
    distance = grid_sample(fields[choice], grid, padding_mode="border", align_corners=False)
    thicken, blur = uniform(-0.005, 0.08, 1, 1, 1), uniform(1, 3, 1, 1, 1)
    ink = ((distance + thicken) * IMAGE_SIZE * size[:, None, None, None] / blur + 0.5).clamp(0, 1)
    # Low resolution: 8 × 8 counts of 0 to 16, enlarged again.
    coarse = (avg_pool2d(ink, IMAGE_SIZE // 8) * 16).round() / 16
    ink = torch.where(chance(COARSE_SHARE), interpolate(coarse, size=IMAGE_SIZE, mode="bilinear"), ink)

    paper, contrast = uniform(0, 0.3, 1, 1, 1), uniform(0.5, 1, 1, 1, 1)
    image = paper + (1 - paper) * contrast * ink
    image = torch.where(chance(0.15), 1 - image, image)
    image = image + uniform(0, 0.1, 1, 1, 1) * torch.randn(image.shape, generator=generator)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8)[:, 0], field_labels[choice]


@cache
def _distance_fields() -> tuple[Tensor, Tensor]:
    """Signed distance fields `[fonts · 52, 1, 64, 64]` (inside positive, the letter's longer side is 1), labels."""
    merged = {letter: letter.upper() if letter in MERGED_WITH_CAPITAL else letter for letter in string.ascii_letters}
    return _fields_of(FONTS, {letter: CLASSES.index(name) for letter, name in merged.items()})


@cache
def _greek_fields() -> tuple[Tensor, Tensor]:
    """Likewise, of `GREEK` in the fonts that have them."""
    with_greek = [name for name in FONTS if name.startswith(("DejaVu", "STIX"))]
    return _fields_of(with_greek, {letter: label for label, letter in enumerate(GREEK)})


def _fields_of(fonts: Sequence[str], letters: Mapping[str, int]) -> tuple[Tensor, Tensor]:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fields = []
    for name in fonts:
        font = ImageFont.truetype(folder / f"{name}.ttf", _DRAWN_SIZE)
        fields += [_distance_field(letter, font) for letter in letters]
    return torch.from_numpy(np.stack(fields))[:, None], torch.tensor(list(letters.values()) * len(fonts))


def _distance_field(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """Signed distance field `[64, 64]` of one letter, centred, its longer side scaled to half of the field."""
    left, top, right, bottom = font.getbbox(letter)
    glyph = Image.new("L", (int(right - left), int(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), letter, font=font, fill=255)
    scale = _DRAWN_SIZE / 2 / max(glyph.size)
    glyph = glyph.resize((max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale))))
    drawn = Image.new("L", (_DRAWN_SIZE, _DRAWN_SIZE))
    drawn.paste(glyph, ((_DRAWN_SIZE - glyph.width) // 2, (_DRAWN_SIZE - glyph.height) // 2))
    inside = np.asarray(drawn) > 127
    distance = (distance_transform_edt(inside) - distance_transform_edt(~inside)) / (_DRAWN_SIZE / 2)
    cell = _DRAWN_SIZE // _FIELD_SIZE
    return distance.reshape(_FIELD_SIZE, cell, _FIELD_SIZE, cell).mean((1, 3)).astype(np.float32)

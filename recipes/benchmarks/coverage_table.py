"""Which architectures PX can score: the table in docs/COVERAGE.md.

    python recipes/benchmarks/coverage_table.py                     # all of them, about 10 minutes on one core
    python recipes/benchmarks/coverage_table.py transformers vit    # the rows of one library, of those names only

The rows come from the libraries: each class behind transformers' AutoModelForImageClassification with
a tiny random configuration, the smallest model of each module of timm, each architecture of
torchvision, and vision towers with a linear head. Every parameter is drawn at random, also those that
start at zero, so that nothing is hidden. A row is *supported* if `px.PX()` and
`px.PX(paths="active")` give every prunable weight a finite, non-negative score, name those weights
that no path can lead through, and score no layer as all zeros that the network's own gradient reaches.
"""
# ruff: noqa: C408  (configurations read best as keyword arguments)

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

import px_hf as px
from px_hf.atomic import whole
from px_hf.model.inputs import inputs_of, run
from px_hf.model.targets import prunable

LIBRARIES = ("transformers", "timm", "torchvision", "towers")


@dataclass(frozen=True)
class Row:
    """One architecture: how to build it, and a batch for it."""

    library: str
    family: str
    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Result:
    """``status`` is 'supported', 'rule missing', 'not applicable' or 'wrong'; ``note`` says why."""

    row: Row
    status: str
    note: str = ""
    seconds: float = 0.0


class NotApplicable(Exception):
    """The architecture cannot be built here, or takes no images."""


# ------------------------------------------------------------------------------------ transformers

_VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)
_STAGES = dict(hidden_sizes=[16, 32, 48, 64], depths=[1, 2, 1, 1])
_TOWER = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)
_SWIN = dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, image_size=32)
_TEXT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    intermediate_size=48, vocab_size=64, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
)  # fmt: skip
_GEMMA = dict(
    text_config=_TEXT, vision_config=_TOWER, mm_tokens_per_image=4, boi_token_index=60, eoi_token_index=61,
    image_token_index=62, yes_token_index=5, no_token_index=7,
)  # fmt: skip

TINY: dict[str, dict[str, Any]] = {
    "beit": dict(_VIT, use_relative_position_bias=True, layer_scale_init_value=0.1),
    "bit": dict(_STAGES, embedding_size=16, num_groups=4),
    "clip": dict(vision_config=_TOWER),
    "convnext": _STAGES,
    "convnextv2": _STAGES,
    "cvt": dict(embed_dim=[16, 32, 48], num_heads=[1, 2, 3], depth=[1, 2, 3]),
    "data2vec-vision": dict(_VIT, use_shared_relative_position_bias=True),
    "deit": _VIT,
    "dinov2": dict(_VIT, use_swiglu_ffn=True),
    "dinov2_with_registers": _VIT,
    "donut-swin": _SWIN,
    "efficientnet": dict(width_coefficient=0.5, depth_coefficient=0.5, image_size=64, hidden_dim=640),
    "focalnet": dict(
        embed_dim=16, hidden_sizes=[32, 48], depths=[1, 2], focal_levels=[2, 2], focal_windows=[3, 3], image_size=32,
        use_conv_embed=True,
    ),
    "hgnet_v2": dict(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], embedding_size=16, stem_channels=[3, 8, 16],
        stage_in_channels=[16, 16, 32, 48], stage_mid_channels=[8, 8, 16, 16], stage_out_channels=[16, 32, 48, 64],
        stage_num_blocks=[1, 1, 2, 1], stage_numb_of_layers=[2, 2, 2, 2],
    ),
    "hiera": dict(embed_dim=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4]),
    "ijepa": _VIT,
    "levit": dict(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1], key_dim=[8, 8, 8]
    ),
    "metaclip_2": dict(vision_config=_TOWER),
    "mobilenet_v1": dict(depth_multiplier=0.25, image_size=64),
    "mobilenet_v2": dict(depth_multiplier=0.35, image_size=64),
    "mobilevit": dict(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 48], image_size=64),
    "mobilevitv2": dict(width_multiplier=0.25, image_size=64),
    "perceiver": dict(
        num_latents=8, d_latents=32, num_self_attends_per_block=2, num_self_attention_heads=2,
        num_cross_attention_heads=1, image_size=32,
    ),
    "poolformer": dict(_STAGES),
    "pp_lcnet": dict(scale=0.25, class_expand=64),
    "pvt": dict(_STAGES, image_size=64, num_attention_heads=[1, 2, 2, 4]),
    "pvt_v2": dict(_STAGES, image_size=64, num_attention_heads=[1, 2, 2, 4]),
    "regnet": dict(_STAGES, embedding_size=16, groups_width=8),
    "resnet": dict(_STAGES, embedding_size=16),
    "segformer": dict(_STAGES, num_attention_heads=[1, 2, 2, 4]),
    "shieldgemma2": _GEMMA,
    "siglip": dict(vision_config=_TOWER),
    "siglip2": dict(vision_config=dict(_TOWER, num_patches=16)),
    "swiftformer": dict(depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 48]),
    "swin": _SWIN,
    "swinv2": _SWIN,
    "textnet": dict(hidden_sizes=[8, 8, 16, 16, 32], stem_out_channels=8),
    "timm_wrapper": dict(architecture="resnet10t", num_classes=5),
    "vit": _VIT,
    "vit_msn": _VIT,
}  # fmt: skip
"""Model type -> what is made smaller than in its default configuration."""


def transformers_rows() -> Iterator[Row]:
    for config_class, classes in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.items():
        kind = config_class.model_type
        for model_class in classes if isinstance(classes, tuple) else (classes,):
            if model_class is not None:
                build = _pretrained(kind, config_class, model_class)
                yield Row("transformers", kind, model_class.__name__, build, _transformers_batch)


def _pretrained(kind: str, config_class: Any, model_class: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        if kind == "imagegpt":
            raise NotApplicable("reads the indices of colour clusters through an embedding table, not pixels")
        options = dict(TINY.get(kind, {}))
        if model_class.__name__ in ("PerceiverForImageClassificationFourier",
                                    "PerceiverForImageClassificationConvProcessing"):  # fmt: skip
            options["num_cross_attention_heads"] = 1
        config = config_class(**options)
        config.num_labels = 5
        try:
            model = model_class(config)
        except ImportError as error:
            raise NotApplicable(f"needs a package that is not installed: {str(error).split('. ')[0]}") from error
        assert isinstance(model, nn.Module)
        return model

    return build


def _transformers_batch(model: nn.Module) -> Any:
    config: Any = model.config
    kind = config.model_type
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 64)
    size = min(size if isinstance(size, int) else size[0], 224)
    size = 224 if "ConvProcessing" in type(model).__name__ or "Fourier" in type(model).__name__ else size
    images = torch.randn(2, 3, size, size)
    if kind == "siglip2":
        patches = torch.randn(2, vision.num_patches, 3 * vision.patch_size**2)
        mask = torch.ones(2, vision.num_patches, dtype=torch.long)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[4, 4]] * 2)}
    if kind == "shieldgemma2":
        text = torch.tensor([[1, 60, *[62] * 4, 61, 5, 7]] * 2)
        return {"pixel_values": images, "input_ids": text, "attention_mask": torch.ones_like(text)}
    return {"pixel_values": images}


# -------------------------------------------------------------------------------------------- timm


def timm_rows() -> Iterator[Row]:
    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            yield timm_row(module, smallest(names))


def timm_row(family: str, name: str) -> Row:
    return Row("timm", family, name, _timm_model(name), _timm_batch)


def smallest(names: Iterable[str]) -> str:
    """The model with the fewest parameters, timm's own test models aside."""
    counts = {}
    for name in names:
        if not name.startswith("test_"):
            with torch.device("meta"):
                counts[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(counts, key=lambda name: counts[name])


SHALLOW: dict[str, dict[str, Any]] = {"deepseek_vit_412m": {"depth": 2}, "gemma4_vit_167m": {"depth": 2}}
"""Models whose smallest is large, and what makes them smaller."""


def _timm_model(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = timm.create_model(name, num_classes=5, **SHALLOW.get(name, {}))
        assert isinstance(model, nn.Module)
        return model

    return build


def _timm_batch(model: nn.Module) -> Any:
    config: Any = model.pretrained_cfg
    channels, height, width = config["input_size"]
    small = torch.randn(1, channels, min(height, 96), min(width, 96))
    try:
        with torch.no_grad():
            model(small)
    except (AssertionError, RuntimeError, ValueError):  # made for one size, or for multiples of another
        return torch.randn(1, channels, height, width)
    return small


# ---------------------------------------------------------------------------- torchvision and towers


def torchvision_rows() -> Iterator[Row]:
    families: dict[str, list[str]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        module = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
        families.setdefault(module, []).append(name)
    for module, names in families.items():
        name = min(names, key=lambda n: torchvision.models.get_model_weights(n).DEFAULT.meta["num_params"])
        size = 224 if name.startswith(("vit", "maxvit")) else 96

        def build(name: str = name) -> nn.Module:
            model = torchvision.models.get_model(name, num_classes=5)
            assert isinstance(model, nn.Module)
            return model

        yield Row("torchvision", module, name, build, partial(_square, size))


def _square(size: int, _: nn.Module) -> Tensor:
    return torch.randn(1, 3, size, size)


class Tower(nn.Module):
    """A vision tower with a linear classifier on its pooled output."""

    def __init__(self, tower: nn.Module, width: int) -> None:
        super().__init__()
        self.tower = tower
        self.classifier = nn.Linear(width, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.tower(pixel_values=pixel_values).pooler_output)
        return logits


def tower_rows() -> Iterator[Row]:
    stages = dict(depths=[1, 1, 1, 1], hidden_sizes=[16, 24, 32, 32])
    towers: dict[str, tuple[str, dict[str, Any]]] = {
        "CLIPVision": ("CLIPVisionConfig", _TOWER),
        "SiglipVision": ("SiglipVisionConfig", _TOWER),
        "Dinov2": ("Dinov2Config", dict(_VIT)),
        "DINOv3ViT": ("DINOv3ViTConfig", _VIT),
        "DINOv3ConvNext": ("DINOv3ConvNextConfig", stages),
    }
    for name, (config, options) in towers.items():

        def build(name: str = name, config: str = config, options: dict[str, Any] = options) -> nn.Module:
            made = getattr(transformers, config)(**options)
            return Tower(getattr(transformers, f"{name}Model")(made), 32)

        yield Row("towers", name, f"{name}Model", build, lambda _: {"pixel_values": torch.randn(2, 3, 32, 32)})


ROWS: Mapping[str, Callable[[], Iterator[Row]]] = {
    "transformers": transformers_rows,
    "timm": timm_rows,
    "torchvision": torchvision_rows,
    "towers": tower_rows,
}

# -------------------------------------------------------------------------------------------- check


def randomise_(model: nn.Module) -> None:
    """Draw every parameter and BatchNorm statistic at random, of a size that keeps activations near 1."""
    for parameter in model.parameters():
        if parameter.numel() == 0:
            continue
        if parameter.numel() == max(parameter.shape, default=1):  # scales and biases
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=(parameter.shape[0] / parameter.numel()) ** 0.5)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
            if module.running_var is not None:
                nn.init.uniform_(module.running_var, 0.5, 1.5)


def check(row: Row) -> Result:
    """Score ``row`` with both criteria."""
    start = time.perf_counter()

    def result(status: str, note: str = "") -> Result:
        return Result(row, status, note, time.perf_counter() - start)

    torch.manual_seed(0)
    try:
        model = row.build().eval()
    except NotApplicable as error:
        return result("not applicable", str(error))
    randomise_(model)
    batch = row.batch(model)
    weights = prunable(model)
    reached = _gradients(model, batch, weights)
    notes: list[str] = []
    for criterion in (px.PX(), px.PX(paths="active")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                scores = criterion.score(model, [batch])
            except px.UnsupportedOpError as error:
                return result("rule missing", str(error).partition("\n")[2].partition("\nA rule")[0])
            except px.PxError as error:
                return result("wrong", str(error))
        wrong = list(_wrong(weights, reached, scores, [str(w.message) for w in caught]))
        if wrong:
            return result("wrong", f"{criterion}: " + "; ".join(wrong[:4]))
        left_out = [name for name in weights if name not in scores]
        if left_out and not notes:
            notes.append(f"{len(left_out)} of {len(weights)} weights are on no path: {_shown(left_out)}")
    return result("supported", "; ".join(notes))


def _gradients(model: nn.Module, batch: Any, weights: Mapping[str, nn.Parameter]) -> dict[str, bool]:
    """Whether the network's own output depends on each weight."""
    inputs = next(iter(inputs_of([batch], model)))
    with torch.enable_grad():
        logits = run(model, inputs)
        out = (logits.float() * torch.randn(logits.shape)).sum()
        found = torch.autograd.grad(out, list(weights.values()), allow_unused=True)
    return {name: g is not None and bool(g.any()) for name, g in zip(weights, found, strict=True)}


def _wrong(
    weights: Mapping[str, Tensor], reached: Mapping[str, bool], scores: Mapping[str, Tensor], said: list[str]
) -> Iterator[str]:
    for name, weight in weights.items():
        if name not in scores:
            if not any(name in message or "more" in message for message in said):
                yield f"{name} has no score and nobody says so"
            continue
        score = scores[name]
        if score.shape != weight.shape or not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
            yield f"the scores of {name} are malformed"
        elif reached[name] and not bool(score.any()):
            yield f"the scores of {name} are all zero, though the output depends on it"


def _shown(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


# ------------------------------------------------------------------------------------------- report


def document(results: list[Result]) -> str:
    """The table as Markdown."""
    packages = (torch, transformers, timm, torchvision)
    versions = ", ".join(f"{package.__name__} {package.__version__}" for package in packages)
    lines = [
        "# Coverage", "",
        "Made by `python recipes/benchmarks/coverage_table.py`, whose docstring says what *supported* means. "
        f"px_hf {px.__version__}, {versions}.", "",
        "| | supported | rule missing | not applicable | wrong | all |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for library in LIBRARIES:
        mine = [r.status for r in results if r.row.library == library]
        if mine:
            counts = [mine.count(s) for s in ("supported", "rule missing", "not applicable", "wrong")]
            lines.append(f"| {library} | " + " | ".join(map(str, [*counts, len(mine)])) + " |")
    for library in LIBRARIES:
        mine_rows = [r for r in results if r.row.library == library]
        if mine_rows:
            lines += ["", f"## {library}", "", "| family | model | | |", "|---|---|---|---|"]
            lines += [
                f"| {r.row.family} | {r.row.name} | {r.status} | {' '.join(r.note.split())} |" for r in mine_rows
            ]
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"libraries ({', '.join(LIBRARIES)}), families and models")
    named = parser.parse_args(argv).names
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    libraries = [name for name in named if name in LIBRARIES] or list(LIBRARIES)
    names = [name for name in named if name not in LIBRARIES]
    results = []
    for library in libraries:
        for row in ROWS[library]():
            if names and not {row.family, row.name} & set(names):
                continue
            try:
                results.append(check(row))
            except Exception as error:
                results.append(Result(row, "wrong", f"{type(error).__name__}: {error}"))
            last = results[-1]
            print(f"{library} {row.family} {row.name}: {last.status} {last.seconds:.1f} s  {last.note}", flush=True)
            gc.collect()
    if not names and libraries == list(LIBRARIES):
        with whole(Path(__file__).parents[2] / "docs" / "COVERAGE.md") as unfinished:
            unfinished.write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Path sums of deep networks: in range, conserved, and equal to exact arithmetic.

With unit weights a path sum is a number of paths: 10^45 in a ResNet-20, beyond float64 in a ResNet-152.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from fractions import Fraction

import pytest
import timm
import torch
from torch import Tensor, nn

import px_hf as px
from px_hf.ops import ACTIVE, G, H, Tracer, Weight

Groups = list[list[str]]
"""Sets of weights that receive the same flow."""


def resnet152(channels: tuple[int, ...] = (64, 128, 256, 512)) -> tuple[nn.Module, Groups]:
    model = timm.create_model("resnet152", num_classes=10, zero_init_last=False, channels=channels)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # the statistics of a batch, so that fp16 activations stay in range
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(2, 3, 64, 64))
    blocks = [n for n, m in model.named_modules() if hasattr(m, "conv3")]
    return model, [
        ["fc.weight", "conv1.weight"],
        *([f"{n}.conv1.weight", f"{n}.conv2.weight", f"{n}.conv3.weight"] for n in blocks),
    ]


def vit48() -> tuple[nn.Module, Groups]:
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=48, embed_dim=32, num_heads=2, num_classes=10
    )
    return model, [[f"blocks.{i}.mlp.fc1.weight", f"blocks.{i}.mlp.fc2.weight"] for i in range(48)]


def convnext() -> tuple[nn.Module, Groups]:
    """The depths of ConvNeXt-L."""
    model = timm.models.ConvNeXt(depths=(3, 3, 27, 3), dims=(16, 32, 64, 128), num_classes=10)
    blocks = [n for n, m in model.named_modules() if hasattr(m, "conv_dw")]
    return model, [
        ["head.fc.weight", *(f"stages.{i}.downsample.1.weight" for i in (1, 2, 3))],
        *([f"{n}.conv_dw.weight", f"{n}.mlp.fc1.weight", f"{n}.mlp.fc2.weight"] for n in blocks),
    ]


DEEP: dict[str, tuple[Callable[[], tuple[nn.Module, Groups]], int]] = {
    "ResNet-152": (resnet152, 64),
    "ResNet-152, a quarter as wide": (lambda: resnet152((16, 32, 64, 128)), 64),
    "ViT, 48 blocks": (vit48, 16),
    "ConvNeXt, 36 blocks": (convnext, 64),
}
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = [(n, d) for n, d in itertools.product(DEEP, DTYPES) if n != "ResNet-152" or d == "float32"]


def conservation_error(scores: dict[str, Tensor], groups: Groups) -> float:
    """The largest relative difference of two flows that should be equal."""
    totals = {n: float(s.double().sum()) for n, s in scores.items()}
    return max(abs(totals[n] / totals[group[0]] - 1) for group in groups for n in group)


@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize(("name", "dtype"), ROWS)
def test_deep_models_conserve_flow(name: str, dtype: str, paths: str) -> None:
    torch.manual_seed(0)
    construct, size = DEEP[name]
    model, groups = construct()
    x = torch.randn(1, 3, size, size)
    scores = px.PX(paths=paths).score(model.to(DTYPES[dtype]), [x.to(DTYPES[dtype])], prune_head=True)
    for n, score in scores.items():
        assert score.dtype == torch.float32
        assert bool(torch.isfinite(score).all()), n
        assert bool((score > 0).any()), n
    assert conservation_error(scores, groups) < 1e-6


# -------------------------------------------------------------------------------- exact arithmetic

DEPTH, WIDTH, CLASSES = 420, 8, 3
UNIT = 32
"""Weights are whole numbers of 1/UNIT: exact in floating point, and integers to the oracle."""


def chain() -> tuple[nn.Sequential, list[list[list[int]]], list[int]]:
    """A sparse chain of matrices whose path sums leave float64: more than 10^308 paths, Π θ² below 10^-308.

    The first layers have mixed signs, so that some gates are closed; the others are not negative.
    """
    draw = random.Random(0)
    weights, layers, below = [], [], 4
    for depth in range(DEPTH):
        above = CLASSES if depth == DEPTH - 1 else WIDTH
        lowest = -3 if depth < 3 else 0
        weights.append([[draw.choice([0, draw.randint(lowest, 3), 1, 2]) for _ in range(below)] for _ in range(above)])
        layer = nn.Linear(below, above, bias=False, dtype=torch.float64)
        layer.weight.data = torch.tensor(weights[-1], dtype=torch.float64) / UNIT
        layers += [layer, nn.ReLU()]
        below = above
    return nn.Sequential(*layers[:-1]), weights, [3, -2, 1, 4]


def products(matrices: list[list[list[int]]], start: list[int], gates: list[list[int]] | None) -> list[list[int]]:
    """Path sums before and after every layer, in Python integers."""
    sums = [start]
    for depth, matrix in enumerate(matrices):
        after = [sum(w * s for w, s in zip(row, sums[-1], strict=True)) for row in matrix]
        if gates is not None and depth < len(gates):
            after = [s * g for s, g in zip(after, gates[depth], strict=True)]
        sums.append(after)
    return sums


def exact(weights: list[list[list[int]]], x: list[int]) -> dict[str, tuple[list[int], list[int], list[list[int]]]]:
    """reading -> (path sums at the output, Σ h_k or ones, flow through every weight), times powers of UNIT."""
    values, gates = x, []
    for matrix in weights[:-1]:
        values = [max(sum(w * v for w, v in zip(row, values, strict=True)), 0) for row in matrix]
        gates.append([int(v > 0) for v in values])
    kept = [[[int(w != 0) for w in row] for row in matrix] for matrix in weights]
    squared = [[[w * w for w in row] for row in matrix] for matrix in weights]
    h = products(kept, [v * v for v in x], gates)[-1]

    def flow(start: list[int], weight: list[int], gates: list[list[int]] | None) -> list[list[int]]:
        sums, after, flows = products(squared, start, gates), weight, []
        for depth in reversed(range(DEPTH)):
            if gates is not None and depth < len(gates):
                after = [a * g for a, g in zip(after, gates[depth], strict=True)]
            matrix, below = squared[depth], sums[depth]
            flows.append(
                [a * w * s for a, row in zip(after, matrix, strict=True) for w, s in zip(row, below, strict=True)]
            )
            columns = zip(*matrix, strict=True)
            after = [sum(a * w for a, w in zip(after, column, strict=True)) for column in columns]
        return flows[::-1]

    ones = [1] * CLASSES
    g = products(squared, [1] * len(x), None)[-1]
    active = products(squared, [v * v for v in x], gates)[-1]
    return {
        "all": (g, h, flow([1] * len(x), h, None)),
        "active": (active, ones, flow([v * v for v in x], ones, gates)),
    }


def test_path_sums_equal_python_integers_beyond_the_range_of_float64() -> None:
    model, weights, x = chain()
    oracle = exact(weights, x)
    expected = {
        H: [Fraction(h) for h in oracle["all"][1]],
        G: [Fraction(g, UNIT ** (2 * DEPTH)) for g in oracle["all"][0]],
        ACTIVE: [Fraction(s, UNIT ** (2 * DEPTH)) for s in oracle["active"][0]],
    }
    assert min(expected[H]) > 10**308
    assert max(expected[G]) < Fraction(1, 10**308)
    image = torch.tensor([x], dtype=torch.float64)
    for reading, sums in expected.items():
        read = {p: Weight(p.detach().square() if reading.weights else p.detach() != 0) for p in model.parameters()}
        value = image.clone()
        with torch.no_grad(), Tracer(model, reading, read, torch.float64) as tracer:
            tracer.start(value, image.square() if reading.gates else torch.ones_like(image))
            paths = tracer.paths(model(value))
        assert paths is not None
        for found, right in zip(paths.data[0].tolist(), sums, strict=True):
            error = Fraction(found) * Fraction(2) ** int(paths.exponent) / right - 1
            assert abs(error) < 1e-13


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("paths", ["all", "active"])
def test_scores_equal_python_integers(paths: str, dtype: torch.dtype, tolerance: float) -> None:
    """Every weight's share of R; R itself only up to the power of two that keeps scores in range."""
    model, weights, x = chain()
    if dtype == torch.float32:  # its activations would vanish: the same network times a power of two per layer
        for p in model.parameters():
            p.data *= 4
    _, _, flows = exact(weights, x)[paths]
    r = sum(flows[0])
    assert all(sum(flow) == r for flow in flows)
    masks = {n: p != 0 for n, p in model.named_parameters()}
    images = torch.tensor([x], dtype=dtype)
    scores = px.PX(paths=paths).score(model.to(dtype), [images], masks=masks, prune_head=True)
    found_r = Fraction(float(scores["0.weight"].double().sum()))
    ratio = found_r / Fraction(r, UNIT ** (2 * DEPTH))
    power = math.log2(ratio.numerator) - math.log2(ratio.denominator)
    assert power == pytest.approx(round(power), abs=2 * tolerance + 1e-11)
    for score, flow in zip(scores.values(), flows, strict=True):
        shares = [float(Fraction(share, r) * found_r) for share in flow]
        assert score.flatten().tolist() == pytest.approx(shares, rel=tolerance)


@pytest.mark.parametrize(("dtype", "found"), [(torch.float32, 0.0), (torch.float64, 1e-48)])
def test_float32_loses_paths_far_below_the_largest(dtype: torch.dtype, found: float) -> None:
    """One exponent per tensor: what lies 10^45 below the tensor's largest path sum rounds to 0."""
    model = nn.Sequential(*[nn.Linear(2, 2, bias=False, dtype=dtype) for _ in range(4)])
    for p in model.parameters():
        p.data = torch.diag(torch.tensor([1.0, 1e-6], dtype=dtype))
    for score in px.PX(paths="active").score(model, [torch.ones(1, 2, dtype=dtype)], prune_head=True).values():
        assert score.diag().tolist() == pytest.approx([1.0, found], rel=1e-9)

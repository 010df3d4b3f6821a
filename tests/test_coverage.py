"""Architectures that PX scores. ``-m slow`` runs all of them; docs/COVERAGE.md is the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import coverage_table as table
import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import Siglip2Config, Siglip2ForImageClassification

import px_hf as px

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torchvision", "ignore::UserWarning")

KNOWN = {
    ("transformers", "dinat"): "not applicable",
    ("transformers", "imagegpt"): "not applicable",
    ("timm", "sequencer"): "rule missing",
}
"""What is not supported. A row that becomes supported has to leave."""

QUICK = {
    "transformers": [
        "beit",
        "convnextv2",
        "focalnet",
        "hiera",
        "levit",
        "mobilevitv2",
        "pp_lcnet",
        "siglip2",
        "swinv2",
    ],
    "towers": ["CLIPVision", "DINOv3ViT", "SiglipVision"],
}
QUICK_TIMM = ["test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet", "test_vit", "test_vit_relpos"]


def judge(row: table.Row) -> None:
    result = table.check(row)
    assert result.status == KNOWN.get((row.library, row.family), "supported"), result.note


def rows(library: str) -> list[Any]:
    return [pytest.param(row, id=f"{row.library}-{row.name}") for row in table.ROWS[library]()]


@pytest.mark.parametrize("row", [p for lib in QUICK for p in rows(lib) if p.values[0].family in QUICK[lib]])
def test_a_few_architectures(row: table.Row) -> None:
    judge(row)


@pytest.mark.parametrize("name", QUICK_TIMM)
def test_a_few_of_timm(name: str) -> None:
    judge(table.timm_row(name, name))


@pytest.mark.slow
@pytest.mark.parametrize("row", rows("transformers") + rows("towers"))
def test_all_of_transformers(row: table.Row) -> None:
    judge(row)


@pytest.mark.slow
@pytest.mark.parametrize("family", timm.list_modules())
def test_all_families_of_timm(family: str) -> None:
    judge(table.timm_row(family, table.smallest(timm.list_models(module=family))))


@pytest.mark.slow
def test_all_of_torchvision() -> None:
    for row in table.torchvision_rows():
        judge(row)


class Wrong(nn.Module):
    """``body`` is squared by hand outside torch's sight: the output depends on it, its paths are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(x) * self.body(x).var(-1, keepdim=True))


def test_the_check_sees_lost_paths() -> None:
    row = table.Row("own", "wrong", "Wrong", Wrong, lambda _: torch.randn(2, 4))
    assert table.check(row).status == "wrong"


class ClassAttention(nn.Module):
    """The class token alone asks; no path leads to it yet."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.q, self.k, self.v, self.head = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        q, k, v = self.q(x[:, :1]), self.k(x), self.v(x)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])


@pytest.mark.parametrize("paths", ["all", "active"])
def test_the_projections_of_a_class_token_share_the_flow_through_their_attention(paths: str) -> None:
    torch.manual_seed(0)
    scores = px.PX(paths=paths).score(ClassAttention(), [torch.randn(2, 3, 4)])
    for name in ("q.weight", "k.weight"):
        torch.testing.assert_close(scores[name].sum(), scores["v.weight"].sum())


class Branch(nn.Module):
    """A residual branch that does something to its activation."""

    def __init__(self, something: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.something = something
        self.first, self.branch, self.head = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(x + self.something(self.branch(x)))


def through_a_view_of_an_activation(x: Tensor) -> Tensor:
    x[:, :2].mul_(3)
    return x


def through_a_view_of_a_constant(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :2].copy_(x[:, :2])
    return out


def through_complex_numbers(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.reshape(-1, 2, 2)) * 1j).flatten(1)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


@pytest.mark.parametrize(("something", "message"), [
    (through_a_view_of_an_activation, "in-place operation on a tensor of which another view"),
    (through_a_view_of_a_constant, "in-place operation on a tensor of which another view"),
    (through_complex_numbers, "view_as_complex"),
    (Function.apply, "bessel_j0"),
    (torch.ops.aten.relu, "aten.relu"),
    (torch.vmap(torch.relu), "no path leads through: branch.weight"),
    (lambda x: torch.add(x, x, out=torch.empty_like(x)), "'out'"),
    (lambda x: x.norm(dim=-1, keepdim=True), "no path leads through: branch.weight"),
])  # fmt: skip
def test_what_cannot_be_followed_is_an_error_and_never_a_wrong_score(something: Any, message: str) -> None:
    for paths in ("all", "active"):
        with pytest.raises(px.PxError, match=message):
            px.PX(paths=paths).score(Branch(something), [torch.rand(2, 4)])


def test_other_inputs_of_a_mapping_reach_the_model() -> None:
    vision = table.TINY["siglip2"]["vision_config"] | {"num_hidden_layers": 1}
    torch.manual_seed(0)
    model = Siglip2ForImageClassification(Siglip2Config(vision_config=vision, num_labels=5)).eval()
    batch = {
        "pixel_values": torch.randn(2, 16, 192),
        "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 8 + [0] * 8]),
        "spatial_shapes": torch.tensor([[4, 4], [2, 4]]),
        "labels": torch.tensor([0, 1]),
    }
    padded = {**batch, "pixel_values": batch["pixel_values"].clone()}
    padded["pixel_values"][1, 8:] = 1e3  # behind the mask
    expected = px.PX(paths="active").score(model, [batch])
    found = px.PX(paths="active").score(model, [padded])
    for name in [n for n in expected if "q_proj" not in n and "k_proj" not in n]:  # these are averaged over all tokens
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].max()))
    assert px.PX().score(model, [batch]).keys() == expected.keys()

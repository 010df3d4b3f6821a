"""Units: found by structure, chosen by the path flow through them, and taken out without a change of the function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import networks
import path_enumeration
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForImageClassification,
)

import px_hf as px
from px_hf.errors import InvalidArgumentError, TargetError
from px_hf.model.inputs import Inputs, run
from px_hf.model.targets import prunable
from px_hf.scopes.units import UnitsOfModel, unit_scores
from px_hf.structured.heads import with_counts
from px_hf.structured.units import Family, trace_units, unread


def hf_bottleneck() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck", num_labels=5)
    )


def dinov2(swiglu: bool = False) -> nn.Module:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=8, patch_size=4,
        num_labels=5, use_swiglu_ffn=swiglu,
    )  # fmt: skip
    return Dinov2ForImageClassification(config)


def deit() -> nn.Module:
    config = DeiTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    return DeiTForImageClassification(config)


def segformer() -> nn.Module:
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2], num_labels=5, decoder_hidden_size=8,
    )  # fmt: skip
    return SegformerForImageClassification(config)


def timm_model(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5, **arguments)


class Vgg(nn.Module):
    """Convolutions flattened over space: a channel is many columns of the next layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 4, 3),
            nn.ReLU(),
        )
        self.hidden = nn.Linear(4, 7)
        self.out = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.body(x).flatten(1))))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{name: (make, networks.sizes(name)) for name, make in networks.NETWORKS.items() if name not in ("mlp", "cnn")},
    "hf resnet, bottleneck": (hf_bottleneck, 32),
    "hf dinov2": (dinov2, 8),
    "hf dinov2, swiglu": (lambda: dinov2(swiglu=True), 8),
    "hf deit": (deit, 8),
    "hf segformer": (segformer, 16),
    "timm mobilenetv3": (timm_model("mobilenetv3_small_050"), 32),  # depthwise, squeeze-and-excite
    "timm swin": (timm_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), embed_dim=16,
                             num_heads=(2, 2)), 32),  # relative position bias
    "timm convnext": (timm_model("test_convnext"), 32),
    "timm vit, rotary": (timm_model("vit_small_patch16_rope_224", img_size=32, depth=1, embed_dim=24,
                                    num_heads=2), 32),
    "torchvision resnet": (lambda: torchvision.models.resnet18(num_classes=5), 32),
    "vgg": (Vgg, 8),
}  # fmt: skip


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A model whose every parameter matters (no zeros at the end of a branch), and images for it."""
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("running_mean"):
                buffer.uniform_(-0.5, 0.5)
            if buffer_name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
    return model, torch.randn(3, 3, size, size)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return run(model, Inputs(images))


def units_of(model: nn.Module, images: Tensor, prune_head: bool = True) -> list[Family]:
    inputs = Inputs(images[:1])
    return with_counts(model, inputs, trace_units(model, inputs, prunable(model, prune_head)))


# ------------------------------------------------------------------------------------------------ the flow


FLOWS: dict[str, tuple[nn.Sequential, tuple[int, ...]]] = {
    "mlp": (
        nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 3, bias=False), nn.ReLU(),
                      nn.Linear(3, 2, bias=False)),
        (6,),
    ),
    "cnn": (
        nn.Sequential(nn.Conv2d(1, 2, 2, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 2, bias=False), nn.ReLU(),
                      nn.Flatten(), nn.Linear(2, 2, bias=False)),
        (1, 3, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("active", [True, False], ids=["active", "all"])
def test_scores_of_its_rows_and_of_its_columns_are_the_flow_through_a_unit(name: str, active: bool) -> None:
    """The flow by naming every path: the sum of those that lead through the unit."""
    model, shape = FLOWS[name]
    model = copy.deepcopy(model).double()
    layers = [module for module in model if isinstance(module, (nn.Linear, nn.Conv2d))]
    torch.manual_seed(0)
    for layer in layers:
        nn.init.normal_(layer.weight)
    images = torch.randn(4, *shape, dtype=torch.float64)
    gates, value = [], images
    for module in model:
        value = module(value)
        if isinstance(module, nn.ReLU):
            gates.append((value > 0).flatten(1))
    pixels = images.flatten(1)
    paths = list(path_enumeration.enumerate_paths(model, shape))

    def data(start: int, path: Any) -> float:
        through = [gates[depth][:, unit] for depth, _, unit in path[:-1]]
        return float((pixels[:, start] ** 2 * torch.stack(through).all(0)).sum())

    h = torch.zeros(layers[-1].weight.shape[0], dtype=torch.float64)
    for start, path in paths:
        h[path[-1][2]] += data(start, path)
    terms = [
        float(torch.stack([layers[d].weight.detach().flatten()[w] for d, w, _ in path]).square().prod())
        * (data(start, path) if active else float(h[path[-1][2]]))
        for start, path in paths
    ]

    scores = px.PX(paths="active" if active else "all").score(model, [images], prune_head=True)
    families = units_of(model, images)
    assert [family.size for family in families] == [len(layer.weight) for layer in layers[:-1]]
    for depth, family in enumerate(families):
        positions, alive = gates[depth].shape[1] // family.size, 0  # of a channel; units that flow reaches
        for unit in range(family.size):
            flow = sum(
                term for term, (_, path) in zip(terms, paths, strict=True) if path[depth][2] // positions == unit
            )
            alive += flow > 0
            for part in family.parts:
                entries = scores[part.tensor].index_select(part.axis, part.index[unit])
                assert float(entries.sum()) == pytest.approx(flow, rel=1e-10), part
        assert alive >= 2


@pytest.mark.parametrize("paths", ["active", "all"])
@pytest.mark.parametrize("name", ["hf vit", "hf resnet, bottleneck", "torchvision vit"])
def test_flow_is_conserved_in_hidden_units_of_real_blocks(name: str, paths: Any) -> None:
    """Also with normalisation, biases and residual branches: what flows into a hidden unit flows out of it."""
    model, images = build(name)
    model, images = model.double(), images.double()
    scores = px.PX(paths=paths).score(model, [images], prune_head=True)
    families = [family for family in units_of(model, images) if not family.heads]
    assert families
    for family in families:
        flows = {
            role: sum(
                scores[part.tensor].movedim(part.axis, 0).flatten(1).sum(1)[part.index].sum(1)
                for part in family.parts
                if part.role == role and part.tensor in scores
            )
            for role in ("rows", "columns")
        }
        torch.testing.assert_close(flows["rows"], flows["columns"], rtol=1e-9, atol=0)


def test_a_head_gives_its_values_and_its_projection_the_same_flow() -> None:
    model, images = build("hf vit")
    model, images = model.double(), images.double()
    scores = px.PX(paths="active").score(model, [images], prune_head=True)
    heads = [family for family in units_of(model, images) if family.heads]
    assert len(heads) == 2
    for family in heads:
        flows = {
            part.tensor.split(".")[-2]: scores[part.tensor].movedim(part.axis, 0).flatten(1).sum(1)[part.index].sum(1)
            for part in family.parts
            if part.matrix
        }
        torch.testing.assert_close(flows["v_proj"], flows["o_proj"], rtol=1e-9, atol=0)


def test_unit_score_is_the_mean_over_its_kept_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    (family,) = units_of(model, torch.randn(1, 2))
    scores = {"0.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "2.weight": torch.tensor([[5.0, 6.0]])}
    everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    assert unit_scores(family, scores, everything).tolist() == [8 / 3, 13 / 3]
    assert unit_scores(family, scores, everything, power=2).tolist() == [30 / 3, 61 / 3]
    scores["0.weight"][0, 1], everything["0.weight"][0, 1] = 0, False
    assert unit_scores(family, scores, everything).tolist() == [6 / 2, 13 / 3]


# ----------------------------------------------------------------------------------------------- the units

UNITS: dict[str, list[tuple[int, bool, int]]] = {  # size, heads, how many such families
    "hf vit": [(2, True, 2), (24, False, 2)],
    "hf vit, eager": [(2, True, 2), (24, False, 2)],
    "hf resnet": [(8, False, 2), (16, False, 2)],
    "hf resnet, bottleneck": [(4, False, 4), (8, False, 3)],
    "hf dinov2": [(4, True, 2), (32, False, 2)],
    "hf dinov2, swiglu": [(4, True, 2), (24, False, 2)],
    "hf deit": [(4, True, 2), (24, False, 2)],
    "timm vit": [(2, True, 2), (96, False, 2)],
    "timm vit, rotary": [(2, True, 1), (96, False, 1)],
    "torchvision vit": [(24, False, 2)],
    "torchvision resnet": [(64, False, 2), (128, False, 2), (256, False, 2), (512, False, 2)],
    "vgg": [(6, False, 1), (4, False, 1), (7, False, 1)],
}


@pytest.mark.parametrize("name", UNITS)
def test_units_are_those_that_the_architecture_has(name: str) -> None:
    model, images = build(name)
    found: dict[tuple[int, bool], int] = {}
    for family in units_of(model, images):
        found[family.size, family.heads] = found.get((family.size, family.heads), 0) + 1
    assert sorted((size, heads, count) for (size, heads), count in found.items()) == sorted(UNITS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_smaller_model_computes_what_the_masked_one_does(name: str) -> None:
    model, images = build(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    masks = px.prune(model, [images], px.Random(), sparsity=0.25, scope="structured", progress=False)
    assert 0.1 < masks.sparsity <= 0.25
    small, rest = px.shrink(model, masks, images)

    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    masked = copy.deepcopy(model)
    masks.apply_(masked)
    assert not torch.allclose(logits(masked, images), logits(model, images), rtol=1e-3)
    torch.testing.assert_close(logits(small, images), logits(masked, images), rtol=1e-4, atol=1e-4)
    assert type(small) is type(model)
    assert rest.sparsity == 0
    rest.match(small)
    gone = masks.total - masks.kept
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) >= gone


# ------------------------------------------------------------------------------------------ choosing them


@pytest.mark.parametrize("criterion", [px.PX(paths="active"), px.Magnitude(), px.Random(), px.SNIP()], ids=repr)
def test_masks_are_whole_units_and_the_next_unit_would_be_too_much(criterion: px.Criterion) -> None:
    model, images = build("hf vit")
    batches = [(images, torch.tensor([0, 1, 2]))]
    masks = px.prune(model, batches, criterion, sparsity=0.4, rounds=3, scope="structured", progress=False)
    families = units_of(model, images, prune_head=False)
    largest = 0
    for family in families:
        gone = unread(family, masks)
        for part in family.parts:
            if part.matrix:
                entries = masks[part.tensor].movedim(part.axis, 0).flatten(1)
                assert not entries[part.index[gone].flatten()].any()
                assert entries[part.index[~gone].flatten()].all()
        assert 0 <= gone.count_nonzero() < family.size
        each = sum(masks[part.tensor].numel() // family.size for part in family.parts if part.matrix)
        largest = max(largest, each)
    assert 0.4 * masks.total - largest < masks.total - masks.kept <= 0.4 * masks.total


def test_the_best_units_are_kept_for_what_they_cost() -> None:
    """Checked against all subsets of the units of one layer."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    (family,) = units_of(model, torch.randn(1, 3))
    scores = {"0.weight": torch.rand(4, 3), "2.weight": torch.rand(2, 4)}
    masks = UnitsOfModel(families=(family,)).choose(scores, 0.5)
    value = scores["0.weight"].sum(1) + scores["2.weight"].sum(0)
    best = max(torch.combinations(torch.arange(4)).tolist(), key=lambda units: float(value[units].sum()))
    assert masks["2.weight"].all(0).nonzero().flatten().tolist() == sorted(best)


def test_a_pruned_unit_stays_pruned() -> None:
    model, images = build("hf resnet")
    families = units_of(model, images, prune_head=False)
    scores = px.Random(seed=1).score(model)
    scope = UnitsOfModel(families=tuple(families))
    first = scope.choose(scores, 0.2)
    second = scope.choose(px.Random(seed=2).score(model), 0.4, within=first)
    assert first.sparsity < second.sparsity
    assert all(not bool((second[name] & ~first[name]).any()) for name in first)


@pytest.mark.parametrize("name", ["hf vit", "timm resnet"])
def test_uniform_keeps_the_same_share_of_every_layer_and_all_heads(name: str) -> None:
    model, images = build(name)
    masks = px.prune(model, [images], px.Magnitude(), sparsity=0.3, scope="structured:uniform", progress=False)
    shares = set()
    for family in units_of(model, images, prune_head=False):
        kept = family.size - int(unread(family, masks).count_nonzero())
        assert not family.heads or kept == family.size
        assert family.size < 64 or kept % 8 == 0
        if not family.heads:
            shares.add(kept / family.size)
    assert max(shares) - min(shares) < 8 / 24
    assert max(shares) < 0.8
    assert 0.15 < masks.sparsity <= 0.3


def test_min_layer_density_is_a_share_of_the_units() -> None:
    model, images = build("hf vit")
    masks = px.prune(
        model, [images], px.Magnitude(), sparsity=0.4, scope="structured", min_layer_density=0.5, progress=False
    )
    for family in units_of(model, images):
        assert int((~unread(family, masks)).count_nonzero()) >= family.size / 2


def test_masks_are_the_same_however_often_they_are_made() -> None:
    model, images = build("timm vit")
    one, two = (
        px.prune(model, [images], px.PX(), sparsity=0.3, rounds=2, scope="structured", progress=False)
        for _ in range(2)
    )
    assert one == two


def narrow_vit(heads: int) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(8, 4, 1, heads, 8, 1, num_classes=5)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"sparsity": 0.9, "scope": "structured"}, TargetError, "out of reach"),
        ({"sparsity": 0.7, "scope": "structured:uniform"}, TargetError, "hold 0.4"),
        (
            {"sparsity": 0.5, "scope": "structured", "min_layer_density": 0.5001},
            InvalidArgumentError,
            "min_layer_density",
        ),
        ({"sparsity": 0.5, "scope": "structured:units"}, InvalidArgumentError, "structured:uniform"),
        ({"sparsity": 0.5, "scope": "structured", "criterion": px.GraSP()}, InvalidArgumentError, "GraSP"),
    ],
)
def test_what_cannot_be_is_an_error_before_any_score(settings: Any, error: type[Exception], said: str) -> None:
    model, images = build("hf vit")
    with pytest.raises(error, match=said):
        px.prune(model, [images], **{"criterion": px.PX(), "progress": False, **settings})


@pytest.mark.parametrize("heads", [1, 2])
def test_a_model_without_units_is_an_error(heads: int) -> None:
    """One hidden unit, and heads in one fused operation."""
    with pytest.raises(TargetError, match="no unit that can be taken out"):
        px.prune(narrow_vit(heads), [torch.randn(1, 3, 8, 8)], px.Magnitude(), sparsity=0.1, scope="structured")


def test_a_single_head_stays() -> None:
    model = networks.timm_vit()
    model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim = 1, 24
    found = [family for family in units_of(model, networks.images()) if family.heads]
    assert [family.name for family in found] == ["blocks.1.attn.qkv.weight"]


# --------------------------------------------------------------------------------------- taking them out


def test_a_unit_that_still_emits_a_constant_stays_and_one_that_nothing_reads_goes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(model[0].bias, 1.0)
    masks = {"0.weight": torch.ones(4, 3, dtype=torch.bool), "2.weight": torch.ones(2, 4, dtype=torch.bool)}
    masks["0.weight"][0] = False  # emits relu(bias)
    masks["2.weight"][:, 1] = False  # is not read
    masks["2.weight"][0, 2] = False
    images = torch.randn(5, 3)
    small, rest = px.shrink(model, px.Masks(masks), images)
    assert small[0].weight.shape == (3, 3)
    assert small[2].in_features == 3
    assert rest.total - rest.kept == 3 + 1
    px.Masks(masks).apply_(model)
    torch.testing.assert_close(small(images), model(images))


def test_masks_without_a_whole_unit_are_an_error() -> None:
    model, images = build("hf vit")
    with pytest.raises(TargetError, match="no unit whole"):
        px.shrink(model, px.select(px.Magnitude().score(model), sparsity=0.3), images)


def test_a_model_without_an_image_size_needs_an_example() -> None:
    model, images = build("vgg")
    masks = px.prune(model, [images], px.Magnitude(), sparsity=0.3, scope="structured", progress=False)
    with pytest.raises(px.DataError, match="example=images"):
        px.shrink(model, masks)


def test_a_layer_that_is_called_twice_keeps_its_units() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.shared, self.two, self.out = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(torch.relu(self.one(x)))
            return self.out(torch.relu(self.two(torch.relu(self.shared(x)))))

    assert [family.name for family in units_of(Twice(), torch.randn(1, 4))] == ["two.weight"]


def test_an_operation_without_a_rule_keeps_what_it_touches() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.relu(self.two(self.one(x).sort(-1).values)))

    assert [family.name for family in units_of(Sorted(), torch.randn(1, 4))] == ["two.weight"]


def test_a_smaller_model_trains_and_can_shrink_again() -> None:
    model, images = build("hf vit")
    masks = px.prune(model, [images], px.Magnitude(), sparsity=0.2, scope="structured", progress=False)
    small, masks = px.shrink(model, masks)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = logits(small, images)
    small(pixel_values=images, labels=torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(small, images), before)
    masks = px.prune(small, [images], px.Magnitude(), sparsity=0.3, scope="structured", progress=False)
    smaller, rest = px.shrink(small, masks)
    assert smaller.num_parameters() < small.num_parameters()
    report = px.report(smaller, rest)
    assert report.macs == report.effective_macs
    assert report.macs < px.report(small, masks).macs

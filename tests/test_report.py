"""The report against numbers worked out by hand; the model is left as it was."""

import copy
import json

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from px_hf.errors import DataError, TargetError
from px_hf.masks import Masks
from px_hf.report import report


def keep(model: nn.Module, **kept: int) -> Masks:
    """Masks that keep the first so many weights of each named parameter (dots written as __)."""
    masks = {}
    for key, count in kept.items():
        name = key.replace("__", ".")
        mask = torch.zeros(model.get_parameter(name).shape, dtype=torch.bool)
        mask.view(-1)[:count] = True
        masks[name] = mask
    return Masks(masks)


class Small(nn.Module):
    """Image [N, 2, 6, 6]: 3×3 convolution to 4 channels on 4×4 places; a layer called twice; one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Linear(4, 4)
        self.never = nn.Linear(7, 7)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(images)).mean((2, 3))
        return self.head(self.twice(self.twice(features)))


def test_by_hand() -> None:
    model = Small()
    masks = keep(model, conv__weight=18, twice__weight=4, never__weight=0)
    found = report(model, masks, torch.zeros(5, 2, 6, 6))
    conv, twice, never = found.layers
    assert (conv.name, conv.shape, conv.kept, conv.weights) == ("conv.weight", (4, 2, 3, 3), 18, 72)
    assert (conv.sparsity, conv.macs, conv.effective_macs) == (0.75, 72 * 16, 18 * 16)
    assert (twice.sparsity, twice.macs, twice.effective_macs) == (0.75, 2 * 16, 2 * 4)
    assert (never.sparsity, never.macs, never.effective_macs) == (1.0, 0, 0)
    assert (found.weights, found.kept, found.sparsity) == (72 + 16 + 49, 22, 115 / 137)
    parameters = (72 + 4) + (4 + 4) + (16 + 4) + (49 + 7) + (12 + 3)
    assert (found.parameters, found.parameters_kept) == (parameters, parameters - 115)
    assert found.parameter_sparsity == 115 / parameters
    assert found.macs == 72 * 16 + 2 * 16 + 12
    assert found.effective_macs == 18 * 16 + 2 * 4 + 12
    assert found.emptied == ("never.weight",)


def test_the_text() -> None:
    model = Small()
    text = str(report(model, keep(model, conv__weight=18, never__weight=0), torch.zeros(5, 2, 6, 6)))
    assert text == "\n".join(
        [
            "layer           shape  sparsity  kept  weights   MACs  effective MACs",
            "---------------------------------------------------------------------",
            "conv.weight   4×2×3×3    0.7500    18       72  1,152             288",
            "never.weight      7×7    1.0000     0       49      0               0",
            "",
            "Masked weights   18 of 121 kept, sparsity 0.8512",
            "All parameters   72 of 175 kept, sparsity 0.5886",
            "MACs per image   1,196 dense, 332 effective",
            "Effective: pruned weights skipped, as a sparse runtime could; dense kernels do not get faster.",
            "MACs counted on the example of shape [5, 2, 6, 6].",
            "Warning: all weights are pruned in never.weight. Prune less, or by layer.",
        ]
    )


def test_json() -> None:
    model = Small()
    found = report(model, keep(model, conv__weight=18), torch.zeros(1, 2, 6, 6))
    content = json.loads(json.dumps(found.to_dict()))
    assert content["layers"] == [
        {
            "name": "conv.weight",
            "shape": [4, 2, 3, 3],
            "kept": 18,
            "weights": 72,
            "macs": 1152,
            "sparsity": 0.75,
            "effective_macs": 288,
        }
    ]
    for name in (
        "sparsity",
        "weights",
        "parameters",
        "parameters_kept",
        "parameter_sparsity",
        "macs",
        "effective_macs",
    ):
        assert content[name] == getattr(found, name)


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(
        ViTConfig(
            image_size=[8, 16],
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=5,
        )
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_counted_and_stays_dense(attention: str) -> None:
    model = vit()
    model.set_attn_implementation(attention)
    name = "vit.layers.0.attention.q_proj.weight"
    found = report(model, Masks({name: torch.zeros(16, 16, dtype=torch.bool)}))
    tokens = 2 * 4 + 1
    dense = (
        8 * 16 * 16  # patches
        + tokens * 4 * 16 * 16  # q, k, v, o
        + 2 * tokens * tokens * 16  # scores and their use
        + 2 * tokens * 16 * 32  # the MLP
        + 16 * 5  # head
    )
    assert found.macs == dense
    assert found.effective_macs == dense - tokens * 16 * 16
    assert "zeros of shape [1, 1, 8, 16]" in found.note


def test_multihead_attention_of_torch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.attention(tokens, tokens, tokens)[0]

    model = Model()
    masks = keep(model, attention__in_proj_weight=0, attention__out_proj__weight=16)
    found = report(model, masks, torch.zeros(3, 5, 8))
    assert [layer.macs for layer in found.layers] == [5 * 3 * 64, 5 * 64]
    assert found.macs == 5 * 4 * 64 + 2 * 5 * 5 * 8
    assert found.effective_macs == 2 * 5 * 5 * 8 + 5 * 16
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_layer_with_two_names_and_tied_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.same = self.first
            self.tied = nn.Linear(4, 4, bias=False)
            self.tied.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.tied(self.same(self.first(x)))

    model = Model()
    found = report(model, keep(model, tied__weight=4, first__weight=4), torch.zeros(2, 4))
    assert [(layer.name, layer.macs, layer.weights) for layer in found.layers] == [("tied.weight", 48, 16)]
    assert (found.parameters, found.macs, found.effective_macs) == (16, 48, 12)


def timm_wrapper(**settings: object) -> nn.Module:
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=3, **settings))


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=2)
    )


@pytest.mark.parametrize(
    ("make", "example", "note"),
    [
        (vit, None, "MACs counted on zeros of shape [1, 1, 8, 16]."),
        (timm_wrapper, None, "MACs counted on zeros of shape [1, 3, 160, 160]."),
        (lambda: timm.create_model("test_vit"), None, "MACs counted on zeros of shape [1, 3, 160, 160]."),
        (resnet, None, "MACs were not counted: the model's configuration names no image size. Pass example=images."),
        (resnet, torch.zeros(2, 3, 32, 32), "MACs counted on the example of shape [2, 3, 32, 32]."),
        (resnet, {"pixel_values": torch.zeros(2, 3, 32, 32)}, "MACs counted on the example of shape [2, 3, 32, 32]."),
        (resnet, (torch.zeros(1, 3, 32, 32), [1]), "MACs counted on the example of shape [1, 3, 32, 32]."),
        (lambda: timm_wrapper(model_args={"in_chans": 1}), None, "MACs were not counted: on [1, 3, 160, 160] the"),
    ],
)
def test_what_the_macs_are_counted_on(make, example, note: str) -> None:
    model = make()
    name, weight = next((name, p) for name, p in model.named_parameters() if p.dim() == 4)
    found = report(model, Masks({name: torch.ones(weight.shape, dtype=torch.bool)}), example)
    assert found.note.startswith(note)
    assert note in str(found)
    assert (found.macs is None) == ("not counted" in note) == ("MACs per image" not in str(found))
    assert found.effective_macs == found.macs


def test_masked_only_in_the_masks() -> None:
    """The masks need not be applied, and the model may be wrapped or in a narrow type."""
    model = vit()
    name = "vit.layers.0.mlp.fc1.weight"
    masks = Masks({name: torch.rand(32, 16) < 0.5})
    expected = report(model, masks)
    masks.apply_(model)
    assert report(model, masks) == expected
    assert report(nn.DataParallel(torch.compile(model, backend="eager")), masks) == expected
    assert report(model.to(torch.bfloat16), masks) == expected


class Counts(nn.Module):
    """Counts its calls in a buffer, even in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Small()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(images)


@pytest.mark.parametrize("works", [True, False])
def test_the_model_is_left_as_it_was(works: bool) -> None:
    model = Counts()
    model.train()
    model.inner.norm.eval()
    model.inner.conv.weight.grad = torch.ones_like(model.inner.conv.weight)
    before = copy.deepcopy(model.state_dict())
    flags = [module.training for module in model.modules()]
    masks = keep(model, inner__conv__weight=10)
    if works:
        report(model, masks, torch.randn(4, 2, 6, 6))
    else:
        with pytest.raises(DataError, match="3 channel"):
            report(model, masks, torch.randn(4, 3, 6, 6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(model.inner.conv.weight.grad, torch.ones_like(model.inner.conv.weight))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("masks", "example", "error", "message"),
    [
        (Masks({"nope": torch.ones(2).bool()}), None, TargetError, "'nope' is not a parameter"),
        (Masks({"conv.weight": torch.ones(4, 2, 3, 3).bool()}), "an image", DataError, "images of type str"),
        (Masks({"conv.weight": torch.ones(4, 2, 3, 3).bool()}), {"image": 1}, DataError, "expected 'pixel_values'"),
        (Masks({"conv.weight": torch.ones(4, 2, 3, 3).bool()}), torch.zeros(0, 2, 6, 6), DataError, "shape"),
    ],
)
def test_bad_input(masks: Masks, example: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        report(Small(), masks, example)

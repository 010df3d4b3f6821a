"""Backbones without a classifier: which output they are pruned for, and how they are saved and read again."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from hub_server import HubServer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DetrConfig,
    DetrForObjectDetection,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import px_hf as px
from px_hf.model.inputs import Inputs, run

SIZES: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 20,
    "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
RESNET = ResNetConfig(
    embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage1", "stage2"]
)


def torchvision_resnet() -> nn.Module:
    model = torchvision.models.mobilenet_v3_small()
    model.classifier = nn.Identity()
    return model


def trained_pooler() -> nn.Module:
    model = ViTModel(ViTConfig(**SIZES))
    nn.init.normal_(model.pooler.dense.bias)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "ViTModel": (lambda: ViTModel(ViTConfig(**SIZES)), lambda out: out.last_hidden_state[:, 0]),
    "ViTModel, trained pooler": (trained_pooler, lambda out: out.pooler_output),
    "ViTModel, no pooler": (
        lambda: ViTModel(ViTConfig(**SIZES), add_pooling_layer=False),
        lambda out: out.last_hidden_state[:, 0],
    ),
    "Dinov2Model": (lambda: Dinov2Model(Dinov2Config(**SIZES)), lambda out: out.pooler_output),
    "DINOv3ViTModel": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES)), lambda out: out.pooler_output),
    "Dinov2Backbone": (
        lambda: AutoBackbone.from_config(Dinov2Config(**SIZES, out_features=["stage1", "stage2"])),
        lambda out: torch.cat([each.mean((2, 3)) for each in out.feature_maps], 1),
    ),
    "ResNetModel": (lambda: ResNetModel(RESNET), lambda out: out.pooler_output),
    "ResNetBackbone": (
        lambda: AutoBackbone.from_config(RESNET),
        lambda out: torch.cat([each.mean((2, 3)) for each in out.feature_maps], 1),
    ),
    "CLIPModel": (
        lambda: CLIPModel(CLIPConfig(text_config=TEXT, vision_config=SIZES, projection_dim=12)),
        lambda out: out["pooler_output"],
    ),
    "CLIPVisionModel": (lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES)), lambda out: out.pooler_output),
    "CLIPVisionModelWithProjection": (
        lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES, projection_dim=12)),
        lambda out: out.image_embeds,
    ),
    "SiglipModel": (
        lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SIZES)),
        lambda out: out["pooler_output"],
    ),
    "SiglipVisionModel": (lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES)), lambda out: out.pooler_output),
    "SiglipVisionModel, no head": (
        lambda: SiglipVisionModel(SiglipVisionConfig(**SIZES, vision_use_head=False)),
        lambda out: out.last_hidden_state.mean(1),
    ),
    "timm, num_classes=0": (lambda: timm.create_model("test_vit", num_classes=0), lambda out: out),
    "timm, tokens": (
        lambda: timm.create_model("test_vit", num_classes=0, global_pool=""),
        lambda out: out.transpose(1, 2),
    ),
    "timm, features_only": (
        lambda: timm.create_model("test_resnet", features_only=True),
        lambda out: torch.cat([each.mean((2, 3)) for each in out], 1),
    ),
    "timm, maps with channels last": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=32, window_size=2,
                                  embed_dim=8, depths=(1, 1), num_heads=(1, 2), out_indices=(0, 1)),
        lambda out: torch.cat([each.mean((1, 2)) for each in out], 1),
    ),
    "torchvision": (torchvision_resnet, lambda out: out),
}  # fmt: skip
"""Name -> the model, and the output that it is pruned for, written out."""

SIDES = {"timm, num_classes=0": 160, "timm, tokens": 160, "timm, maps with channels last": 32, "torchvision": 32}


def made(name: str) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    side = SIDES.get(name, 16)
    return model, [torch.randn(2, 3, side, side)]


def prune(model: nn.Module, batches: Any, criterion: px.Criterion, **settings: Any) -> px.Masks:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*stay dense and have no masks|.*lost all their weights")
        return px.prune(model, batches, criterion, **{"sparsity": 0.5, "rounds": 2, "progress": False} | settings)


@pytest.mark.parametrize("name", MODELS)
def test_the_default_output_is_what_the_backbone_is_used_for(name: str) -> None:
    model, (images,) = made(name)
    with torch.no_grad():
        features = getattr(model, "get_image_features", model)
        expected = MODELS[name][1](features(images))
        torch.testing.assert_close(run(model, Inputs(images)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_a_module_that_returns_that_output(name: str) -> None:
    class Named(nn.Module):
        """The backbone as a classifier: its output is the tensor itself."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, pixel_values: Tensor) -> Tensor:
            return MODELS[name][1](getattr(model, "get_image_features", model)(pixel_values))

    model, batches = made(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*get no score and stay dense")
        expected = px.PX("active").score(Named(), batches)
        found = px.PX("active").score(model, batches)
    assert found
    for key, score in found.items():
        torch.testing.assert_close(score, expected[f"inner.{key}"])


@pytest.mark.parametrize("criterion", [px.PX(), px.Magnitude(), px.Wanda(), px.NTKSAP(), px.NTKTrace(probes=1)])
@pytest.mark.parametrize("name", ["ViTModel", "CLIPModel", "ResNetBackbone", "timm, features_only"])
def test_criteria_without_labels_prune_backbones(name: str, criterion: px.Criterion) -> None:
    model, batches = made(name)
    masks = prune(model, [{"pixel_values": images} for images in batches], criterion, scope="global")
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    untouched = {"ViTModel": "pooler.", "CLIPModel": "text_"}.get(name, "-")
    assert not [key for key in masks if key.startswith(untouched) or "patch_embedding" in key]


@pytest.mark.parametrize("name", ["ViTModel", "CLIPModel", "ResNetBackbone", "timm, num_classes=0", "torchvision"])
@pytest.mark.parametrize("criterion", [px.SNIP(), px.GraSP(), px.GemMiner()])
def test_criteria_of_a_loss_name_those_that_need_no_labels(name: str, criterion: px.Criterion) -> None:
    model, (images,) = made(name)
    batches = [(images, torch.zeros(len(images), dtype=torch.int64))]
    for call in (lambda: prune(model, batches, criterion), lambda: criterion.score(model, batches)):
        with pytest.raises(px.InvalidArgumentError, match=r"no classifier.*needs no labels: px\.PX\(\)"):
            call()


# ---------------------------------------------------------------------------------------- output=


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("pooler_output", lambda out: out.pooler_output),
        ("class_token", lambda out: out.last_hidden_state[:, 0]),
        ("token_mean", lambda out: out.last_hidden_state.mean(1)),
        ("last_hidden_state", lambda out: out.last_hidden_state.transpose(1, 2)),
        (lambda out: out.last_hidden_state[:, 1:3].flatten(1), lambda out: out.last_hidden_state[:, 1:3].flatten(1)),
    ],
)
def test_an_output_can_be_named(output: Any, expected: Callable[[Any], Tensor]) -> None:
    model, (images,) = made("ViTModel")
    with torch.no_grad():
        torch.testing.assert_close(run(model, Inputs(images), output), expected(model(images)), rtol=0, atol=0)


def test_the_output_decides_what_is_pruned_and_what_stays_dense() -> None:
    model, batches = made("ViTModel")
    pooled = prune(model, batches, px.PX(), output="pooler_output")
    assert "pooler.dense.weight" in pooled
    for criterion in (px.PX(), px.Magnitude(), px.Random()):
        with pytest.warns(UserWarning, match=r"1 weight\(s\) stay dense.*'token_mean'.*pooler\.dense\.weight"):
            masks = px.prune(model, batches, criterion, sparsity=0.5, rounds=1, output="token_mean", progress=False)
        assert "pooler.dense.weight" not in masks
        assert "pooler.dense.weight" not in criterion.score(model, batches, output="token_mean")


def test_without_images_the_size_of_the_config_tells_what_is_reached() -> None:
    masks = prune(made("ViTModel")[0], (), px.Magnitude())
    assert masks
    assert "pooler.dense.weight" not in masks
    assert len(prune(made("ResNetModel")[0], (), px.Magnitude())) == 6  # its config has none: nothing is left out


def test_an_output_of_a_classifier_can_be_named() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.classifier = nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            hidden = self.trunk(x.flatten(1)).relu()
            return {"logits": self.classifier(hidden), "features": hidden}

    model, batches = Encoder(), [torch.randn(2, 3, 2, 2)]
    with pytest.warns(UserWarning, match="classifier"):
        masks = px.prune(model, batches, px.PX(), sparsity=0.5, output="features", prune_head=True, progress=False)
    assert list(masks) == ["trunk.weight"]
    with pytest.raises(px.InvalidArgumentError, match="SNIP scores by a loss with labels, and output='features'"):
        px.prune(model, batches, px.SNIP(), sparsity=0.5, output="features")


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (3, px.InvalidArgumentError, "output=3: expected the name of an output"),
        ("hidden", px.InvalidArgumentError, r"ViTModel returns last_hidden_state, pooler_output\. Name one of them"),
        ("feature_maps", px.InvalidArgumentError, "Name one of them"),
        (lambda out: out, px.DataError, r"expected a floating-point tensor \[N, K, ...\]"),
        (lambda out: out.last_hidden_state.argmax(1), px.DataError, "floating-point"),
        (lambda out: torch.zeros(2, 3), px.TargetError, "depends on none of its prunable weights"),
    ],
)
def test_an_output_that_there_is_not(output: Any, error: type[Exception], message: str) -> None:
    model, batches = made("ViTModel")
    with pytest.raises(error, match=message):
        px.prune(model, batches, px.PX(), sparsity=0.5, output=output, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(error, match=message):
        px.gradual_pruning(optimizer, model, batches, px.PX(), sparsity=0.5, total_steps=20, output=output)


def test_a_class_token_of_a_convolutional_backbone() -> None:
    model, (images,) = made("ResNetModel")
    with pytest.raises(px.InvalidArgumentError, match=r"expected tokens \[N, T, D\]. Use output='token_mean'"):
        run(model, Inputs(images), "class_token")


def test_gradual_pruning_and_trainers_settings_know_the_output() -> None:
    model, batches = made("ViTModel")
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*stay dense and have no masks")
        with px.gradual_pruning(
            optimizer, model, batches, px.PX(), sparsity=0.5, total_steps=2, rounds=2, output="token_mean"
        ) as pruning:
            for _ in range(2):
                optimizer.zero_grad()
                model(batches[0]).last_hidden_state.square().mean().backward()
                optimizer.step()
    assert pruning.finished
    assert pruning.state_dict()["settings"]["output"] == "token_mean"
    assert not pruning.masks.revived(model)
    callback = px.GradualPruning(px.PX(), batches, sparsity=0.5, output="token_mean")
    assert callback._plan.output == "token_mean"


# ---------------------------------------------------------------- the flow to all outputs, slowly


class Tokens(nn.Module):
    """Two linear maps of tokens that are mixed in between; returns all tokens and two maps of unlike sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mixing, self.last = nn.Linear(3, 4, bias=False), nn.Linear(5, 2, bias=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        early = self.first(x).relu()  # [N, 5, 4]
        mixed = self.mixing(early.mT).mT.relu()  # [N, 2, 4]
        return {
            "last_hidden_state": self.last(mixed),
            "feature_maps": (early.mT[..., None], mixed.mT[..., None]),
        }


def slow_scores(model: Tokens, x: Tensor, maps: bool) -> dict[str, Tensor]:
    """∂/∂θ² of the sum, over images and outputs, of all active paths; path by path, in float64."""
    squares = {name: p.detach().square().requires_grad_(True) for name, p in model.named_parameters()}
    w1, mix, w2 = (squares[f"{name}.weight"] for name in ("first", "mixing", "last"))
    total = torch.zeros((), dtype=torch.float64)
    for image in x:
        early = model.first(image)
        mixed = model.mixing(early.relu().mT).mT
        for t in range(5):
            for i in range(3):
                for d in range(4):
                    to_early = image[t, i] ** 2 * w1[d, i] * (early[t, d] > 0)
                    if maps:
                        total = total + to_early / 5**2  # the mean of the first map over its 5 positions
                    for u in range(2):
                        to_mixed = to_early * mix[u, t] * (mixed[u, d] > 0)
                        if maps:
                            total = total + to_mixed / 2**2
                        else:
                            total = total + sum(to_mixed * w2[k, d] for k in range(3))
    names = [name for name in squares if name.endswith("weight") and not (maps and name.startswith("last"))]
    found = torch.autograd.grad(total, [squares[name] for name in names])
    return {name: squares[name].detach() * g for name, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("maps", [False, True])
def test_the_flow_is_that_to_all_tokens_and_to_all_maps(maps: bool) -> None:
    torch.manual_seed(0)
    model, x = Tokens().double(), torch.randn(2, 5, 3, dtype=torch.float64)
    output = "feature_maps" if maps else "last_hidden_state"
    found = px.PX("active").score(model, [x], output=output)
    expected = slow_scores(model, x, maps)
    assert found.keys() == expected.keys()
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score)


def test_all_tokens_and_their_mean_have_the_same_ranking() -> None:
    model, batches = made("ViTModel")
    for criterion in (px.PX(), px.PX("active"), px.SynFlow()):
        assert prune(model, batches, criterion, output="token_mean") == prune(
            model, batches, criterion, output="last_hidden_state"
        )


# ----------------------------------------------------------------------- zero shot, saved and read


def test_the_texts_of_clip_are_embedded_as_before() -> None:
    model, batches = made("CLIPModel")
    assert isinstance(model, CLIPModel)
    ids = torch.tensor([[0, 3, 4, 1], [0, 5, 6, 1]])
    before = model.get_text_features(input_ids=ids).pooler_output
    with pytest.warns(UserWarning, match=r"7 weight\(s\) stay dense.*text_model"):
        masks = px.prune(model, batches, px.PX(), sparsity=0.5, rounds=1, progress=False)
    masks.apply_(model)
    assert torch.equal(model.get_text_features(input_ids=ids).pooler_output, before)
    assert model(input_ids=ids, pixel_values=batches[0]).logits_per_image.shape == (2, 2)
    with_text = [{"pixel_values": batches[0], "input_ids": ids}]
    assert set(prune(model, with_text, px.Magnitude(), output="image_embeds")) == set(masks)
    assert any("text_model" in name for name in prune(model, with_text, px.Magnitude(), output="logits_per_image"))


SAVED = [name for name in MODELS if "features_only" not in name and "last" not in name and name != "torchvision"]


@pytest.mark.parametrize("name", SAVED)
def test_what_is_saved_comes_back_as_what_it_was(name: str, tmp_path: Path) -> None:
    model, (images,) = made(name)
    masks = prune(model, (images,), px.Magnitude())
    masks.apply_(model)
    px.save_pretrained(model, masks, tmp_path / "out")
    read = px.from_pretrained(tmp_path / "out")
    assert type(read) is type(model)
    assert not masks.revived(read)
    with torch.no_grad():
        assert torch.equal(run(read, Inputs(images)), run(model, Inputs(images)))
    if not isinstance(model, PreTrainedModel):
        stock = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
        assert torch.equal(run(stock, Inputs(images)), run(model, Inputs(images)))
    elif not name.endswith(("Projection", "Backbone")):
        own = {"add_pooling_layer": False} if name.endswith("no pooler") else {}
        for where in ({}, {"subfolder": "sparse"}):
            found = AutoModel.from_pretrained(tmp_path / "out", **where, **own).eval()
            assert found.state_dict().keys() == model.state_dict().keys()
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.state_dict().items())


def test_a_model_of_feature_maps_alone_is_not_saved(tmp_path: Path) -> None:
    model, batches = made("timm, features_only")
    masks = prune(model, batches, px.Magnitude())
    masks.apply_(model)
    with pytest.raises(px.InvalidArgumentError, match="load that with features_only=True"):
        px.save_pretrained(model, masks, tmp_path / "out")
    whole = timm.create_model("test_resnet", num_classes=0).eval()
    masks = prune(whole, batches, px.Magnitude())
    masks.apply_(whole)
    px.save_pretrained(whole, masks, tmp_path / "out")
    maps = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True).eval()
    assert torch.equal(maps(batches[0])[-1], whole.forward_features(batches[0]))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "task", "loader"),
    [
        ("Dinov2Model", "image-feature-extraction", "AutoModel"),
        ("CLIPModel", "zero-shot-image-classification", "AutoModel"),
        ("CLIPVisionModelWithProjection", "image-feature-extraction", "CLIPVisionModelWithProjection"),
    ],
)
def test_backbones_are_pushed_with_a_card_that_loads_them(
    hub: HubServer, tmp_path: Path, name: str, task: str, loader: str
) -> None:
    model, batches = made(name)
    masks = prune(model, batches, px.Magnitude())
    masks.apply_(model)
    px.push_to_hub(model, masks, "alice/backbone")
    read = px.from_pretrained("alice/backbone")
    assert type(read) is type(model)
    assert not masks.revived(read)
    from huggingface_hub import ModelCard

    card = ModelCard.load("alice/backbone")
    assert card.data.pipeline_tag == task
    assert f'model = {loader}.from_pretrained("alice/backbone")' in card.text
    assert "Image classifier" not in card.text


def test_shrinking_keeps_every_output_of_a_backbone() -> None:
    model, batches = made("Dinov2Model")
    masks = prune(model, batches, px.PX("active"), scope="structured", sparsity=0.3)
    masks.apply_(model)
    small, _ = px.shrink(model, masks)
    with torch.no_grad():
        for name, value in model(batches[0]).items():
            torch.testing.assert_close(small(batches[0])[name], value)


def test_a_backbone_is_exported_with_its_embedding() -> None:
    from px_hf.export import _Logits

    model, (images,) = made("ViTModel")
    exported = torch.export.export(_Logits(model).eval(), (images,)).module()
    torch.testing.assert_close(exported(images), model(images).last_hidden_state[:, 0])


# ------------------------------------------------------------------------- arguments of from_pretrained


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, model in {
        "vit": ViTForImageClassification(ViTConfig(**SIZES, num_labels=3)),
        "timm": timm.create_model("test_resnet", num_classes=3),
        "narrow": ViTForImageClassification(ViTConfig(**SIZES, num_labels=3)).bfloat16(),
    }.items():
        found[name] = tmp_path_factory.mktemp("saved") / name
        masks = px.prune(model, (), px.Magnitude(), sparsity=0.5, progress=False)
        masks.apply_(model)
        px.save_pretrained(model, masks, found[name])
    return found


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("vit", "auto", torch.float32),
        ("vit", "bfloat16", torch.bfloat16),
        ("vit", "torch.float16", torch.float16),
        ("vit", None, torch.float32),
        ("narrow", "auto", torch.bfloat16),
        ("narrow", "float32", torch.float32),
        ("timm", "auto", torch.float32),
        ("timm", "bfloat16", torch.bfloat16),
        ("timm", torch.float16, torch.float16),
    ],
)
def test_dtypes_by_name(folders: dict[str, Path], name: str, dtype: Any, expected: torch.dtype) -> None:
    model = px.from_pretrained(folders[name], dtype=dtype)
    assert next(model.parameters()).dtype == expected
    assert next(px.from_pretrained(folders[name], torch_dtype=dtype).parameters()).dtype == expected


@pytest.mark.parametrize("name", ["vit", "timm"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float"}, None),
        ({"dtype": "wide"}, "dtype='wide': expected a torch.dtype, its name"),
        ({"dtype": 16}, "dtype=16: expected"),
        ({"quantization_config": object()}, "Quantize what it returns"),
        ({"quantization_config": {"load_in_8bit": True}, "device_map": "cpu"}, "Quantize what it returns"),
        ({"output_loading_info": True}, "leave output_loading_info out"),
        ({"nonsense": 3}, "nonsense"),
    ],
)
def test_arguments_that_do_not_apply(
    folders: dict[str, Path], name: str, arguments: dict[str, Any], message: str | None
) -> None:
    if message is None:
        px.from_pretrained(folders[name], **arguments)
        return
    with pytest.raises(px.InvalidArgumentError, match=message):
        px.from_pretrained(folders[name], **arguments)


@pytest.mark.parametrize("more", [{}, {"device_map": "cpu"}, {"attn_implementation": "eager"}, {"num_labels": 3}])
def test_a_config_may_be_that_of_either_copy(folders: dict[str, Path], more: dict[str, Any]) -> None:
    expected = px.from_pretrained(folders["vit"]).state_dict()
    dense, sparse = (ViTConfig.from_pretrained(folders["vit"], subfolder=each) for each in ("", "sparse"))
    for config in (dense, sparse, folders["vit"], str(folders["vit"] / "config.json")):
        found = px.from_pretrained(folders["vit"], config=config, **more).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert "quantization_config" not in json.loads((folders["vit"] / "config.json").read_text())
    assert not hasattr(dense, "quantization_config")


def test_a_config_of_another_model(folders: dict[str, Path]) -> None:
    with pytest.raises(px.CheckpointError, match="config and weights do not belong together"):
        px.from_pretrained(folders["vit"], config=ViTConfig(**SIZES | {"hidden_size": 32}, num_labels=3))
    with pytest.raises(px.CheckpointError):
        px.from_pretrained(folders["vit"], config=ResNetConfig())
    with pytest.raises(px.InvalidArgumentError, match="config does not apply"):
        px.from_pretrained(folders["timm"], config=ViTConfig())


def test_nearest_neighbours_of_a_backbone_without_labels() -> None:
    """Features are the output that was pruned for; pooled over positions where there are any."""
    from px_hf.evaluation.features import _HeadInput

    for name in ("SiglipVisionModel", "timm, tokens", "ResNetBackbone", "CLIPModel"):
        model, (images,) = made(name)
        with torch.no_grad(), _HeadInput(model) as head:
            found, expected = head(Inputs(images)), run(model, Inputs(images))
            assert torch.equal(found, expected.flatten(2).mean(2) if expected.dim() > 2 else expected)
            assert float(F.cosine_similarity(found[:1], found[1:])) < 1 - 1e-6


# ------------------------------------------------------------------------------- recipes, detection


@pytest.mark.parametrize("name", ["ViTModel", "CLIPModel"])
def test_the_recipes_take_a_backbone_without_a_classifier(name: str, tmp_path: Path) -> None:
    """Dense, pruned there on images without labels; and saved pruned, by the names of a classifier around it."""
    from transformers import ViTImageProcessor

    from px_hf.commands import evaluate_downstream, transfer

    model, batches = made(name)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    for folder in ("dense", "pruned"):
        if folder == "pruned":
            masks = prune(model, batches, px.Magnitude())
            masks.apply_(model)
            px.save_pretrained(model, masks, tmp_path / folder, image_processor=processor)
        else:
            model.save_pretrained(tmp_path / folder)
            processor.save_pretrained(tmp_path / folder)
    few = [
        "--max_train_samples",
        "40",
        "--max_eval_samples",
        "20",
        "--num_train_epochs",
        "1",
        "--disable_tqdm",
        "true",
    ]
    (tmp_path / "unlabelled").mkdir()
    Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "unlabelled/1.png")
    unlabelled = ["--unlabelled_dir", str(tmp_path / "unlabelled"), "--criterion", "px-active", "--rounds", "1"]
    for folder, more in (("dense", ["--sparsity", "0.5", *unlabelled]), ("pruned", [])):
        argv = ["--model_name_or_path", str(tmp_path / folder), "--output_dir", str(tmp_path / f"out-{folder}"), *few]
        assert evaluate_downstream.main([*argv, "--tasks", "digits", "--methods", "knn", *more]) == 0
        results = json.loads((tmp_path / f"out-{folder}/downstream.json").read_text())
        names = [subject["name"] for subject in results["subjects"] if subject["kind"] == "pruned"]
        share = (
            {"ViTModel": "50", "CLIPModel": "51"}[name] if folder == "pruned" else "50"
        )  # its projection is left out
        assert names == [f"pruned {share} %"]
        assert 0 <= results["tasks"]["digits"]["results"][names[0]]["knn"]["scores"]["accuracy"]["value"] <= 1
    argv = ["--model_name_or_path", str(tmp_path / "dense"), "--output_dir", str(tmp_path / "transfer"), *few]
    argv += ["--prune_on", "source", "--targets", "digits", "--sparsity", "0.5", "--random_control", "false"]
    assert transfer.main([*argv, *unlabelled]) == 0


def test_a_backbone_without_a_classifier_in_transformers_is_an_error(tmp_path: Path) -> None:
    from px_hf.commands import evaluate_downstream

    CLIPVisionModel(CLIPVisionConfig(**SIZES)).save_pretrained(tmp_path / "vision")
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vision")
    argv = [
        "--model_name_or_path",
        str(tmp_path / "vision"),
        "--output_dir",
        str(tmp_path / "out"),
        "--tasks",
        "digits",
    ]
    assert evaluate_downstream.main([*argv, "--max_train_samples", "20", "--max_eval_samples", "20"]) == 1
    error = json.loads((tmp_path / "out/downstream.json").read_text())["tasks"]["digits"]["error"]
    assert "clip_vision_model, to which transformers adds no classifier" in error


def detector() -> nn.Module:
    torch.manual_seed(0)
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))}  # fmt: skip
    return DetrForObjectDetection(
        DetrConfig(backbone_config=copy.deepcopy(RESNET), d_model=16, num_queries=4, num_labels=3, **sizes)
    )


def test_the_backbone_of_a_detector_is_pruned_and_the_detector_trained() -> None:
    model, images = detector(), torch.randn(2, 3, 32, 32)
    where = "model.backbone.model"
    own = prune(model.get_submodule(where), [images], px.PX("active"))
    with pytest.raises(px.TargetError, match=r"masks\.under\('model\.backbone\.model'\)"):
        own.apply_(model)
    masks = own.under(where)
    model.requires_grad_(True)  # DETR freezes the first stages
    masks.apply_(model)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])} for _ in images]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with px.keep_masks(optimizer, model, masks):
        for _ in range(3):
            optimizer.zero_grad()
            model(pixel_values=images, labels=labels).loss.backward()
            optimizer.step()
    assert not masks.revived(model)
    assert all(not torch.equal(before[name], model.get_parameter(name)) for name in masks)
    assert px.report(model, masks, images).macs


def test_the_decoder_stays_dense_where_the_encoder_is_pruned_for() -> None:
    model, images = detector(), torch.randn(2, 3, 32, 32)
    with pytest.warns(UserWarning, match=r"'encoder_last_hidden_state'.*model\.decoder"):
        masks = px.prune(
            model, [images], px.Magnitude(), sparsity=0.5, output="encoder_last_hidden_state", progress=False
        )
    assert {name.split(".")[1] for name in masks} >= {"backbone", "encoder"}
    assert not any("decoder" in name for name in masks)

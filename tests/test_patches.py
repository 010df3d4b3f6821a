"""Patch tickets: attention by hand, tokens that follow, every kind of ViT, and training with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import datasets
import pytest
import timm
import torch
from networks import build, images
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

import px_hf as px

SMALL = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
    "patch_size": 2, "num_labels": 5,
}  # fmt: skip
TIMM = {"img_size": 8, "patch_size": 2, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 5}


def timm_vit(**more: Any) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", **TIMM, **more)
    model.default_cfg = model.pretrained_cfg = {"input_size": (3, 8, 8)}
    return model


def wrapped() -> nn.Module:
    config = TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={n: v for n, v in TIMM.items() if n != "num_classes"},
        num_labels=5,
    )
    config.image_size = 8
    return TimmWrapperForImageClassification(config)


def hf_vit(attention: str = "sdpa") -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SMALL, attn_implementation=attention))


VITS = {
    "hf vit": hf_vit,
    "hf deit": lambda: DeiTForImageClassification(DeiTConfig(**SMALL)),
    "hf dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SMALL, mlp_ratio=2)),
    "hf dinov2 with registers": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2)
    ),
    "timm vit": timm_vit,
    "timm vit without a class token": lambda: timm_vit(class_token=False, global_pool="avg"),
    "timm vit with registers": lambda: timm_vit(reg_tokens=2),
    "timm in transformers": wrapped,
}
PREFIX = {
    "hf deit": 2,
    "hf dinov2 with registers": 5,
    "timm vit without a class token": 0,
    "timm vit with registers": 3,
}
X = images(5)


def vit(name: str) -> nn.Module:
    torch.manual_seed(0)
    return VITS[name]().eval()


def logits(model: nn.Module, x: Tensor = X, **more: Any) -> Tensor:
    output = model(x, **more)
    return getattr(output, "logits", output)


def attention_by_hand(model: nn.Module, name: str, layers: tuple[int, ...]) -> Tensor:
    """From queries and keys caught at their layers."""
    prefix = PREFIX.get(name, 1)
    caught: dict[int, list[Tensor]] = {}
    hooks = []
    for path, module in model.named_modules():
        number = next((int(part) for part in path.split(".") if part.isdigit()), -1)
        last = path.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "query", "key", "qkv") and isinstance(module, nn.Linear):
            hooks.append(
                module.register_forward_hook(lambda _, __, out, n=number: caught.setdefault(n, []).append(out))
            )
    logits(model)
    for hook in hooks:
        hook.remove()
    total = []
    for layer in layers:
        found = caught[layer - 1]
        q, k = found if len(found) == 2 else found[0].chunk(3, -1)[:2]
        q, k = (each.unflatten(-1, (2, -1)).transpose(1, 2).double() for each in (q, k))
        pattern = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        rows = pattern[:, :, :1] if prefix else pattern
        total.append(rows[..., prefix:].mean((1, 2)))
    return torch.stack(total).mean(0)


@pytest.mark.parametrize("name", VITS)
def test_scores_are_the_attention_that_patches_get(name: str) -> None:
    model = vit(name)
    before, state = logits(model), copy.deepcopy(model.state_dict())
    model.train()
    found = px.PatchTickets(layers=(1, 3)).scores(model, [X[:3], {"pixel_values": X[3:]}])
    assert model.training
    model.eval()
    assert found.shape == (5, 16)
    assert torch.allclose(found, attention_by_hand(model, name, (1, 3)), atol=1e-6)
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[n]) for n, value in model.state_dict().items())
    selected = px.PatchTickets(keep=0.5, layers=(1, 3)).select(model, [X])
    assert selected.tolist() == [sorted(row.topk(8).indices.tolist()) for row in found]


def test_attention_is_as_it_was_afterwards() -> None:
    for attention in ("sdpa", "eager"):
        model = hf_vit(attention)
        px.PatchTickets(layers=(1,)).scores(model, [X])
        assert model.config._attn_implementation == attention
    model = timm_vit()
    px.PatchTickets(layers=(1,)).scores(model, [X])
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not any(block.attn.attn_drop._forward_hooks for block in model.blocks)


# ------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", VITS)
def test_the_network_reads_only_these_patches(name: str) -> None:
    """What is in the others changes nothing, what is in these does; all patches in any order are the whole image."""
    model = vit(name)
    whole = logits(model)
    patches = px.PatchTickets(keep=0.5).random(5, 16)
    with px.read_patches(model):
        assert torch.equal(logits(model), whole)
        every = torch.stack([torch.randperm(16) for _ in range(5)])
        assert torch.allclose(logits(model, patches=every), whole, atol=1e-5)
        some = logits(model, patches=patches)
        assert not torch.allclose(some, whole, atol=1e-4)
        read = torch.zeros(5, 16).scatter(1, patches, 1.0).view(5, 1, 4, 4)
        read = nn.functional.interpolate(read, size=8, mode="nearest").bool()
        noise = images(5, seed=9)
        assert torch.allclose(logits(model, torch.where(read, X, noise), patches=patches), some, atol=1e-5)
        assert not torch.allclose(logits(model, torch.where(read, noise, X), patches=patches), some, atol=1e-4)
        assert torch.equal(logits(model), whole), "the next call reads all"
    with pytest.raises(TypeError, match="patches"):
        logits(build("timm vit"), patches=patches)


@pytest.mark.parametrize("name", ["hf vit", "timm vit"])
def test_fewer_tokens_go_through_every_block(name: str) -> None:
    model = vit(name)
    lengths: list[int] = []
    blocks = model.blocks if hasattr(model, "blocks") else model.vit.layers
    for block in blocks:
        block.register_forward_hook(lambda _, args, out: lengths.append(args[0].shape[1]))
    with px.read_patches(model):
        lengths.clear()
        logits(model, patches=torch.tensor([[3, 7, 9]] * 5)).sum().backward()
    assert lengths == [4, 4, 4]
    position = model.pos_embed if hasattr(model, "blocks") else model.vit.embeddings.position_embeddings
    assert position.grad[0].abs().sum(-1).gt(0).nonzero().flatten().tolist() == [0, 4, 8, 10]


def swin() -> nn.Module:
    return SwinForImageClassification(
        SwinConfig(
            image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, num_labels=5
        )
    )


def rotary() -> nn.Module:
    model = timm.create_model(
        "eva02_tiny_patch14_224", img_size=8, patch_size=2, depth=2, embed_dim=24, num_heads=2, num_classes=5
    )
    model.default_cfg = model.pretrained_cfg = {"input_size": (3, 8, 8)}
    return model


NOT = {"resnet": lambda: build("hf resnet"), "mlp": lambda: build("mlp"), "swin": swin, "rotary": rotary}


@pytest.mark.parametrize("make", NOT.values(), ids=NOT)
def test_networks_that_cannot(make: Any) -> None:
    model = make()
    with pytest.raises(px.TargetError, match="patches"):
        px.read_patches(model, torch.zeros(1, 3, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "keep of 0": (lambda m: px.PatchTickets(keep=0), px.InvalidArgumentError, r"in \(0, 1\]"),
    "keep of 2": (lambda m: px.PatchTickets(keep=2.0), px.InvalidArgumentError, r"in \(0, 1\]"),
    "no patch left": (
        lambda m: px.PatchTickets(keep=0.01, layers=(1,)).select(m, [X]),
        px.InvalidArgumentError,
        "leaves none of 16 patches",
    ),
    "no layers": (lambda m: px.PatchTickets(layers=()), px.InvalidArgumentError, "from 1"),
    "layer 0": (lambda m: px.PatchTickets(layers=(0,)), px.InvalidArgumentError, "from 1"),
    "too deep": (lambda m: px.PatchTickets().select(m, [X]), px.InvalidArgumentError, "has 3 layers"),
    "shuffled": (
        lambda m: px.PatchTickets(layers=(1,)).select(m, DataLoader(list(X), 2, shuffle=True)),
        px.InvalidArgumentError,
        "shuffle=False",
    ),
    "no images": (lambda m: px.PatchTickets(layers=(1,)).select(m, []), px.DataError, "empty"),
    "NaN": (lambda m: px.PatchTickets(layers=(1,)).select(m, [X * torch.nan]), px.NonFiniteError, "NaN"),
    "no transformer": (lambda m: px.PatchTickets().select(build("cnn"), [X]), px.TargetError, "patches"),
    "a patch too many": (lambda m: logits(m, patches=torch.tensor([[16]] * 5)), px.DataError, "patches 0 to 15"),
    "a negative one": (lambda m: logits(m, patches=torch.tensor([[-1]] * 5)), px.DataError, "lie in -1"),
    "other images": (lambda m: logits(m, patches=torch.zeros(4, 2).long()), px.DataError, "for 5 images"),
    "none": (lambda m: logits(m, patches=torch.zeros(5, 0).long()), px.DataError, "k ≥ 1"),
    "masks": (lambda m: logits(m, patches=torch.ones(5, 16).bool()), px.DataError, "whole numbers"),
    "one row": (lambda m: logits(m, patches=torch.zeros(3).long()), px.DataError, "whole numbers"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    model = vit("hf vit")
    whole = logits(model)
    with px.read_patches(model):
        with pytest.raises(error, match=match):
            call(model)
        assert torch.equal(logits(model), whole), "what failed is forgotten"


def test_the_random_control() -> None:
    tickets = px.PatchTickets(keep=0.5)
    drawn = tickets.random(200, 16, seed=1)
    assert drawn.shape == (200, 8)
    assert bool((drawn.diff(dim=1) > 0).all())
    assert torch.equal(drawn, tickets.random(200, 16, seed=1))
    assert len(drawn.unique()) == 16


def test_trainer_reads_the_column_of_a_saved_data_set(tmp_path: Path) -> None:
    model = vit("hf vit")
    x, labels = images(8), [i % 5 for i in range(8)]
    data = datasets.Dataset.from_dict({"pixel_values": x.tolist(), "labels": labels}).with_format("torch")
    batches = DataLoader([{"pixel_values": image} for image in x], batch_size=3)
    patches = px.PatchTickets(keep=0.25, layers=(1, 2)).select(model, batches)
    data = data.add_column("patches", patches.tolist())
    data.save_to_disk(tmp_path / "data")
    data = datasets.load_from_disk(tmp_path / "data")
    assert torch.equal(data["patches"][:], patches)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, label_names=["labels"], save_strategy="no",
    )  # fmt: skip
    lengths: list[int] = []
    model.vit.layers[0].register_forward_hook(lambda _, given, out: lengths.append(given[0].shape[1]))
    with px.read_patches(model):
        lengths.clear()
        trainer = Trainer(model, args, train_dataset=data, eval_dataset=data)
        trainer.train()
        scored = trainer.evaluate()
        assert set(lengths) == {1 + 4}
    without = Trainer(model, args, eval_dataset=data.remove_columns("patches")).evaluate()
    assert scored["eval_loss"] != without["eval_loss"]

"""Which weights may be pruned: those of the convolutions and linear layers of the backbone."""

from __future__ import annotations

from typing import Any, Final

import torch.distributed as dist
from torch import nn

from ..errors import TargetError, listed
from .adapters import adapted_layers, added_modules
from .outputs import is_bare
from .quantized import require_plain
from .wrappers import named_parameters, unwrap

PRUNABLE_LAYERS: Final = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
)
"""Layers whose weights can be pruned. Subclasses count."""

HEAD_NAMES: Final = (
    "classifier", "fc", "head", "heads", "cls_classifier", "distillation_classifier", "decode_head", "auxiliary_head",
)  # fmt: skip
"""Attributes of a model that are taken for its classifier or decoder where the model does not say it itself."""


def head_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of the classifier head.

    0. None in a model that transformers itself calls one without a head (`px_hf.model.outputs.is_bare`).
    1. What timm's ``get_classifier()`` returns, also inside transformers' ``TimmWrapper``.
    2. In a transformers model: all that lies outside ``base_model``.
    3. Otherwise an attribute of the model itself with one of `HEAD_NAMES`, if there is one.
    4. Otherwise, if all parameters lie in one submodule, as in a LightningModule around a model, the head of that.
    """
    model = unwrap(model)
    if is_bare(model):
        return set()
    for owner in (model, getattr(model, "timm_model", None)):
        get_classifier = getattr(owner, "get_classifier", None)
        if callable(get_classifier):
            found = get_classifier()
            heads = found if isinstance(found, (tuple, list)) else [found]
            return {m for head in heads if isinstance(head, nn.Module) for m in head.modules()}
    base: Any = getattr(model, "base_model", model)
    if isinstance(base, nn.Module) and base is not model:
        return set(model.modules()) - set(base.modules()) - {model}
    found = {
        m for name in HEAD_NAMES if isinstance(head := getattr(model, name, None), nn.Module) for m in head.modules()
    }
    only = _only_part(model)
    return head_modules(only) if not found and only is not None else found


def _only_part(model: nn.Module) -> nn.Module | None:
    """The submodule that holds all parameters of a model."""
    if next(model.parameters(recurse=False), None) is not None:
        return None
    parts = [part for part in model.children() if next(part.parameters(), None) is not None]
    return parts[0] if len(parts) == 1 else None


def patch_embedding(model: nn.Module) -> set[nn.Module]:
    """The convolution that cuts the image into patches: the model's first, if its windows do not overlap. Of a model
    of images and texts it is that of its ``vision_model``.

    An embedding like that of a word, a percent or two of the weights; pruning it with the rest ruins a
    ViT (ImageNet ViT-Ti, magnitude at 40 % sparsity: 19 % accuracy instead of 61 %).
    """
    if callable(getattr(model, "get_image_features", None)):
        model = getattr(model, "vision_model", model)
    first = next((m for m in model.modules() if isinstance(m, PRUNABLE_LAYERS)), None)
    if isinstance(first, (nn.Conv2d, nn.Conv3d)) and tuple(first.kernel_size) == tuple(first.stride):
        return {first} if max(first.stride) > 1 else set()
    return set()


def require_whole(model: nn.Module) -> None:
    """The model must hold its weights: for what does not work with a share of them.

    Raises:
        TargetError: they are sharded over processes, or on the meta device.
    """
    sharded = dist.is_available() and dist.is_initialized() and _is_sharded(model)
    if sharded or any(p.is_meta for p in model.parameters()):
        how = "its weights are sharded over the processes (FSDP)" if sharded else "it has weights on the meta device"
        raise TargetError(
            f"{type(model).__name__} does not hold its weights: {how}. Do this before accelerator.prepare, "
            "fully_shard or offloading: load it whole on one device, on every process, and wrap it then. What works "
            "with weights that FSDP2 has sharded: px.prune (but for structured scopes), masks.apply_, px.keep_masks, "
            "px.KeepMasks, px.report, px.save_pretrained and px.push_to_hub. With weights that Accelerate has "
            "offloaded: px.prune by px.Magnitude(), px.LAMP() or px.Random(), in one process (docs/SCALE.md)."
        )


def _require_own_weights(model: nn.Module, left_out: set[nn.Module]) -> None:
    """A layer whose weight is computed from other parameters at each forward has none that could be pruned."""
    computed = {
        path: undo
        for path, module in model.named_modules()
        if isinstance(module, PRUNABLE_LAYERS) and module not in left_out and (undo := _undo(module)) is not None
    }
    for path, layer in adapted_layers(model).items():
        if isinstance(layer.base_layer, nn.MultiheadAttention):
            computed[path] = "merge_and_unload() of the PeftModel; prune first, and give the model adapters then"
    if computed:
        raise TargetError(
            f"the weights of {len(computed)} layer(s) are computed from other parameters, and masks of them would not "
            f"hold: {listed(computed)}. Make them plain first: {listed(dict.fromkeys(computed.values()))}."
        )


def _undo(module: nn.Module) -> str | None:
    """What makes the weight of a layer a plain parameter again, if it is not one."""
    computed = [name for name in getattr(module, "parametrizations", {}) if name.endswith("weight")]
    if computed:
        return f"torch.nn.utils.parametrize.remove_parametrizations(layer, {computed[0]!r})"
    for name, _ in module.named_parameters(recurse=False):
        if name.endswith("weight_orig"):
            kind = "remove_spectral_norm(layer" if hasattr(module, "weight_u") else "prune.remove(layer"
            return f"torch.nn.utils.{kind}, {name.removesuffix('_orig')!r})"
        if name.endswith("weight_g"):
            return f"torch.nn.utils.remove_weight_norm(layer, {name.removesuffix('_g')!r})"
    return None


def _is_sharded(model: nn.Module) -> bool:
    """By FSDP2, whose parameters are DTensors, or by FSDP1, which flattens them."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters()) or any(
        isinstance(module, FullyShardedDataParallel) for module in model.modules()
    )


def prunable(model: nn.Module, prune_head: bool = False, *, anywhere: bool = False) -> dict[str, nn.Parameter]:
    """The prunable weights of ``model``, by the names that `px_hf.model.wrappers` gives them, in the model's
    order.

    Weights of convolutions and linear layers; biases, norms, embeddings (the patch embedding too) and
    class tokens never, nor what peft has added. The classifier head, which is freshly initialised in
    transfer learning, is left out unless ``prune_head``. ``anywhere``: also weights that this process does not hold,
    for who asks for names and shapes, or gathers them.

    Raises:
        TargetError: there is none, or the model does not hold its weights whole: they are sharded or offloaded, or
            quantized, or computed from other parameters (`torch.nn.utils.prune`, weight norm, parametrizations).
    """
    model = unwrap(model)
    if not anywhere:
        require_whole(model)
    require_plain(model, "Pruning")
    left_out: set[nn.Module] = set() if prune_head else head_modules(model)
    left_out |= patch_embedding(model) | added_modules(model)
    _require_own_weights(model, left_out)
    chosen: set[nn.Parameter] = set()
    for module in model.modules():
        if isinstance(module, PRUNABLE_LAYERS) and module not in left_out:
            named = module.named_parameters(recurse=False)
            chosen.update(p for name, p in named if name.endswith("weight") and p.dim() > 1 and p.is_floating_point())
    weights = {name: p for name, p in named_parameters(model).items() if p in chosen}
    if not weights:
        raise TargetError(
            f"{type(model).__name__} has no prunable weights. Expected at least one convolution or linear layer "
            "outside the classifier head; pass prune_head=True to prune the head too."
        )
    return weights

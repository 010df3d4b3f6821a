"""LoRA on a sparse model: train adapters, and merge them with the zeros kept.

    masks.apply_(model)
    peft_model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with px.mask_lora(peft_model, masks):
        ...                                             # train
        model = px.merge_lora_(peft_model, masks)       # the plain model, as sparse as before

A LoRA layer computes W x + s·B A x, with a small A and B. Their product is dense, so W + s·B A has no zeros left:
peft's own `merge_and_unload` fills the pruned weights. `mask_lora` trains W + s·(B A) ⊙ M instead.
"""

from __future__ import annotations

import importlib.util
import warnings
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import DependencyError, NonFiniteError, TargetError, listed
from .masks import Masks
from .model.adapters import INJECTED, adapted_layers, is_peft_model
from .model.wrappers import unwrap_to_peft


def merge_lora_(peft_model: nn.Module, masks: Masks) -> nn.Module:
    """Merge LoRA adapters into the weights they belong to, in place, and keep the zeros: (W + s·B A) ⊙ M.

    ```python
    model = px.merge_lora_(peft_model, masks)
    px.save_pretrained(model, masks, "out")
    ```

    The values are those of peft's ``merge_and_unload`` and then ``masks.apply_``. What the adapters add to pruned
    weights, s·B A where M is False, is lost, at 90 % sparsity most of it: unless they were trained, and are merged,
    inside `mask_lora`, the merged model computes something else than the trained one, and a warning says how much
    was lost.

    Args:
        peft_model: what ``peft.get_peft_model`` returned, with LoRA adapters. It cannot be used afterwards.
        masks: of the plain model.

    Returns:
        The plain model, without a trace of peft, with the head that was trained (``modules_to_save``).

    Raises:
        DependencyError: peft is not installed.
        TargetError: the model is no PeftModel, an adapter is not of LoRA or cannot be merged, or the masks do not fit.
            Then nothing was changed.
        NonFiniteError: an adapter holds NaN or infinity.
    """
    model: Any = _lora_model(peft_model)
    weights = masks.match(model)
    layers = adapted_layers(model)
    _require_mergeable(layers)
    share = _share_lost(layers, {weight: masks.tensors[name] for name, weight in weights.items()})
    merged: nn.Module = model.merge_and_unload()
    masks.apply_(merged)
    if share > 0.01:
        warnings.warn(
            f"{share:.0%} of what the adapters have learned (of the squared norm of s·B A) was for pruned weights and "
            "is lost. Train and merge them inside px.mask_lora(peft_model, masks), and nothing is.",
            stacklevel=2,
        )
    return merged


def mask_lora(peft_model: nn.Module, masks: Masks) -> LoraMasking:
    """Let LoRA layers compute W x + s·((B A) ⊙ M) x, until removed, so that merging them loses nothing.

    ```python
    with px.mask_lora(peft_model, masks):
        ...                                         # train, evaluate
        model = px.merge_lora_(peft_model, masks)   # the same outputs, the zeros kept

    handle = px.mask_lora(peft_model, masks)
    handle.remove()
    ```

    The pruned weights of the model are zeroed too (`Masks.apply_`). Adapters are saved and loaded as ever; load them
    into a model that is masked again before you evaluate or merge. Costs one product of B and A, as large as the
    weight, per layer and step. Layers without adapters, and heads that are trained whole, are not touched:
    `keep_masks` keeps the zeros of weights that train.

    Raises:
        DependencyError: peft is not installed.
        TargetError: the model is no PeftModel, the masks do not fit, no adapted layer is masked, or one of them is not
            a plain LoRA of a linear layer or convolution (DoRA, a bias of LoRA's own, other adapters, merged ones).
    """
    return LoraMasking(_lora_model(peft_model), masks)


class LoraMasking:
    """What `mask_lora` returns: `remove()` ends it, and so does leaving a `with`."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        names = {weight: name for name, weight in masks.match(model).items()}
        layers = adapted_layers(model)
        apart = {path: layer for path, layer in layers.items() if isinstance(layer.base_layer, nn.MultiheadAttention)}
        found = {path: layer for path, layer in layers.items() if _weight(layer) in names}
        if not found and not apart:
            raise TargetError(
                "none of the layers with an adapter is masked, so there is nothing to do: merging them leaves no zero "
                "filled. Check target_modules of the LoraConfig if they should be."
            )
        _require_plain({**apart, **found})
        masks.apply_(model)
        self._layers: list[Any] = []
        for layer in found.values():
            weight = _weight(layer)
            layer.register_buffer("px_mask", masks[names[weight]].to(weight.device), persistent=False)
            layer.__class__ = _masked_class(type(layer))
            self._layers.append(layer)

    def remove(self) -> None:
        """Let the layers compute B A x again. Adapters that were trained under the mask then give other outputs."""
        while self._layers:
            layer = self._layers.pop()
            layer.__class__ = type(layer).__mro__[2]
            del layer.px_mask

    def __enter__(self) -> LoraMasking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


class _Masked:
    """Put before a LoRA layer's own class, as torch's parametrizations are: copies of the layer are masked too."""

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """s·(B A) ⊙ M, which is also what peft merges."""
        return super().get_delta_weight(adapter) * self.px_mask  # type: ignore[misc]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("adapter_names") is not None:
            raise TargetError("px.mask_lora knows no batches of mixed adapters (adapter_names). Use one at a time.")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        result: Tensor = self.base_layer(x, *args, **kwargs)
        total = result
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                delta = self.get_delta_weight(adapter)
                total = total + self._product(self.lora_dropout[adapter](x.to(delta.dtype)), delta)
        return total.to(result.dtype)

    def _product(self: Any, x: Tensor, delta: Tensor) -> Tensor:
        if isinstance(self.base_layer, nn.Linear):
            return F.linear(x, delta)
        product: Tensor = self.base_layer._conv_forward(x, delta, None)
        return product


_CLASSES: dict[type, type] = {}


def _masked_class(layer_class: type) -> type:
    if layer_class not in _CLASSES:
        _CLASSES[layer_class] = type(f"Masked{layer_class.__name__}", (_Masked, layer_class), {})
    return _CLASSES[layer_class]


def _lora_model(model: nn.Module) -> nn.Module:
    """The PeftModel in `model`, if all its adapters are of LoRA."""
    if importlib.util.find_spec("peft") is None:
        raise DependencyError('LoRA needs peft: pip install "px-hf[peft]".')
    found: Any = unwrap_to_peft(model)
    if not is_peft_model(found):
        raise TargetError(
            f"{type(found).__name__} is no PeftModel. Expected what peft.get_peft_model(model, LoraConfig(...)) gives."
            + (f" It holds adapters of peft. {INJECTED}" if adapted_layers(found) else "")
        )
    kinds = {name: str(getattr(each.peft_type, "value", each.peft_type)) for name, each in found.peft_config.items()}
    others = [f"{name!r} is {kind}" for name, kind in kinds.items() if kind != "LORA"]
    if others:
        raise TargetError(
            f"the adapters of the model are not all of LoRA: {listed(others)}. Of another type call peft's "
            "merge_and_unload(), where it has one, and masks.apply_(model) on what it returns."
        )
    return found


def _weight(layer: Any) -> Any:
    return getattr(layer.get_base_layer(), "weight", None)


def _require_mergeable(layers: dict[str, Any]) -> None:
    """peft finds out too late, with half of the layers merged."""
    grouped = [path for path, layer in layers.items() if getattr(layer.get_base_layer(), "groups", 1) > 1]
    if grouped:
        raise TargetError(
            f"peft cannot merge adapters of grouped convolutions: {listed(grouped)}. Leave them out of target_modules."
        )
    for path, layer in layers.items():
        for name, parameter in layer.named_parameters():
            if "lora_" in name and not bool(torch.isfinite(parameter.detach()).all()):
                raise NonFiniteError(
                    f"the adapter {path}.{name} holds NaN or infinity, and nothing was merged. Load one from before."
                )


def _require_plain(layers: dict[str, Any]) -> None:
    unfit = [f"{path} ({problem})" for path, layer in layers.items() if (problem := _problem(layer)) is not None]
    if unfit:
        raise TargetError(
            f"px.mask_lora cannot mask {len(unfit)} of the adapted layers: {listed(unfit)}. Use plain LoRA, or train "
            "without mask_lora: px.merge_lora_ keeps the zeros then too, and loses what was learned for them."
        )


def _problem(layer: Any) -> str | None:
    if isinstance(layer, _Masked):
        return "it is masked already"
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    if kind not in {f"peft.tuners.lora.layer.{name}" for name in ("Linear", "Conv1d", "Conv2d")}:
        return f"its adapter is {kind}"
    if not isinstance(layer.base_layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
        return f"its layer is {type(layer.base_layer).__name__}"
    if layer.merged:
        return "its adapter is merged for the time being: call unmerge_adapter()"
    if getattr(layer, "lora_variant", None):
        return "its adapter is DoRA or another variant of LoRA"
    if any(getattr(layer, "lora_bias", {}).values()):
        return "its adapter has a bias"
    return "it is a grouped convolution" if getattr(layer.base_layer, "groups", 1) > 1 else None


@torch.no_grad()
def _share_lost(layers: dict[str, Any], masks: dict[nn.Parameter, Tensor]) -> float:
    """Σ (s·B A)² over pruned weights / over all weights with an adapter, in [0, 1]."""
    lost = total = 0.0
    for layer in layers.values():
        mask = masks.get(_weight(layer))
        for adapter in layer.active_adapters if hasattr(layer, "get_delta_weight") and not layer.merged else ():
            if adapter in getattr(layer, "lora_A", {}):
                squared = layer.get_delta_weight(adapter).double().square()
                total += float(squared.sum())
                lost += 0.0 if mask is None else float(squared[~mask.to(squared.device)].sum())
    return lost / total if total else 0.0

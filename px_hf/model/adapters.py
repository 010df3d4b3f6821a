"""peft's levels in a model: which layers hold the weights of the model that peft was given, and which were added.

peft puts a layer of its own around each adapted layer (`q_proj` becomes `q_proj.base_layer` beside `q_proj.lora_A`),
and around each module that is trained whole (`classifier` becomes `classifier.modules_to_save.default`). Nothing here
imports peft: where it has not been imported, no model holds any of it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import TargetError, listed


def _classes(module: str, *names: str) -> tuple[type, ...]:
    found = sys.modules.get(module)
    return tuple(each for name in names if isinstance(each := getattr(found, name, None), type))


def is_peft_model(model: nn.Module) -> bool:
    """Whether it is what `peft.get_peft_model` returns."""
    return isinstance(model, _classes("peft.peft_model", "PeftModel") + _classes("peft.mixed_model", "PeftMixedModel"))


def is_tuner(model: nn.Module) -> bool:
    """Whether it is what a `PeftModel` holds: the model that peft was given is its ``model``."""
    return isinstance(model, _classes("peft.tuners.tuners_utils", "BaseTuner"))


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> the layers that peft has put around layers of ``model``, with adapters beside them."""
    classes = _classes("peft.tuners.tuners_utils", "BaseTunerLayer")
    return {path: module for path, module in model.named_modules() if isinstance(module, classes)} if classes else {}


def _layer_inside(module: nn.Module) -> str | None:
    """Where in a module of peft the weights are that the model computes with, but for adapters."""
    if isinstance(module, _classes("peft.tuners.tuners_utils", "BaseTunerLayer")):
        return "base_layer"
    if isinstance(module, _classes("peft.utils.other", "AuxiliaryTrainingWrapper")):
        wrapper: Any = module
        copies = getattr(wrapper, "modules_to_save", {})
        used = [name for name in wrapper.active_adapters if name in copies and not wrapper.disable_adapters]
        return f"modules_to_save.{used[0]}" if used else "original_module"
    return None


def plain_paths(model: nn.Module) -> dict[str, str] | None:
    """Path of each module in ``model`` -> its path without the levels of peft and of ``torch.compile``.

    None if peft has put nothing into the model.
    """
    if "peft" not in sys.modules or all(_layer_inside(module) is None for module in model.modules()):
        return None
    plain = {"": ""}
    for path, module in model.named_modules(remove_duplicate=False):
        if path not in plain:
            parent, _, child = path.rpartition(".")
            plain[path] = f"{plain[parent]}.{child}".lstrip(".")
        inside = "_orig_mod" if hasattr(module, "_orig_mod") else _layer_inside(module)
        if inside is not None:
            plain[f"{path}.{inside}".lstrip(".")] = plain[path]
    return plain


def added_modules(model: nn.Module) -> set[nn.Module]:
    """What peft has added: adapters, and of a module that is trained whole all copies but the one in use."""
    added: set[nn.Module] = set()
    for module in model.modules():
        inside = _layer_inside(module)
        if inside is not None:
            added |= set(module.modules()) - {module} - set(module.get_submodule(inside).modules())
    return added


INJECTED = (
    "They were put in without a PeftModel (peft.inject_adapter_in_model, model.add_adapter). Make one of the plain "
    "model, peft.get_peft_model(model, config), for px.mask_lora and px.merge_lora_. Or merge them by hand: for path, "
    'layer in list(model.named_modules()): if hasattr(layer, "base_layer"): layer.merge(); '
    "model.set_submodule(path, layer.base_layer). And then masks.apply_(model)."
)
"""What to do with adapters that no PeftModel holds."""


def require_merged(model: nn.Module, what: str) -> None:
    """For what cannot be done to a model with adapters.

    Raises:
        TargetError: it has some.
    """
    if plain_paths(model) is not None:
        whole = any(is_peft_model(module) or is_tuner(module) for module in model.modules())
        advice = "Call model = px.merge_lora_(peft_model, masks), which merges them and keeps the zeros."
        raise TargetError(
            f"{what} needs the plain model, and {type(model).__name__} holds adapters of peft. "
            f"{advice if whole else INJECTED}"
        )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The network without its adapters, as peft's ``disable_adapter()``, but heads that are trained whole stay.

    Raises:
        TargetError: adapters are merged into the weights for the time being.
    """
    layers = adapted_layers(model)
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise TargetError(
            f"adapters are merged into {len(merged)} layer(s): {listed(merged)}. Call peft's unmerge_adapter() "
            "before, or px.merge_lora_ to merge them for good."
        )
    flags = {path: layer._disable_adapters for path, layer in layers.items()}
    try:
        for layer in layers.values():
            layer._disable_adapters = True
        yield
    finally:
        for path, layer in layers.items():
            layer._disable_adapters = flags[path]


def warn_of_trained_adapters(model: nn.Module) -> None:
    """Scores are those of the network without adapters: say so if these have learned something."""
    layers = adapted_layers(model)
    trained = [
        path
        for path, layer in layers.items()
        if any(bool(part.weight.any()) for part in getattr(layer, "lora_B", {}).values())
    ]
    if trained:
        warnings.warn(
            f"{len(trained)} LoRA adapter(s) have been trained, and the weights are scored without them: "
            f"{listed(trained)}. To prune what they have learned too, merge them first (peft's merge_and_unload).",
            stacklevel=4,
        )

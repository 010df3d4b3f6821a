"""Models of timm: what `timm.create_model("hf-hub:...")` and transformers' TimmWrapper both load.

timm is imported when it is needed, which for models of transformers it is not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError

WRAPPER_PREFIX = "timm_model."
"""What the names of parameters begin with in TimmWrapper, and not in timm's files."""


def is_timm_model(model: nn.Module) -> bool:
    """Whether `timm.create_model` made this model, and so can make it again."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not hasattr(model, "num_classes"):  # as one with features_only=True
        return False
    import timm

    return timm.is_model(str(config.get("architecture")))


def is_timm_config(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` is that of a timm model, and not of transformers' TimmWrapper around one."""
    return "architecture" in config and "model_type" not in config


def version_of(model: nn.Module) -> dict[str, str]:
    """The version of timm, if the model is one of timm's, also in TimmWrapper."""
    if not is_timm_model(getattr(model, "timm_model", model)):
        return {}
    import timm

    return {"timm": timm.__version__}


def save_config(model: nn.Module, folder: Path) -> None:
    """Write timm's `config.json` of a timm model."""
    from timm.models import save_for_hf

    everything = folder / "timm"  # timm has no public function for the config alone
    save_for_hf(model, str(everything), safe_serialization=True)
    shutil.move(everything / "config.json", folder)
    shutil.rmtree(everything)


def config_of(model: nn.Module) -> dict[str, Any]:
    """What `build` needs to make a timm model again, as far as the model itself knows it."""
    cfg = {name: value for name, value in vars(model)["pretrained_cfg"].items() if value is not None}
    return {"architecture": cfg["architecture"], "num_classes": model.num_classes, "pretrained_cfg": cfg}


def complete(config: dict[str, Any], model: nn.Module) -> None:
    """Make the config of a timm model, or of TimmWrapper around one, such that both libraries load it.

    timm 1.0.31 writes `num_classes` among `model_args` too, and TimmWrapper would pass it twice.
    """
    from timm.models import filter_pretrained_cfg

    config["model_args"] = {k: v for k, v in (config.get("model_args") or {}).items() if k != "num_classes"}
    inner = model.get_submodule(WRAPPER_PREFIX[:-1]) if "model_type" in config else model
    if "pretrained_cfg" not in config and is_timm_model(inner):
        found = filter_pretrained_cfg(inner.pretrained_cfg, remove_source=True)
        config["pretrained_cfg"] = {k: v for k, v in found.items() if k != "num_classes"}


def check_config(config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a config asks timm for one of its architectures and nothing else.

    Some arguments of `timm.create_model` make it read other files, pickles among them.
    """
    import timm

    architecture, arguments = config.get("architecture"), config.get("model_args") or {}
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise CheckpointError(f"timm {timm.__version__} knows no architecture {architecture!r}.")
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"model_args of config.json is {arguments!r}, expected a mapping.")
    reading = {"checkpoint_path", "cache_dir", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "model_name"}
    if asked := reading & arguments.keys():
        raise CheckpointError(f"model_args of config.json tells timm what to read: {', '.join(sorted(asked))}.")


def build(config: Mapping[str, Any]) -> nn.Module:
    """The model that timm's `config.json` describes, without trained weights. Check the config first."""
    import timm

    return timm.create_model(
        config["architecture"],
        pretrained_cfg={"architecture": config["architecture"], **(config.get("pretrained_cfg") or {})},
        **{"num_classes": config.get("num_classes"), **(config.get("model_args") or {})},
    )

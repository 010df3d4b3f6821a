"""Load what `px_hf.hub.saving` wrote, with its zeros checked."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from ..compact import CompactFile
from ..compact.agreement import check, check_configs
from ..compact.files import find, find_compact
from ..compact.filling import fill
from ..compact.quantizer import CompactConfig
from ..errors import CheckpointError, InvalidArgumentError, TargetError
from ..masks import Masks
from ..model.empty import build_empty
from ..model.widths import restore_
from ..tickets.difference import load_with_difference, read_about
from . import timm_models
from .kinds import class_of


def from_pretrained(folder_or_repo_id: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """Load a model that `save_pretrained` wrote: the compact copy if there is one, else the dense one.

    Or one that `save_difference` wrote: its base model is loaded by transformers, and becomes the tuned one bit for
    bit.

    It comes back as what it was, a transformers model with or without a head, or a timm model if it was saved as one.
    (In TimmWrapper: `AutoModelForImageClassification.from_pretrained` of the same folder.) The weights are bit for
    bit those of the dense copy, and they are checked: against their checksums, and that the dense files beside them
    are those they were written with; or, of a dense copy alone, against its masks.

    `kwargs` are those of `AutoModel.from_pretrained`: `revision`, `token`, `cache_dir`, `local_files_only`,
    `subfolder`, `dtype` (also "auto", as stored, or a text such as "bfloat16"), `config` (an object or a folder),
    `trust_remote_code` (off by default), `attn_implementation`, entries of the config. With others (`device_map`, ...)
    transformers itself reads the compact copy. A timm model takes those of the download and `dtype`.

    Raises:
        CheckpointError: there is no such folder or repository, something in it is missing or damaged, a weight of the
            model would not come from the file, or a pruned weight is not zero; or the dense copy was saved anew by
            another library, so that the compact one holds older weights.
        InvalidArgumentError: an argument that does not apply, such as `quantization_config`: quantize afterwards.
    """
    kwargs = _checked(kwargs)
    source = str(folder_or_repo_id)
    download = {name: value for name, value in kwargs.items() if name in _DOWNLOAD}
    others = {name: value for name, value in kwargs.items() if name not in _DOWNLOAD}
    found = find_compact(folder_or_repo_id, **download)
    if found is None:
        about = read_about(folder_or_repo_id, **download)
        if about is not None:
            return load_with_difference(folder_or_repo_id, about, **kwargs)
        return _through_transformers(folder_or_repo_id, kwargs)
    download |= {"subfolder": found.subfolder} | ({"revision": found.commit} if found.commit else {})
    file = CompactFile(found.files)
    content = _read_config(folder_or_repo_id, download)
    check(found, file, source, **download)
    if timm_models.is_timm_config(content):
        timm_model = _timm_model(content, file, source, others)
        check_configs(found, source, content, **download)
        return timm_model

    building = {name: others.pop(name) for name in _BUILDING if name in others}
    trust = building.get("trust_remote_code", False)
    given = others.pop("config", None)
    if isinstance(given, PreTrainedConfig):
        config, unused = _with_entries(given, others)
    else:
        where = (folder_or_repo_id, download) if given is None else (given, {})
        try:
            config, unused = AutoConfig.from_pretrained(
                where[0], **where[1], **others, trust_remote_code=trust, return_unused_kwargs=True
            )
        except Exception as error:  # anybody may have written it, so anything can be wrong with it
            raise CheckpointError(f"transformers cannot load the config of {str(where[0])!r}: {error}") from error
    if unused.keys() & others.keys():
        if given is not None:
            config.quantization_config = CompactConfig().to_dict()
            others = unused | {"config": config}
        return _through_transformers(folder_or_repo_id, others | building | download)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    kind = class_of(content, config)
    if "add_pooling_layer" in inspect.signature(kind).parameters:  # which no config can say
        building["add_pooling_layer"] = any(".pooler." in f".{name}" for name in file.shapes)
    model = build_empty(lambda: _build(kind, config, building), source)
    _restore_structure_(model, content, source)
    fill(model, file, source)
    check_configs(found, source, content, **download)
    config.name_or_path = source
    return model.eval()


_DOWNLOAD = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")
_BUILDING = ("dtype", "trust_remote_code", "attn_implementation")


_DTYPES = "a torch.dtype, its name such as 'bfloat16', or 'auto'"


def _checked(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with `dtype` as a torch.dtype, or without it where it is to be the one stored.

    Raises:
        InvalidArgumentError: an argument that cannot be passed on, or that is no dtype.
    """
    kwargs = dict(kwargs)
    if kwargs.pop("quantization_config", None) is not None:
        raise InvalidArgumentError(
            "px_hf.from_pretrained returns the plain weights, whose zeros it has checked, and takes no "
            "quantization_config. Quantize what it returns, with torchao's quantize_(model, ...), or load the dense "
            "copy with transformers' from_pretrained(folder, quantization_config=...): docs/SAVING.md has both."
        )
    if kwargs.pop("output_loading_info", False):
        raise InvalidArgumentError(
            "px_hf.from_pretrained returns the model alone, and raises where a weight would not come from the file: "
            "leave output_loading_info out."
        )
    given = [kwargs.pop(name) for name in ("torch_dtype", "dtype") if name in kwargs]
    dtype = next((each for each in reversed(given) if each is not None), None)
    if dtype is None or dtype == "auto":
        return kwargs
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise InvalidArgumentError(f"dtype={dtype!r}: expected {_DTYPES}.")
    return kwargs | {"dtype": found}


def _with_entries(config: PreTrainedConfig, others: Mapping[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """A copy of a config with those of the arguments that are entries of it; and the others."""
    config = copy.deepcopy(config)
    for name in (entries := {name: value for name, value in others.items() if hasattr(config, name)}):
        setattr(config, name, entries[name])
    return config, {name: value for name, value in others.items() if name not in entries}


def _build(kind: Any, config: PreTrainedConfig, building: Mapping[str, Any]) -> nn.Module:
    """A new model of an auto class, or of a class of its own."""
    if issubclass(kind, PreTrainedModel):
        building = {name: value for name, value in building.items() if name != "trust_remote_code"}
        model: nn.Module = kind._from_config(config, **building)
        return model
    built: nn.Module = kind.from_config(config, **building)
    return built


def _timm_model(config: Mapping[str, Any], file: CompactFile, source: str, settings: Mapping[str, Any]) -> nn.Module:
    others = {name: value for name, value in settings.items() if name not in ("dtype", "trust_remote_code")}
    if others:
        raise InvalidArgumentError(
            f"{source!r} is a timm model, which {', '.join(sorted(others))} does not apply to. To load it in "
            "transformers' TimmWrapper, use AutoModelForImageClassification.from_pretrained."
        )
    timm_models.check_config(config)
    model = build_empty(lambda: timm_models.build(config), source)
    _restore_structure_(model, config, source)
    fill(model, file, source, stored_dtypes=True)
    return model.to(settings.get("dtype")).eval()


def _restore_structure_(model: nn.Module, config: Mapping[str, Any], source: str) -> None:
    px = config.get("px")
    if isinstance(px, Mapping) and "structure" in px:
        restore_(model, px["structure"], source)


def _read_config(folder_or_repo_id: str | os.PathLike[str], download: Mapping[str, Any]) -> dict[str, Any]:
    path = find(folder_or_repo_id, CONFIG_NAME, **download)
    try:
        if path is None:
            raise OSError("it is missing")
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        if content.get("model_type") == "timm_wrapper":
            timm_models.check_config(content)
        return content
    except (OSError, ValueError, RecursionError) as error:
        where = "/".join(filter(None, [str(folder_or_repo_id), download.get("subfolder"), CONFIG_NAME]))
        raise CheckpointError(f"Cannot load {where}: {error}") from error


def _through_transformers(folder_or_repo_id: str | os.PathLike[str], kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """Load with stock `from_pretrained`, and check what came."""
    masks = Masks.from_pretrained(folder_or_repo_id, **{k: v for k, v in kwargs.items() if k in _DOWNLOAD})
    try:
        found = _read_config(folder_or_repo_id, {k: v for k, v in kwargs.items() if k in _DOWNLOAD})
        model, info = class_of(found).from_pretrained(folder_or_repo_id, **kwargs, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"transformers cannot load {str(folder_or_repo_id)!r}: {error}") from error
    except TypeError as error:
        if "keyword argument" not in str(error):
            raise
        raise InvalidArgumentError(f"transformers does not know an argument: {error}") from error
    unfilled = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if unfilled:
        raise CheckpointError(
            f"{len(unfilled)} parameters of {type(model).__name__} are not in {str(folder_or_repo_id)!r} or have "
            f"another shape there, for example {min(unfilled)!r}: they would be random. To give the model another "
            "head, load it with transformers and its masks with Masks.from_pretrained."
        )
    try:
        revived = masks.revived(model)
    except TargetError as error:
        written_by = (getattr(model.config, "px", None) or {}).get("versions")
        raise CheckpointError(
            f"The masks of {str(folder_or_repo_id)!r} are not about its model: {error} (Written by {written_by}; "
            f"this is transformers {transformers.__version__}.)"
        ) from error
    if revived:
        raise CheckpointError(
            f"{sum(revived.values())} weights of {str(folder_or_repo_id)!r} that its masks prune are not "
            f"zero, for example in {next(iter(revived))!r}: weights and masks do not belong together."
        )
    return model

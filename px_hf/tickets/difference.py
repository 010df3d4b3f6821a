"""A tuned model as a small file: what differs from the base model that it was made of.

    save_difference(model, base, "out", base_model="google/vit-base-patch16-224-in21k")
    model = px.from_pretrained("out")                    # loads the base model, and applies the difference
    apply_difference_(base, "out")                       # to a base model that is there already

`difference.safetensors` has the layout of a compact copy (docs/COMPACT_FORMAT.md): of a tensor that differs in some
places a coded mask of these and the new values, of one that differs in more than half of them (a new head) all of it.
The values are the tuned ones, so that the tuned model comes back to the bit. `difference.json` names the base model
and holds the SHA-256 of all that was taken from it: to another base the difference is not applied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..atomic import beside
from ..compact import CompactFile, write_compact
from ..compact.files import find
from ..compact.layout import DTYPES, VALUE_DTYPES, WEIGHTS_FILE
from ..errors import CheckpointError, InvalidArgumentError, OutputExistsError, TargetError, listed
from ..masked_steps import INTEGERS
from ..model.adapters import require_merged
from ..model.wrappers import inner_name, unwrap
from ..version import __version__

DIFFERENCE_FILE = "difference.safetensors"
ABOUT_FILE = "difference.json"
_VERSION = 1


def save_difference(
    model: nn.Module,
    base: nn.Module | Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    image_processor: Any = None,
    overwrite: bool = False,
) -> None:
    """Write what `model` has and `base` has not into `folder`.

    `base`: the model that training began from, or its state by name. Its head may have another shape.
    `base_model`, `base_revision`: the Hub id or folder that `base` was loaded from, for `px.from_pretrained`; by
    default what its config says. Without one the difference can be applied by `apply_difference_` only.
    `image_processor`: what has transformers' `save_pretrained`.
    `overwrite`: replace a difference that is there.

    A model of transformers also leaves its config, whose labels are those of the tuned head.

    Raises:
        TargetError: nothing differs, or `model` holds adapters of peft.
        OutputExistsError: there is one already.
    """
    require_merged(model, "px.save_difference")
    folder = Path(folder).absolute()
    for name in (DIFFERENCE_FILE, ABOUT_FILE):
        if (folder / name).exists() and not overwrite:
            raise OutputExistsError(f"{folder} already holds {name}. Choose another folder, or overwrite=True.")
    tuned = _state(model)
    before = _state(base) if isinstance(base, nn.Module) else dict(base)
    masks = {name: _differs(value, before.get(name)) for name, value in tuned.items()}
    masks = {name: mask for name, mask in masks.items() if bool(mask.any())}
    if not masks:
        raise TargetError("the model is the base model: not one weight differs. Pass the tuned one, and its base.")
    parts = {
        name: mask
        for name, mask in masks.items()
        if tuned[name].dtype in VALUE_DTYPES.values() and 2 * int(mask.count_nonzero()) <= mask.numel()
    }
    config = getattr(unwrap(base), "config", None) if isinstance(base, nn.Module) else None
    about = {
        "version": _VERSION,
        "base_model": base_model or getattr(config, "name_or_path", None) or None,
        "base_revision": base_revision,
        "base_sha256": _fingerprint(before, [name for name in tuned if name not in masks or name in parts]),
        "values": sum(int(mask.count_nonzero()) if name in parts else mask.numel() for name, mask in masks.items()),
        "px_hf": __version__,
    }
    with beside(folder) as unfinished:
        unfinished.mkdir()
        write_compact({name: tuned[name] for name in masks}, parts, unfinished)
        os.replace(unfinished / WEIGHTS_FILE, unfinished / DIFFERENCE_FILE)
        saved: Any = getattr(unwrap(model), "config", None)
        if hasattr(saved, "save_pretrained"):
            saved.save_pretrained(unfinished)
        if image_processor is not None:
            image_processor.save_pretrained(unfinished)
        (unfinished / ABOUT_FILE).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(
            unfinished.iterdir(), key=lambda path: path.name == ABOUT_FILE
        ):  # the last says it is whole
            os.replace(path, folder / path.name)


@torch.no_grad()
def apply_difference_(model: nn.Module, folder_or_repo_id: str | os.PathLike[str], **download: Any) -> None:
    """Turn the base model into the tuned one, in place, bit for bit; it has the tuned head's shape already.

    `download`: `revision`, `token`, `subfolder` and what else `huggingface_hub.hf_hub_download` takes.

    Raises:
        CheckpointError: there is no such difference, it is damaged, or it was made from another base model: then
            nothing was changed.
        TargetError: `model` holds adapters of peft.
    """
    require_merged(model, "px.apply_difference_")
    about = read_about(folder_or_repo_id, **download)
    source = str(folder_or_repo_id)
    path = None if about is None else find(folder_or_repo_id, DIFFERENCE_FILE, **download)
    if about is None or path is None:
        raise CheckpointError(f"{source!r} holds no difference: px.save_difference() writes one.")
    state = _state(model)
    try:
        file = CompactFile([path])
        wrong = [
            name
            for name, shape in file.shapes.items()
            if name not in state or list(state[name].shape) != shape or state[name].dtype != DTYPES[file.dtype(name)]
        ]
        if wrong:
            raise CheckpointError(
                f"The difference in {source!r} is not one of {type(unwrap(model)).__name__} as it is: {len(wrong)} "
                f"tensors have another name, shape or dtype there: {listed(map(repr, wrong))}. Load the base model "
                f"with the classes of the tuned one, in the same dtype{_named(about)}."
            )
        whole = file.shapes.keys() - set(file.pruned)
        if _fingerprint(state, [name for name in state if name not in whole]) != about["base_sha256"]:
            raise CheckpointError(
                f"The difference in {source!r} was made from another base model: the weights that it takes over are "
                f"not those given. Expected{_named(about) or ' the one that it was made from'}, untouched, in the "
                "same dtype; nothing was changed."
            )
        values = {name: file.tensor(name) for name in file.shapes}
        masks = {name: file.mask(name) for name in file.pruned}
    except CheckpointError as error:
        if error.__cause__ is None:
            raise
        raise CheckpointError(
            f"{DIFFERENCE_FILE} of {source!r} is not whole: {error.__cause__}. Get it again."
        ) from error
    for name, value in values.items():
        mask = masks.get(name)
        new = value if mask is None else torch.where(mask, value, state[name].cpu())
        state[name].copy_(new)


def read_about(folder_or_repo_id: str | os.PathLike[str], **download: Any) -> dict[str, Any] | None:
    """What `difference.json` says, checked; None if there is none.

    Raises:
        CheckpointError: there is no such folder or repository, or the file is none of ours.
    """
    path = find(folder_or_repo_id, ABOUT_FILE, **download)
    if path is None:
        return None
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not the description of a difference: {error}.") from error
    match about:
        case {"version": version} if type(version) is int and version != _VERSION:
            raise CheckpointError(f"{path} is of version {version}, and this px_hf knows {_VERSION}: upgrade px_hf.")
        case {
            "version": int(), "base_sha256": str(), "base_model": str() | None, "base_revision": str() | None,
        }:  # fmt: skip
            return dict(about)
    raise CheckpointError(f"{path} is not the description of a difference: it lacks a version or names no base.")


def load_with_difference(folder_or_repo_id: str | os.PathLike[str], about: Mapping[str, Any], **kwargs: Any) -> Any:
    """The base model that a difference names, with the difference applied: see `px.from_pretrained`.

    Raises:
        InvalidArgumentError: it names none.
        CheckpointError: the base model cannot be loaded, or is another one by now.
    """
    from transformers import AutoConfig, AutoModelForImageClassification

    source, base = str(folder_or_repo_id), about["base_model"]
    if base is None:
        raise InvalidArgumentError(
            f"{source!r} does not say where its base model is. Load the base model yourself, with the classes of the "
            f"tuned one, and call px.apply_difference_(model, {source!r})."
        )
    download = {name: value for name, value in kwargs.items() if name in _DOWNLOAD}
    common = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    try:
        config = AutoConfig.from_pretrained(folder_or_repo_id, **download)
        model = AutoModelForImageClassification.from_pretrained(
            base, config=config, revision=about["base_revision"] or "main", ignore_mismatched_sizes=True, **common
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"The base model {base!r} that {source!r} was made from cannot be loaded: {error}. Load it yourself, and "
            f"call px.apply_difference_(model, {source!r})."
        ) from error
    apply_difference_(model, folder_or_repo_id, **download)
    return model.eval()


_DOWNLOAD = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names inside all wrappers, as the model holds them."""
    return {inner_name(name): tensor.detach() for name, tensor in unwrap(model).state_dict().items()}


def _differs(value: Tensor, before: Tensor | None) -> Tensor:
    """Where two tensors differ, bit by bit; everywhere, if the second is no tensor of that shape and dtype."""
    if before is None or before.shape != value.shape or before.dtype != value.dtype:
        return torch.ones(value.shape, dtype=torch.bool)
    if value.is_floating_point():
        integer = INTEGERS[value.dtype.itemsize]
        value, before = value.contiguous().view(integer), before.to(value.device).contiguous().view(integer)
    return (value != before.to(value.device)).cpu()


def _fingerprint(state: Mapping[str, Tensor], names: list[str]) -> str:
    """SHA-256, in hexadecimal, of names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(names):
        value = state[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, list(value.shape), str(value.dtype)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _named(about: Mapping[str, Any]) -> str:
    if about["base_model"] is None:
        return ""
    revision = f" at revision {about['base_revision']}" if about["base_revision"] else ""
    return f" {about['base_model']!r}{revision}"

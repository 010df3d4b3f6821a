"""Save a pruned model so that stock transformers loads it, and load it with its zeros checked.

    save_pretrained(model, masks, "out", image_processor=processor)
    model = from_pretrained("out")                              # zeros and masks compared
    model = AutoModelForImageClassification.from_pretrained("out")    # needs no px_hf

The folder holds what transformers would write (`config.json`, `model.safetensors`, the image processor) with
the pruned weights as exact zeros, `masks.safetensors`, and in `config.json` one more entry "px": where the
zeros come from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel
from transformers.utils import CONFIG_NAME

from .errors import CheckpointError, InvalidArgumentError, OutputExistsError, TargetError
from .masks import MASKS_FILE, Masks
from .targets import unwrap
from .version import __version__


def save_pretrained(
    model: nn.Module,
    masks: Masks,
    folder: str | os.PathLike[str],
    *,
    image_processor: Any = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the masked model, its masks and its image processor into `folder`.

    `model`: a transformers model (timm models: through TimmWrapper), also inside DistributedDataParallel or
    torch.compile, with zeros where the masks prune. It is not changed. In several processes, call this on
    the main one.
    `image_processor`: what has transformers' `save_pretrained`.
    `provenance`: where the masks come from (criterion, rounds, base model, ...), anything that JSON can say. It
    becomes the entry "px" of `config.json`, together with sparsity, counts, the fingerprint of the masks and
    versions. NaN becomes null.
    `overwrite`: replace files of the same names. Other files in the folder are left alone in any case.

    All is written beside the folder first: if something fails, the folder is as it was.

    Raises TargetError if the masks do not fit the model or its pruned weights are not zero,
    InvalidArgumentError if the model is none of transformers or the provenance is not JSON, OutputExistsError
    if a file would be overwritten.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise InvalidArgumentError(
            f"save_pretrained needs a transformers model, got {type(model).__name__}. Load a timm model by "
            "AutoModelForImageClassification.from_pretrained('timm/...')."
        )
    if revived := masks.revived(model):
        raise TargetError(
            f"{sum(revived.values())} weights that the masks prune are not zero in the model, for example "
            f"{next(iter(revived))!r}. masks.apply_(model) zeroes them; KeepMasks or keep_masks keeps them so while "
            "the model trains."
        )
    entry = _entry(masks, provenance)

    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file. Choose another name for the folder.")
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        model.save_pretrained(unfinished)
        masks.save(unfinished / MASKS_FILE)
        if image_processor is not None:
            image_processor.save_pretrained(unfinished)
        _add_to_config(unfinished / CONFIG_NAME, entry)
        _move(unfinished, folder, overwrite)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def from_pretrained(folder_or_repo_id: str | os.PathLike[str], **kwargs: Any) -> PreTrainedModel:
    """Load an image classifier that `save_pretrained` wrote, and check its weights against its masks.

    `kwargs` are those of `AutoModelForImageClassification.from_pretrained`, which loads it: `revision`,
    `token`, `dtype`, `trust_remote_code` (off by default), ...

    Raises CheckpointError if there is no such folder or repository, something in it is missing or damaged,
    a weight of the model would not come from the file, or a pruned weight is not zero.
    """
    masks = Masks.from_pretrained(folder_or_repo_id, **{k: v for k, v in kwargs.items() if k in _DOWNLOAD})
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            folder_or_repo_id, **kwargs, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"transformers cannot load {str(folder_or_repo_id)!r}: {error}") from error
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
            f"{MASKS_FILE} of {str(folder_or_repo_id)!r} is not about its model: {error} (Written by {written_by}; "
            f"this is transformers {transformers.__version__}.)"
        ) from error
    if revived:
        raise CheckpointError(
            f"{sum(revived.values())} weights of {str(folder_or_repo_id)!r} that its {MASKS_FILE} prunes are not "
            f"zero, for example in {next(iter(revived))!r}: the two files do not belong together."
        )
    return model


_DOWNLOAD = ("revision", "token", "subfolder", "cache_dir", "local_files_only", "force_download")


def _entry(masks: Masks, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        told = json.loads(json.dumps(dict(provenance or {})), parse_constant=lambda _: None)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"provenance must be a mapping that JSON can say: {error}.") from error
    return {
        **told,
        "sparsity": masks.sparsity,
        "weights": masks.total,
        "weights_kept": masks.kept,
        "masks_sha256": masks.fingerprint(),
        "versions": {"px_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _add_to_config(file: Path, entry: dict[str, Any]) -> None:
    config = json.loads(file.read_text(encoding="utf-8"))
    config["px"] = entry
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move(source: Path, folder: Path, overwrite: bool) -> None:
    """Put what is in `source` into `folder`; without a config.json the folder is known to be half-written."""
    if not folder.exists():
        os.replace(source, folder)
        return
    targets = {path: folder / path.name for path in source.iterdir()}
    existing = sorted(target.name for target in targets.values() if os.path.lexists(target))
    if existing and not overwrite:
        raise OutputExistsError(
            f"{folder} already holds {', '.join(existing)}; nothing was written. Choose another folder, or "
            "overwrite=True to replace them."
        )
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for path in sorted(targets, key=lambda path: path.name == CONFIG_NAME):
        if targets[path].is_dir():
            shutil.rmtree(targets[path])
        os.replace(path, targets[path])

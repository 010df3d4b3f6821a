"""Save a pruned model so that stock transformers or timm loads it.

    save_pretrained(model, masks, "out", image_processor=processor)
    model = from_pretrained("out")                                    # reads the compact copy
    model = AutoModelForImageClassification.from_pretrained("out")    # needs no px_hf

The folder holds what transformers (for a timm model: timm) would write, `config.json`, `model.safetensors` with the
pruned weights as exact zeros and the image processor, and in `config.json` one more entry "px": where the zeros come
from. `sparse/` holds the same model in fewer bytes, its masks and the weights that they keep (docs/COMPACT_FORMAT.md),
which transformers loads too after `import px_hf`: `from_pretrained("out", subfolder="sparse")`. It records the dense
files, so that whoever reads it notices if another library has saved over them (`px_hf.compact.agreement`).

A model from which units were taken (`px_hf.shrink`) is saved in the same way. If its config cannot say how wide it is,
the entry "px" also holds the "structure" that `from_pretrained` builds; stock libraries then refuse the folder, since
shapes differ.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..atomic import beside, remove
from ..compact import write_compact
from ..compact.dense import describe
from ..compact.layout import QUANT_METHOD, SPARSE_FOLDER
from ..distributed import in_contact, on_main
from ..errors import CheckpointError, InvalidArgumentError, OutputExistsError, TargetError
from ..masks import Masks
from ..masks_file import MASKS_FILE
from ..model.adapters import require_merged
from ..model.empty import build_empty
from ..model.quantized import require_plain
from ..model.shards import shards_of
from ..model.widths import structure_of
from ..model.wrappers import inner_name, named_parameters, unwrap
from ..version import __version__, commit
from . import timm_models
from .whole_copy import rebuilt, require_known, whole_copy


def save_pretrained(
    model: nn.Module,
    masks: Masks,
    folder: str | os.PathLike[str],
    *,
    image_processor: Any = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> None:
    """Write the masked model, dense and compact, and its image processor into `folder`.

    `model`: a transformers model, TimmWrapper among them, or one that `timm.create_model` made, also inside
    DistributedDataParallel or torch.compile, with zeros where the masks prune. It is not changed. In several
    processes, call this on the main one; of a model whose weights are sharded over them (FSDP2) call it on all: tensor
    by tensor is gathered on the main one, which writes.
    `image_processor`: what has transformers' `save_pretrained`.
    `provenance`: where the masks come from (criterion, rounds, base model, ...), anything that JSON can say. It
    becomes the entry "px" of `config.json`, together with sparsity, counts, the fingerprint of the masks and
    versions. NaN becomes null. What the model's config says already of the same masks is kept.
    `overwrite`: replace files of the same names and the weights of the model before. Other files in the folder are
    left alone in any case.
    `max_shard_size`: larger files of weights are split as transformers does it, except the dense one of a timm
    model, since timm reads only one.

    All is written beside the folder first: if something fails, the folder is as it was.

    Raises:
        TargetError: the masks do not fit the model, it is quantized, or its pruned weights are not zero.
        InvalidArgumentError: the model is of neither library, or the provenance is not JSON.
        OutputExistsError: a file would be overwritten.
    """
    settings: dict[str, Any] = {
        "image_processor": image_processor, "provenance": provenance, "overwrite": overwrite,
        "max_shard_size": max_shard_size,
    }  # fmt: skip
    if shards_of(unwrap(model)) is None:
        _save(model, masks, folder, _save_dense, **settings)
        return
    with in_contact("while the model was gathered"):
        plain, masks = whole_copy(unwrap(model)), masks.whole()
    on_main(lambda: _save(cast(nn.Module, plain), masks, folder, _save_dense, **settings))


def save_for_trainer(model: PreTrainedModel, masks: Masks, folder: str | os.PathLike[str]) -> None:
    """`save_pretrained` into Trainer's output folder, with the dense file as Trainer itself is about to write it.

    The compact copy records that file. It differs for TimmWrapper, which Trainer saves by other names than timm's.
    """

    def as_trainer(model: Any, state: Mapping[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
        model.save_pretrained(folder)

    _save(model, masks, folder, as_trainer, overwrite=True)


def _save(
    model: nn.Module,
    masks: Masks,
    folder: str | os.PathLike[str],
    save_dense: Callable[[nn.Module, Mapping[str, Tensor], Path, int | str], None],
    *,
    image_processor: Any = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "50GB",
) -> None:
    require_merged(model, "px.save_pretrained")
    model = unwrap(model)
    require_plain(model, "px.save_pretrained")
    require_known(model)
    if revived := masks.revived(model):
        raise TargetError(
            f"{sum(revived.values())} weights that the masks prune are not zero in the model, for example "
            f"{next(iter(revived))!r}. masks.apply_(model) zeroes them; KeepMasks or keep_masks keeps them so while "
            "the model trains."
        )
    entry = _entry(model, masks, provenance)

    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"{folder} is a file. Choose another name for the folder.")
    with beside(folder) as unfinished:
        sparse = unfinished / SPARSE_FOLDER
        sparse.mkdir(parents=True)
        state = _state(model, masks)
        save_dense(model, state, unfinished, max_shard_size)
        version = write_compact(
            state, masks.tensors, sparse, max_shard_size=max_shard_size, dense=describe(unfinished)
        )
        if image_processor is not None:
            image_processor.save_pretrained(unfinished)
        config = json.loads((unfinished / CONFIG_NAME).read_text(encoding="utf-8"))
        if "architecture" in config:
            timm_models.complete(config, model)
        if structure := _structure(model, config):
            entry["structure"] = structure
        _write_json(unfinished / CONFIG_NAME, config | {"px": entry})
        quantization = {"quant_method": QUANT_METHOD, "version": version, "dequantize": True}
        _write_json(sparse / CONFIG_NAME, config | {"px": entry, "quantization_config": quantization})
        for code in unfinished.glob("*.py"):  # of a model that is not one of transformers' own
            shutil.copy(code, sparse)
        _move(unfinished, folder, overwrite)


def _structure(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Any]:
    """How the shapes of a model differ from those that its config makes: see `px_hf.model.widths`."""

    try:
        return structure_of(model, build_empty(lambda: rebuilt(model, config), type(model).__name__))
    except CheckpointError:  # a model that cannot be built without weights is not one that px_hf.shrink made
        return {}


def _state(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """The tensors to save by the names of `masks`: tied ones once, pruned weights as +0.0."""
    state = {inner_name(name): tensor for name, tensor in model.state_dict().items()}
    again = named_parameters(model, remove_duplicate=False).keys() - named_parameters(model).keys()
    state = {name: tensor for name, tensor in state.items() if name not in again or name in masks}
    for name, mask in masks.tensors.items():
        pruned = ~mask.to(state[name].device)
        if bool((state[name].signbit() & pruned).any()):  # -0.0, as multiplying by a mask gives
            state[name] = state[name].masked_fill(pruned, 0)
    return state


def _save_dense(model: nn.Module, state: Mapping[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    if not isinstance(model, PreTrainedModel):
        timm_models.save_config(model, folder)
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    elif model.config.model_type == "timm_wrapper":  # by timm's names, so that timm loads it too
        names = {name: name.removeprefix(timm_models.WRAPPER_PREFIX) for name in state}
        tensors = {names[name]: tensor for name, tensor in state.items()}
        model.save_pretrained(folder, state_dict=tensors, max_shard_size=max_shard_size, save_original_format=False)
    else:
        model.save_pretrained(folder, state_dict=dict(state), max_shard_size=max_shard_size)


OF_MASKS = (
    *("criterion", "sparsity_asked", "rounds", "scope", "min_layer_density", "prune_head", "calibration"),
    *("control", "base_model", "base_revision", "masks_from", "schedule", "until", "ended_early"),
)
"""Provenance that stays true while the masks are the same, whatever the weights learn."""


def _entry(model: nn.Module, masks: Masks, provenance: Mapping[str, Any] | None) -> dict[str, Any]:
    before = getattr(getattr(model, "config", None), "px", None) or {}
    known = {key: before[key] for key in OF_MASKS if key in before}
    if before.get("masks_sha256") != masks.fingerprint():
        known = {}
    try:
        told = json.loads(json.dumps({**known, **(provenance or {})}), parse_constant=lambda _: None)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"provenance must be a mapping that JSON can say: {error}.") from error
    return {
        **told,
        "sparsity": masks.sparsity,
        "weights": masks.total,
        "weights_kept": masks.kept,
        "masks_sha256": masks.fingerprint(),
        "versions": {
            "px_hf": __version__,
            **({"px_hf_commit": commit()} if commit() else {}),
            "torch": torch.__version__,
            **timm_models.version_of(model),
            "transformers": transformers.__version__,
        },
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move(source: Path, folder: Path, overwrite: bool) -> None:
    """Put what is in `source` into `folder`; without a config.json the folder is known to be half-written."""
    if not folder.exists():
        os.replace(source, folder)
        return
    targets = {path: folder / path.name for path in source.iterdir()}
    weights = {*folder.glob("model*.safetensors*"), folder / MASKS_FILE}  # of a model saved before, in other files
    existing = sorted(path.name for path in {*targets.values(), *weights} if os.path.lexists(path))
    if existing and not overwrite:
        raise OutputExistsError(
            f"{folder} already holds {', '.join(existing)}; nothing was written. Choose another folder, or "
            "overwrite=True to replace them."
        )
    (folder / CONFIG_NAME).unlink(missing_ok=True)
    for path in weights - {*targets.values()}:
        path.unlink(missing_ok=True)
    for path in sorted(targets, key=lambda path: path.name == CONFIG_NAME):
        if targets[path].is_dir():
            remove(targets[path])
        os.replace(path, targets[path])

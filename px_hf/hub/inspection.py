"""What a saved model is, without building or running it: `px-hf inspect`.

Masks are read from the compact copy or the masks file, weights only to see whether they have the zeros. Of a Hub
repository the compact copy is downloaded; the dense file only if there is no compact copy to know its SHA-256 from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from torch import Tensor

from ..compact import CompactFile
from ..compact.agreement import broken_masks, check_configs, parted_from
from ..compact.dense import dense_files, is_weights
from ..compact.files import Compact, find, find_compact
from ..compact.header import shard_names
from ..compact.layout import CONFIG_FILE, INDEX_FILE, SPARSE_FOLDER, WEIGHTS_FILE
from ..errors import CheckpointError, listed
from ..masks import Masks
from ..masks_file import MASKS_FILE

_OF_THE_FILE = ("sparsity", "weights", "weights_kept", "masks_sha256", "structure")
"""Entries of `config["px"]` that are not about where the masks come from."""


@dataclass(frozen=True)
class InspectedLayer:
    """A parameter with a mask: how many of its weights there are, and how many are kept."""

    name: str
    shape: tuple[int, ...]
    weights: int
    kept: int


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        source: the folder or repository; `commit` is that of a repository.
        architecture: the model's class, or of a timm model its name there.
        pruned: whether there are masks of px_hf.
        layers: those with a mask, in its order.
        provenance: what the config says of how the masks were found, and of the versions.
        dense_bytes, compact_bytes: size of each file of weights; of the compact copy by its path in the folder.
        problems: why the model is not what it says; empty if the zeros hold and the copies agree.
        notes: what else is worth knowing.
    """

    source: str
    commit: str | None
    architecture: str
    pruned: bool
    layers: tuple[InspectedLayer, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    dense_bytes: dict[str, int] = field(default_factory=dict)
    compact_bytes: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """How many weights the masks speak about."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """How many of them are kept."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The fraction of them that is pruned, in [0, 1]."""
        return (self.weights - self.kept) / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can say it."""
        totals = {"sparsity": self.sparsity, "weights": self.weights, "weights_kept": self.kept}
        return asdict(self) | totals | {"ok": not self.problems}


def inspect(folder_or_repo_id: str | os.PathLike[str], **download: Any) -> Inspection:
    """Read what a folder or Hub repository says of itself, and whether it is true.

    ```python
    found = px.inspect("me/vit-b16-cifar100-px90")
    found.sparsity, found.provenance["criterion"], found.problems
    ```

    The problems are: a pruned weight that is not zero in a dense file; dense files that are not those of the compact
    copy, since another library has saved over them; two configs that do not agree; a config that says "pruned" where
    no masks are. Of a local folder every pruned weight is looked at.

    `download`: `revision`, `token`, `cache_dir`, `subfolder`, `local_files_only`, as `huggingface_hub` takes them.

    Raises:
        CheckpointError: there is no such folder or repository, it is no saved model, or a file in it is damaged.
    """
    source = str(folder_or_repo_id)
    compact = find_compact(folder_or_repo_id, **download)
    if compact is not None and compact.commit is not None:
        download |= {"revision": compact.commit}
    config, config_path = _config(source, download, compact)
    told = config.get("px")
    entry: dict[str, Any] = told if isinstance(told, dict) else {}
    masks: dict[str, Tensor] = {}
    problems: list[str] = []
    folder = config_path.parent
    if compact is not None:
        file = CompactFile(compact.files)
        masks = file.masks()
        problems += _of_compact(compact, file, masks, config, source, download)
    elif (path := find(source, MASKS_FILE, **download)) is not None:
        masks = dict(Masks.load(path).tensors)
        _download_dense(source, download)
        problems += _not_zero(broken_masks(masks, dense_files(folder)))
    elif entry:
        problems.append(
            f"its config says that px_hf pruned it to a sparsity of {entry.get('sparsity')}, and there are no masks: "
            "stock saving carries that entry along whatever the weights are. Take it as an ordinary model."
        )
    dense_bytes, compact_bytes = _sizes(source, folder, compact, download)
    notes = []
    if masks and not dense_bytes:
        notes.append("this is the compact copy: px_hf.from_pretrained loads it, transformers after `import px_hf`.")
    if "structure" in entry:
        notes.append("units were taken out and layers have unlike widths: only px_hf.from_pretrained loads it.")
    return Inspection(
        source,
        compact.commit if compact is not None else _commit_of(config_path, source),
        _architecture(config),
        bool(masks),
        tuple(
            InspectedLayer(name, tuple(mask.shape), mask.numel(), int(mask.count_nonzero()))
            for name, mask in masks.items()
        ),
        {key: value for key, value in entry.items() if key not in _OF_THE_FILE},
        dense_bytes,
        compact_bytes,
        tuple(problems),
        tuple(notes),
    )


def _config(source: str, download: Mapping[str, Any], compact: Compact | None) -> tuple[dict[str, Any], Path]:
    path = find(source, CONFIG_FILE, **download)
    if path is None and compact is not None:
        path = find(source, CONFIG_FILE, **{**download, "subfolder": compact.subfolder})
    if path is None:
        raise CheckpointError(f"{source!r} holds no {CONFIG_FILE}: it is no saved model of transformers or timm.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no JSON object, so it is no config of a model.")
    return content, path


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return f"{names[0]} (transformers)"
    if isinstance(config.get("architecture"), str):
        return f"{config['architecture']} (timm)"
    return str(config.get("model_type", "unknown"))


def _of_compact(
    compact: Compact,
    file: CompactFile,
    masks: Mapping[str, Tensor],
    config: Mapping[str, Any],
    source: str,
    download: Mapping[str, Any],
) -> list[str]:
    """What is wrong with a compact copy and the dense files beside it."""
    found = []
    more = {key: value for key, value in download.items() if key not in ("revision", "subfolder")}
    parted = parted_from(compact, file, source, **more)
    if parted is not None:
        found.append(
            f"{listed(parted.files, 4)} and the compact copy in {SPARSE_FOLDER}/ are not the same model: "
            f"{parted.how}. Another library has saved over the dense file."
        )
        found += _not_zero(broken_masks(masks, parted.files))
    elif compact.commit is None:
        beside = compact.files[0].absolute().parent.parent
        dense = dense_files(beside) if compact.files[0].absolute().parent.name == SPARSE_FOLDER else {}
        found += _not_zero(broken_masks(masks, dense))
    try:
        inner = find(source, CONFIG_FILE, **{**download, "subfolder": compact.subfolder})
        content = json.loads(inner.read_text(encoding="utf-8")) if inner is not None else None
        if not isinstance(content, dict):
            raise ValueError("it is missing or no JSON object")
        check_configs(compact, source, content, **{**download, "revision": compact.commit})
    except CheckpointError as error:
        found.append(str(error))
    except (OSError, ValueError, RecursionError) as error:
        found.append(f"{SPARSE_FOLDER}/{CONFIG_FILE} cannot be read: {error}.")
    return found


def _not_zero(names: list[str]) -> list[str]:
    if not names:
        return []
    return [
        f"the masks of {len(names)} layers do not hold in the dense file: pruned weights of {listed(names, 3)} are "
        "not zero, or cannot be read."
    ]


def _download_dense(source: str, download: Mapping[str, Any]) -> None:
    """Fetch the dense files of a repository, so that they lie beside its config."""
    if Path(source).is_dir() or find(source, WEIGHTS_FILE, **download) is not None:
        return
    index = find(source, INDEX_FILE, **download)
    for name in shard_names(index) if index is not None else []:
        find(source, name, **download)


def _sizes(
    source: str, folder: Path, compact: Compact | None, download: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """Of the dense files, and of those of the compact copy."""
    files = [] if compact is None else compact.files
    small = {str(Path(compact.subfolder, path.name)): path.stat().st_size for path in files if compact is not None}
    if Path(source).is_dir() or is_offline_mode() or download.get("local_files_only"):
        if files and files[0].absolute().parent == folder.absolute():  # the compact folder itself was named
            return {}, small
        return {name: path.stat().st_size for name, path in dense_files(folder).items()}, small
    try:
        info = HfApi(token=download.get("token")).model_info(
            source, revision=download.get("revision"), files_metadata=True
        )
    except (HfHubHTTPError, HTTPError, OSError):
        return {}, small
    prefix = f"{download['subfolder']}/" if download.get("subfolder") else ""
    sizes = {each.rfilename.removeprefix(prefix): each.size or 0 for each in info.siblings or [] if each.size}
    return {name: size for name, size in sizes.items() if is_weights(name)}, small


def _commit_of(path: Path, source: str) -> str | None:
    return path.parent.name if not Path(source).is_dir() and "snapshots" in path.parts else None

"""Whether a compact copy and the dense files beside it hold the same weights.

A compact copy records the dense files it was written with. Whoever reads it looks whether they are still there:

1. On the Hub the SHA-256 of each file is known without downloading it. On this machine the header, the size and
   samples of each tensor are compared, which takes milliseconds whatever the size of the model.
2. If that differs, all weights are compared, so that the same weights in other files (other shards, names, metadata)
   are no error.
3. Copies from before there was a record are compared by samples of the tensors that are not pruned.

Where there is no dense file, there is nothing to compare: a compact copy is a whole model.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.hf_api import RepoFile
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, listed
from .dense import Span, content, dense_files, is_recorded, names_to_ask, pieces, sampled, spans
from .files import Compact, find, find_compact
from .header import shard_names
from .layout import CONFIG_FILE, INDEX_FILE, SPARSE_FOLDER, WEIGHTS_FILE
from .reader import CompactFile

Paths = dict[str, Path]


class Parted(NamedTuple):
    """How a dense copy differs from the compact one beside it; `files` are those that were looked at."""

    where: str
    files: Paths
    how: str

    def error(self, more: str = "") -> CheckpointError:
        """What happened and what to do."""
        return CheckpointError(
            f"{listed(self.files, 4)} in {self.where} and the compact copy in {SPARSE_FOLDER}/ are not the same "
            f"model: {self.how}.{more} Nothing was loaded. Stock save_pretrained, trainer.save_model or a stock push "
            f"writes the dense file alone, and {SPARSE_FOLDER}/ then holds the weights of before. To keep the dense "
            "weights, load them with transformers (or timm) and their masks with px_hf.Masks.from_pretrained, or "
            "prune anew; px_hf.save_pretrained(model, masks, folder, overwrite=True), or px_hf.push_to_hub, writes "
            f"both. If nothing is to be sparse, delete {SPARSE_FOLDER}/. For the weights of before, move it "
            "into an empty folder, from which px_hf.from_pretrained and Masks.from_pretrained load it."
        )


def check_copies(folder_or_repo_id: str | os.PathLike[str], **download: Any) -> None:
    """`check` of a folder or repository, if it has a compact copy; `download` as in `find`.

    Raises:
        CheckpointError: as of `check`, or there is no such folder or repository.
    """
    found = find_compact(folder_or_repo_id, **download)
    if found is not None:
        check(found, CompactFile(found.files), folder_or_repo_id, **download)


def check(found: Compact, file: CompactFile, source: str | os.PathLike[str], **download: Any) -> None:
    """Nothing, if the dense files beside a compact copy hold the same weights, or there are none.

    `download`: as of `find`, for a repository of the Hub.

    Raises:
        CheckpointError: they hold others; it says what to do. Or the Hub answers with an error.
    """
    if parted := parted_from(found, file, source, **download):
        raise parted.error()


def parted_from(found: Compact, file: CompactFile, source: str | os.PathLike[str], **download: Any) -> Parted | None:
    """How the dense files beside a compact copy differ from it; None if they do not, or there are none."""
    where = f"{source!s}, commit {found.commit}" if found.commit else str(_above(found))
    files = _files(found, file, str(source), download)
    if not files or not _may_differ(files, file):
        return None
    how = _differences(files, file)
    return Parted(where, files, how) if how else None


def _above(found: Compact) -> Path:
    return found.files[0].absolute().parent.parent


# ----------------------------------------------------------------------------------------------- which files there are


def _files(found: Compact, file: CompactFile, source: str, download: Mapping[str, Any]) -> Paths:
    """The dense files on this machine, without those of the Hub that are known to be the recorded ones."""
    here = dense_files(_above(found)) if _is_sparse_folder(found) else {}
    if found.commit is None or not file.dense or file.dense.keys() <= here.keys():
        return here
    if is_offline_mode() or download.get("local_files_only"):
        return here
    more = {**download, "subfolder": _parent(found), "revision": found.commit}
    there = _on_the_hub(source, _parent(found), found.commit, file, download.get("token"))
    if there is None:
        return here
    if INDEX_FILE in there and (index := find(source, INDEX_FILE, **more)) is not None:
        there = {**dict.fromkeys(shard_names(index)), **there}
    there.pop(INDEX_FILE, None)
    if all(name in file.dense and digest == file.dense[name].sha256 for name, digest in there.items()):
        return here
    for name in sorted(there):
        find(source, name, **more)
    return dense_files(_above(found))


def _parent(found: Compact) -> str:
    return str(PurePosixPath(found.subfolder).parent).removeprefix(".")


def _is_sparse_folder(found: Compact) -> bool:
    return found.files[0].absolute().parent.name == SPARSE_FOLDER


def _on_the_hub(
    repo_id: str, parent: str, commit: str, file: CompactFile, token: str | bool | None
) -> dict[str, str | None] | None:
    """The dense files of a commit with their SHA-256 (None: not a large file); None if the Hub cannot be asked."""
    paths = {str(PurePosixPath(parent, name)): name for name in names_to_ask(file.dense or {})}
    try:
        entries = HfApi(token=token).get_paths_info(repo_id, list(paths), revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403, 404):  # which say that this token may not ask
            raise CheckpointError(
                f"The Hub does not tell which dense file belongs to {SPARSE_FOLDER}/ of {repo_id!r}: {error}"
            ) from error
        reason: Exception = error
    except (HTTPError, OSError) as error:
        reason = error
    else:
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {paths[entry.path]: entry.lfs.sha256 if entry.lfs else None for entry in files}
    warnings.warn(
        f"Whether {SPARSE_FOLDER}/ of {repo_id!r} still belongs to its dense copy could not be asked "
        f"({type(reason).__name__}): what is in the cache is used.",
        stacklevel=2,
    )
    return None


# --------------------------------------------------------------------------------------------- whether they are others


def _may_differ(files: Paths, file: CompactFile) -> bool:
    """False if the files are those that were recorded; without a record, if samples of whole tensors are the same."""
    try:
        if file.dense is not None:
            return not all(name in file.dense and is_recorded(path, file.dense[name]) for name, path in files.items())
        found = [span for path in files.values() for span in spans(path)]
    except (SafetensorError, OSError, ValueError, KeyError):
        return file.dense is not None
    there: dict[tuple[int, ...], set[tuple[str, str]]] = {}
    for span in found:
        there.setdefault(span.shape, set()).add((span.dtype, sampled(span)))
    return any(
        span.shape in there and (span.dtype, sampled(span)) not in there[span.shape] for span in file.whole_spans()
    )


def _differences(files: Paths, file: CompactFile) -> str:
    """In what the weights differ; empty if all of them are the same.

    Names and files do not count, which libraries change: for each tensor there must be one of its shape and content.
    """
    ours: dict[tuple[int, ...], set[tuple[str, str]]] = {}
    for name, shape in file.shapes.items():
        tensor = file.tensor(name)
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        ours.setdefault(tuple(shape), set()).add((file.dtype(name), hashlib.sha256(raw.data).hexdigest()))
    try:
        theirs = [span for path in files.values() for span in spans(path)]
        contents = [(span, (span.dtype, content(span))) for span in theirs]
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        return f"it cannot be read as safetensors ({error})"
    if file.dense is None:  # nothing says that names were all that the library changed in writing it
        contents = [(span, found) for span, found in contents if span.shape in ours]
    others = [span.name for span, found in contents if found not in ours.get(span.shape, set())]
    if others:
        return f"{len(others)} of the {len(theirs)} dense tensors hold other values, for example {others[0]!r}"
    if file.dense is None:
        return ""
    known = {(span.shape, *found) for span, found in contents}
    lacking = sum((shape, *found) not in known for shape, all_of in ours.items() for found in all_of)
    return f"the dense copy lacks {lacking} tensors of the compact one" if lacking else ""


# -------------------------------------------------------------------------------------------- whether masks hold there


def broken_masks(masks: Mapping[str, Tensor], files: Paths, *, samples: bool = False) -> list[str]:
    """The masks of which no dense tensor has the zeros, each tensor for one mask; all if the files cannot be read.

    Tensors are told by shape and zeros, since files may name them as older versions of their library do. If there is
    a model in one file and one in shards, the masks must hold in both.
    `samples`: look at pieces of each tensor, and do not count masks whose shape is not there at all, nor any if the
    files cannot be read.
    """
    whole = [path for name, path in files.items() if name == WEIGHTS_FILE]
    shards = [path for name, path in files.items() if name != WEIGHTS_FILE]
    return [name for model in (whole, shards) if model for name in _broken_in(model, masks, samples)]


def _broken_in(files: Iterable[Path], masks: Mapping[str, Tensor], samples: bool) -> list[str]:
    try:
        by_shape: dict[tuple[int, ...], list[Span]] = {}
        for path in files:
            for span in spans(path):
                by_shape.setdefault(span.shape, []).append(span)
        broken = []
        for name, mask in sorted(masks.items(), key=lambda item: int(item[1].count_nonzero())):
            candidates = by_shape.get(tuple(mask.shape), [])
            fitting = next((span for span in candidates if _has_zeros(span, mask, samples)), None)
            if fitting is not None:
                candidates.remove(fitting)
            elif candidates or not samples:
                broken.append(name)
        return broken
    except (SafetensorError, OSError, ValueError, KeyError):
        return [] if samples else sorted(masks)


def _has_zeros(span: Span, mask: Tensor, samples: bool) -> bool:
    kept = mask.reshape(-1)
    with safe_open(span.path, framework="pt") as file:
        weights = file.get_tensor(span.name).reshape(-1)  # mapped, not read
    for start, end in pieces(len(kept), 512):
        if weights[start:end][~kept[start:end]].count_nonzero():
            return False
    return samples or not weights[~kept].count_nonzero()


# ----------------------------------------------------------------------------------------------------- the two configs

_MAY_DIFFER = {"px", "quantization_config", "transformers_version", "dtype", "torch_dtype", "_name_or_path"}
_MAY_DIFFER |= {"architectures", "model_args", "pretrained_cfg", "auto_map"}
"""Entries that libraries write anew without another model being meant."""


def check_configs(found: Compact, source: str | os.PathLike[str], config: Mapping[str, Any], **download: Any) -> None:
    """Nothing, if `config`, that of a compact copy, and the one above it describe the same model.

    Raises:
        CheckpointError: an entry that both have differs, such as the names of the classes or the masks.
    """
    if not _is_sparse_folder(found):
        return
    path: Path | None = _above(found) / CONFIG_FILE
    if found.commit is not None:
        path = find(source, CONFIG_FILE, **{**download, "subfolder": _parent(found), "revision": found.commit})
    try:
        above = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return  # a damaged config says nothing
    if not isinstance(above, dict):
        return
    others = sorted(key for key in above.keys() & config.keys() - _MAY_DIFFER if above[key] != config[key])
    if _masks_of(above) and _masks_of(config) and _masks_of(above) != _masks_of(config):
        others.append("px")
    if others:
        raise CheckpointError(
            f"config.json and {SPARSE_FOLDER}/config.json of {str(source)!r} do not agree on {listed(others)}: one "
            "was changed, or belongs to another model. Nothing was loaded. Make the same change in both, or save the "
            "model again with px_hf.save_pretrained(model, masks, folder, overwrite=True)."
        )


def _masks_of(config: Mapping[str, Any]) -> Any:
    px = config.get("px")
    return px.get("masks_sha256") if isinstance(px, dict) else None

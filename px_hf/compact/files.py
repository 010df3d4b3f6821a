"""Find the files of a saved model, in a local folder or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    HTTPError,  # a cut connection too
    LocalEntryNotFoundError,
)

from ..errors import CheckpointError
from .header import shard_names
from .layout import INDEX_FILE, SPARSE_FOLDER, WEIGHTS_FILE


class Compact(NamedTuple):
    """Where a compact copy is. `commit`: of the Hub repository; None for a folder."""

    subfolder: str
    files: list[Path]
    commit: str | None


def find(
    folder_or_repo_id: str | os.PathLike[str], name: str, *, required: bool = False, **download: Any
) -> Path | None:
    """The local path of a file in a folder or Hub repository, downloaded if need be; None if it has no such file.

    `download`: what `huggingface_hub.hf_hub_download` takes: `subfolder`, `revision`, `token`, `cache_dir`,
    `local_files_only`, ... A folder only looks at `subfolder`.

    Raises:
        CheckpointError: there is no such folder or repository, it cannot be reached, or, if `required`, it is a
            repository that has no such file.
    """
    subfolder = download.pop("subfolder", None) or None
    if Path(folder_or_repo_id).is_dir():
        path = Path(folder_or_repo_id, subfolder or "", name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(str(folder_or_repo_id), name, subfolder=subfolder, **download))
    except (EntryNotFoundError, HTTPError, OSError, ValueError) as error:
        # LocalEntryNotFoundError: not in the cache, where nothing else may be, or cannot be, asked
        asked = not isinstance(error, LocalEntryNotFoundError) or download.get("local_files_only") or is_offline_mode()
        if isinstance(error, EntryNotFoundError) and asked and not required:
            return None
        raise CheckpointError(
            f"Cannot get {name} of {str(folder_or_repo_id)!r}: it is not a local folder, and as a Hub repository: "
            f"{error}"
        ) from error


def find_compact(folder_or_repo_id: str | os.PathLike[str], **download: Any) -> Compact | None:
    """The compact copy of a folder or repository, None if it has none; `download` as in `find`.

    It is in `sparse/`; that folder may also be given itself. From the Hub, all of its files are of one commit.

    Raises:
        CheckpointError: as of `find`, or a file that the index lists is missing.
    """
    asked = download.pop("subfolder", None) or ""
    subfolders = [str(PurePosixPath(asked, SPARSE_FOLDER))]
    if (PurePosixPath(asked).name or Path(folder_or_repo_id).name) == SPARSE_FOLDER:
        subfolders.append(asked)  # the last, for a whole model may be in a folder of that name too
    for subfolder in subfolders:
        whole = find(folder_or_repo_id, WEIGHTS_FILE, subfolder=subfolder, **download)
        if whole is not None:
            return Compact(subfolder, [whole], _commit(folder_or_repo_id, whole))
        index = find(folder_or_repo_id, INDEX_FILE, subfolder=subfolder, **download)
        if index is not None:
            commit = _commit(folder_or_repo_id, index)
            download |= {"revision": commit} if commit else {}
            files = []
            for name in shard_names(index):
                shard = find(folder_or_repo_id, name, subfolder=subfolder, **download)
                if shard is None:
                    raise CheckpointError(
                        f"{str(folder_or_repo_id)!r} has no {name} in {subfolder!r}, which its index lists: it was "
                        "copied or uploaded in part."
                    )
                files.append(shard)
            return Compact(subfolder, files, commit)
    return None


def located(files: list[Path], folder_or_repo_id: str | os.PathLike[str]) -> tuple[Compact, dict[str, Any]]:
    """A compact copy that another library has found, as `find_compact` gives it, and `download` for more of it."""
    commit = _commit(folder_or_repo_id, files[0])
    if commit is None:
        return Compact(SPARSE_FOLDER, files, None), {}
    folder = files[0].parent
    snapshot = next(path for path in (folder, *folder.parents) if path.parent.name == "snapshots")
    subfolder = folder.relative_to(snapshot).as_posix().removeprefix(".")
    return Compact(subfolder, files, commit), {"cache_dir": snapshot.parents[2]}


def _commit(folder_or_repo_id: str | os.PathLike[str], path: Path) -> str | None:
    """The commit of a downloaded file: the cache keeps it in snapshots/<commit>/."""
    if Path(folder_or_repo_id).is_dir() or "snapshots" not in path.parts:
        return None
    return path.parts[path.parts.index("snapshots") + 1]

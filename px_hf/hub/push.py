"""Publish a pruned model on the Hugging Face Hub, in one commit.

    push_to_hub(model, masks, "user/vit-b16-cifar100-px90", image_processor=processor, provenance={...})
    print(push_to_hub(model, masks, "user/vit-b16-cifar100-px90", dry_run=True))

The repository gets what `save_pretrained` writes, a model card and the plot that it shows.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from torch import nn

from ..distributed import in_contact, processes
from ..downstream.attached import attach
from ..errors import HubError, InvalidArgumentError
from ..masks import Masks
from ..model.shards import shards_of
from ..model.wrappers import unwrap
from ..plots import plot_layer_sparsity
from ..report import Report, report
from ..version import __version__
from .card import CARD_FILE, PLOT_FILE, is_about_others, is_unedited, model_card
from .saving import save_pretrained
from .whole_copy import whole_copy

_WEIGHTS = re.compile(
    r"(model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|masks\.safetensors|sparse/.*)"
)
"""Files by which an older push could be taken for this one: removed where this one does not write them."""


@dataclass(frozen=True)
class Upload:
    """What a dry run would have pushed: `files` maps names in the repository to sizes in bytes."""

    repo_id: str
    revision: str
    files: Mapping[str, int]

    def __str__(self) -> str:
        width = max(map(len, self.files))
        lines = [f"{name.ljust(width)}  {size:>13,} bytes" for name, size in self.files.items()]
        total = f"{len(self.files)} files, {sum(self.files.values()):,} bytes"
        return "\n".join([f"Would push to {self.repo_id}, revision {self.revision}:", *lines, total])


def push_to_hub(
    model: nn.Module,
    masks: Masks,
    repo_id: str,
    *,
    image_processor: Any = None,
    provenance: Mapping[str, Any] | None = None,
    results: Mapping[str, float] | None = None,
    model_report: Report | None = None,
    evaluation: str | os.PathLike[str] | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    overwrite_card: bool = False,
    dry_run: bool = False,
) -> CommitInfo | Upload | None:
    """Push the masked model to a repository of the Hub, which is created if there is none.

    `model`, `masks`, `image_processor`, `provenance`, `max_shard_size`: as for `save_pretrained`.
    `results`, for the card: numbers by the names that Trainer gives them, such as `test_accuracy`, `eval_accuracy`
    and, of the unpruned model, `dense_test_accuracy`; accuracies are fractions.
    `model_report`, for the card: by default `report(model, masks)`.
    `evaluation`: the output folder of recipes/evaluate_downstream.py on this very model. Its page goes into the card,
    its metrics into the card's `model-index`, its files beside the model. By default the folder that the model was
    loaded from, if it holds a report of the same weights (`--add_to_model` puts it there).
    `license`: an identifier of the Hub, such as `"apache-2.0"`.
    `repo_id`: `"user/name"`, or `"name"` for the user whose token it is.
    `private`, `token`, `revision`, `commit_message`, `commit_description`, `create_pr`: as in transformers'
    `push_to_hub`. A `revision` that is not there is made as a branch. `private=True` for a repository that is
    public is an error.
    `overwrite_card`: also replace a model card that was edited, or that px_hf did not write. By default it stays.
    `dry_run`: write nothing and ask the Hub nothing.

    All files come in one commit: the repository shows the old state or the new one. Files of the repository that
    this does not write are left alone, but for weights of an earlier push under names that are no longer used.
    After a failure the same call takes up where it ended: what was uploaded is not sent again, and if the commit was
    already made, nothing is. In several processes the main one pushes and the others return None; of a sharded model
    (FSDP2) all must call it.

    Returns the commit, or for a dry run the list of files.

    Raises:
        HubError: nothing was pushed, and it says what to do: no token, no permission, a revision that is no branch, no
            connection, an error of the Hub, no room for the temporary copy.
        InvalidArgumentError: a malformed `repo_id`, or an `evaluation` of another model.
        CheckpointError: a damaged `evaluation`.
        PxError: whatever `save_pretrained` raises.
    """
    _check_repo_id(repo_id)
    plain: nn.Module | None = model
    if shards_of(unwrap(model)) is not None:
        with in_contact("while the model was gathered"):
            plain, masks = whole_copy(unwrap(model)), masks.whole()
    if not processes().is_main:
        return None
    assert plain is not None
    model = plain
    with tempfile.TemporaryDirectory(prefix="px_hf-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, "model")
        with _room_for(temporary):
            save_pretrained(
                model,
                masks,
                folder,
                image_processor=image_processor,
                provenance={**_base_model(model, repo_id), **(provenance or {})},
                max_shard_size=max_shard_size,
            )
            if masks.kept < masks.total:
                plot_layer_sparsity(masks, folder / PLOT_FILE)
            downstream = attach(folder, model, masks, evaluation)
        card = {"results": results, "downstream": downstream, "license": license}
        card["revision"] = None if create_pr else revision
        about = model_report or report(model, masks)
        _write_card(folder, repo_id, about, **card)
        if dry_run:
            return Upload(repo_id, revision or "main", _sizes(folder))
        repo_id = claim_repo(repo_id, private=private, token=token, create_pr=create_pr)
        _write_card(folder, repo_id, about, **card)  # with the owner's name
        with explained(repo_id, revision):
            api = api_of(token)
            if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
                raise HubError(f"Revision {revision} is a commit, and one pushes to branches. Name a branch.")
            if revision is not None and not revision.startswith("refs/pr/") and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            there = set(api.list_repo_files(repo_id, revision=revision))
            edited = CARD_FILE in there and not overwrite_card and _edited_card(repo_id, revision, token, temporary)
            if edited:
                (folder / CARD_FILE).unlink()
                others = is_about_others(edited, masks.fingerprint())
                warnings.warn(
                    f"The model card of {repo_id} was not written by px_hf, or was edited since, and stays as it is"
                    f"{', although it describes other masks than those pushed, such as another sparsity' * others}. "
                    "Pass overwrite_card=True to replace it.",
                    stacklevel=2,
                )
            files = _sizes(folder)
            stale = sorted(name for name in there - files.keys() if _WEIGHTS.fullmatch(name))
            return api.create_commit(
                repo_id,
                [
                    *(CommitOperationAdd(name, folder / name) for name in files),
                    *(CommitOperationDelete(name, is_folder=False) for name in stale),
                ],
                commit_message=commit_message or "Upload pruned model with px_hf",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )


def claim_repo(
    repo_id: str, *, private: bool | None = None, token: str | bool | None = None, create_pr: bool = False
) -> str:
    """Make the repository if there is none, and its whole name. HubError if the token may not write to it."""
    _check_repo_id(repo_id)
    with explained(repo_id):
        if token is False or (token in (None, True) and get_token() is None):
            raise LocalTokenNotFoundError
        api = api_of(token)
        user = api.whoami()["name"] if "/" not in repo_id else ""
        name = f"{user}/{repo_id}" if user else repo_id
        api.create_repo(repo_id, private=private, exist_ok=True)
        if not create_pr:
            api.auth_check(name, write=True)
        if private and not api.model_info(name).private:
            raise HubError(
                f"{name} exists and is public, so private=True would not hide this model; nothing was pushed. Make "
                "it private in its settings, or choose another name."
            )
    return name


def _base_model(model: nn.Module, repo_id: str) -> dict[str, str]:
    """The repository that the model was loaded from, if it was one: then its configuration is in the cache."""
    name = getattr(getattr(unwrap(model), "config", None), "name_or_path", None)
    if not name or name == repo_id or Path(name).exists():
        return {}
    try:
        return {"base_model": name} if isinstance(try_to_load_from_cache(name, "config.json"), str) else {}
    except HFValidationError:  # the name of a folder
        return {}


def api_of(token: str | bool | None) -> HfApi:
    return HfApi(token=token, library_name="px_hf", library_version=__version__)


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InvalidArgumentError(f"repo_id: {error} Expected 'user/name' or 'name'.") from error


def _write_card(folder: Path, repo_id: str, about: Report, **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = model_card(repo_id, config, _sizes(folder), about, **more)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _edited_card(repo_id: str, revision: str | None, token: str | bool | None, temporary: str) -> str:
    """The card of the repository if it was edited, else an empty text."""
    path = hf_hub_download(repo_id, CARD_FILE, revision=revision, token=token, local_dir=Path(temporary, "card"))
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return "" if is_unedited(text) else text or " "


@contextmanager
def _room_for(folder: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
        if not full:
            raise
        raise HubError(
            f"No room for the temporary copy of the model in {Path(folder).parent} "
            f"({shutil.disk_usage(folder).free / 1e6:,.0f} MB free); nothing was pushed. Free some, or name another "
            "folder in the environment variable TMPDIR."
        ) from error


_BY_STATUS = {
    401: "the token is not valid. Make one with write access at https://huggingface.co/settings/tokens and pass it "
    "as token=..., or log in with `hf auth login`",
    403: "the token may not write there. Use a token with write access to it, another name, or create_pr=True",
    404: "there is no such repository, or the token may not see it. Check the name, and whose token it is",
    409: "the name or the branch is taken, or someone else is changing it. Choose another name, or push again",
    412: "someone else has pushed in the meantime. Push again",
    413: "a file is larger than the Hub takes",
    429: "too many requests. Wait some minutes and push again",
}


@contextmanager
def explained(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Errors of huggingface_hub as HubError, with what to do."""
    try:
        yield
    except HubError:
        raise
    except LocalTokenNotFoundError as error:
        raise HubError(
            f"No token to push to {repo_id} with. Log in with `hf auth login`, set the environment variable HF_TOKEN, "
            "or pass token=..."
        ) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"Nothing was pushed to {repo_id}: the environment variable HF_HUB_OFFLINE is set.") from error
    except Exception as error:
        if isinstance(error, ValueError) and "metadata in README.md" in str(error):
            raise HubError(f"Nothing was pushed to {repo_id}: the Hub refuses the model card. {error}") from error
        answered = next((cause for cause in _causes(error) if isinstance(cause, HfHubHTTPError)), None)
        if answered is not None:
            status = answered.response.status_code
            says = (answered.server_message or str(answered)).strip().replace("\n", " ")
            if answered.response.headers.get("X-Error-Code") == "RevisionNotFound":
                why = f"{revision!r} is no branch of it. Name a branch, or none for main"
            elif status >= 500:
                why = "the Hub has a problem. Push again later; what was uploaded is not sent again"
            else:
                why = _BY_STATUS.get(status, "the Hub refused it")
            raise HubError(f"Nothing was pushed to {repo_id}: {why}. (The Hub said {status}: {says})") from error
        if _is_network(error):
            last = list(_causes(error))[-1]
            without = " If it breaks off each time, set HF_HUB_DISABLE_XET=1, which uploads by git-lfs."
            raise HubError(
                f"The connection to the Hub broke off ({type(last).__name__}: {last}), and the push to {repo_id} was "
                "not confirmed. Call push_to_hub again: what was uploaded is not sent again."
                f"{without if 'xet' in str(last) else ''}"
            ) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    while True:
        yield error
        following = error.__cause__ or error.__context__
        if following is None:
            return
        error = following


def _is_network(error: BaseException) -> bool:
    # HTTPError is that of httpx or httpx2, whichever this huggingface_hub is built on; hf_xet raises RuntimeError.
    return isinstance(error, RuntimeError) or any(isinstance(cause, HTTPError | OSError) for cause in _causes(error))

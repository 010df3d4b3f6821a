"""Publishing the model of a run on the Hub: the repository is claimed early, and written to at the end."""

from __future__ import annotations

from typing import Any

from huggingface_hub import CommitInfo
from torch import nn

import px_hf as px

from ..distributed import processes
from ..hub.push import claim_repo
from .arguments import FineTuneArguments


def claim_repository(training: FineTuneArguments, name: str) -> str | None:
    """The repository that `--push_to_hub` asks for, by default called `name`; None without it.

    It is made at once: a token that may not write to it is better known now than after the work. Trainer itself is
    kept from pushing at every checkpoint.

    Raises:
        HubError: the token may not.
    """
    if not training.push_to_hub:
        return None
    training.push_to_hub = False
    repo_id = training.hub_model_id or name
    if not processes().is_main:
        return repo_id
    return claim_repo(repo_id, private=training.hub_private_repo, token=training.hub_token)


def publish(model: nn.Module, masks: px.Masks, repo_id: str, training: FineTuneArguments, **about: Any) -> str:
    """Push to the repository that was claimed; the address of the commit. `about` is for `px.push_to_hub`.

    Raises:
        HubError: nothing was pushed.
    """
    commit = px.push_to_hub(
        model,
        masks,
        repo_id,
        private=training.hub_private_repo,
        token=training.hub_token,
        revision=training.hub_revision,
        **about,
    )
    assert isinstance(commit, CommitInfo)  # this is the main process, and no dry run
    return str(commit.commit_url)

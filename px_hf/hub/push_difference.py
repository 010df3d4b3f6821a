"""Publish the difference of a tuned model to its base model, in one commit.

push_difference(model, base, "user/vit-b16-digits-ticket")
model = px.from_pretrained("user/vit-b16-digits-ticket")
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, ModelCard, ModelCardData
from torch import Tensor, nn

from ..distributed import processes
from ..tickets.difference import ABOUT_FILE, save_difference
from .card import CARD_FILE
from .push import api_of, claim_repo, explained

_CARD = """---
{data}
---

# {repo_id}

{base}, of which {values:,} weights were tuned and the others are as they were. This repository holds the tuned ones
alone. It was made with px_hf.

```python
import px_hf as px

model = px.from_pretrained("{repo_id}")  # loads the base model, and checks that it is the same
```
"""


def push_difference(
    model: nn.Module,
    base: nn.Module | Mapping[str, Tensor],
    repo_id: str,
    *,
    base_model: str | None = None,
    base_revision: str | None = None,
    image_processor: Any = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload difference with px_hf",
) -> CommitInfo | None:
    """Push what `save_difference` writes, and a model card, to a repository of the Hub, made if there is none.

    `private`, `token`, `commit_message`: as in transformers' `push_to_hub`. In several processes the main one pushes
    and the others return None. A model card that is there is replaced.

    Raises:
        HubError: nothing was pushed, and it says what to do.
        PxError: whatever `save_difference` raises.
    """
    if not processes().is_main:
        return None
    with tempfile.TemporaryDirectory(prefix="px_hf-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        save_difference(
            model, base, folder, base_model=base_model, base_revision=base_revision, image_processor=image_processor
        )
        name = claim_repo(repo_id, private=private, token=token)
        about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
        on_hub = about["base_model"] if about["base_model"] and not Path(about["base_model"]).exists() else None
        data = ModelCardData(base_model=on_hub, library_name="px_hf", tags=["px-hf", "sparse", "difference"])
        text = _CARD.format(
            data=data.to_yaml(), repo_id=name, values=about["values"], base=f"[{on_hub}]" if on_hub else "A base model"
        )
        ModelCard(text).save(folder / CARD_FILE)
        with explained(name):
            files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir()) if path.is_file()]
            return api_of(token).create_commit(name, files, commit_message=commit_message)

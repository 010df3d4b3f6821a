"""One thread for every test and its subprocesses: small tensors gain nothing from more, and on a busy
machine OpenMP's spinning threads cost most of the time. And a Hub on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, User

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local Hub. This process uses it as alice, and keeps what it downloads in `tmp_path`.

    The client's waits before it tries again are cut short.
    """
    import huggingface_hub
    import transformers.utils.hub
    from huggingface_hub import constants

    with HubServer() as server:
        server.users = {"hf_alice": User("alice"), "hf_alice_read": User("alice", write=False), "hf_bob": User("bob")}
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "hf_alice")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        sleep = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()

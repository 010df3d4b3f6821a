"""One thread for every test and its subprocesses: small tensors gain nothing from more, and on a busy
machine OpenMP's spinning threads cost most of the time. And a Hub on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer, User

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny backbone in `backbone`, which has BatchNorm; runs write beside it."""
    import torch
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    ResNetForImageClassification(config).save_pretrained(folder / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "backbone")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `cuda` are skipped without a GPU."""
    if any(item.get_closest_marker("cuda") for item in items):
        import torch

        for item in items if not torch.cuda.is_available() else []:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A local Hub. This process uses it as alice, and keeps what it downloads in `tmp_path`."""
    with HubServer() as server:
        server.users = {"hf_alice": User("alice"), "hf_alice_read": User("alice", write=False), "hf_bob": User("bob")}
        server.use_here(monkeypatch, tmp_path)
        yield server

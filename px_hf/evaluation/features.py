"""Frozen features: what the classifier head of a model is given, computed once and kept in files.

The feature of an image is the input of the first convolution or linear layer of the head that runs, averaged over
positions where it has any; for a model without a head, its output (`px_hf.model.outputs`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..atomic import whole
from ..data import Preprocess, Split
from ..distributed import on_main, processes, raise_together
from ..errors import DataError, PxError
from ..model.inputs import Inputs, run
from ..model.modes import evaluating
from ..model.targets import PRUNABLE_LAYERS, head_modules
from ..model.wrappers import unwrap


def head_inputs(model: nn.Module, split: Split, *, batch_size: int = 64, progress: bool = True) -> np.ndarray:
    """The features of all images of `split`, float32 [N, D], the same on every process.

    Processes take batches in turn, so that each image is computed once, in the batch that one process would
    compute it in. The model is left as it was.

    Raises:
        DataError: an image is unreadable, on every process alike, or the split is empty.
    """
    if len(split) == 0:
        raise DataError(f"Split {split.name!r} is empty.")
    model, group = unwrap(model), processes()
    device = next(model.parameters()).device
    starts = range(0, len(split), batch_size)
    mine = list(starts)[group.rank :: group.world_size]
    found: list[tuple[int, np.ndarray]] = []
    problem: PxError | None = None
    try:
        with evaluating(model), torch.no_grad(), _HeadInput(model) as head:
            for start in tqdm(mine, desc=f"Features of {split.name}", unit="batch", leave=False,
                              disable=not (progress and group.is_main)):  # fmt: skip
                items = split.__getitems__(range(start, min(start + batch_size, len(split))))
                images = torch.stack([item["pixel_values"] for item in items]).to(device)
                found.append((start, head(Inputs(images)).float().cpu().numpy()))
    except PxError as error:
        problem = error
    raise_together(problem)
    if group.world_size > 1:
        found = gather_object(found)
    return np.concatenate([features for _, features in sorted(found, key=lambda pair: pair[0])])


class _HeadInput:
    """Runs the model and returns what its head was given, [N, D]."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: Tensor | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> _HeadInput:
        layers = [module for module in head_modules(self.model) if isinstance(module, PRUNABLE_LAYERS)]
        self._hooks = [layer.register_forward_pre_hook(self._keep) for layer in layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._seen is None:
            self._seen = inputs[0]

    def __call__(self, inputs: Inputs) -> Tensor:
        self._seen = None
        output = run(self.model, inputs)
        if self._seen is not None and self._seen.dim() == 3:  # [N, tokens, D]
            return self._seen.mean(1)
        features = output if self._seen is None else self._seen
        return features.flatten(2).mean(2) if features.dim() > 2 else features


class FeatureCache:
    """Features in safetensors files, found again by a hash of all that they depend on.

    `compute(...)` returns the features on the main process, None on others. A damaged file is computed anew.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    def compute(self, key: str, features: Callable[[], np.ndarray]) -> np.ndarray | None:
        """The array kept under `key`, or that of `features()`, which runs on every process and is then kept."""
        main = processes().is_main
        path = self.folder / f"{key}.safetensors"
        kept = _read(path) if main else None
        if on_main(lambda: kept is not None):
            return kept
        computed = features()
        if main:
            with whole(path) as unfinished:
                save_file({"features": np.ascontiguousarray(computed)}, unfinished)
        return computed if main else None


def _read(path: Path) -> np.ndarray | None:
    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None


def features_key(model: nn.Module, split: Split, batch_size: int) -> str:
    """SHA-256 of weights, configuration, images, image processor and versions: all that features depend on."""
    digest = hashlib.sha256()
    for name, tensor in unwrap(model).state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    config = getattr(model, "config", None)
    told = config.to_dict() if config is not None else {"class": type(model).__name__}
    told = {name: value for name, value in told.items() if name not in ("id2label", "label2id", "px")}
    processor = split.pixels.processor.to_dict() if isinstance(split.pixels, Preprocess) else repr(split.pixels)
    versions = (torch.__version__, transformers.__version__, batch_size)
    digest.update(json.dumps([told, processor, versions], sort_keys=True, default=str).encode())
    _hash_images(digest, split)
    return digest.hexdigest()


def _hash_images(digest: Any, split: Split) -> None:
    """Encoded images; of files not held in the data set, their path, size and time of change."""
    for start in range(0, len(split), 256):
        for value in split.rows[split.indices[start : start + 256].tolist()][split.image]:
            if value is not None and value.get("bytes") is not None:
                digest.update(hashlib.sha256(value["bytes"]).digest())
            elif value is not None and value.get("path") and os.path.exists(value["path"]):
                stat = os.stat(value["path"])
                digest.update(f"{value['path']} {stat.st_size} {stat.st_mtime_ns};".encode())
            else:
                digest.update(f"{value};".encode())

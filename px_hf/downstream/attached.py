"""The report of a downstream evaluation that is published with the model it is about."""

from __future__ import annotations

import hashlib
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InvalidArgumentError
from ..masks import Masks
from ..model.wrappers import unwrap
from .page import REPORT_FILES, RESULTS_FILE, read_results


def weights_fingerprint(model: nn.Module, masks: Masks) -> str:
    """SHA-256, in hexadecimal, of the masked weights as float32: equal for equal weights under equal masks.

    The names of parameters do not count, which differ between a timm model and TimmWrapper around it.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(masks.match(model).items()):
        weights = parameter.detach().float().cpu() * masks[name]
        digest.update(f"{list(weights.shape)} {int(masks[name].sum())};".encode())
        digest.update((weights + 0.0).contiguous().flatten().view(torch.uint8).numpy().data)  # -0.0 is 0.0
    return digest.hexdigest()


def is_about(results: Mapping[str, Any], model: nn.Module, masks: Masks) -> bool:
    """Whether `results` (see `page`) are those of this model, weights and masks."""
    return results.get("weights_sha256") == weights_fingerprint(model, masks)


def attach(
    folder: str | os.PathLike[str], model: nn.Module, masks: Masks, source: str | os.PathLike[str] | None
) -> dict[str, Any] | None:
    """Copies the report of `model` from `source` into `folder`, and returns its results; None if there is none.

    `source` is None: the folder that the model was loaded from, if it was one; a report on other weights is then left
    where it is, with a warning.

    Raises:
        InvalidArgumentError: `source` holds no report, or one on other weights.
        CheckpointError: the report is damaged.
    """
    given = source is not None
    if source is None:
        source = getattr(getattr(unwrap(model), "config", None), "name_or_path", None)
        if not source or not Path(source).is_dir():
            return None
    results = read_results(source)
    if results is None:
        if given:
            raise InvalidArgumentError(
                f"{source} holds no {RESULTS_FILE}. Name the output folder of recipes/evaluate_downstream.py."
            )
        return None
    if not is_about(results, model, masks):
        problem = f"The evaluation in {source} is not of this model: its weights or masks are others."
        if given:
            raise InvalidArgumentError(f"{problem} Evaluate this one with recipes/evaluate_downstream.py.")
        warnings.warn(f"{problem} It stays out.", stacklevel=3)
        return None
    for name in REPORT_FILES:
        if Path(source, name).is_file():
            shutil.copy(Path(source, name), folder)
    return results

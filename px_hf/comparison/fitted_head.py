"""A classifier head that was fitted to the frozen features of the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import PreTrainedModel

import px_hf as px

from ..data import Split
from ..evaluation import Examples, LinearProbe, head_inputs
from ..evaluation.probe import Standardise
from ..model.targets import head_modules
from .pixels import Pixels

HEAD_IMAGES = 5000
"""Training images that the head is fitted to, at most."""


def head_layer(model: nn.Module, classes: int) -> nn.Linear | None:
    """The linear layer that the classifier head consists of; None if it is something else."""
    layers = [m for m in head_modules(model) if any(True for _ in m.parameters(recurse=False))]
    only = layers[0] if len(layers) == 1 else None
    return only if isinstance(only, nn.Linear) and only.out_features == classes else None


def fit_head(model: PreTrainedModel, train: Pixels, validation: Pixels, path: Path) -> None:
    """Logistic regression on the dense model's features, its strength chosen on the validation split.

    Written to ``path`` as the weight and bias of the head's linear layer; nothing if the head is no linear layer.
    """
    classes = int(model.config.num_labels or 0)
    if head_layer(model, classes) is None:
        return
    some = train.first(HEAD_IMAGES)
    features, held_out = (head_inputs(model, cast(Split, split)) for split in (some, validation))  # has what it reads
    probe = LinearProbe().fit(Examples(features, some.labels), Examples(held_out, validation.labels), classes)
    scale = Standardise.of(features)
    solver = LogisticRegression(C=probe.chosen["C"], max_iter=300).fit(scale(features), some.labels)
    weight = np.zeros((classes, features.shape[1]))
    bias = np.full(classes, -1e4)  # a class without an example among those
    if len(solver.classes_) == 2:  # sklearn keeps the difference of the two
        weight[solver.classes_] = np.concatenate([-solver.coef_, solver.coef_]) / 2
        bias[solver.classes_] = np.concatenate([-solver.intercept_, solver.intercept_]) / 2
    else:
        weight[solver.classes_], bias[solver.classes_] = solver.coef_, solver.intercept_
    weight = weight / scale.deviation
    bias = bias - weight @ scale.mean
    save_file({"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}, path)


@torch.no_grad()
def set_head_(model: PreTrainedModel, path: Path) -> None:
    """Puts the fitted head into the model.

    Raises:
        TargetError: there is none.
    """
    layer = head_layer(model, int(model.config.num_labels or 0))
    if layer is None or layer.bias is None or not path.exists():
        raise px.TargetError(f"the head of {type(model).__name__} is no linear layer with a bias, so none was fitted.")
    head = load_file(path)
    layer.weight.copy_(head["weight"])
    layer.bias.copy_(head["bias"])

"""Models inside wrappers: scores, masks and smaller models are those of the model inside."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import images
from torch import nn

import px_hf as px
from px_hf.model.wrappers import is_compiled, named_buffers, named_parameters, paths_of_tensors, unwrap


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()


def partly_compiled(model: nn.Sequential) -> nn.Module:
    model = copy.deepcopy(model)
    model[2][0] = torch.compile(model[2][0], backend="eager")
    model[2] = torch.compile(model[2], backend="eager")
    return nn.DataParallel(model)


def test_names_are_those_of_the_model_inside() -> None:
    plain = net()
    wrapped = partly_compiled(plain)
    assert unwrap(plain) is plain
    assert list(named_parameters(wrapped)) == [name for name, _ in plain.named_parameters()]
    assert list(named_buffers(wrapped)) == [name for name, _ in plain.named_buffers()]
    tensors = {**named_parameters(wrapped), **named_buffers(wrapped)}
    state = unwrap(wrapped).state_dict(keep_vars=True)
    assert all(state[path] is tensors[name] for name, path in paths_of_tensors(unwrap(wrapped)).items())


def test_what_is_compiled_is_known() -> None:
    plain = net()
    assert not is_compiled(plain)
    assert is_compiled(unwrap(partly_compiled(plain)))
    plain[1].compile(backend="eager")
    assert is_compiled(plain)


@pytest.mark.parametrize("scope", ["global", "2:4", "structured"])
def test_a_wrapped_model_is_pruned_as_the_one_inside(scope: str) -> None:
    plain, batches = net(), [images(2)]
    wrapped = partly_compiled(plain)
    masks = px.prune(wrapped, batches, px.PX(paths="active"), sparsity=0.5, scope=scope, progress=False)
    assert masks == px.prune(plain, batches, px.PX(paths="active"), sparsity=0.5, scope=scope, progress=False)
    masks.apply_(wrapped)
    assert not masks.revived(wrapped)
    if scope == "structured":
        small, _ = px.shrink(wrapped, masks, batches[0])
        smaller, _ = px.shrink(plain, masks, batches[0])
        assert [p.shape for p in small.parameters()] == [p.shape for p in smaller.parameters()]

"""Models inside wrappers: scores, masks and smaller models are those of the model inside."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from networks import build, images
from torch import Tensor, nn

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


class Lit(nn.Module):
    """As a LightningModule is made: a model inside, its loss beside it."""

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        super().__init__()
        self.add_module(name, model)
        self.loss = nn.CrossEntropyLoss()
        self._name = name

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.get_submodule(self._name)(pixel_values).logits


@pytest.mark.parametrize("around", [Lit, lambda m: Lit(Lit(m), "net"), lambda m: nn.DataParallel(Lit(m))],
                         ids=["module", "two modules", "wrapped"])  # fmt: skip
def test_masks_of_the_model_inside_say_what_they_fit(around) -> None:
    model = build("hf vit")
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)
    lit = around(model)
    with pytest.raises(px.TargetError) as error:
        masks.apply_(lit)
    path = re.search(r"fit its part '\S+', a ViTForImageClassification: pass module\.(\S+) in", str(error.value))
    assert path
    assert masks.match(unwrap(lit).get_submodule(path[1]))


def test_masks_of_the_module_around_say_so() -> None:
    lit = Lit(build("hf vit"))
    masks = px.prune(lit, [images(2)], px.PX("active"), sparsity=0.5, rounds=1, progress=False)
    assert all(name.startswith("model.vit.") for name in masks), "the head of the model inside stays dense"
    with pytest.raises(px.TargetError, match=r"a module that holds this one as 'model': pass that module"):
        masks.apply_(lit.model)


def test_masks_of_something_else_get_the_usual_advice() -> None:
    masks = px.prune(build("cnn"), [], px.Magnitude(), sparsity=0.5, progress=False)
    with pytest.raises(px.TargetError, match="Masks belong to the architecture"):
        masks.apply_(Lit(build("hf vit")))
    shape = px.Masks({"vit.layernorm.weight": torch.ones(3).bool()})
    with pytest.raises(px.TargetError, match="Masks belong to the architecture"):
        shape.apply_(Lit(build("hf vit")))


def test_a_compiled_model_and_its_masks_fit_the_plain_one() -> None:
    model = build("hf vit")
    masks = px.prune(torch.compile(model, backend="eager"), [], px.Magnitude(), sparsity=0.5, progress=False)
    model.vit.layers[0] = torch.compile(model.vit.layers[0], backend="eager")
    assert masks.match(model).keys() == masks.keys()
    assert masks == px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)

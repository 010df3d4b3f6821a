"""What people do to a model while its zeros are kept: loads, conversions, copies, other optimizers, other loops."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import timm.utils
import torch
from networks import build, images
from timm.optim import Lion
from torch import Tensor, nn
from torch.nn.utils import prune

import px_hf as px

X, Y = images(4), torch.tensor([0, 1, 2, 3])


def masked(name: str = "hf vit") -> tuple[nn.Module, px.Masks, dict[str, Tensor]]:
    """A model with its zeros, its masks, and the dense state of before."""
    model = build(name)
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.6, progress=False)
    dense = copy.deepcopy(model.state_dict())
    masks.apply_(model)
    return model, masks, dense


def adamw(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, **settings)


def step(model: nn.Module, optimizer: Any) -> None:
    like = next(model.parameters())
    output = model(X.to(like.dtype))
    nn.functional.cross_entropy(getattr(output, "logits", output), Y).backward()
    optimizer.step()
    optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("whole", [True, False], ids=["the model", "a part of it"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_is_masked_as_it_is_loaded(assign: bool, whole: bool) -> None:
    model, masks, dense = masked()
    with px.keep_masks(adamw(model), model, masks):
        if whole:
            model.load_state_dict(copy.deepcopy(dense), assign=assign)
        else:
            part = {name.removeprefix("vit."): value for name, value in dense.items() if name.startswith("vit.")}
            model.vit.load_state_dict(copy.deepcopy(part), assign=assign)
        assert not masks.revived(model)
        assert torch.equal(model.vit.layernorm.weight, dense["vit.layernorm.weight"])
    model.load_state_dict(dense)
    assert masks.revived(model), "the handle is gone"


def test_after_an_assigned_state_the_old_optimizer_is_refused_and_a_new_one_taken() -> None:
    model, masks, dense = masked()
    optimizer = adamw(model)
    handle = px.keep_masks(optimizer, model, masks)
    step(model, optimizer)
    model.load_state_dict(dense, assign=True)
    with pytest.raises(px.TargetError, match=r"steps none of the 12 masked weights.*assign=True.*Make it from"):
        step(model, optimizer)
    handle.remove()
    optimizer = adamw(model)
    with px.keep_masks(optimizer, model, masks):
        step(model, optimizer)
        assert not masks.revived(model)


def test_an_optimizer_that_is_told_of_the_new_weights_goes_on() -> None:
    model, masks, dense = masked()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with px.keep_masks(optimizer, model, masks):
        step(model, optimizer)
        model.load_state_dict(dense, assign=True)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        before = model.get_parameter(next(iter(masks))).clone()
        step(model, optimizer)
        assert not masks.revived(model)
        assert not torch.equal(model.get_parameter(next(iter(masks))), before)
        model(X).logits.sum().backward()
        assert all((model.get_parameter(name).grad[~mask] == 0).all() for name, mask in masks.items())


def test_other_masks_for_weights_that_were_replaced() -> None:
    model, masks, _ = masked()
    fewer = px.Masks({name: mask & (torch.arange(mask.shape[-1]) > 2) for name, mask in masks.items()})
    optimizer = adamw(model)
    with px.keep_masks(optimizer, model, masks) as handle:
        for name, parameter in list(model.named_parameters()):  # as a conversion does that makes new objects
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(parameter.detach().clone()))
        handle.replace(fewer)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        for _ in range(2):
            step(model, optimizer)
            assert not fewer.revived(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_tied_weight_that_comes_apart() -> None:
    model = Tied()
    masks = px.Masks({f"{name}.weight": torch.eye(4).bool() for name in ("first", "second")})
    dense = copy.deepcopy(model.state_dict())
    optimizer = adamw(model)
    with px.keep_masks(optimizer, model, masks):
        model.load_state_dict(dense, assign=True)
        assert model.first.weight is not model.second.weight
        assert not masks.revived(model)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert not masks.revived(model)


def test_a_weight_that_is_taken_away_is_an_error() -> None:
    model, masks, _ = masked()
    optimizer = adamw(model)
    px.keep_masks(optimizer, model, masks)
    prune.identity(model.vit.layers[0].mlp.fc1, "weight")
    with pytest.raises(px.TargetError, match=r"fc1\.weight is no longer the weight that was masked"):
        step(model, optimizer)


# ------------------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_conversion_of_the_model(dtype: torch.dtype) -> None:
    model, masks, _ = masked("cnn")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with px.keep_masks(optimizer, model, masks):
        model.to(dtype)
        step(model, optimizer)
        assert not masks.revived(model)
        model.float().to(memory_format=torch.channels_last)
        optimizer.state.clear()
        step(model, optimizer)
        assert not masks.revived(model)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_weights_that_are_unfrozen_later() -> None:
    model, masks, _ = masked()
    model.vit.requires_grad_(False)
    optimizer = adamw(model)
    with px.keep_masks(optimizer, model, masks):
        step(model, optimizer)
        model.requires_grad_(True)
        for _ in range(2):
            step(model, optimizer)
            assert not masks.revived(model)
        moments = [optimizer.state[model.get_parameter(name)]["exp_avg"][~mask] for name, mask in masks.items()]
        assert not any(moment.any() for moment in moments), "the gradients were masked, from the first step on"
        model(X).logits.sum().backward()
        assert all((model.get_parameter(name).grad[~mask] == 0).all() for name, mask in masks.items())


# ------------------------------------------------------------------------------------------------ copies


def test_averages_and_copies_are_their_own() -> None:
    model, masks, dense = masked()
    optimizer = adamw(model)
    with px.keep_masks(optimizer, model, masks):
        ema = timm.utils.ModelEmaV3(model, decay=0.5)
        swa = torch.optim.swa_utils.AveragedModel(model)
        plain = copy.deepcopy(model)
        for _ in range(2):
            step(model, optimizer)
            ema.update(model)
            swa.update_parameters(model)
        assert not masks.revived(model)
        assert not masks.revived(ema.module)
        assert not masks.revived(swa.module)
        plain.load_state_dict(dense)
        assert masks.revived(plain), "nobody asked to keep zeros of the copy"
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        assert not masks.revived(torch.load(file, weights_only=False))


def test_accelerate_saves_and_loads(tmp_path: Path) -> None:
    from accelerate import Accelerator

    def prepared() -> tuple[Any, Any, Any, px.Masks]:
        model, masks, _ = masked()
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, adamw(model)), masks

    accelerator, model, optimizer, masks = prepared()
    with px.keep_masks(optimizer, model, masks):
        step(model, optimizer)
        accelerator.save_state(str(tmp_path))
        step(model, optimizer)
        expected = copy.deepcopy(model.state_dict())
    accelerator, model, optimizer, masks = prepared()
    with px.keep_masks(optimizer, model, masks):
        accelerator.load_state(str(tmp_path))
        assert not masks.revived(model)
        step(model, optimizer)
        assert not masks.revived(model)
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ loops


class PlainLion(torch.optim.Optimizer):
    """The sign of a momentum, as in Chen et al. 2023: every weight moves at each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            momentum = self.state[parameter].setdefault("momentum", torch.full_like(parameter, 0.1))
            parameter.mul_(1 - 1e-3).sub_(1e-2 * (0.9 * momentum + 0.1 * parameter.grad).sign())
            momentum.mul_(0.99).add_(parameter.grad, alpha=0.01)


OPTIMIZERS = {
    "AdamW fused": lambda model: adamw(model, fused=True),
    "AdamW foreach": lambda model: adamw(model, foreach=True),
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2, weight_decay=0.1),
    "Lion": lambda model: PlainLion(model.parameters()),
    "timm's Lion": lambda model: Lion(model.parameters(), lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_loop_as_lightning_makes_it(make: Any) -> None:
    """A module around the model steps it by a closure; a clipped norm, and a checkpoint loaded in between."""

    class Lit(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    model, masks, _ = masked()
    lit = Lit(model)
    optimizer = make(lit)
    with px.keep_masks(optimizer, lit.model, masks):
        for i in range(4):

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(X).logits, Y)
                loss.backward()
                nn.utils.clip_grad_norm_(lit.parameters(), 1.0)
                return loss

            loss = closure()
            optimizer.step()
            assert torch.isfinite(loss)
            assert not masks.revived(model)
            if i == 1:
                lit.load_state_dict(copy.deepcopy(lit.state_dict()))
    closure()
    optimizer.step()
    assert masks.revived(model), "without the handle they come back, or this test could not fail"


# ------------------------------------------------------------------------------------------------ scoring


@pytest.mark.parametrize("criterion", [px.PX(), px.PX("active"), px.SNIP(), px.Wanda()], ids=str)
def test_scores_do_not_depend_on_autocast(criterion: px.Criterion) -> None:
    model = build("hf vit")
    expected = criterion.score(model, [(X, Y)])
    with torch.autocast("cpu", torch.bfloat16):
        found = criterion.score(model, [(X, Y)])
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(score, expected[name]) for name, score in found.items())


def test_a_model_that_is_to_be_compiled_is_scored_as_it_is_written() -> None:
    compiled = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.compiler.reset()
    model, settings = build("hf vit"), {"sparsity": 0.5, "rounds": 2, "progress": False}
    expected = px.prune(model, [(X, Y)], px.PX("active"), **settings)
    model.compile(backend=backend)
    assert px.prune(model, [(X, Y)], px.PX("active"), **settings) == expected
    assert px.report(model, expected, X).macs
    assert compiled == []
    model(X)
    assert compiled, "or this test could not fail"

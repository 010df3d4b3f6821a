"""Pruning while the network trains: the schedule, every zero kept, no trace in training, resume, processes."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import gradual_process
import numpy as np
import pytest
import torch
from networks import build, hf_vit, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import px_hf as px
from px_hf.errors import CheckpointError, DataError, InvalidArgumentError, TargetError
from px_hf.gradual import GradualPruner
from px_hf.keep import keep_masks
from px_hf.model.targets import prunable
from px_hf.plan import Plan, round_steps
from px_hf.trainer.gradual_pruning import GradualPruning
from px_hf.trainer.keep_masks import KeepMasks

pytestmark = pytest.mark.filterwarnings("ignore:.*lost all their weights:UserWarning")  # of networks this small

HERE = Path(__file__).parent
BATCHES = [images(4, seed=1), images(3, seed=2)]
LABELLED = [(batch, torch.arange(len(batch)) % 5) for batch in BATCHES]
ACTIVE = px.PX("active", power=0.25)

Optimizer = Callable[[Any], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "Adam amsgrad L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return OPTIMIZERS["AdamW"](model.parameters())


def inputs(step: int, count: int = 4) -> tuple[Tensor, Tensor]:
    return images(count, seed=100 + step), torch.arange(step, step + count) % 5


def loss_of(model: nn.Module, step: int) -> Tensor:
    pixels, labels = inputs(step)
    output = model(pixels)
    return nn.functional.cross_entropy(getattr(output, "logits", output), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    model.train()
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def revived(model: nn.Module, masks: px.Masks) -> int:
    return sum(masks.revived(model).values())


def same(model: nn.Module, other: nn.Module) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def count_kept(total: int, density: float) -> int:
    return total - round((1 - Fraction(repr(density))) * total)


# -------------------------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize(
    ("rounds", "until", "total_steps", "expected"),
    [
        (1, 0.5, 10, (0,)),
        (1, 0.01, 1, (0,)),
        (2, 1.0, 1, None),  # more rounds than steps
        (2, 0.5, 2, (0, 1)),
        (2, 0.5, 100, (0, 50)),
        (5, 0.5, 80, (0, 10, 20, 30, 40)),
        (8, 0.5, 153, (0, 10, 21, 32, 43, 54, 65, 76)),
        (8, 0.5, 14, (0, 1, 2, 3, 4, 5, 6, 7)),
        (8, 0.5, 13, None),
        (3, 0.29, 100, (0, 14, 29)),  # 0.29 * 100 is less than 29 in floating point
        (3, 1, 4, (0, 2, 4)),
    ],
)
def test_when_the_rounds_are(rounds: int, until: float, total_steps: int, expected: tuple[int, ...] | None) -> None:
    if expected is None:
        with pytest.raises(InvalidArgumentError, match=f"rounds={rounds} do not fit into training.*use fewer"):
            round_steps(rounds, until, total_steps)
    else:
        assert round_steps(rounds, until, total_steps) == expected


@dataclass(frozen=True)
class Recording(px.Criterion):
    """Notes what it is asked to score."""

    inner: px.Criterion
    calls: list[tuple[nn.Module, dict[str, Tensor] | None, dict[str, Tensor]]]

    def score(self, model: nn.Module, batches: Any, *, masks: Any = None, prune_head: bool = False) -> Any:
        scores = self.inner.score(model, batches, masks=masks, prune_head=prune_head)
        self.calls.append((model, masks, scores))
        return scores


@pytest.mark.parametrize("criterion", [ACTIVE, px.Magnitude(), px.SNIP()], ids=lambda c: type(c).__name__)
def test_each_round_scores_the_network_as_it_is_then(criterion: px.Criterion) -> None:
    model = build("hf vit")
    optimizer = adamw(model)
    calls: list[Any] = []
    found, expected = [], []
    with px.gradual_pruning(
        optimizer, model, LABELLED, Recording(criterion, calls), sparsity=0.8, total_steps=8, rounds=3, until=0.5
    ) as pruning:
        for step in range(8):
            assert len(calls) == (1 if step < 2 else 2 if step < 4 else 3)
            found.append(pruning.masks)
            train(model, optimizer, range(step, step + 1))
    for t, (scored, masks, scores) in enumerate(calls, start=1):
        assert scored is model
        assert (masks is None) == (t == 1)
        within = None if masks is None else px.Masks(masks)
        assert within is None or within == expected[-1]
        expected.append(px.select(scores, sparsity=0.8 if t == 3 else 1 - 0.2 ** (t / 3), within=within))
    for step, t in enumerate((1, 1, 2, 2, 3, 3, 3, 3)):
        assert found[step] == expected[t - 1]
    if isinstance(criterion, px.Magnitude):  # whose scores are the weights: they have moved between the rounds
        kept = expected[1]["vit.layers.0.mlp.fc1.weight"]
        first, second = (scores["vit.layers.0.mlp.fc1.weight"][kept] for _, _, scores in calls[:2])
        assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "criterion", [px.PX(), px.Magnitude(), px.Random(), px.GemMiner(epochs=1)], ids=lambda c: type(c).__name__
)
def test_one_round_is_pruning_once_before_training(criterion: px.Criterion) -> None:
    once, gradually = build("hf vit"), build("hf vit")
    masks = px.prune(once, LABELLED, criterion, sparsity=0.7, rounds=1, progress=False)
    optimizers = [adamw(once), adamw(gradually)]
    with keep_masks(optimizers[0], once, masks):
        train(once, optimizers[0], range(3))
    with px.gradual_pruning(
        optimizers[1], gradually, LABELLED, criterion, sparsity=0.7, total_steps=3, rounds=1
    ) as pruning:
        train(gradually, optimizers[1], range(3))
    assert pruning.masks == masks
    same(once, gradually)


# ------------------------------------------------------------------------------------------------ zeros stay zero


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_after_every_step_in_weights_gradients_and_state(name: str) -> None:
    model = build("hf vit")
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, range(2))  # momentum from before
    pruning = px.gradual_pruning(
        optimizer, model, BATCHES, px.Magnitude(), sparsity=0.9, total_steps=6, rounds=4, until=0.5
    )
    model.train()
    for step in range(6):
        loss_of(model, step).backward()
        for weight, mask in pruning.masks.items():
            assert not model.get_parameter(weight).grad[~mask].any()  # type: ignore[index]
        optimizer.step()
        assert revived(model, pruning.masks) == 0
        for weight, mask in pruning.masks.items():
            parameter = model.get_parameter(weight)
            assert not parameter.grad[~mask].any()  # type: ignore[index]
            for value in optimizer.state[parameter].values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    assert name == "Rprop" or not value[~mask].any()  # whose step sizes have a least value
        optimizer.zero_grad()
    pruning.remove()
    assert pruning.finished
    train(model, optimizer, range(1))
    assert revived(model, pruning.masks) > 0, "after it they come back, or this test could not fail"


def test_what_is_pruned_stays_pruned_and_the_count_is_exact() -> None:
    model = build("hf resnet")
    optimizer = adamw(model)
    total = sum(weight.numel() for weight in prunable(model).values())
    seen = []
    batches = [images(2, seed=1).repeat(1, 1, 4, 4)]
    with px.gradual_pruning(
        optimizer, model, batches, ACTIVE, sparsity=0.95, total_steps=4, rounds=4, until=0.75
    ) as pruning:
        for step in range(4):
            seen.append(pruning.masks)
            pixels, labels = inputs(step)
            nn.functional.cross_entropy(model(pixels.repeat(1, 1, 4, 4)).logits, labels).backward()
            optimizer.step()
    for t, masks in enumerate(seen, start=1):
        assert masks.kept == count_kept(total, 1 - (0.95 if t == 4 else 1 - (1 - 0.95) ** (t / 4)))
    for earlier, later in itertools.pairwise(seen):
        assert all(not (later[name] & ~earlier[name]).any() for name in later)


@pytest.mark.parametrize(
    ("criterion", "scope", "settings"),
    [
        (px.PX(), "global", {}),
        (px.PX(), "global", {"min_layer_density": 0.1}),
        (ACTIVE, "layer", {}),
        (px.Magnitude(), "row", {}),
        (px.Magnitude(), "2:4", {}),
        (ACTIVE, "1:4", {}),
        (px.Wanda(), None, {}),
        (px.LAMP(), None, {}),
        (px.SNIP(), None, {"prune_head": True}),
        (px.GraSP(), None, {}),
        (px.SynFlow(), None, {}),
        (px.NTKSAP(), None, {}),
        (px.NTKTrace(), None, {}),
        (px.Random(), None, {}),
        (px.GemMiner(epochs=1), None, {}),
        (px.PX(), "structured", {}),
        (px.Magnitude(), "structured:uniform", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_criterion_and_scope(criterion: px.Criterion, scope: str | None, settings: dict[str, Any]) -> None:
    model = build("hf vit")
    sparsity = {"2:4": 0.5, "1:4": 0.8, "structured": 0.6, "structured:uniform": 0.3}.get(scope or "", 0.7)
    optimizer = adamw(model)
    with px.gradual_pruning(
        optimizer, model, LABELLED, criterion, sparsity=sparsity, total_steps=4, rounds=3, scope=scope, **settings
    ) as pruning:
        train(model, optimizer, range(4))
    assert pruning.finished
    assert revived(model, pruning.masks) == 0
    if scope and "structured" in scope:
        assert 0 < pruning.masks.sparsity <= sparsity
    else:
        assert pruning.masks.sparsity == pytest.approx(sparsity, abs=2e-3)
    if scope == "2:4":
        for mask in pruning.masks.values():
            assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


# -------------------------------------------------------------------------------------------- no trace in training


class Dropping(nn.Module):
    """Draws from every source of random numbers, and has BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.out = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        noise = float(np.random.rand()) + random.random() if self.training else 1.0
        hidden = torch.relu(self.norm(self.conv(pixels))) * noise
        hidden = torch.relu(self.out(torch.relu(self.frozen(nn.functional.dropout(hidden, 0.3, self.training)))))
        return self.fc(hidden.mean((2, 3)))


def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "criterion", [px.PX(), px.NTKSAP(), px.GemMiner(epochs=1), px.SNIP()], ids=lambda c: type(c).__name__
)
def test_sparsity_0_is_plain_training_to_the_bit(criterion: px.Criterion) -> None:
    """With a shuffling loader for scoring that shares its generator with the one of training."""
    models = []
    for gradually in (False, True):
        model = Dropping()
        optimizer = adamw(model)
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(images(12), torch.arange(12) % 5)
        training = DataLoader(data, 4, shuffle=True, generator=generator)
        scoring = DataLoader(data, 6, shuffle=True, generator=generator)
        seeded()
        pruning = contextlib.nullcontext()
        if gradually:
            pruning = px.gradual_pruning(optimizer, model, scoring, criterion, sparsity=0, total_steps=6, rounds=4)
        model.train()
        with pruning:
            for _ in range(2):
                for pixels, labels in training:
                    nn.functional.cross_entropy(model(pixels), labels).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        models.append(model)
    same(*models)


class Augmented:
    """Batches that draw from every source of random numbers when they are read."""

    def __iter__(self) -> Any:
        for batch, labels in LABELLED:
            yield batch + random.random() + np.random.rand() + torch.rand(1), labels


def test_a_round_touches_nothing_else() -> None:
    model = Dropping().train()
    model.norm.eval()
    optimizer = adamw(model)
    pruner = GradualPruner(
        optimizer, model, Augmented(), Plan(px.GemMiner(epochs=1), sparsity=0.5, rounds=3), 4, count_steps=False
    )
    loss_of(model, 0).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    flags = {name: (module.training) for name, module in model.named_modules()}
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with torch.no_grad():
        assert pruner.reach(1)
        assert not torch.is_grad_enabled()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["frozen.weight", "frozen.bias"]
    for name, value in model.state_dict().items():
        kept = pruner.masks[name] if name in pruner.masks else torch.ones_like(value, dtype=torch.bool)
        assert torch.equal(value, torch.where(kept, before[name], 0))
    assert gradients.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    for name, gradient in gradients.items():
        kept = pruner.masks[name] if name in pruner.masks else torch.ones_like(gradient, dtype=torch.bool)
        assert torch.equal(model.get_parameter(name).grad, torch.where(kept, gradient, 0))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ kinds of loops


@pytest.mark.parametrize("loop", ["accumulation", "autocast", "scaler", "compiled", "accelerate", "channels last"])
def test_loops(loop: str) -> None:
    model: Any = build("cnn")
    if loop == "channels last":
        model.to(memory_format=torch.channels_last)
    optimizer: Any = OPTIMIZERS["SGD momentum"](model.parameters())
    called = torch.compile(model, backend="aot_eager") if loop == "compiled" else model
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=loop == "scaler")
    accelerator: Any = None
    if loop == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        called, optimizer = accelerator.prepare(model, optimizer)
    parts = 2 if loop in ("accumulation", "accelerate") else 1
    done = []
    with px.gradual_pruning(
        optimizer, called, BATCHES, px.PX(), sparsity=0.8, total_steps=6, rounds=4, until=0.5
    ) as pruning:
        for step in range(6 * parts):
            with accelerator.accumulate(called) if accelerator else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=loop == "autocast"):
                    loss = loss_of(called, step)
                (accelerator.backward if accelerator else lambda it: scaler.scale(it).backward())(loss)
                if accelerator or step % parts == parts - 1:
                    scaler.step(optimizer) if loop == "scaler" else optimizer.step()
                    scaler.update()
                    optimizer.zero_grad()
            assert revived(model, pruning.masks) == 0
            done.append(pruning.masks.kept)
    assert pruning.finished
    assert len(set(done)) == 4 or done[0] != done[-1]
    assert pruning.masks.sparsity == pytest.approx(0.8, abs=1 / pruning.masks.total)
    assert done.index(pruning.masks.kept) == 3 * parts - 1, "the last round is after the third step"


def test_a_step_that_the_scaler_skips_does_not_count() -> None:
    model = build("cnn")
    optimizer = adamw(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with px.gradual_pruning(
        optimizer, model, BATCHES, px.Magnitude(), sparsity=0.8, total_steps=2, rounds=2, until=0.5
    ) as pruning:
        for poison in (True, False, False):
            scaler.scale(loss_of(model, 0)).backward()
            if poison:
                next(model.parameters()).grad[0] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert pruning.finished != poison


def test_an_average_of_the_weights_is_masked_when_it_is_used() -> None:
    model = build("cnn")
    optimizer = adamw(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    with px.gradual_pruning(optimizer, model, BATCHES, px.PX(), sparsity=0.8, total_steps=4, rounds=2) as pruning:
        for step in range(4):
            train(model, optimizer, range(step, step + 1))
            average.update_parameters(model)
    assert revived(average.module, pruning.masks) > 0
    pruning.masks.apply_(average.module)
    assert revived(average.module, pruning.masks) == 0


# ------------------------------------------------------------------------------------------- resume, a run cut short


@pytest.mark.parametrize("criterion", [ACTIVE, px.GemMiner(epochs=1)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("how", ["state", "load_state_dict"])
def test_resume_a_plain_loop_from_any_step(criterion: px.Criterion, how: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sparsity": 0.8, "total_steps": 6, "rounds": 3, "until": 0.7}

    def start(**more: Any) -> tuple[nn.Module, torch.optim.Optimizer, GradualPruner]:
        model = build("mlp")
        optimizer = adamw(model)
        return model, optimizer, px.gradual_pruning(optimizer, model, LABELLED, criterion, **settings, **more)

    whole, optimizer, pruning = start()
    for step in range(6):
        state = [whole.state_dict(), optimizer.state_dict(), pruning.state_dict()]
        torch.save(state, tmp_path / f"{step}.pt")
        train(whole, optimizer, range(step, step + 1))
    for step in range(6):
        weights, moments, state = torch.load(tmp_path / f"{step}.pt", weights_only=True)
        if how == "state":
            model = build("mlp")
            model.load_state_dict(weights)
            optimizer = adamw(model)
            optimizer.load_state_dict(moments)
            resumed = px.gradual_pruning(optimizer, model, LABELLED, criterion, **settings, state=state)
        else:
            model, optimizer, resumed = start()
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            resumed.load_state_dict(state)
        train(model, optimizer, range(step, 6))
        assert resumed.finished
        assert resumed.masks == pruning.masks
        same(model, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["settings"].update(sparsity=0.5), "other settings: sparsity=0.5 there and 0.8 here"),
        (lambda s: s["settings"].update(total_steps=9), "other settings: total_steps=9 there and 6 here"),
        (lambda s: s["settings"].update(criterion="Magnitude()"), "criterion='Magnitude..' there"),
        (lambda s: s["masks"].update({n: torch.zeros_like(m) for n, m in s["masks"].items()}), "are not zero"),
        (lambda s: s.clear(), "not one that GradualPruner.state_dict"),
    ],
)
def test_another_state_is_not_resumed(change: Callable[[dict[str, Any]], None], message: str) -> None:
    model = build("mlp")
    settings: dict[str, Any] = {"sparsity": 0.8, "total_steps": 6, "rounds": 3}
    optimizer = adamw(model)
    state = px.gradual_pruning(optimizer, model, BATCHES, px.PX(), **settings).state_dict()
    change(state)
    hooks = len(optimizer._optimizer_step_post_hooks)
    with pytest.raises(CheckpointError, match=message):
        px.gradual_pruning(optimizer, model, BATCHES, px.PX(), **settings, state=state)
    assert len(optimizer._optimizer_step_post_hooks) == hooks


def test_a_run_that_ends_before_its_last_round_says_so() -> None:
    model = build("mlp")
    optimizer = adamw(model)
    pruning = px.gradual_pruning(optimizer, model, BATCHES, px.PX(), sparsity=0.9, total_steps=8, rounds=3)
    train(model, optimizer, range(3))
    with pytest.warns(UserWarning, match=r"round 2 of 3, after 3 steps; the last was due after 4\..*0\.784\d sparse"):
        pruning.remove()
    pruning.remove()  # says it once
    assert not pruning.finished
    assert pruning.masks.sparsity == pytest.approx(1 - 0.1 ** (2 / 3), abs=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruning = px.gradual_pruning(optimizer, model, BATCHES, px.PX(), sparsity=0.9, total_steps=8, rounds=3)
        with pytest.raises(KeyError), pruning:
            raise KeyError  # which says enough
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


# --------------------------------------------------------------------------------------------------------- bad input


def prepared() -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(DataLoader(images(4), 2))


ROWS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rounds": 0}, InvalidArgumentError, "rounds=0: expected a whole number ≥ 1"),
    ({"rounds": 2.0}, InvalidArgumentError, "rounds=2.0"),
    ({"rounds": 20}, InvalidArgumentError, "rounds=20 do not fit into training: until=0.5 of total_steps=10"),
    ({"until": 0}, InvalidArgumentError, "until=0: expected the share"),
    ({"until": 1.5}, InvalidArgumentError, "until=1.5: expected the share"),
    ({"until": "half"}, InvalidArgumentError, "until='half': expected the share"),
    ({"until": True}, InvalidArgumentError, "until=True"),
    ({"sparsity": 1.0}, InvalidArgumentError, "must be in \\[0, 1\\), got 1.0"),
    ({"sparsity": -0.1}, InvalidArgumentError, "must be in \\[0, 1\\)"),
    ({"total_steps": 0}, InvalidArgumentError, "total_steps=0: expected a whole number of optimizer steps"),
    ({"total_steps": 9.5}, InvalidArgumentError, "total_steps=9.5"),
    ({"scope": "glob"}, InvalidArgumentError, "Unknown scope 'glob'"),
    ({"criterion": px.PX}, InvalidArgumentError, "is not a criterion; expected an object such as PX()"),
    ({"batches": iter(BATCHES)}, DataError, "iterator, which can be read only once"),
    ({"batches": []}, DataError, "batches is empty"),
    ({"batches": prepared}, DataError, "DataLoaderShard that Accelerate has prepared.*batches of its own"),
    ({"min_layer_density": 0.9}, InvalidArgumentError, "min_layer_density=0.9"),
]


@pytest.mark.parametrize(("change", "error", "message"), ROWS, ids=[f"{k}" for row in ROWS for k in row[0]])
def test_bad_input_changes_nothing(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build("mlp")
    before = copy.deepcopy(model.state_dict())
    optimizer = adamw(model)
    given: dict[str, Any] = {
        "batches": BATCHES, "criterion": px.PX(), "sparsity": 0.5, "total_steps": 10, "rounds": 2, **change
    }  # fmt: skip
    if given["batches"] is prepared:
        given["batches"] = prepared()
    with pytest.raises(error, match=message):
        px.gradual_pruning(optimizer, model, **given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_of_other_weights() -> None:
    model = build("mlp")
    with pytest.raises(TargetError, match="steps none of the"):
        px.gradual_pruning(adamw(build("mlp")), model, BATCHES, px.PX(), sparsity=0.5, total_steps=10, rounds=2)
    with pytest.raises(InvalidArgumentError, match=r"torch\.optim\.Optimizer, got str"):
        px.gradual_pruning("AdamW", model, BATCHES, px.PX(), sparsity=0.5, total_steps=10)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- Trainer


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = hf_vit()
    model.config.hidden_dropout_prob = 0.1
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    return model


def examples(count: int = 24) -> list[dict[str, Any]]:
    return [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images(count, seed=7))]


def callback(criterion: px.Criterion = ACTIVE, batches: Any = LABELLED, **changes: Any) -> GradualPruning:
    return GradualPruning(criterion, batches, **{"sparsity": 0.8, "rounds": 3, "until": 0.7, **changes})


def trainer(model: nn.Module, folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 6,
        "per_device_train_batch_size": 4, "save_steps": 1, "logging_steps": 100, "learning_rate": 1e-2,
        "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=examples(8),  # type: ignore[arg-type]
        callbacks=list(callbacks),
    )


class LooksAtEachStep(TrainerCallback):
    def __init__(self, pruning: GradualPruning) -> None:
        self.pruning = pruning
        self.kept: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.kept.append(self.pruning.masks.kept)
        assert revived(kwargs["model"], self.pruning.masks) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True},
        {"optim": "adafactor"},
    ],
    ids=str,
)
def test_trainer(settings: dict[str, Any], tmp_path: Path) -> None:
    model, pruning = vit(), callback()
    with pytest.raises(InvalidArgumentError, match="has no masks yet"):
        _ = pruning.masks
    looks = LooksAtEachStep(pruning)
    trainer(model, tmp_path, pruning, looks, save_strategy="no", **settings).train()
    total = pruning.masks.total
    kept = [count_kept(total, d) for d in (1 - (1 - 0.2 ** (1 / 3)), 1 - (1 - 0.2 ** (2 / 3)), 1 - 0.8)]
    assert looks.kept == [kept[0], kept[1], kept[1], kept[2], kept[2], kept[2]]  # rounds at 0, 2 and 4 of 6
    assert pruning.finished
    assert revived(model, pruning.masks) == 0
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def test_trainer_with_one_round_is_keep_masks(tmp_path: Path) -> None:
    once, gradually = vit(), vit()
    masks = px.prune(once, LABELLED, px.PX(), sparsity=0.8, rounds=1, progress=False)
    trainer(once, tmp_path, KeepMasks(masks), save_strategy="no").train()
    pruning = callback(px.PX(), rounds=1)
    trainer(gradually, tmp_path, pruning, save_strategy="no").train()
    assert pruning.masks == masks
    same(once, gradually)


def test_trainer_with_sparsity_0_is_plain_training(tmp_path: Path) -> None:
    plain, gradually = vit(), vit()
    trainer(plain, tmp_path, save_strategy="no").train()
    scoring = DataLoader(TensorDataset(images(6), torch.arange(6) % 5), 3, shuffle=True)
    trainer(gradually, tmp_path, callback(px.SNIP(), scoring, sparsity=0), save_strategy="no").train()
    same(plain, gradually)


class Interrupts(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def killed() -> None:
    """The body of the test below: dies without a word in the middle of step 6."""

    class Dies(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                os._exit(9)

    pruning = callback(px.GemMiner(epochs=1))
    trainer(vit(), Path(sys.argv[2]), pruning, Dies(), gradient_accumulation_steps=2).train()


@pytest.mark.parametrize("criterion", [ACTIVE, px.GemMiner(epochs=1)], ids=["PX", "GemMiner"])
def test_kill_and_resume_from_every_checkpoint(criterion: px.Criterion, tmp_path: Path) -> None:
    stateful = isinstance(criterion, px.GemMiner)
    if stateful:
        command = [sys.executable, __file__, "killed", str(tmp_path / "run")]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
        assert done.returncode == 9, done.stderr[-3000:]
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer(vit(), tmp_path / "run", callback(), Interrupts(5), gradient_accumulation_steps=2).train()
    whole, expected = vit(), callback(criterion)
    trainer(whole, tmp_path / "whole", expected, gradient_accumulation_steps=2).train()
    for step in (1, 3) if stateful else range(1, 6):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert (checkpoint / "criterion.safetensors").is_file() == (step < 4 and stateful)
        model, pruning = vit(), callback(criterion)
        folder = tmp_path / ("elsewhere" if step % 2 else "run")  # where callbacks are not told of the checkpoint
        settings: dict[str, Any] = {"resume_from_checkpoint": str(checkpoint)} if stateful else {}
        it = trainer(model, folder, pruning, gradient_accumulation_steps=2, save_strategy="no", **settings)
        it.train(resume_from_checkpoint=str(checkpoint))
        assert pruning.finished
        assert pruning.masks == expected.masks
        same(model, whole)
    assert px.Masks.load(tmp_path / "whole" / "checkpoint-6" / "masks.safetensors") == expected.masks
    assert px.Masks.load(tmp_path / "run" / "checkpoint-1" / "masks.safetensors").kept > expected.masks.kept


def interrupted(folder: Path, *callbacks: TrainerCallback) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(vit(), folder, *callbacks, Interrupts(3), save_steps=3).train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 0.5}, "other settings: sparsity=0.8 there and 0.5 here"),
        ({"rounds": 2}, "rounds=3 there and 2 here"),
        ({"criterion": px.PX()}, "criterion=.*there and"),
        ({"scope": "layer"}, "scope='global' there and 'layer' here"),
    ],
)
def test_other_settings_are_not_resumed(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    interrupted(tmp_path, callback())
    with pytest.raises(CheckpointError, match=message):
        trainer(vit(), tmp_path, callback(**changes)).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_training_is_not_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path)
    with pytest.raises(CheckpointError, match="checkpoint-3 was written without GradualPruning"):
        trainer(vit(), tmp_path, callback()).train(resume_from_checkpoint=True)


def test_a_checkpoint_whose_weights_are_not_masked_is_not_resumed(tmp_path: Path) -> None:
    interrupted(tmp_path, callback())
    vit().save_pretrained(tmp_path / "checkpoint-3", save_original_format=False)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="are not zero in the model"):
        trainer(vit(), tmp_path, callback()).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3" / "masks.safetensors").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-3 was trained with masks that were not found"):
        trainer(vit(), tmp_path, callback()).train(resume_from_checkpoint=True)


def test_what_a_criterion_had_learnt_must_be_there(tmp_path: Path) -> None:
    interrupted(tmp_path, callback(px.GemMiner(epochs=1)))
    (tmp_path / "checkpoint-3" / "criterion.safetensors").unlink()
    with pytest.raises(CheckpointError, match="learns from round to round"):
        trainer(vit(), tmp_path, callback(px.GemMiner(epochs=1))).train(resume_from_checkpoint=True)


class Metric:
    """An accuracy that is best when the network is dense, then falls, and rises a little at the end."""

    def __init__(self, *values: float) -> None:
        self.values = iter(values)

    def __call__(self, _: Any) -> dict[str, float]:
        return {"score": next(self.values)}


def evaluating(model: nn.Module, folder: Path, metric: Metric, *callbacks: TrainerCallback) -> Trainer:
    it = trainer(
        model, folder, *callbacks, load_best_model_at_end=True, metric_for_best_model="score", eval_strategy="steps",
        eval_steps=1, greater_is_better=True,
    )  # fmt: skip
    it.compute_metrics = metric
    return it


def test_the_best_model_is_one_after_the_last_round(tmp_path: Path) -> None:
    model, pruning = vit(), callback()
    it = evaluating(model, tmp_path, Metric(0.9, 0.8, 0.7, 0.3, 0.5, 0.4), pruning)
    it.train()
    assert it.state.best_global_step == 5
    assert it.state.best_metric == 0.5
    assert pruning.finished
    assert revived(model, pruning.masks) == 0
    assert px.Masks.load(tmp_path / "checkpoint-5" / "masks.safetensors") == pruning.masks


def test_a_training_that_stops_early_says_so_and_claims_no_more(tmp_path: Path) -> None:
    model, pruning = vit(), callback()
    it = evaluating(model, tmp_path, Metric(0.9, 0.8, 0.7), pruning, EarlyStoppingCallback(2))
    with pytest.warns(UserWarning, match=r"round 2 of 3, after 3 steps; the last was due after 4.*best model so far"):
        it.train()
    assert not pruning.finished
    assert pruning.masks == px.Masks.load(tmp_path / "checkpoint-1" / "masks.safetensors")
    assert revived(model, pruning.masks) == 0
    px.save_pretrained(model, pruning.masks, tmp_path / "out")
    config = px.from_pretrained(tmp_path / "out").config
    assert config.px["sparsity"] == pytest.approx(1 - 0.2 ** (1 / 3), abs=1e-3)


def test_trainer_refuses_what_its_own_sampler_would_miss(tmp_path: Path) -> None:
    model = vit()
    loader = trainer(model, tmp_path).get_train_dataloader()
    with pytest.raises(DataError, match="Accelerate has prepared"):
        callback(batches=loader)
    raw = DataLoader(examples(), 4)  # type: ignore[arg-type]
    for batches in (raw, DataLoader(examples(), batch_sampler=raw.batch_sampler)):  # type: ignore[arg-type]
        it = trainer(model, tmp_path, callback(batches=batches), save_strategy="no")
        it.get_train_dataloader = lambda: raw  # type: ignore[method-assign]
        with pytest.raises(DataError, match="DataLoader that training reads"):
            it.train()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rounds": 0}, InvalidArgumentError, "rounds=0"),
        ({"until": 1.01}, InvalidArgumentError, "until=1.01"),
        ({"sparsity": 1}, InvalidArgumentError, "must be in"),
        ({"scope": "glob"}, InvalidArgumentError, "Unknown scope"),
        ({"criterion": "px"}, InvalidArgumentError, "is not a criterion"),
        ({"rounds": 8}, InvalidArgumentError, "rounds=8 do not fit into training: until=0.7 of total_steps=6"),
        ({"batches": (batch for batch in BATCHES)}, DataError, "can be read only once"),
    ],
)
def test_bad_settings_of_the_callback(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        trainer(vit(), tmp_path, callback(**changes)).train()


# --------------------------------------------------------------------------------------------------------- processes


def environment() -> dict[str, str]:
    cleared = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    return cleared | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def launch(processes: int, *arguments: str) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run([*run, *arguments], env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_end_with_one_mask(processes: int, tmp_path: Path) -> None:
    """Under DDP BatchNorm statistics differ between processes, if their images do; the masks must not."""
    kinds = ("own", "alike") if processes == 2 else ("own",)
    launch(processes, str(HERE / "gradual_process.py"), str(tmp_path), *kinds)
    for data in kinds:
        ranks = [f"{data} {rank} of {processes}" for rank in range(processes)]
        first, *others = (px.Masks.load(tmp_path / f"{rank}.safetensors") for rank in ranks)
        assert all(masks == first for masks in others)
        assert first.sparsity == pytest.approx(0.8, abs=1 / first.total)
        one, *more = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in ranks)
        for state in more:
            assert torch.equal(one["0.weight"], state["0.weight"])
            assert torch.equal(one["1.running_mean"], state["1.running_mean"]) == (data == "alike")
    if processes == 2:  # (g + g) / 2 is g
        gradual_process.train(tmp_path, "alike")
        assert px.Masks.load(tmp_path / "alike 0 of 1.safetensors") == first


def trainer_in_processes() -> None:
    """The body of the test below: a whole training, and one that goes on from the checkpoint between two rounds."""
    folder = Path(sys.argv[2])
    for name in ("whole", "resumed"):
        model, pruning = vit(), callback()
        it = trainer(model, folder / name, pruning, LooksAtEachStep(pruning), save_steps=3)
        assert it.args.world_size == 2
        it.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3") if name == "resumed" else None)
        pruning.masks.save(folder / f"{name}{it.args.process_index}.safetensors")
        torch.save(model.state_dict(), folder / f"{name}{it.args.process_index}.pt")
        del it
        gc.collect()
    torch.distributed.destroy_process_group()


def test_trainer_in_two_processes_and_resumed(tmp_path: Path) -> None:
    launch(2, __file__, "trainer_in_processes", str(tmp_path))
    names = ["whole0", "whole1", "resumed0", "resumed1"]
    first, *others = (px.Masks.load(tmp_path / f"{name}.safetensors") for name in names)
    assert first.sparsity == pytest.approx(0.8, abs=1 / first.total)
    assert all(masks == first for masks in others)
    one, *more = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
    for state in more:
        assert all(torch.equal(value, state[name]) for name, value in one.items())


if __name__ == "__main__":
    {"killed": killed, "trainer_in_processes": trainer_in_processes}[sys.argv[1]]()

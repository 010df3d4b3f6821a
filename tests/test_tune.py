"""Only the ticket moves: every optimizer, what people do to a model meanwhile, Trainer and its checkpoints."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build
from test_finetune import OPTIMIZERS, batch, examples, masks_of, moved, train, vit
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import px_hf as px
from px_hf.tune import TICKET_FILE, frozen_fingerprint, frozen_parameters

State = dict[str, Tensor]


def state(model: nn.Module) -> State:
    return copy.deepcopy(dict(model.state_dict()))


def strays(model: nn.Module, before: State, masks: px.Masks, free: str = "classifier") -> list[str]:
    """The tensors that moved outside the masks, compared bit by bit."""
    found = []
    for name, value in model.state_dict().items():
        same = value.view(torch.int32) == before[name].view(torch.int32)
        allowed = masks[name] if name in masks else torch.full(value.shape, name.startswith(free))
        if bool((~same & ~allowed).any()):
            found.append(name)
    return found


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer_moves_the_ticket_and_the_head_alone(make: Any) -> None:
    model = vit()
    masks, optimizer, before = masks_of(model), make(model.parameters()), state(model)
    with px.tune_only(optimizer, model, masks):
        train(model, optimizer)
        assert strays(model, before, masks) == []
        assert moved(model, before, masks)
        assert not torch.equal(model.classifier.weight, before["classifier.weight"])
        for name, mask in masks.items():
            for value in optimizer.state[model.get_parameter(name)].values():
                if isinstance(value, Tensor) and value.shape == mask.shape and "AdamW" in type(optimizer).__name__:
                    assert not value[~mask].any(), "what is frozen has no momentum"
    assert all(parameter.requires_grad for parameter in model.parameters())
    train(model, optimizer, steps=1)
    assert len(strays(model, before, masks)) > 4, "without the handle they move, or this test could not fail"


def test_what_moved_before_is_frozen_as_it_is_with_its_momentum() -> None:
    model = vit()
    masks = masks_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(model, optimizer)  # momentum everywhere
    model(**batch()).loss.backward()  # and gradients
    before = state(model)
    with px.tune_only(optimizer, model, masks):
        optimizer.step()
        train(model, optimizer)
        assert strays(model, before, masks) == []


@pytest.mark.parametrize("also", [(), ("head",), ("norms",), ("biases",), ("head", "norms", "biases")], ids=str)
def test_groups_that_train_as_a_whole(also: tuple[str, ...]) -> None:
    model = vit()
    masks, before = masks_of(model), state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with px.tune_only(optimizer, model, masks, also=also):
        train(model, optimizer)
    still = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    expected = {
        name
        for name in before
        if name not in masks
        and not ("head" in also and name.startswith("classifier"))
        and not ("norms" in also and "norm" in name)
        and not ("biases" in also and name.endswith(".bias"))
    }
    expected -= {name for name in expected if name.startswith("vit.pooler")}
    assert still == expected == set(frozen_parameters(model, masks, also))


def test_a_pruned_model_stays_pruned_while_a_ticket_of_it_is_tuned() -> None:
    model = vit()
    pruned = px.prune(model, [], px.Magnitude(), sparsity=0.7, progress=False)
    ticket = px.Masks({name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in pruned.items()})
    pruned.apply_(model)
    before = state(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with px.keep_masks(optimizer, model, pruned), px.tune_only(optimizer, model, ticket):
        train(model, optimizer)
    assert strays(model, before, ticket) == []
    assert not pruned.revived(model)


# ------------------------------------------------------------------------------------------------ meanwhile


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def test_what_is_loaded_is_what_stays() -> None:
    model, other = vit(), state(vit())
    masks, optimizer = masks_of(model), adamw(model)
    loaded = {name: value + 1 for name, value in other.items()}
    with px.tune_only(optimizer, model, masks):
        train(model, optimizer)
        model.load_state_dict(loaded)
        train(model, optimizer)
        assert strays(model, loaded, masks) == []


def test_new_weights_that_the_optimizer_knows() -> None:
    model = vit()
    masks, optimizer, before = masks_of(model), adamw(model), state(model)
    with px.tune_only(optimizer, model, masks):
        model.load_state_dict(before, assign=True)
        with pytest.raises(px.TargetError, match=r"steps none of the .* call tune_only then"):
            train(model, optimizer)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        train(model, optimizer)
        assert strays(model, before, masks) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_conversion_of_the_model(dtype: torch.dtype) -> None:
    model = vit()
    masks, optimizer = masks_of(model), torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    with px.tune_only(optimizer, model, masks):
        train(model, optimizer)
        model.to(dtype)
        before = state(model)
        given = batch()
        for _ in range(2):
            model(given["pixel_values"].to(dtype), labels=given["labels"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, mask in masks.items():
            assert torch.equal(model.state_dict()[name][~mask], before[name][~mask])
            assert not torch.equal(model.state_dict()[name], before[name])


def test_channels_last_and_batchnorm() -> None:
    model = build("cnn")
    masks = px.Masks({"3.weight": torch.rand(6, 6, 3, 3) < 0.5})
    optimizer, before = adamw(model), state(model)
    model.to(memory_format=torch.channels_last)
    with px.tune_only(optimizer, model, masks, also=()):
        model(torch.randn(4, 3, 8, 8)).sum().backward()
        optimizer.step()
    assert strays(model, before, masks) == []
    assert moved(model, before, masks)


BAD = {
    "unknown group": (lambda m, k: px.tune_only(adamw(m), m, k, also=("bias",)), px.InvalidArgumentError, "'biases'"),
    "one text": (lambda m, k: px.tune_only(adamw(m), m, k, also="head"), px.InvalidArgumentError, "a collection"),
    "no optimizer": (lambda m, k: px.tune_only(None, m, k), px.InvalidArgumentError, "tune_only needs a torch"),
    "another model": (lambda m, k: px.tune_only(adamw(m), build("cnn"), k), px.TargetError, "do not fit the model"),
    "another copy": (lambda m, k: px.tune_only(adamw(vit()), m, k), px.TargetError, "another copy"),
    "no masks": (lambda m, k: px.TuneOnly(k.tensors), px.InvalidArgumentError, "needs Masks"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    model = vit()
    with pytest.raises(error, match=match):
        call(model, masks_of(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


# ------------------------------------------------------------------------------------------------ Trainer


def trainer(model: nn.Module, folder: Path, masks: px.Masks, steps: int) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=8, report_to=[], disable_tqdm=True,
        use_cpu=True, weight_decay=0.1, learning_rate=1e-2, lr_scheduler_type="constant",
    )  # fmt: skip
    return Trainer(model, args, train_dataset=examples(), callbacks=[px.TuneOnly(masks)])


def test_trainer_tunes_the_ticket_and_resumes_the_same(tmp_path: Path) -> None:
    model = vit()
    masks, before = masks_of(model), state(model)
    trainer(model, tmp_path / "whole", masks, 4).train()
    assert strays(model, before, masks) == []
    assert moved(model, before, masks)
    assert px.Masks.load(tmp_path / "whole" / "checkpoint-2" / TICKET_FILE) == masks
    assert frozen_fingerprint(model, masks) == frozen_fingerprint(vit(), masks)

    resumed = vit()
    trainer(resumed, tmp_path / "whole", masks, 4).train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    model = vit()
    masks = masks_of(model)
    trainer(model, tmp_path, masks, 2).train()
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(px.CheckpointError, match="with other masks"):
        trainer(vit(), tmp_path, masks_of(model, seed=1), 4).train(resume_from_checkpoint=str(checkpoint))
    with torch.no_grad():
        model.vit.layernorm.weight.add_(1)
    model.save_pretrained(checkpoint, save_original_format=False)
    with pytest.raises(px.CheckpointError, match="not those that training began with"):
        trainer(vit(), tmp_path, masks, 4).train(resume_from_checkpoint=str(checkpoint))


# ------------------------------------------------------------------------------------------------ two processes

TWO = """
import copy, sys, torch, torch.distributed as dist, px_hf as px
dist.init_process_group("gloo")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
before = copy.deepcopy(model.state_dict())
ddp = torch.nn.parallel.DistributedDataParallel(model)
masks = px.Masks({"0.weight": torch.arange(32).view(8, 4) % 3 == 0})
optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.1, weight_decay=0.1)
with px.tune_only(optimizer, ddp, masks, also=()):
    for step in range(3):
        ddp(torch.randn(2, 4) + dist.get_rank()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
for name, value in model.state_dict().items():
    free = masks[name] if name in masks else torch.zeros(value.shape, dtype=torch.bool)
    assert torch.equal(value[~free], before[name][~free]), name
    assert not free.any() or not torch.equal(value[free], before[name][free])
shared = model[0].weight.detach().clone()
dist.broadcast(shared, 0)
assert torch.equal(shared, model[0].weight)
dist.destroy_process_group()
"""


def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(px.__file__).parents[1])}
    done = subprocess.run(
        [*command, str(tmp_path / "two.py")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]

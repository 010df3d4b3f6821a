"""Distillation: the loss by its definition, the teacher untouched, the same however a batch is split."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, images
from torch import Tensor, nn
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

import px_hf as px
from px_hf.distillation import Distillation, hidden_loss, logits_loss
from px_hf.errors import InvalidArgumentError, TargetError
from px_hf.runs.arguments import FineTuneArguments
from px_hf.runs.classifier_trainer import make_trainer
from px_hf.trainer.distillation_trainer import DistillationTrainer

HERE = Path(__file__).parent


def teacher_of(name: str = "hf vit") -> nn.Module:
    model = build(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    return model.train()


def examples(count: int = 24) -> list[dict[str, Any]]:
    return [{"pixel_values": image, "labels": i % 5} for i, image in enumerate(images(count, seed=7))]


def batch(count: int = 6) -> dict[str, Tensor]:
    rows = examples(count)
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


# ---------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4, 4)])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_logits_by_definition(shape: tuple[int, ...], temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    places = [(z.movedim(1, -1).reshape(-1, shape[1]) / temperature).softmax(1) for z in (s, t)]
    divergence = [sum(q * (q / p).log() for p, q in zip(*row, strict=True)) for row in zip(*places, strict=True)]
    expected = temperature**2 * sum(divergence) / len(divergence)
    assert float(logits_loss(s, t, temperature)) == pytest.approx(float(expected), rel=1e-5)
    assert logits_loss(t, t, temperature).abs() < 1e-6


def test_hidden_states_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (tuple(torch.randn(3, 4, 2, generator=generator) for _ in range(3)) for _ in range(2))
    expected = 0.0
    for s, t in list(zip(student, teacher, strict=True))[1:]:
        for n in range(3):
            expected += float(((s[n] - t[n]) ** 2).mean() / (t[n] ** 2).mean()) / 3
    assert float(hidden_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(hidden_loss(student, teacher, (0, -1))) != pytest.approx(expected)
    assert float(hidden_loss(teacher, teacher)) == 0
    assert float(hidden_loss(teacher, tuple(map(torch.zeros_like, teacher)))) > 1e30, "and no division by zero"


@pytest.mark.parametrize(("alpha", "beta"), [(0, 0), (0.3, 0), (1, 0), (0, 2.0), (0.5, 0.1)])
def test_the_sum_of_its_parts(alpha: float, beta: float) -> None:
    student, teacher = build("hf vit").eval(), teacher_of()
    distillation = Distillation(teacher, alpha=alpha, temperature=2.0, beta=beta)
    given = batch()
    outputs = student(**given, output_hidden_states=True)
    loss = distillation.loss(outputs.loss, outputs, given)
    teacher.eval()
    with torch.no_grad():
        taught = teacher(pixel_values=given["pixel_values"], output_hidden_states=True)
    expected = (
        (1 - alpha) * outputs.loss
        + alpha * logits_loss(outputs.logits, taught.logits, 2.0)
        + beta * hidden_loss(outputs.hidden_states, taught.hidden_states)
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("name", ["mlp", "hf resnet", "timm vit", "hf vit"])
def test_the_teacher_is_frozen_and_as_it_was(name: str) -> None:
    student, teacher = build(name), teacher_of(name)
    for module in teacher.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    before, flags = copy.deepcopy(teacher.state_dict()), [module.training for module in teacher.modules()]
    given = batch()
    if name == "hf resnet":
        given["pixel_values"] = given["pixel_values"].repeat(1, 1, 4, 4)
    named = name.startswith("hf")
    outputs = student(**given) if named else student(given["pixel_values"])
    logits = outputs.logits if named else outputs
    distillation = Distillation(teacher, alpha=0.7)
    losses = []
    for _ in range(2):
        losses.append(distillation.loss(nn.functional.cross_entropy(logits, given["labels"]), outputs, given))
    losses[0].backward()
    assert losses[0] == losses[1], "in eval mode"
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert [module.training for module in teacher.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())


# ---------------------------------------------------------------------------------------------------------- Trainer


def trainer(model: nn.Module, folder: Path, distillation: Any, callbacks: Any = (), **settings: Any) -> Any:
    arguments = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 3,
        "per_device_train_batch_size": 8, "save_strategy": "no", "logging_steps": 1, "learning_rate": 0.1,
        "optim": "sgd", "max_grad_norm": 0.0, "dataloader_pin_memory": False, **settings,
    }  # fmt: skip
    return DistillationTrainer(
        model,
        TrainingArguments(**arguments),
        train_dataset=examples(),
        eval_dataset=examples(8),
        callbacks=list(callbacks),
        distillation=distillation,
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def by_hand(distillation: Distillation, dataset: list[dict[str, Any]], order: list[int]) -> nn.Module:
    model = build("hf vit").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for rows in (order[:8], order[8:16], order[16:]):
        given = {
            "pixel_values": torch.stack([dataset[i]["pixel_values"] for i in rows]),
            "labels": torch.tensor([dataset[i]["labels"] for i in rows]),
        }
        outputs = model(**given, output_hidden_states=True)
        distillation.loss(outputs.loss, outputs, given).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Order:
    """Feeds the examples in their order."""

    def __call__(self, it: Any) -> Any:
        it._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(it.train_dataset)
        it.args.lr_scheduler_type = "constant"
        return it


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_trainer_is_the_loop_by_hand_however_a_batch_is_split(parts: int, beta: float, tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
    distillation = Distillation(teacher_of(), alpha=0.5, beta=beta)
    expected = by_hand(distillation, examples(), list(range(24)))
    model = build("hf vit")
    Order()(trainer(model, tmp_path, distillation, **settings)).train()
    torch.testing.assert_close(weights(model), weights(expected), rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights(model), weights(build("hf vit")))


def of_recipes(folder: Path, distillation: Distillation, count: int, **settings: Any) -> Any:
    """The Trainer of the recipes, on the first examples, without what else would differ from the loop by hand."""
    training = FineTuneArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", eval_strategy="no",
        num_train_epochs=1.0, learning_rate=0.1, optim="sgd", weight_decay=0.0, max_grad_norm=0.0, **settings,
    )  # fmt: skip
    data: Any = {"train": examples(count), "validation": examples(4)}
    return Order()(make_trainer(build("hf vit"), data, training, distillation=distillation))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_the_recipes_however_a_batch_is_split(smoothing: float, tmp_path: Path) -> None:
    """A function that divides a sum by the examples of the whole step; the last step is a short one."""
    distillation = Distillation(teacher_of(), alpha=0.4, beta=0.5)
    found = []
    for parts in (1, 2, 4):
        settings = {"per_device_train_batch_size": 8 // parts, "gradient_accumulation_steps": parts}
        it = of_recipes(tmp_path, distillation, 21, label_smoothing_factor=smoothing, **settings)
        it.train()
        found.append(weights(it.model))
    expected = build("hf vit").train()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.1)
    for rows in (range(8), range(8, 16), range(16, 21)):
        given = {
            "pixel_values": torch.stack([examples()[i]["pixel_values"] for i in rows]),
            "labels": torch.tensor([examples()[i]["labels"] for i in rows]),
        }
        outputs = expected(**given, output_hidden_states=True)
        task = nn.functional.cross_entropy(outputs.logits, given["labels"], label_smoothing=smoothing)
        optimizer.zero_grad()
        distillation.loss(task, outputs, given).backward()
        optimizer.step()
    for after in found:
        torch.testing.assert_close(after, weights(expected), rtol=1e-4, atol=1e-6)


def test_evaluation_is_the_task_alone(tmp_path: Path) -> None:
    class Deaf(nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("the teacher was asked")

    model = build("hf vit")
    it = trainer(model, tmp_path, Distillation(Deaf()))
    loss = it.evaluate()["eval_loss"]
    model.eval()
    assert loss == pytest.approx(float(model(**batch(8)).loss.detach()), rel=1e-5)


def test_with_gradual_pruning(tmp_path: Path) -> None:
    model = build("hf vit")
    pruning = px.GradualPruning(px.PX("active"), [images(4)], sparsity=0.8, rounds=2, until=0.7)
    it = trainer(model, tmp_path, Distillation(teacher_of(), beta=0.1), [pruning], optim="adamw_torch")
    it.train()
    assert pruning.finished
    assert not pruning.masks.revived(model)


def in_processes() -> None:
    """The body of the test below, run by torchrun in each process."""
    model = build("hf vit")
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    it = Order()(trainer(model, Path(sys.argv[1]), Distillation(teacher_of(), alpha=0.5, beta=0.5), **settings))
    assert it.args.world_size == 2
    it.train()
    func = of_recipes(Path(sys.argv[1]), Distillation(teacher_of(), alpha=0.5, beta=0.5), 24, **settings)
    func.train()
    torch.save([weights(model), weights(func.model)], Path(sys.argv[1], f"{it.args.process_index}.pt"))
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    env |= {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "ACCELERATE_USE_CPU": "true"}
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([*run, __file__, str(tmp_path)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = weights(by_hand(Distillation(teacher_of(), alpha=0.5, beta=0.5), examples(), list(range(24))))
    for rank in (0, 1):
        for found in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- bad input


def wider(**changes: Any) -> nn.Module:
    given = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8,
        "patch_size": 4, "num_labels": 5, **changes,
    }  # fmt: skip
    return ViTForImageClassification(ViTConfig(**given))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher": "google/vit"}, r"teacher='google/vit'.*expected a torch\.nn\.Module"),
        ({"alpha": 1.2}, "alpha=1.2"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"temperature": 0}, "temperature=0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"beta": -1}, "beta=-1"),
        ({"beta": float("inf")}, "beta=inf"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Distillation(**{"teacher": nn.Identity(), **settings})


@pytest.mark.parametrize(
    ("teacher", "settings", "message"),
    [
        (lambda: wider(num_labels=7), {}, r"logits are \[6, 7\] and the student's \[6, 5\].*other classes"),
        (lambda: wider(hidden_size=32), {"beta": 1.0}, "hidden states do not match"),
        (lambda: wider(num_hidden_layers=3), {"beta": 1.0}, "hidden states do not match"),
        (wider, {"beta": 1.0, "layers": (5,)}, r"hidden states do not match.*layers=\(5,\)"),
        (lambda: nn.Flatten(), {"beta": 1.0, "alpha": 0.0}, "output_hidden_states"),
    ],
)
def test_teachers_that_do_not_fit(teacher: Any, settings: dict[str, Any], message: str) -> None:
    student, given = build("hf vit"), batch()
    outputs = student(**given, output_hidden_states=True)
    with pytest.raises(TargetError, match=message):
        Distillation(teacher(), **settings).loss(outputs.loss, outputs, given)
    if settings.get("beta"):
        outputs = student(**given)
        with pytest.raises(TargetError, match="the student returned none"):
            Distillation(wider(), beta=1.0).loss(outputs.loss, outputs, given)


def test_the_trainer_looks_at_the_names_of_the_classes(tmp_path: Path) -> None:
    model = build("hf vit")
    with pytest.raises(InvalidArgumentError, match="the teacher is the model that trains"):
        trainer(model, tmp_path, Distillation(model))
    with pytest.raises(InvalidArgumentError, match=r"expected px\.Distillation"):
        trainer(model, tmp_path, build("hf vit"))
    with pytest.raises(TargetError, match="other classes than the model: 7"):
        trainer(model, tmp_path, Distillation(wider(num_labels=7)))
    names = dict(enumerate(["cat", "dog", "cow", "hen", "ape"]))
    others = names | {0: "dog", 1: "cat"}
    student, teacher = wider(id2label=names), wider(id2label=others)
    with pytest.raises(TargetError, match=r"5 \(dog, cat, cow, \.\.\.\) and 5 \(cat, dog, cow"):
        trainer(student, tmp_path, Distillation(teacher))
    trainer(student, tmp_path, Distillation(wider(id2label=names)))
    trainer(student, tmp_path, Distillation(wider()))


if __name__ == "__main__":
    in_processes()

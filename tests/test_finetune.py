"""Zeros survive training: every optimizer, precision, accumulation, resume and two processes."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import timm
import timm.optim
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification

from px_hf.errors import CheckpointError, InvalidArgumentError, TargetError
from px_hf.keep import keep_masks
from px_hf.masks import Masks
from px_hf.trainer.keep_masks import KeepMasks

Optimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW loop": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "Adam amsgrad L2": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-2),
    "SGD nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "timm Lion": lambda p: timm.optim.Lion(list(p), lr=1e-3, weight_decay=0.1),
    "timm LAMB": lambda p: timm.optim.Lamb(list(p), lr=1e-2, weight_decay=0.1),
    "timm Muon": lambda p: timm.optim.Muon(list(p), lr=1e-2, weight_decay=0.1),
}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=3,
        )
    )


def masks_of(model: nn.Module, seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks(
        {
            name: torch.rand(parameter.shape, generator=generator) < 0.3
            for name, parameter in model.named_parameters()
            if parameter.dim() > 1 and "layer" in name
        }
    )


def examples(count: int = 24) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images)]


def batch(count: int = 8) -> dict[str, Tensor]:
    rows = examples(count)
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),  # type: ignore[misc]
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def revived(model: nn.Module, masks: Masks) -> int:
    """How many pruned weights are not zero (NaN is not)."""
    return sum(int((model.get_parameter(name)[~mask] != 0).sum()) for name, mask in masks.items())


def moved(model: nn.Module, before: dict[str, Tensor], masks: Masks) -> bool:
    """Each masked tensor has kept weights that are not what they were."""
    return all(not torch.equal(model.get_parameter(name)[mask], before[name][mask]) for name, mask in masks.items())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        model(**batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------- keep_masks


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_optimizer(make: Optimizer) -> None:
    model = vit()
    masks, optimizer, before = masks_of(model), make(model.parameters()), copy.deepcopy(model.state_dict())
    assert revived(model, masks) > 0
    with keep_masks(optimizer, model, masks):
        assert revived(model, masks) == 0
        train(model, optimizer)
        assert revived(model, masks) == 0
        assert moved(model, before, masks)
    train(model, optimizer, steps=1)
    assert revived(model, masks) > 0, "without the handle they come back, or this test could not fail"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon yet")
def test_muon_steps_the_matrices_and_another_optimizer_the_rest() -> None:
    """Orthogonalised updates are dense whatever the gradients are."""
    model = vit()
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    matrices = [p for name, p in model.named_parameters() if name in masks]
    rest = [p for name, p in model.named_parameters() if name not in masks]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1)
    with keep_masks(muon, model, masks):
        for _ in range(3):
            train(model, muon, steps=1)
            OPTIMIZERS["AdamW"](rest).step()
            assert revived(model, masks) == 0
        assert moved(model, before, masks)
    train(model, muon, steps=1)
    assert revived(model, masks) > 0


def test_lbfgs() -> None:
    model = vit()
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        assert revived(model, masks) == 0, "the search leaves the kept weights' subspace"
        return loss

    with keep_masks(optimizer, model, masks):
        for _ in range(2):
            optimizer.step(closure)
        assert revived(model, masks) == 0
        assert moved(model, before, masks)


@pytest.mark.parametrize("name", ["AdamW", "SGD momentum"])
def test_a_state_from_before_does_not_bring_them_back(name: str) -> None:
    model = vit()
    masks, optimizer = masks_of(model), OPTIMIZERS[name](model.parameters())
    train(model, optimizer)
    with keep_masks(optimizer, model, masks):
        train(model, optimizer)
        assert revived(model, masks) == 0


def test_pruned_weights_have_no_state_and_do_not_count_in_the_norm() -> None:
    model = vit()
    masks, optimizer = masks_of(model), OPTIMIZERS["AdamW"](model.parameters())
    masks.apply_(model)
    model(**batch()).loss.backward()
    kept = {name: masks[name] if name in masks else torch.ones(()) for name, _ in model.named_parameters()}
    expected = torch.stack([(p.grad * kept[name]).norm() for name, p in model.named_parameters()]).norm()
    dense = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.zero_grad()

    with keep_masks(optimizer, model, masks):
        model(**batch()).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        torch.testing.assert_close(norm, expected)
        assert dense > norm + 1e-3
        optimizer.step()
    for name, mask in masks.items():
        state = optimizer.state[model.get_parameter(name)]
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert not moment[~mask].any()
            assert moment[mask].any()


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_accumulation_and_autocast(micro_batches: int, autocast: bool) -> None:
    model = vit()
    masks, optimizer, before = (
        masks_of(model),
        OPTIMIZERS["AdamW"](model.parameters()),
        copy.deepcopy(vit().state_dict()),
    )
    with keep_masks(optimizer, model, masks):
        for _ in range(2):
            for _ in range(micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**batch()).loss
                loss.backward()
            assert all(not model.get_parameter(name).grad[~mask].any() for name, mask in masks.items())
            optimizer.step()
            optimizer.zero_grad()
        assert revived(model, masks) == 0
        assert moved(model, before, masks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_another_width(dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    masks, optimizer, before = (
        masks_of(model),
        OPTIMIZERS["AdamW"](model.parameters()),
        copy.deepcopy(model.state_dict()),
    )
    inputs = {"pixel_values": batch()["pixel_values"].to(dtype), "labels": batch()["labels"]}
    with keep_masks(optimizer, model, masks):
        model(**inputs).loss.backward()
        optimizer.step()
        assert revived(model, masks) == 0
        assert moved(model, before, masks)


def test_a_step_that_the_scaler_skips() -> None:
    model = vit()
    masks, optimizer = masks_of(model), OPTIMIZERS["AdamW"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with keep_masks(optimizer, model, masks):
        for poison in (False, True, False):
            before = copy.deepcopy(model.state_dict())
            scaler.scale(model(**batch()).loss).backward()
            if poison:
                model.classifier.weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert revived(model, masks) == 0
            assert moved(model, before, masks) != poison


def test_nan_gradients_do_not_reach_pruned_weights() -> None:
    model = vit()
    masks, optimizer = masks_of(model), OPTIMIZERS["AdamW"](model.parameters())
    with keep_masks(optimizer, model, masks):
        (model(**batch()).loss * float("nan")).backward()
        optimizer.step()
        assert revived(model, masks) == 0


def test_weights_in_channels_last_and_a_compiled_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3)).to(memory_format=torch.channels_last)
    optimizer = OPTIMIZERS["SGD momentum"](model.parameters())
    masks = Masks({name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters() if p.dim() == 4})
    compiled = torch.compile(model, backend="aot_eager")
    before = copy.deepcopy(model.state_dict())
    with keep_masks(optimizer, compiled, masks):  # type: ignore[arg-type]
        for _ in range(2):
            compiled(torch.randn(2, 2, 8, 8)).square().mean().backward()
            optimizer.step()
        assert revived(model, masks) == 0
        assert moved(model, before, masks)


def test_frozen_weights_and_several_optimizers() -> None:
    model = vit()
    masks = masks_of(model)
    first, *others = masks
    model.get_parameter(first).requires_grad_(False)
    half = len(others) // 2
    parts = [[model.get_parameter(name) for name in names] for names in (others[:half], others[half:])]
    optimizers = [OPTIMIZERS["AdamW"](part) for part in parts]
    before = copy.deepcopy(model.state_dict())
    handles = [keep_masks(optimizer, model, masks) for optimizer in optimizers]
    for _ in range(2):
        model(**batch()).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert revived(model, masks) == 0
    assert moved(model, before, Masks({name: masks[name] for name in others}))
    for handle in handles:
        handle.remove()
        handle.remove()


def test_everything_frozen() -> None:
    model = vit()
    masks = masks_of(model)
    for name in masks:
        model.get_parameter(name).requires_grad_(False)
    optimizer = OPTIMIZERS["AdamW"](model.classifier.parameters())
    with keep_masks(optimizer, model, masks):
        train(model, optimizer, steps=1)
        assert revived(model, masks) == 0


def test_misfits_change_nothing() -> None:
    model = vit()
    masks, optimizer, before = (
        masks_of(model),
        OPTIMIZERS["AdamW"](model.parameters()),
        copy.deepcopy(model.state_dict()),
    )
    rows = [
        (OPTIMIZERS["AdamW"](vit().parameters()), masks, TargetError, "steps none of the 12 masked weights"),
        (optimizer, Masks({"nope": torch.ones(2).bool()}), TargetError, "'nope' is not a parameter"),
        ("AdamW", masks, InvalidArgumentError, "needs a torch.optim.Optimizer, got str"),
    ]
    for wrong_optimizer, wrong_masks, error, message in rows:
        with pytest.raises(error, match=message):
            keep_masks(wrong_optimizer, model, wrong_masks)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    train(model, optimizer, steps=1)
    assert revived(model, masks) > 0


# -------------------------------------------------------------------------------------------------- KeepMasks


def trainer(
    model: nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    make: Optimizer = OPTIMIZERS["AdamW"],
    **settings: object,
) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "save_steps": 2,
        "logging_steps": 100,
        "dataloader_pin_memory": False,
        **settings,
    }
    return Trainer(
        model,
        TrainingArguments(**arguments),  # type: ignore[arg-type]
        train_dataset=examples(),  # type: ignore[arg-type]
        eval_dataset=examples(8),  # type: ignore[arg-type]
        optimizers=(make(model.parameters()), None),
        callbacks=list(callbacks),
    )


class LooksAtEachStep(TrainerCallback):
    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.steps += 1
        assert revived(kwargs["model"], self.masks) == 0


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("AdamW", {}),
        ("AdamW", {"gradient_accumulation_steps": 3}),
        ("AdamW", {"bf16": True}),
        ("AdamW", {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1}),
        ("AdamW", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
        ("AdamW", {"gradient_checkpointing": True}),
        ("SGD momentum", {}),
        ("SGD nesterov", {"gradient_accumulation_steps": 2}),
        ("Adafactor", {"max_grad_norm": 0.0}),
    ],
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")  # transformers 5.0 knows no other name
def test_trainer(name: str, settings: dict[str, object], tmp_path: Path) -> None:
    model = vit()
    masks, before = masks_of(model), copy.deepcopy(model.state_dict())
    looks = LooksAtEachStep(masks)
    trainer(model, tmp_path, KeepMasks(masks), looks, make=OPTIMIZERS[name], save_strategy="no", **settings).train()
    assert looks.steps == 6
    assert revived(model, masks) == 0
    assert moved(model, before, masks)


def test_trainer_without_the_callback_brings_them_back(tmp_path: Path) -> None:
    model = vit()
    masks = masks_of(model)
    masks.apply_(model)
    trainer(model, tmp_path, save_strategy="no").train()
    assert revived(model, masks) > 0.9 * (masks.total - masks.kept)


def test_the_hooks_end_with_training(tmp_path: Path) -> None:
    model = vit()
    masks = masks_of(model)
    it = trainer(model, tmp_path, KeepMasks(masks), save_strategy="no")
    it.train()
    it.remove_callback(KeepMasks)
    it.train()
    assert revived(model, masks) > 0


class Killed(TrainerCallback):
    """Ends the run in the middle, as a crash does: no on_train_end."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def killed_run(folder: Path, masks: Masks) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(vit(), folder, KeepMasks(masks), Killed(5)).train()


@pytest.mark.parametrize("explicit", [False, True])
def test_kill_and_resume_ends_as_the_uninterrupted_run(explicit: bool, tmp_path: Path) -> None:
    masks = masks_of(vit())
    whole = vit()
    trainer(whole, tmp_path / "whole", KeepMasks(masks)).train()

    killed_run(tmp_path / "run", masks)
    assert Masks.load(tmp_path / "run" / "checkpoint-4" / "masks.safetensors") == masks
    resumed = vit()
    # With an output folder of its own, Trainer is told where the checkpoint is and callbacks are not.
    folder = tmp_path / ("elsewhere" if explicit else "run")
    it = trainer(resumed, folder, KeepMasks(Masks.load(tmp_path / "run" / "checkpoint-4" / "masks.safetensors")))
    it.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4") if explicit else True)
    assert it.state.global_step == 6
    assert revived(resumed, masks) == 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert Masks.load(folder / "checkpoint-6" / "masks.safetensors") == masks
    loaded = ViTForImageClassification.from_pretrained(folder / "checkpoint-6")
    assert torch.equal(loaded.eval()(**batch()).logits, whole.eval()(**batch()).logits)


def test_the_same_trainer_can_train_again_after_a_crash(tmp_path: Path) -> None:
    model = vit()
    masks = masks_of(model)
    it = trainer(model, tmp_path, KeepMasks(masks), Killed(3))
    with pytest.raises(KeyboardInterrupt):
        it.train()
    it.remove_callback(Killed)
    it.train()
    assert revived(model, masks) == 0
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())


def save_other_masks(checkpoint: Path) -> None:
    masks_of(vit(), seed=1).save(checkpoint / "masks.safetensors")


def delete_masks(checkpoint: Path) -> None:
    (checkpoint / "masks.safetensors").unlink()


def truncate_masks(checkpoint: Path) -> None:
    content = (checkpoint / "masks.safetensors").read_bytes()
    (checkpoint / "masks.safetensors").write_bytes(content[:-7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (save_other_masks, "trained with other masks"),
        (delete_masks, r"has no masks.*masks\.save\("),
        (truncate_masks, "not a whole file of masks"),
    ],
)
def test_a_damaged_checkpoint_is_not_resumed(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    masks = masks_of(vit())
    killed_run(tmp_path, masks)
    damage(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=message):
        trainer(vit(), tmp_path, KeepMasks(masks)).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("folder", ["run", "elsewhere"])
def test_other_masks_are_not_resumed(folder: str, tmp_path: Path) -> None:
    killed_run(tmp_path / "run", masks_of(vit()))
    it = trainer(vit(), tmp_path / folder, KeepMasks(masks_of(vit(), seed=1)))
    with pytest.raises(CheckpointError, match="checkpoint-4 was trained with other masks"):
        it.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


@pytest.mark.parametrize("folder", ["run", "elsewhere"])
def test_a_checkpoint_without_masks_is_not_resumed_until_told(folder: str, tmp_path: Path) -> None:
    masks, checkpoint = masks_of(vit()), tmp_path / "run" / "checkpoint-4"
    with pytest.raises(KeyboardInterrupt):
        trainer(vit(), tmp_path / "run", Killed(5)).train()
    model = vit()
    it = trainer(model, tmp_path / folder, KeepMasks(masks))
    with pytest.raises(CheckpointError, match=r"checkpoint-4 has no masks.*start anew"):
        it.train(resume_from_checkpoint=str(checkpoint))
    masks.save(tmp_path / folder / "checkpoint-4" / "masks.safetensors")
    with pytest.raises(CheckpointError, match="are not zero in what Trainer loaded from checkpoint-4"):
        it.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_at_the_end_is_masked(tmp_path: Path) -> None:
    model = vit()
    masks = masks_of(model)

    class Revives(TrainerCallback):
        """What a best checkpoint from before the masks would do."""

        def on_save(self, args, state, control, **kwargs) -> None:
            from safetensors.torch import load_file, save_file

            file = Path(args.output_dir, f"checkpoint-{state.global_step}", "model.safetensors")
            weights = load_file(file)
            save_file({name: value + 1 for name, value in weights.items()}, file, metadata={"format": "pt"})

    it = trainer(
        model, tmp_path, KeepMasks(masks), Revives(), load_best_model_at_end=True, eval_strategy="steps", eval_steps=2
    )
    it.train()
    assert it.state.best_model_checkpoint is not None
    for part in (model.vit.layernorm, model.vit.layers[0].layernorm_before):
        assert part.weight.min() > 1.5, "all of the best checkpoint was loaded"
    assert revived(model, masks) == 0


def test_bad_masks_and_a_model_that_they_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="needs Masks, got dict"):
        KeepMasks({})  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="'nope' is not a parameter"):
        trainer(vit(), tmp_path, KeepMasks(Masks({"nope": torch.ones(2).bool()}))).train()


def in_two_processes() -> None:
    """The body of the test below, run by torchrun in each process."""
    folder = Path(sys.argv[1])
    model = vit()
    masks = masks_of(model)
    before = copy.deepcopy(model.state_dict())
    looks = LooksAtEachStep(masks)
    it = trainer(model, folder, KeepMasks(masks), looks, gradient_accumulation_steps=2)
    assert it.args.world_size == 2
    it.train()
    assert isinstance(it.model_wrapped, nn.parallel.DistributedDataParallel)
    assert looks.steps == 6
    assert moved(model, before, masks)
    torch.save(model.state_dict(), folder / f"rank{it.args.process_index}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(tmp_path)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    masks = masks_of(vit())
    for name, value in first.items():
        assert torch.equal(value, second[name])
        if name in masks:
            assert not value[~masks[name]].any()
    assert Masks.load(tmp_path / "checkpoint-6" / "masks.safetensors") == masks


if __name__ == "__main__":
    in_two_processes()

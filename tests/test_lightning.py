"""Lightning as it is: a module around a pruned model, whose optimizer keeps the masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, images
from torch import Tensor, nn

import px_hf as px

lightning = pytest.importorskip("lightning")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of Lightning, about loaders, loggers, and torch's own
]

X = images(8)
Y = torch.arange(8) % 4


class Lit(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """The example of docs/FINETUNING.md."""

    def __init__(self, model: nn.Module, masks: px.Masks) -> None:
        super().__init__()
        self.model, self.masks = model, masks
        self.alive: list[int] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.alive.append(sum(self.masks.revived(self.model).values()))
        return nn.functional.cross_entropy(self.model(batch[0]).logits, batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, weight_decay=0.1)
        px.keep_masks(optimizer, self.model, self.masks)
        return optimizer


def made(name: str = "hf vit") -> Lit:
    torch.manual_seed(0)
    model = build(name)
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.7, progress=False)
    assert masks.revived(model)  # what configure_optimizers does is what makes them zero
    return Lit(model.train(), masks)


def trainer(folder: Path, epochs: int, **more: Any) -> Any:
    return lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0, **{"enable_checkpointing": False, **more},
    )  # fmt: skip


def loader() -> torch.utils.data.DataLoader[Any]:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=2)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["hf vit", "hf resnet"])
def test_zeros_hold_in_every_step(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    lit = made(name)
    before = {key: p.detach().clone() for key, p in lit.model.named_parameters()}
    trainer(tmp_path, 2, **more).fit(lit, loader())
    assert len(lit.alive) == 8
    assert not any(lit.alive)
    assert not lit.masks.revived(lit.model)
    moved = [key for key, p in lit.model.named_parameters() if not torch.equal(p.detach() != 0, before[key] != 0)]
    assert {*lit.masks} <= {*moved}
    kept = next(iter(lit.masks))
    assert not torch.equal(lit.model.get_parameter(kept)[lit.masks[kept]], before[kept][lit.masks[kept]])


def test_a_resumed_training_is_the_one_that_was_not_interrupted(tmp_path: Path) -> None:
    whole = made()
    trainer(tmp_path, 4, accumulate_grad_batches=2).fit(whole, loader())
    first = made()
    started = trainer(tmp_path, 2, accumulate_grad_batches=2)
    started.fit(first, loader())
    started.save_checkpoint(tmp_path / "half.ckpt")
    second = made()
    trainer(tmp_path, 4, accumulate_grad_batches=2).fit(second, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len(second.alive) == 8
    assert not any(second.alive)
    for (name, a), b in zip(whole.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_averaged_weights_have_the_zeros(tmp_path: Path) -> None:
    lit = made("hf resnet")
    average = lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    trainer(tmp_path, 4, callbacks=[average]).fit(lit, loader())
    assert not any(lit.alive)
    assert not lit.masks.revived(lit.model)


def test_masks_found_on_the_lightning_module_itself(tmp_path: Path) -> None:
    """Their names have the module's level, and fit the model inside as well."""
    lit = made()
    masks = px.prune(lit, [], px.Magnitude(), sparsity=0.7, progress=False)
    assert all(name.startswith("model.") for name in masks)
    lit.masks = px.Masks({name.removeprefix("model."): mask for name, mask in masks.items()})
    trainer(tmp_path, 1).fit(lit, loader())
    assert not masks.revived(lit)
    px.save_pretrained(lit.model, lit.masks, tmp_path / "out")
    assert px.Masks.from_pretrained(tmp_path / "out") == lit.masks

"""px_hf: find sparse subnetworks in pretrained vision models before they are fine-tuned.

```python
import px_hf as px

masks = px.prune(model, batches, px.PX(), sparsity=0.9)   # the model is untouched
print(px.report(model, masks))
masks.apply_(model)
trainer = Trainer(model, ..., callbacks=[px.KeepMasks(masks)])
px.save_pretrained(model, masks, "out")
px.push_to_hub(model, masks, "user/name")
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    CheckpointError,
    DataError,
    DependencyError,
    HubError,
    InvalidArgumentError,
    LaunchError,
    NonFiniteError,
    OutputExistsError,
    PxError,
    TargetError,
    UnsupportedOpError,
)
from .hub.registration import register as _register
from .lazy import keeps_names as _keeps_names
from .lazy import loaded_when_used as _loaded_when_used
from .version import __version__

if TYPE_CHECKING:
    from .compact.agreement import check_copies
    from .criteria import (
        CRITERIA,
        LAMP,
        NTKSAP,
        PX,
        SNIP,
        Criterion,
        GemMiner,
        GraSP,
        InstantSoup,
        Magnitude,
        NTKTrace,
        Random,
        SynFlow,
        SynFlowL2,
        Wanda,
    )
    from .distillation import Distillation
    from .export import export_onnx
    from .gradual import gradual_pruning
    from .hub.inspection import Inspection, inspect
    from .hub.loading import from_pretrained
    from .hub.push import push_to_hub
    from .hub.push_difference import push_difference
    from .hub.saving import save_pretrained
    from .int8 import round_to_int8_
    from .keep import keep_masks
    from .kernels import accelerate_24_, accelerate_blocks_, accelerate_csr_
    from .lora import mask_lora, merge_lora_
    from .masks import Masks
    from .ops import add_rule
    from .prune import prune
    from .repair.batchnorm import recalibrate_batchnorm_
    from .repair.correction import correct_
    from .repair.folding import fold_removed_
    from .repair.outcome import RepairReport
    from .repair.reconstruct import reconstruct_
    from .report import Report, report
    from .select import select
    from .sharded_masks import ShardedMasks
    from .structured.shrink import shrink
    from .tickets.difference import apply_difference_, save_difference
    from .tickets.fisher import Fisher
    from .tickets.ks import KS
    from .tickets.patch_tickets import PatchTickets
    from .tickets.read_patches import read_patches
    from .tickets.select_trainable import select_trainable
    from .trainer.distillation_trainer import DistillationTrainer
    from .trainer.gradual_pruning import GradualPruning
    from .trainer.keep_masks import KeepMasks
    from .trainer.tune_only import TuneOnly
    from .tune import tune_only
    from .vote import vote

_register()

_LAZY = {
    "CRITERIA": "criteria",
    "Criterion": "criteria",
    "Distillation": "distillation",
    "DistillationTrainer": "trainer.distillation_trainer",
    "Fisher": "tickets.fisher",
    "GemMiner": "criteria",
    "GraSP": "criteria",
    "GradualPruning": "trainer.gradual_pruning",
    "Inspection": "hub.inspection",
    "InstantSoup": "criteria",
    "KS": "tickets.ks",
    "KeepMasks": "trainer.keep_masks",
    "LAMP": "criteria",
    "Magnitude": "criteria",
    "Masks": "masks",
    "NTKSAP": "criteria",
    "NTKTrace": "criteria",
    "PX": "criteria",
    "PatchTickets": "tickets.patch_tickets",
    "Random": "criteria",
    "RepairReport": "repair.outcome",
    "Report": "report",
    "SNIP": "criteria",
    "ShardedMasks": "sharded_masks",
    "SynFlow": "criteria",
    "SynFlowL2": "criteria",
    "TuneOnly": "trainer.tune_only",
    "Wanda": "criteria",
    "accelerate_24_": "kernels",
    "accelerate_blocks_": "kernels",
    "accelerate_csr_": "kernels",
    "add_rule": "ops",
    "apply_difference_": "tickets.difference",
    "check_copies": "compact.agreement",
    "correct_": "repair.correction",
    "export_onnx": "export",
    "fold_removed_": "repair.folding",
    "from_pretrained": "hub.loading",
    "gradual_pruning": "gradual",
    "inspect": "hub.inspection",
    "keep_masks": "keep",
    "mask_lora": "lora",
    "merge_lora_": "lora",
    "prune": "prune",
    "push_difference": "hub.push_difference",
    "push_to_hub": "hub.push",
    "read_patches": "tickets.read_patches",
    "recalibrate_batchnorm_": "repair.batchnorm",
    "reconstruct_": "repair.reconstruct",
    "report": "report",
    "round_to_int8_": "int8",
    "save_difference": "tickets.difference",
    "save_pretrained": "hub.saving",
    "select": "select",
    "select_trainable": "tickets.select_trainable",
    "shrink": "structured.shrink",
    "tune_only": "tune",
    "vote": "vote",
}
"""Names that are loaded when first used: torch takes seconds to import, and transformers some more."""

_keeps_names(__name__, _LAZY)
__getattr__ = _loaded_when_used(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "CRITERIA",
    "KS",
    "LAMP",
    "NTKSAP",
    "PX",
    "SNIP",
    "CheckpointError",
    "Criterion",
    "DataError",
    "DependencyError",
    "Distillation",
    "DistillationTrainer",
    "Fisher",
    "GemMiner",
    "GraSP",
    "GradualPruning",
    "HubError",
    "Inspection",
    "InstantSoup",
    "InvalidArgumentError",
    "KeepMasks",
    "LaunchError",
    "Magnitude",
    "Masks",
    "NTKTrace",
    "NonFiniteError",
    "OutputExistsError",
    "PatchTickets",
    "PxError",
    "Random",
    "RepairReport",
    "Report",
    "ShardedMasks",
    "SynFlow",
    "SynFlowL2",
    "TargetError",
    "TuneOnly",
    "UnsupportedOpError",
    "Wanda",
    "__version__",
    "accelerate_24_",
    "accelerate_blocks_",
    "accelerate_csr_",
    "add_rule",
    "apply_difference_",
    "check_copies",
    "correct_",
    "export_onnx",
    "fold_removed_",
    "from_pretrained",
    "gradual_pruning",
    "inspect",
    "keep_masks",
    "mask_lora",
    "merge_lora_",
    "prune",
    "push_difference",
    "push_to_hub",
    "read_patches",
    "recalibrate_batchnorm_",
    "reconstruct_",
    "report",
    "round_to_int8_",
    "save_difference",
    "save_pretrained",
    "select",
    "select_trainable",
    "shrink",
    "tune_only",
    "vote",
]

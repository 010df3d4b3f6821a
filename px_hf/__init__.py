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
from .lazy import loaded_when_used as _loaded_when_used
from .masks import Masks
from .ops import add_rule
from .prune import prune
from .report import Report, report
from .select import select
from .version import __version__
from .vote import vote

if TYPE_CHECKING:
    from .distillation import Distillation
    from .export import export_onnx
    from .gradual import gradual_pruning
    from .hub.loading import from_pretrained
    from .hub.push import push_to_hub
    from .hub.push_difference import push_difference
    from .hub.saving import save_pretrained
    from .keep import keep_masks
    from .kernels import accelerate_24_, accelerate_csr_
    from .lora import mask_lora, merge_lora_
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

_register()

_LAZY = {
    "Distillation": "distillation",
    "DistillationTrainer": "trainer.distillation_trainer",
    "Fisher": "tickets.fisher",
    "GradualPruning": "trainer.gradual_pruning",
    "KS": "tickets.ks",
    "KeepMasks": "trainer.keep_masks",
    "PatchTickets": "tickets.patch_tickets",
    "TuneOnly": "trainer.tune_only",
    "accelerate_24_": "kernels",
    "accelerate_csr_": "kernels",
    "apply_difference_": "tickets.difference",
    "export_onnx": "export",
    "from_pretrained": "hub.loading",
    "gradual_pruning": "gradual",
    "keep_masks": "keep",
    "mask_lora": "lora",
    "merge_lora_": "lora",
    "push_difference": "hub.push_difference",
    "push_to_hub": "hub.push",
    "read_patches": "tickets.read_patches",
    "save_difference": "tickets.difference",
    "save_pretrained": "hub.saving",
    "select_trainable": "tickets.select_trainable",
    "shrink": "structured.shrink",
    "tune_only": "tune",
}
"""Names that are loaded when first used: most need transformers, which takes seconds to import."""

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
    "Report",
    "SynFlow",
    "SynFlowL2",
    "TargetError",
    "TuneOnly",
    "UnsupportedOpError",
    "Wanda",
    "__version__",
    "accelerate_24_",
    "accelerate_csr_",
    "add_rule",
    "apply_difference_",
    "export_onnx",
    "from_pretrained",
    "gradual_pruning",
    "keep_masks",
    "mask_lora",
    "merge_lora_",
    "prune",
    "push_difference",
    "push_to_hub",
    "read_patches",
    "report",
    "save_difference",
    "save_pretrained",
    "select",
    "select_trainable",
    "shrink",
    "tune_only",
    "vote",
]

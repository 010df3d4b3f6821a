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
from .repair.outcome import RepairReport
from .report import Report, report
from .select import select
from .version import __version__

if TYPE_CHECKING:
    from .distillation import Distillation
    from .export import export_onnx
    from .gradual import gradual_pruning
    from .hub.loading import from_pretrained
    from .hub.push import push_to_hub
    from .hub.saving import save_pretrained
    from .keep import keep_masks
    from .kernels import accelerate_24_, accelerate_csr_
    from .lora import mask_lora, merge_lora_
    from .repair.batchnorm import recalibrate_batchnorm_
    from .repair.correction import correct_
    from .repair.folding import fold_removed_
    from .repair.reconstruct import reconstruct_
    from .structured.shrink import shrink
    from .trainer.distillation_trainer import DistillationTrainer
    from .trainer.gradual_pruning import GradualPruning
    from .trainer.keep_masks import KeepMasks

_register()

_LAZY = {
    "Distillation": "distillation",
    "DistillationTrainer": "trainer.distillation_trainer",
    "GradualPruning": "trainer.gradual_pruning",
    "KeepMasks": "trainer.keep_masks",
    "accelerate_24_": "kernels",
    "accelerate_csr_": "kernels",
    "correct_": "repair.correction",
    "export_onnx": "export",
    "fold_removed_": "repair.folding",
    "from_pretrained": "hub.loading",
    "gradual_pruning": "gradual",
    "keep_masks": "keep",
    "mask_lora": "lora",
    "merge_lora_": "lora",
    "push_to_hub": "hub.push",
    "recalibrate_batchnorm_": "repair.batchnorm",
    "reconstruct_": "repair.reconstruct",
    "save_pretrained": "hub.saving",
    "shrink": "structured.shrink",
}
"""Names that are loaded when first used: most need transformers, which takes seconds to import."""

__getattr__ = _loaded_when_used(__name__, _LAZY)


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "CRITERIA",
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
    "GemMiner",
    "GraSP",
    "GradualPruning",
    "HubError",
    "InvalidArgumentError",
    "KeepMasks",
    "LaunchError",
    "Magnitude",
    "Masks",
    "NTKTrace",
    "NonFiniteError",
    "OutputExistsError",
    "PxError",
    "Random",
    "RepairReport",
    "Report",
    "SynFlow",
    "SynFlowL2",
    "TargetError",
    "UnsupportedOpError",
    "Wanda",
    "__version__",
    "accelerate_24_",
    "accelerate_csr_",
    "add_rule",
    "correct_",
    "export_onnx",
    "fold_removed_",
    "from_pretrained",
    "gradual_pruning",
    "keep_masks",
    "mask_lora",
    "merge_lora_",
    "prune",
    "push_to_hub",
    "recalibrate_batchnorm_",
    "reconstruct_",
    "report",
    "save_pretrained",
    "select",
    "shrink",
]

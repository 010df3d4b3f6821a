"""px_hf: find sparse subnetworks in pretrained vision models before they are fine-tuned.

```python
import px_hf as px

masks = px.prune(model, batches, px.PX(), sparsity=0.9)   # the model is untouched
print(px.report(model, masks))
masks.apply_(model)
trainer = Trainer(model, ..., callbacks=[px.KeepMasks(masks)])
px.save_pretrained(model, masks, "out")
```
"""

from __future__ import annotations

from .criteria import CRITERIA, PX, Criterion, Magnitude, Random
from .errors import (
    CheckpointError,
    DataError,
    InvalidArgumentError,
    LaunchError,
    NonFiniteError,
    OutputExistsError,
    PxError,
    TargetError,
    UnsupportedOpError,
)
from .masks import Masks
from .prune import prune
from .select import select
from .version import __version__

__all__ = [
    "CRITERIA",
    "PX",
    "CheckpointError",
    "Criterion",
    "DataError",
    "InvalidArgumentError",
    "LaunchError",
    "Magnitude",
    "Masks",
    "NonFiniteError",
    "OutputExistsError",
    "PxError",
    "Random",
    "TargetError",
    "UnsupportedOpError",
    "__version__",
    "prune",
    "select",
]

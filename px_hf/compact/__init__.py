"""The compact format: a pruned model in a safetensors file of entropy-coded masks and kept values.

    write_compact(model.state_dict(), masks, folder)
    file = CompactFile.open(folder)
    file.masks()                    # name -> bool tensor, True = kept
    file.tensor("fc.weight")        # dense, with exact zeros

docs/COMPACT_FORMAT.md specifies it for readers in any language.
"""

from .reader import CompactFile
from .writer import write_compact

__all__ = ["CompactFile", "write_compact"]

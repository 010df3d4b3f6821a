"""Kernels that gain from zeros: 2:4 on a GPU, CSR and blocks on a CPU. Conversions are in place and for inference."""

from __future__ import annotations

from .blocks import accelerate_blocks_
from .conversion import Conversion
from .csr import accelerate_csr_
from .semi_structured import accelerate_24_

__all__ = ["Conversion", "accelerate_24_", "accelerate_blocks_", "accelerate_csr_"]

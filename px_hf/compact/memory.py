"""Memory for decoded weights."""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np

_ALIGNMENT = 64  # as torch's own memory has it, on which the results of kernels may depend


class Memory:
    """Zeros for arrays of `total` bytes together, asked for by any thread.

    From 4 MB on numpy gets huge pages, which the system clears in half the time: smaller arrays share blocks.
    """

    large, block = 1 << 22, 1 << 25

    def __init__(self, total: int) -> None:
        self._lock = Lock()
        self._free = np.empty(0, np.uint8)
        self._to_come = total

    def zeros(self, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        """One dimension of zeros."""
        size = count * dtype.itemsize
        with self._lock:
            self._to_come -= size
            if size >= self.large:
                return _aligned(size).view(dtype)
            if len(self._free) < size:
                self._free = _aligned(max(size, min(size + self._to_come, self.block)))
            taken, self._free = self._free[:size], self._free[size + -size % _ALIGNMENT :]
        return taken.view(dtype)


def _aligned(size: int) -> np.ndarray:
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]

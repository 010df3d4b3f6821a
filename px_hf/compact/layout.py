"""The names and numbers of the compact format: docs/COMPACT_FORMAT.md, section 2."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor

VERSION: Final = 1
VERSION_WITH_CODES: Final = 2
"""Of files in which weights are codes of 8 bits; all others are of the first version."""

VERSIONS: Final = (VERSION, VERSION_WITH_CODES)
QUANT_METHOD: Final = "px_sparse"
"""`quant_method` in the config of a compact copy."""

METADATA: Final = "px_sparse"
"""The entry of a safetensors header that describes the tensors of that file."""

DENSE: Final = "px_dense"
"""The entry beside it that says which dense files the copy was written with; see `dense`."""

MASK: Final = ":px_mask"
VALUES: Final = ":px_values"
SCALES: Final = ":px_scales"
"""Endings of the names under which a pruned parameter is stored, or one whose values are codes of 8 bits."""

CODES: Final = "I8"
SCALE: Final = "F32"
"""Dtypes of codes and of their scales, which is that of the weights."""

VALUE_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES: Final = VALUE_DTYPES | {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names of safetensors: of what is pruned, and of what is stored whole."""

SPARSE_FOLDER: Final = "sparse"
"""Where the compact copy lies, below the dense one."""

WEIGHTS_FILE: Final = "model.safetensors"
CONFIG_FILE: Final = "config.json"
INDEX_FILE: Final = "model.safetensors.index.json"


def decoded_limit(stored_bytes: int) -> int:
    """The most bytes that the pruned parameters of files of this size may take when decoded.

    One kept weight in 1024 is enough, whatever the masks and the dtype: a value takes its size of 1024 zeros.
    """
    return 2**26 + 2**10 * stored_bytes


def checksum(kind: str, shape: Iterable[int], stored: Tensor | None = None) -> int:
    """CRC-32 of the ASCII text `kind[size,size]`, followed by the stored bytes if they are given."""
    text = zlib.crc32(f"{kind}[{','.join(map(str, shape))}]".encode())
    return text if stored is None else zlib.crc32(stored.reshape(-1).view(torch.uint8).numpy().data, text)

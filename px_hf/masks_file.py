"""The file of masks, one bit a weight.

The file is one safetensors file. For each mask it holds a uint8 tensor of the mask's name with one bit
a weight, 1 = kept: weight i of the flattened (row-major) mask is bit `i % 8`, counted from the least
significant, of byte `i // 8`; unused bits of the last byte are 0. The metadata entry "px_hf.masks" is
JSON: {"version": 1, "shapes": [[name, [size, ...]], ...]} in the order of the masks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save as to_safetensors
from torch import Tensor

MASKS_FILE = "masks.safetensors"
_METADATA = "px_hf.masks"
_VERSION = 1


def written(masks: Mapping[str, Tensor]) -> bytes:
    """The content of the file: the same masks always give the same bytes."""
    shapes = [[name, list(mask.shape)] for name, mask in masks.items()]
    return to_safetensors(
        {name: pack(mask) for name, mask in masks.items()},
        metadata={_METADATA: json.dumps({"version": _VERSION, "shapes": shapes})},
    )


def read(path: Path) -> dict[str, Tensor]:
    """The masks of a file that anybody may have written. At most 16 bytes are allocated for each byte of it.

    Raises:
        SafetensorError, OSError, ValueError: it is no whole file of masks; the message says what is wrong with it.
    """
    with safe_open(path, framework="numpy") as file:
        shapes = _read_shapes(file.metadata())
        if set(file.keys()) != shapes.keys():
            raise ValueError("its tensors are not those that its metadata lists")
        masks = {}
        for name, shape in shapes.items():
            stored = file.get_slice(name)
            expected = [-(-math.prod(shape) // 8)]
            if stored.get_dtype() != "U8" or stored.get_shape() != expected:
                raise ValueError(
                    f"{name!r} of shape {shape} is stored as {stored.get_dtype()} "
                    f"{stored.get_shape()}, expected U8 {expected}"
                )
            masks[name] = _unpack(file.get_tensor(name), shape)
    return masks


def pack(mask: Tensor) -> np.ndarray:
    return np.packbits(mask.reshape(-1).numpy(), bitorder="little")


def _unpack(bits: np.ndarray, shape: list[int]) -> Tensor:
    unpacked = np.unpackbits(bits, bitorder="little")
    count = math.prod(shape)
    if unpacked[count:].any():
        raise ValueError("bits beyond the last weight are set")
    return torch.from_numpy(unpacked[:count].view(np.bool_)).reshape(shape)


def _read_shapes(metadata: Mapping[str, str] | None) -> dict[str, list[int]]:
    """The checked content of the metadata entry; ValueError says what is wrong with it."""
    if metadata is None or _METADATA not in metadata:
        raise ValueError(f"its metadata has no entry {_METADATA!r}")
    try:
        content = json.loads(metadata[_METADATA])
    except RecursionError:
        raise ValueError("its metadata is nested too deeply") from None
    if not isinstance(content, dict) or type(content.get("version")) is not int:
        raise ValueError("its metadata states no format version")
    if content["version"] != _VERSION:
        raise ValueError(
            f"it is of format version {content['version']}, and this px_hf knows {_VERSION}: upgrade px_hf"
        )
    shapes: dict[str, list[int]] = {}
    entries = content.get("shapes")
    for entry in entries if isinstance(entries, list) else [None]:
        match entry:
            case [str(name), list(shape)] if len(shape) <= 64 and all(map(_is_size, shape)):
                if name in shapes:
                    raise ValueError(f"its metadata lists {name!r} twice")
                shapes[name] = shape
            case _:
                shown = str(entry)[:80]
                raise ValueError(f"its metadata lists {shown!r} where [name, [size, ...]] is expected")
    return shapes


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 2**48

"""Write the compact copy of a pruned model: docs/COMPACT_FORMAT.md."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from ..errors import TargetError
from .codes import codes_of
from .coding import BITS, encode
from .layout import (
    DENSE,
    DTYPES,
    INDEX_FILE,
    MASK,
    METADATA,
    SCALES,
    VALUE_DTYPES,
    VALUES,
    VERSION,
    VERSION_WITH_CODES,
    checksum,
    decoded_limit,
)

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_compact(
    state: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "50GB",
    dense: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Write `state` into an existing folder: of the tensors with a mask only what it keeps. Returns the version.

    `masks`: name in `state` -> bool tensor of its shape, True = kept.
    `dense`: the record of the dense files that hold the same (`dense.describe`), by which readers know them again.

    Weights that lie on a grid of 8 bits (`px_hf.round_to_int8_`) are stored as codes.

    Files larger than `max_shard_size` are split, with an index, as transformers does it. The same state and masks
    always give the same bytes.

    Raises:
        TargetError: a mask has no tensor of its shape, or a tensor is of a dtype that the format does not know.
    """
    for name, mask in masks.items():
        if name not in state or state[name].shape != mask.shape:
            found = list(state[name].shape) if name in state else "none"
            raise TargetError(f"The mask of {name!r} is {list(mask.shape)} and the tensor to write is {found}.")
    stored, entries = _encode(state, masks)
    decoded = sum(state[name].nbytes for name in masks)
    if decoded > decoded_limit(sum(tensor.nbytes for tensor in stored.values())):  # of hardly any weights
        stored, entries = _encode(state, masks, plain_bits=True)
    version = VERSION_WITH_CODES if any(name.endswith(SCALES) for name in stored) else VERSION
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        described = {"version": version, "tensors": {name: entries[name] for name in names}}
        metadata = {"format": "pt", METADATA: json.dumps(described, separators=(",", ":"), sort_keys=True)}
        if dense is not None:
            metadata[DENSE] = json.dumps(dense, separators=(",", ":"), sort_keys=True)
        save_file({name: stored[name] for name in names}, Path(folder, file), metadata=metadata)
        _sort_metadata(Path(folder, file))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        Path(folder, INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return version


def _encode(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor], plain_bits: bool = False
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors to store, and what the metadata says of each."""
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}

    def store(name: str, tensor: Tensor) -> None:
        stored[name] = tensor
        entries[name] = {"crc32": checksum(_NAMES[tensor.dtype], tensor.shape, tensor)}

    for name, tensor in state.items():
        mask = masks.get(name)
        if tensor.dtype not in (DTYPES if mask is None else VALUE_DTYPES).values():
            raise TargetError(f"{name!r} is of {tensor.dtype}, which the compact format does not hold.")
        if name.endswith((MASK, VALUES, SCALES)):
            raise TargetError(f"The name {name!r} is reserved for the compact format.")
        flat = tensor.detach().cpu().reshape(-1)
        coded = codes_of(flat.reshape(tensor.shape), mask)
        if coded is not None:
            store(name + VALUES, coded.codes)
            stored[name + SCALES] = coded.scales
            entries[name + SCALES] = {
                "crc32": checksum(_NAMES[tensor.dtype], tensor.shape, coded.scales),
                "shape": list(tensor.shape),
            }
        if mask is None:
            if coded is None:
                store(name, flat.reshape(tensor.shape).contiguous())
            continue
        kept = mask.reshape(-1)
        if plain_bits:
            coding, payload = BITS, np.packbits(kept.numpy(), bitorder="little").tobytes()
        else:
            coding, payload = encode(kept.numpy())
        if coded is None:
            store(name + VALUES, flat[kept])
        packed = (
            torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
        )
        stored[name + MASK] = packed
        entries[name + MASK] = {
            "crc32": checksum(coding, tensor.shape, packed),
            "coding": coding,
            "shape": list(tensor.shape),
        }
    return stored, entries


def _sort_metadata(path: Path) -> None:
    """Write the header of a safetensors file anew with sorted metadata, which safetensors puts in random order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(text) == size:
            file.seek(8)
            file.write(text)

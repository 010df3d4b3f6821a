"""Read compact files, and take no header's word: docs/COMPACT_FORMAT.md, section 4.

What is wrong with the structure of the files is found when they are opened, and what is wrong with the bytes of a
tensor when it is read, before it is returned. Files that would decode to far more than their own size are refused.
Values are read and placed part by part, so that decoding takes little more memory than what it returns.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .codes import check_scales, decoded
from .coding import PART, kept_positions
from .dense import DenseFile, Span
from .header import Stored, naming, read_header, shard_names
from .layout import (
    CODES,
    DTYPES,
    INDEX_FILE,
    MASK,
    SCALE,
    SCALES,
    VALUE_DTYPES,
    VALUES,
    WEIGHTS_FILE,
    checksum,
    decoded_limit,
)
from .memory import Memory


class CompactFile:
    """The file or files of a compact copy, opened and checked. `shapes`: of every decoded tensor, by name.

    `coded`: the names of those that are stored in parts; `pruned`: of those that have a mask.
    `dense`: the dense files that it was written with, by name; None if it was written without, or before they were
    recorded.

    Raises:
        CheckpointError: a file is missing, damaged, of another version, or says what cannot be.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.shapes: dict[str, list[int]] = {}
        self._stored: dict[str, Stored] = {}
        self.dense: dict[str, DenseFile] | None = None
        size = 0
        for number, path in enumerate(map(Path, paths)):
            with naming(path):
                contents, dense = read_header(path)
                if number and dense != self.dense:
                    raise ValueError("it was written with another dense model than the shards before it")
                self.dense = dense
                for name, stored in contents.items():
                    if name in self._stored:
                        raise ValueError(f"{name!r} is also in {self._stored[name].path.name}")
                    self._stored[name] = stored
                size += path.stat().st_size
        total = 0
        for name, stored in self._stored.items():
            parameter = name.removesuffix(MASK).removesuffix(VALUES).removesuffix(SCALES)
            with naming(stored.path, parameter):
                if name == parameter:
                    self.shapes[name] = stored.shape
                elif parameter not in self.shapes:
                    self.shapes[parameter] = self._coded_shape(parameter, name)
                    total += math.prod(self.shapes[parameter]) * VALUE_DTYPES[self.dtype(parameter)].itemsize
                    if total > decoded_limit(size):
                        raise ValueError(f"files of {size:,} bytes that claim to decode to {total:,} are not opened")
        self._memory = Memory(total)
        self.coded = [name for name in self.shapes if name not in self._stored]
        self.pruned = [name for name in self.coded if name + MASK in self._stored]

    def _coded_shape(self, parameter: str, name: str) -> list[int]:
        """The shape of a parameter that is stored in parts, which are checked; `name` is that of one."""
        if parameter in self._stored:
            raise ValueError("it is there both whole and pruned")
        values, mask, scales = (self._stored.get(parameter + ending) for ending in (VALUES, MASK, SCALES))
        about = mask or scales
        if values is None or about is None:
            raise ValueError(f"there is {name!r} without its counterpart")
        if mask and (mask.dtype != "U8" or mask.length is None):
            raise ValueError("its mask is not a U8 tensor with one dimension")
        kinds = (CODES,) if scales else tuple(VALUE_DTYPES)
        if values.dtype not in kinds or values.length is None:
            raise ValueError(f"its values are not one dimension of {', '.join(kinds)}")
        if scales and (scales.dtype != SCALE or scales.length is None or len(scales.shape) < 2):
            raise ValueError(f"its scales are not one dimension of {SCALE} for the rows of a matrix")
        if scales and (scales.shape != about.shape or scales.length != scales.shape[0]):
            raise ValueError("its scales are of other rows")
        if mask is None and values.length != math.prod(about.shape):
            raise ValueError("it has another number of values than its shape says")
        return about.shape

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> CompactFile:
        """The compact copy in a local folder, in one file or in several with an index."""
        index = Path(folder, INDEX_FILE)
        if Path(folder, WEIGHTS_FILE).exists() or not index.exists():
            return cls([Path(folder, WEIGHTS_FILE)])
        return cls(Path(folder, name) for name in shard_names(index))

    def verify_whole(self) -> None:
        """Raise CheckpointError unless the tensors that are not pruned are as they were written."""
        for name in self.shapes.keys() & self._stored.keys():
            with naming(self._stored[name].path, name):
                self._read(name)

    def dtype(self, name: str) -> str:
        """The dtype of a decoded tensor, as safetensors calls it."""
        if name + SCALES in self._stored:
            return SCALE
        return self._stored[name if name in self._stored else name + VALUES].dtype

    def whole_spans(self) -> list[Span]:
        """Where the tensors that are not pruned lie."""
        whole = [(name, self._stored[name]) for name in self.shapes if name in self._stored]
        return [
            Span(stored.path, name, stored.dtype, tuple(stored.shape), stored.start, _bytes(stored))
            for name, stored in whole
        ]

    def masks(self) -> dict[str, Tensor]:
        """The masks of all pruned parameters: name -> bool tensor, True = kept."""
        return {name: self.mask(name) for name in self.pruned}

    def mask(self, name: str) -> Tensor:
        """The mask of a pruned parameter: bool, True = kept."""
        with naming(self._stored[name + MASK].path, name):
            mask = torch.zeros(self.shapes[name], dtype=torch.bool, device="cpu")
            for positions in self._kept(name):
                mask.view(-1).numpy()[positions] = True
            return mask

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as the dense model holds it, bit for bit, with +0.0 where it is pruned."""
        if name in self._stored:
            with naming(self._stored[name].path, name):
                return self._read(name)
        values = self._stored[name + VALUES]
        with naming(values.path, name), values.path.open("rb", buffering=0) as file:
            file.seek(values.start)
            dtype = VALUE_DTYPES[self.dtype(name)]
            bits = np.dtype(f"i{dtype.itemsize}")  # numpy has no bfloat16
            dense = self._memory.zeros(math.prod(self.shapes[name]), bits)
            scales, row = self._scales(name), math.prod(self.shapes[name][1:])
            buffer = np.empty(PART, bits if scales is None else np.int8)
            found = checksum(values.kind, values.shape)
            for positions in self._kept(name):
                part = buffer[: len(positions)]
                _read_into(file, part)
                found = zlib.crc32(part.data, found)
                dense[positions] = part if scales is None else decoded(part, positions, scales, row)
            _compare(found, values)
            return torch.from_numpy(dense).view(dtype).reshape(self.shapes[name])

    def _kept(self, name: str) -> Iterator[np.ndarray]:
        """Positions of kept weights, in parts; there are as many as values."""
        if name + MASK not in self._stored:
            count = math.prod(self.shapes[name])
            return (np.arange(start, min(start + PART, count)) for start in range(0, count, PART))
        mask, kept = self._stored[name + MASK], self._stored[name + VALUES].length or 0
        return kept_positions(mask.kind, self._read(name + MASK).numpy(), math.prod(mask.shape), kept)

    def _scales(self, name: str) -> Tensor | None:
        """The scales of a parameter whose values are codes."""
        if name + SCALES not in self._stored:
            return None
        scales = self._read(name + SCALES)
        check_scales(scales)
        return scales

    def _read(self, name: str) -> Tensor:
        stored = self._stored[name]
        shape = stored.shape if stored.length is None else [stored.length]
        tensor = torch.empty(shape, dtype=DTYPES[stored.dtype], device="cpu")  # also where meta is the default
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            _read_into(file, tensor.reshape(-1).view(torch.uint8).numpy())
        _compare(checksum(stored.kind, stored.shape, tensor), stored)
        return tensor


def _bytes(stored: Stored) -> int:
    return math.prod(stored.shape) * DTYPES[stored.dtype].itemsize


def _read_into(file: Any, memory: np.ndarray) -> None:
    rest = memory.view(np.uint8).data
    while rest:
        read = file.readinto(rest)
        if not read:
            raise ValueError("the file ends within it")
        rest = rest[read:]


def _compare(crc32: int, stored: Stored) -> None:
    if crc32 != stored.crc32:
        raise ValueError("its bytes are not those that were written (their CRC-32 differs)")

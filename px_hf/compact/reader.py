"""Read compact files, and take no header's word: docs/COMPACT_FORMAT.md, section 4.

What is wrong with the structure of the files is found when they are opened, and what is wrong with the bytes of a
tensor when it is read, before it is returned. Files that would decode to far more than their own size are refused.
Values are read and placed part by part, so that decoding takes little more memory than what it returns.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError
from .coding import PART, kept_positions
from .dense import DenseFile, Span, read_record
from .layout import (
    DENSE,
    DTYPES,
    INDEX_FILE,
    MASK,
    METADATA,
    VALUE_DTYPES,
    VALUES,
    VERSION,
    WEIGHTS_FILE,
    checksum,
    decoded_limit,
)
from .memory import Memory


class _Stored(NamedTuple):
    """A tensor as it lies in a file. `kind` and `shape` are those of its checksum."""

    path: Path
    start: int  # where its bytes begin in the file
    dtype: str
    length: int | None  # of a tensor with one dimension
    kind: str
    shape: list[int]
    crc32: int


class CompactFile:
    """The file or files of a compact copy, opened and checked. `shapes`: of every decoded tensor, by name.

    `dense`: the dense files that it was written with, by name; None if it was written without, or before they were
    recorded.

    Raises:
        CheckpointError: a file is missing, damaged, of another version, or says what cannot be.
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]]) -> None:
        self.shapes: dict[str, list[int]] = {}
        self._stored: dict[str, _Stored] = {}
        self.dense: dict[str, DenseFile] | None = None
        size = 0
        for number, path in enumerate(map(Path, paths)):
            with _naming(path):
                contents, dense = _contents(path)
                if number and dense != self.dense:
                    raise ValueError("it was written with another dense model than the shards before it")
                self.dense = dense
                for name, stored in contents.items():
                    if name in self._stored:
                        raise ValueError(f"{name!r} is also in {self._stored[name].path.name}")
                    self._stored[name] = stored
                size += path.stat().st_size
        decoded = 0
        for name, stored in self._stored.items():
            parameter = name.removesuffix(MASK).removesuffix(VALUES)
            with _naming(stored.path, parameter):
                if name == parameter:
                    self.shapes[name] = stored.shape
                    continue
                if parameter in self._stored:
                    raise ValueError("it is there both whole and pruned")
                values, mask = self._stored.get(parameter + VALUES), self._stored.get(parameter + MASK)
                if values is None or mask is None:
                    raise ValueError(f"there is {name!r} without its counterpart")
                if mask.dtype != "U8" or mask.length is None:
                    raise ValueError("its mask is not a U8 tensor with one dimension")
                if values.dtype not in VALUE_DTYPES or values.length is None:
                    raise ValueError(f"its values are not one dimension of {', '.join(VALUE_DTYPES)}")
                if name == parameter + MASK:
                    self.shapes[parameter] = mask.shape
                    decoded += math.prod(mask.shape) * VALUE_DTYPES[values.dtype].itemsize
                    if decoded > decoded_limit(size):
                        raise ValueError(f"files of {size:,} bytes that claim to decode to {decoded:,} are not opened")
        self._memory = Memory(decoded)
        self.pruned = [name for name in self.shapes if name not in self._stored]

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
            with _naming(self._stored[name].path, name):
                self._read(name)

    def dtype(self, name: str) -> str:
        """The dtype of a decoded tensor, as safetensors calls it."""
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
        with _naming(self._stored[name + MASK].path, name):
            mask = torch.zeros(self.shapes[name], dtype=torch.bool, device="cpu")
            for positions in self._kept(name):
                mask.view(-1).numpy()[positions] = True
            return mask

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as the dense model holds it, bit for bit, with +0.0 where it is pruned."""
        if name in self._stored:
            with _naming(self._stored[name].path, name):
                return self._read(name)
        values = self._stored[name + VALUES]
        with _naming(values.path, name), values.path.open("rb", buffering=0) as file:
            file.seek(values.start)
            dtype = VALUE_DTYPES[values.dtype]
            bits = np.dtype(f"i{dtype.itemsize}")  # numpy has no bfloat16
            dense = self._memory.zeros(math.prod(self.shapes[name]), bits)
            buffer = np.empty(PART, bits)
            found = checksum(values.kind, values.shape)
            for positions in self._kept(name):
                part = buffer[: len(positions)]
                _read_into(file, part)
                found = zlib.crc32(part.data, found)
                dense[positions] = part
            _compare(found, values)
            return torch.from_numpy(dense).view(dtype).reshape(self.shapes[name])

    def _kept(self, name: str) -> Iterator[np.ndarray]:
        """Positions of kept weights, in parts; there are as many as values."""
        mask, kept = self._stored[name + MASK], self._stored[name + VALUES].length or 0
        return kept_positions(mask.kind, self._read(name + MASK).numpy(), math.prod(mask.shape), kept)

    def _read(self, name: str) -> Tensor:
        stored = self._stored[name]
        shape = stored.shape if stored.length is None else [stored.length]
        tensor = torch.empty(shape, dtype=DTYPES[stored.dtype], device="cpu")  # also where meta is the default
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            _read_into(file, tensor.reshape(-1).view(torch.uint8).numpy())
        _compare(checksum(stored.kind, stored.shape, tensor), stored)
        return tensor


def _bytes(stored: _Stored) -> int:
    return math.prod(stored.shape) * DTYPES[stored.dtype].itemsize


def _read_into(file: Any, memory: np.ndarray) -> None:
    rest = memory.view(np.uint8).data
    while rest:
        read = file.readinto(rest)
        if not read:
            raise ValueError("the file ends within it")
        rest = rest[read:]


def _compare(crc32: int, stored: _Stored) -> None:
    if crc32 != stored.crc32:
        raise ValueError("its bytes are not those that were written (their CRC-32 differs)")


def shard_names(index: Path) -> list[str]:
    """The files that an index lists, which are beside it.

    Raises:
        CheckpointError: it is not an index, or a name leads elsewhere.
    """
    with _naming(index):
        content = _json(index.read_text(encoding="utf-8"))
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not name.endswith(".safetensors") or name != os.path.basename(name) or "\\" in name:
                raise ValueError(f"it names {name!r}, which is not a safetensors file beside it")
        return names


def _contents(path: Path) -> tuple[dict[str, _Stored], dict[str, DenseFile] | None]:
    """What a safetensors file holds, as its header and our metadata say in agreement, and its record."""
    if not path.is_file():
        raise FileNotFoundError("there is no such file")
    with safe_open(path, framework="pt"):  # it checks that header and file belong together
        pass
    with path.open("rb") as opened:
        data = 8 + int.from_bytes(opened.read(8), "little")
        header = _json(opened.read(data - 8).decode())
    metadata = header.pop("__metadata__", None)
    entries = _entries(metadata)
    dense = read_record(_json(metadata[DENSE])) if DENSE in metadata else None
    if header.keys() != entries.keys():
        raise ValueError(f"its tensors are not those that its metadata lists: {min(header.keys() ^ entries.keys())!r}")
    contents = {}
    for name, entry in entries.items():
        dtype, shape = header[name]["dtype"], header[name]["shape"]
        start = data + header[name]["data_offsets"][0]
        length = shape[0] if len(shape) == 1 else None
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} is of dtype {dtype}, not one of {', '.join(DTYPES)}")
        match name.endswith(MASK), entry:
            case False, {"crc32": int(crc32), **others} if not others:
                contents[name] = _Stored(path, start, dtype, length, dtype, shape, crc32)
            case True, {"crc32": int(crc32), "coding": str(coding), "shape": list(shape), **others} if (
                not others and len(shape) <= 64 and all(map(_is_size, shape))
            ):
                contents[name] = _Stored(path, start, dtype, length, coding, shape, crc32)
            case _:
                raise ValueError(f"its metadata says {str(entry)[:80]!r} of {name!r}")
    return contents, dense


def _entries(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if metadata is None or METADATA not in metadata:
        raise ValueError(f"its metadata has no entry {METADATA!r}: it is not a compact file of px_hf")
    match _json(metadata[METADATA]):
        case {"version": version, "tensors": dict(entries), **others} if not others:
            if type(version) is not int or version != VERSION:
                raise ValueError(f"it is of format version {version}, and this px_hf knows {VERSION}: upgrade px_hf")
            return entries
        case _:
            raise ValueError(f"its metadata entry {METADATA!r} has no version and tensors")


def _json(text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            raise ValueError("a name occurs twice")
        return content

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 2**48


@contextmanager
def _naming(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Turns whatever is wrong with a file into a CheckpointError that says which file."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        where = f"{tensor!r} in {path}" if tensor else str(path)
        raise CheckpointError(
            f"{where} cannot be used: {error or 'out of memory'}. Nothing was loaded. Get the files again, or load "
            "the dense copy in the folder above."
        ) from error

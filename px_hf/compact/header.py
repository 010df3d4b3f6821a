"""Headers and indexes of compact files, checked before any tensor is read: docs/COMPACT_FORMAT.md, sections 1 to 4."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .dense import DenseFile, read_record
from .layout import DENSE, DTYPES, MASK, METADATA, SCALES, VERSION, VERSIONS


class Stored(NamedTuple):
    """A tensor as it lies in a file. `kind` and `shape` are those of its checksum."""

    path: Path
    start: int  # where its bytes begin in the file
    dtype: str
    length: int | None  # of a tensor with one dimension
    kind: str
    shape: list[int]
    crc32: int


def shard_names(index: Path) -> list[str]:
    """The files that an index lists, which are beside it.

    Raises:
        CheckpointError: it is not an index, or a name leads elsewhere.
    """
    with naming(index):
        content = _json(index.read_text(encoding="utf-8"))
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if not name.endswith(".safetensors") or name != os.path.basename(name) or "\\" in name:
                raise ValueError(f"it names {name!r}, which is not a safetensors file beside it")
        return names


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, DenseFile] | None]:
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
    found = {}
    for name, entry in entries.items():
        dtype, shape = header[name]["dtype"], header[name]["shape"]
        start = data + header[name]["data_offsets"][0]
        length = shape[0] if len(shape) == 1 else None
        if dtype not in DTYPES:
            raise ValueError(f"{name!r} is of dtype {dtype}, not one of {', '.join(DTYPES)}")
        match {"coding": dtype, "shape": shape} | entry if isinstance(entry, dict) else entry:
            case {"crc32": int(crc32), "coding": str(kind), "shape": list(shape)} if (
                entry.keys() == _told(name) and len(shape) <= 64 and all(map(_is_size, shape))
            ):
                found[name] = Stored(path, start, dtype, length, kind, shape, crc32)
            case _:
                raise ValueError(f"its metadata says {str(entry)[:80]!r} of {name!r}")
    return found, dense


def _entries(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if metadata is None or METADATA not in metadata:
        raise ValueError(f"its metadata has no entry {METADATA!r}: it is not a compact file of px_hf")
    match _json(metadata[METADATA]):
        case {"version": version, "tensors": dict(entries), **others} if not others:
            if type(version) is not int or version not in VERSIONS:
                known = " and ".join(map(str, VERSIONS))
                raise ValueError(f"it is of format version {version}, and this px_hf knows {known}: upgrade px_hf")
            if version == VERSION and any(name.endswith(SCALES) for name in entries):
                raise ValueError(f"it has weights as codes, and is said to be of format version {VERSION}")
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


def _told(name: str) -> set[str]:
    """What the metadata says of a tensor of that name."""
    return {"crc32"} | ({"coding", "shape"} if name.endswith(MASK) else {"shape"} if name.endswith(SCALES) else set())


def _is_size(size: object) -> bool:
    return type(size) is int and 0 <= size < 2**48


@contextmanager
def naming(path: Path, tensor: str | None = None) -> Iterator[None]:
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

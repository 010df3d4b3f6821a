"""The dense files beside a compact copy: what is recorded of them, and what is looked at to know them again.

docs/COMPACT_FORMAT.md, section 7, says it for readers in any language.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from safetensors import safe_open

from .layout import INDEX_FILE, WEIGHTS_FILE

PIECES: Final = 8
PIECE: Final = 2048
"""Of a tensor with more than `PIECES * PIECE` bytes so many pieces of so many bytes are looked at, else all of it."""

_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin")
_POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize \d+\n")


class DenseFile(NamedTuple):
    """What a compact copy knows of a dense file: its size, and SHA-256 in hexadecimal of all of it and of samples."""

    size: int
    sha256: str
    samples: str


class Span(NamedTuple):
    """Where a tensor lies in a safetensors file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def is_weights(name: str) -> bool:
    """Whether stock libraries read weights from a file of this name."""
    return _WEIGHTS.fullmatch(name) is not None


def dense_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that stock libraries read weights from: safetensors, or if there is none, pickles."""
    found = {path.name: path for path in sorted(folder.iterdir()) if is_weights(path.name) and path.is_file()}
    safe = {name: path for name, path in found.items() if name.endswith(".safetensors")}
    return safe or found


def describe(folder: Path) -> dict[str, dict[str, Any]]:
    """The record of the dense files in a folder, as `read_record` takes it."""
    record = {}
    for name, path in dense_files(folder).items():
        with path.open("rb") as file:
            whole = hashlib.file_digest(file, "sha256").hexdigest()
        record[name] = DenseFile(path.stat().st_size, whole, samples(path))._asdict()
    return record


def read_record(content: object) -> dict[str, DenseFile]:
    """The checked record that a compact copy holds.

    Raises:
        ValueError: it is none.
    """
    record = {}
    for name, entry in content.items() if isinstance(content, dict) else [("", None)]:
        match entry:
            case {"size": int(size), "sha256": str(whole), "samples": str(sampled)} if _WEIGHTS.fullmatch(name):
                record[name] = DenseFile(size, whole, sampled)
            case _:
                raise ValueError(f"its record of dense files says {str(entry)[:80]!r} of {name[:80]!r}")
    return record


def is_recorded(path: Path, known: DenseFile) -> bool:
    """Whether a file is the one that was recorded, by its size and samples; a pointer of git-lfs by what it says."""
    size = path.stat().st_size
    if size < 200 and (pointer := _POINTER.fullmatch(path.read_bytes())):
        return pointer[1].decode() == known.sha256
    return size == known.size and samples(path) == known.samples


def samples(path: Path) -> str:
    """SHA-256, in hexadecimal, of the header of a safetensors file and of pieces of each of its tensors."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        digest.update(_read(file, 0, 8))
        digest.update(_read(file, 8, int.from_bytes(_read(file, 0, 8), "little")))
        for span in spans(path):
            for start, end in pieces(span.size):
                digest.update(_read(file, span.start + start, end - start))
    return digest.hexdigest()


def pieces(size: int, piece: int = PIECE) -> Iterator[tuple[int, int]]:
    """Start and end of what is looked at of `size` bytes, spread evenly from the first to the last."""
    if size <= PIECES * piece:
        yield 0, size
        return
    for k in range(PIECES):
        start = k * (size - piece) // (PIECES - 1)
        yield start, start + piece


def spans(path: Path) -> list[Span]:
    """The tensors of a safetensors file, in the order in which they lie there.

    Raises:
        SafetensorError, OSError, ValueError: it is no whole safetensors file.
    """
    with safe_open(path, framework="pt"):  # it checks that header and file belong together
        pass
    with path.open("rb") as file:
        data = 8 + int.from_bytes(file.read(8), "little")
        header: Mapping[str, Any] = json.loads(file.read(data - 8))
    found = []
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            found.append(Span(path, name, entry["dtype"], tuple(entry["shape"]), data + start, end - start))
    return sorted(found, key=lambda span: (span.start, span.name))


def content(span: Span) -> str:
    """SHA-256, in hexadecimal, of all bytes of a tensor."""
    digest = hashlib.sha256()
    with span.path.open("rb", buffering=0) as file:
        for start in range(0, span.size, 1 << 20):
            digest.update(_read(file, span.start + start, min(1 << 20, span.size - start)))
    return digest.hexdigest()


def sampled(span: Span) -> str:
    """SHA-256, in hexadecimal, of the pieces of a tensor."""
    digest = hashlib.sha256()
    with span.path.open("rb", buffering=0) as file:
        for start, end in pieces(span.size):
            digest.update(_read(file, span.start + start, end - start))
    return digest.hexdigest()


def names_to_ask(record: Mapping[str, DenseFile]) -> list[str]:
    """The files that show whether a repository's dense copy is the recorded one, or another beside it."""
    return sorted({*record, WEIGHTS_FILE, INDEX_FILE})


def _read(file: BinaryIO | Any, start: int, size: int) -> bytes:
    file.seek(start)
    found = b""
    while len(found) < size and (more := file.read(size - len(found))):
        found += more
    if len(found) < size:
        raise ValueError("the file ends within a tensor")
    return found

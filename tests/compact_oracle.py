"""A second reader of the compact format, made from docs/COMPACT_FORMAT.md alone: slow, and with nothing of px_hf,
torch, numpy or safetensors. Tensors come back as (dtype, shape, bytes)."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
Stored = tuple[str, list[int], bytes]


def read(folder: Path) -> tuple[dict[str, Stored], dict[str, list[bool]]]:
    """The decoded tensors and the flat masks; any exception says that the copy must not be used."""
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    else:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        names = sorted(set(index["weight_map"].values()))
        assert names
        assert all("/" not in name and "\\" not in name and name.endswith(".safetensors") for name in names)
    stored: dict[str, Stored] = {}
    about: dict[str, dict[str, Any]] = {}
    version = 0
    for name in names:
        tensors, entries, version = read_safetensors((folder / name).read_bytes())
        assert not stored.keys() & tensors.keys()
        stored |= tensors
        about |= entries

    decoded, masks = {}, {}
    room = 2**26 + 1024 * sum((folder / name).stat().st_size for name in names)
    for name, (dtype, shape, content) in stored.items():
        parameter, _, part = name.rpartition(":px_")
        if part in ("mask", "scales"):
            assert parameter + ":px_values" in stored
        elif part != "values":
            check(about[name], {"crc32"}, dtype, shape, content)
            decoded[name] = (dtype, shape, content)
        else:
            assert parameter not in stored
            assert len(shape) == 1
            check(about[name], {"crc32"}, dtype, shape, content)
            mask, full = None, None
            if parameter + ":px_mask" in stored:
                kind, length, packed = stored[parameter + ":px_mask"]
                entry = about[parameter + ":px_mask"]
                full = entry["shape"]
                assert kind == "U8"
                assert len(length) == 1
                check(entry, {"crc32", "coding", "shape"}, entry["coding"], full, packed)
            scales = None
            if parameter + ":px_scales" in stored:
                assert version > 1
                assert dtype == "I8"
                scales, rows = read_scales(about[parameter + ":px_scales"], *stored[parameter + ":px_scales"])
                assert full in (None, rows)
                full = rows
            else:
                assert full is not None
                assert dtype in FLOATS
            assert all(type(size) is int and 0 <= size < 2**48 for size in full)
            size = SIZES[dtype] if scales is None else 4
            room -= math.prod(full) * size
            assert room >= 0
            if parameter + ":px_mask" in stored:
                mask = decode(entry["coding"], packed, math.prod(full), shape[0])
                masks[parameter] = mask
            every = mask if mask is not None else [True] * math.prod(full)
            assert sum(every) == shape[0]
            kept = (content[i : i + SIZES[dtype]] for i in range(0, len(content), SIZES[dtype]))
            dense = b"".join(
                (next(kept) if scales is None else product(next(kept), scales[i // math.prod(full[1:])]))
                if keep
                else bytes(size)
                for i, keep in enumerate(every)
            )
            decoded[parameter] = (dtype if scales is None else "F32", full, dense)
    return decoded, masks


def read_scales(entry: dict[str, Any], dtype: str, shape: list[int], content: bytes) -> tuple[list[float], list[int]]:
    check(entry, {"crc32", "shape"}, "F32", entry["shape"], content)
    assert dtype == "F32"
    assert len(entry["shape"]) >= 2
    assert shape == entry["shape"][:1]
    scales = [scale for (scale,) in struct.iter_unpack("<f", content)]
    for scale, bits in zip(scales, struct.iter_unpack("<I", content), strict=True):
        assert math.isfinite(scale)
        assert bits[0] < 2**31  # no sign
        assert bits[0] % 256 == 0
    return scales, entry["shape"]


def product(code: bytes, scale: float) -> bytes:
    return struct.pack("<f", int.from_bytes(code, "little", signed=True) * scale)


def decode(coding: str, content: bytes, count: int, kept: int) -> list[bool]:
    if coding == "deflated-gaps":
        gaps = inflate(content, kept + count // 255)
        mask, position = [False] * count, 0
        assert gaps[-1:] != b"\xff"
        for gap in gaps:
            position += gap
            if gap != 255:
                mask[position] = True
                position += 1
        return mask
    bits = {"bits": lambda: content, "deflated-bits": lambda: inflate(content, -(-count // 8))}[coding]()
    assert len(bits) == -(-count // 8)
    every = [bool(byte >> bit & 1) for byte in bits for bit in range(8)]
    assert not any(every[count:])
    return every[:count]


def inflate(content: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj()
    inflated = stream.decompress(content, limit + 1)
    assert len(inflated) <= limit
    assert stream.eof
    assert not stream.unused_data
    return inflated


def check(entry: dict[str, Any], keys: set[str], kind: str, shape: list[int], content: bytes) -> None:
    assert entry.keys() == keys
    assert entry["crc32"] == zlib.crc32((kind + "[" + ",".join(map(str, shape)) + "]").encode("ascii") + content)


def read_safetensors(content: bytes) -> tuple[dict[str, Stored], dict[str, dict[str, Any]], int]:
    length = int.from_bytes(content[:8], "little")
    assert 8 + length <= len(content)
    header = json.loads(content[8 : 8 + length], object_pairs_hook=unique)
    metadata = json.loads(header.pop("__metadata__")["px_sparse"], object_pairs_hook=unique)
    assert metadata["version"] in (1, 2)
    assert type(metadata["version"]) is int
    assert metadata["tensors"].keys() == header.keys()
    tensors, end = {}, 0
    for name, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = told["data_offsets"]
        assert start == end
        assert stop - start == math.prod(told["shape"]) * SIZES[told["dtype"]]
        end = stop
        tensors[name] = (told["dtype"], told["shape"], content[8 + length + start : 8 + length + stop])
    assert 8 + length + end == len(content)
    return tensors, metadata["tensors"], metadata["version"]


def samples(content: bytes) -> str:
    """Section 7, of a dense file."""
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    found = content[:data]
    for _, told in sorted(header.items(), key=lambda item: (item[1]["data_offsets"][0], item[0])):
        tensor = content[data + told["data_offsets"][0] : data + told["data_offsets"][1]]
        starts = [k * (len(tensor) - 2048) // 7 for k in range(8)] if len(tensor) > 16384 else []
        found += b"".join(tensor[start : start + 2048] for start in starts) if starts else tensor
    return hashlib.sha256(found).hexdigest()


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)

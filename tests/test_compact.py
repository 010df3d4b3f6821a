"""The compact format: exact, small, the same in another reader, and closed to damaged and hostile files."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compact_oracle
import numpy as np
import pytest
import torch
from compact_oracle import SIZES
from safetensors.torch import save_file

from px_hf.compact import CompactFile, write_compact
from px_hf.compact.coding import CODINGS, encode, kept_positions
from px_hf.errors import CheckpointError, TargetError
from px_hf.masks import Masks

NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
State = dict[str, torch.Tensor]


def pruned_state(dtype: torch.dtype = torch.float32, sparsity: float = 0.7) -> tuple[State, Masks]:
    """A few tensors of every kind, with the values that are easily lost."""
    generator = torch.Generator().manual_seed(0)
    odd = [0.0, -0.0, math.inf, -math.inf, math.nan, torch.finfo(dtype).smallest_normal / 2]
    state, masks = {}, {}
    for name, shape in {
        "a.weight": (5, 7),
        "b.in_proj_weight": (3, 2, 3, 3),
        "one": (1,),
        "c.weight": (300, 4),
    }.items():
        state[name] = torch.randn(shape, generator=generator).to(dtype)
        masks[name] = torch.rand(shape, generator=generator) >= sparsity
    state["a.weight"].view(-1)[: len(odd)] = torch.tensor(odd, dtype=dtype)
    masks["a.weight"].view(-1)[: len(odd)] = True
    for name, mask in masks.items():
        state[name][~mask] = 0
    state |= {"empty.weight": torch.zeros(40, 50, dtype=dtype), "full.weight": torch.ones(2, 2, dtype=dtype)}
    masks |= {"empty.weight": torch.zeros(40, 50).bool(), "full.weight": torch.ones(2, 2).bool()}
    state |= {
        "a.bias": torch.randn(5, generator=generator).to(dtype),
        "steps": torch.tensor(7),
        "flag": torch.ones(3).bool(),
    }
    return state, Masks(masks)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: NaN equals itself and -0.0 is not 0.0."""
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(
        a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8)
    )


def read(folder: Path) -> tuple[State, Masks]:
    file = CompactFile.open(folder)
    return {name: file.tensor(name) for name in file.shapes}, Masks(file.masks())


# -------------------------------------------------------------------------------------------------------- exact


@pytest.mark.parametrize("max_shard_size", ["1GB", 600, 1], ids=["one file", "some shards", "a shard each"])
@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_round_trip_and_a_reader_made_from_the_specification(
    dtype: torch.dtype, max_shard_size: int | str, tmp_path: Path
) -> None:
    state, masks = pruned_state(dtype)
    write_compact(state, masks, tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_size == "1GB")
    tensors, found = read(tmp_path)
    assert found == masks
    assert tensors.keys() == state.keys()
    assert all(same(tensors[name], tensor) for name, tensor in state.items())

    others, flat = compact_oracle.read(tmp_path)
    assert others.keys() == state.keys()
    for name, (kind, shape, content) in others.items():
        assert (kind, shape) == (NAMES.get(state[name].dtype, kind), list(state[name].shape))
        assert content == bytes(state[name].reshape(-1).view(torch.uint8).numpy())
    assert {name: torch.tensor(mask).reshape(masks[name].shape).equal(masks[name]) for name, mask in flat.items()} == (
        dict.fromkeys(masks, True)
    )


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    state, masks = pruned_state()
    for name in "abcdefgh":  # safetensors alone would write metadata in random order
        (tmp_path / name).mkdir()
        write_compact(state, masks, tmp_path / name)
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in "abcdefgh"}) == 1


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 255, 256, 511, 5000, 3 * 2**18 + 5])
@pytest.mark.parametrize("density", [0, 0.0003, 0.01, 0.1, 0.5, 0.99, 1])
def test_masks_of_any_length_and_density(count: int, density: float) -> None:
    mask = np.random.default_rng(count).random(count) < density
    coding, payload = encode(mask)
    parts = list(kept_positions(coding, np.frombuffer(payload, np.uint8), count, int(mask.sum())))
    assert np.array_equal(np.concatenate([*parts, []]), np.flatnonzero(mask))
    if count <= 5000:
        assert compact_oracle.decode(coding, payload, count, int(mask.sum())) == mask.tolist()


@pytest.mark.parametrize("gap", [254, 255, 256, 509, 510, 511, 2**18 - 1, 2**18, 2**19])
def test_gaps_around_the_bounds_of_a_byte_and_of_a_part(gap: int) -> None:
    mask = np.zeros(3 * gap + 7, np.bool_)
    mask[[gap, gap + 1, 2 * gap + 2]] = True
    coding, payload = encode(mask)
    found = np.concatenate([*kept_positions(coding, np.frombuffer(payload, np.uint8), len(mask), 3)])
    assert coding == "deflated-gaps"
    assert found.tolist() == [gap, gap + 1, 2 * gap + 2]


def test_the_example_of_the_specification() -> None:
    kept = [False, True, True, False, False, False, True, False]
    for coding, payload in zip(
        CODINGS, (b"\x46", zlib.compress(b"\x46"), zlib.compress(bytes([1, 0, 3]))), strict=True
    ):
        assert compact_oracle.decode(coding, payload, 8, 3) == kept
        positions = list(kept_positions(coding, np.frombuffer(payload, np.uint8), 8, 3))
        assert np.concatenate(positions).tolist() == [1, 2, 6]


# -------------------------------------------------------------------------------------------------------- small


def bound_bytes(weights: int, kept: int, value_bytes: int) -> float:
    s = 1 - kept / weights
    entropy = 0 if s in (0, 1) else -s * math.log2(s) - (1 - s) * math.log2(1 - s)
    return weights * entropy / 8 + kept * value_bytes


@pytest.mark.parametrize("layers", ["alike", "uneven"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99])
def test_the_size_is_near_the_entropy_bound(sparsity: float, dtype: torch.dtype, layers: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = {f"{i}.weight": (512, 256 * (i + 1)) for i in range(5)}
    scale = {name: 1.0 if layers == "alike" else 2.0 ** (2 - i) for i, name in enumerate(shapes)}
    state = {name: torch.randn(shape, generator=generator) * scale[name] for name, shape in shapes.items()}
    values = torch.cat([tensor.abs().flatten() for tensor in state.values()])
    threshold = values.kthvalue(round(sparsity * len(values))).values
    masks = Masks({name: tensor.abs() > threshold for name, tensor in state.items()})
    state = {name: (tensor * masks[name]).to(dtype) for name, tensor in state.items()}
    write_compact(state, masks, tmp_path)
    header = 8 + int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    size = (tmp_path / "model.safetensors").stat().st_size - header
    assert header < 1200 + 250 * len(masks)
    assert size <= 1.012 * bound_bytes(masks.total, masks.kept, dtype.itemsize)
    if layers == "alike":
        assert size >= 0.99 * bound_bytes(masks.total, masks.kept, dtype.itemsize)


def two_of_four(shape: tuple[int, int]) -> torch.Tensor:
    rank = torch.rand(shape[0], shape[1] // 4, 4, generator=torch.Generator().manual_seed(0)).argsort(-1)
    return (rank < 2).reshape(shape)


def empty_rows(shape: tuple[int, int]) -> torch.Tensor:
    return (torch.rand(shape[0], 1, generator=torch.Generator().manual_seed(0)) < 0.5).expand(shape)


@pytest.mark.parametrize(("pattern", "share"), [(two_of_four, 0.7), (empty_rows, 0.02)])
def test_a_pattern_takes_less_than_a_random_mask(pattern: Callable[..., torch.Tensor], share: float) -> None:
    mask = pattern((512, 512)).numpy().reshape(-1)
    assert len(encode(mask)[1]) < share * mask.size / 8


# ------------------------------------------------------------------------------------- damaged: noticed every time


def outcome(folder: Path, state: State, masks: Masks) -> str:
    try:
        tensors, found = read(folder)
    except CheckpointError as error:
        return "refused" if str(folder) in str(error) else "refused without saying which file"
    assert found == masks
    assert tensors.keys() == state.keys()
    assert all(same(tensors[name], tensor) for name, tensor in state.items())
    return "equal"


def test_a_changed_byte_anywhere_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    state, masks = pruned_state(torch.float16)
    write_compact(state, masks, tmp_path)
    file, chance = tmp_path / "model.safetensors", random.Random(0)
    content = file.read_bytes()
    outcomes = {"refused": 0, "equal": 0}
    for position in range(len(content)):
        change = chance.choice([1 << chance.randrange(8), chance.randrange(1, 256)])
        changed = bytearray(content)
        changed[position] ^= change
        file.write_bytes(changed)
        outcomes[outcome(tmp_path, state, masks)] += 1
    assert outcomes["refused"] > 0.99 * len(content), "what is equal is white space, and the entry 'format'"


def test_a_file_of_another_length_is_an_error(tmp_path: Path) -> None:
    state, masks = pruned_state()
    write_compact(state, masks, tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    for length in [*range(20), *range(20, len(content), 101), len(content) - 1]:
        file.write_bytes(content[:length])
        assert outcome(tmp_path, state, masks) == "refused"
    file.write_bytes(content + b"\0")
    assert outcome(tmp_path, state, masks) == "refused"
    file.unlink()
    assert outcome(tmp_path, state, masks) == "refused"


# ----------------------------------------------------------------------------- hostile: what the specification rejects

WEIGHT = {
    "w:px_values": torch.tensor([1.0, 2.0, 3.0]),
    "w:px_mask": torch.frombuffer(bytearray(b"\x46"), dtype=torch.uint8),
    "bias": torch.tensor([4.0]),
}
CODED = {"w:px_mask": {"coding": "bits", "shape": [2, 4]}}


def crc32(kind: str, shape: list[int], tensor: torch.Tensor) -> int:
    text = (kind + "[" + ",".join(map(str, shape)) + "]").encode()
    return zlib.crc32(text + bytes(tensor.reshape(-1).view(torch.uint8).numpy()))


def forge(
    folder: Path,
    tensors: State,
    coded: dict[str, dict[str, Any]],
    *,
    name: str = "model.safetensors",
    metadata: Any = (),
) -> None:
    """A file whose checksums are right, whatever else is wrong. `metadata` replaces parts of the entry."""
    names = {
        **NAMES,
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.complex64: "C64",
    }
    entries: dict[str, Any] = {}
    for stored, tensor in tensors.items():
        about = coded.get(stored, {})
        kind, shape = about.get("coding", names[tensor.dtype]), about.get("shape", list(tensor.shape))
        entries[stored] = {"crc32": crc32(kind, shape, tensor), **about}
    entry = json.dumps({"version": 1, "tensors": entries} | dict(metadata))
    save_file(tensors, folder / name, metadata={"format": "pt", "px_sparse": entry})


def coded(payload: bytes, coding: str, shape: list[int], values: int = 3) -> tuple[State, dict[str, dict[str, Any]]]:
    mask = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    return (
        {"w:px_values": torch.ones(values), "w:px_mask": mask},
        {"w:px_mask": {"coding": coding, "shape": shape}},
    )


def test_the_forger_can_also_be_honest(tmp_path: Path) -> None:
    forge(tmp_path, WEIGHT, CODED)
    tensors, masks = read(tmp_path)
    assert tensors["w"].tolist() == [[0, 1, 2, 0], [0, 0, 3, 0]]
    assert masks["w"].tolist() == [[False, True, True, False], [False, False, True, False]]
    assert tensors["bias"].tolist() == [4]


def without(*names: str) -> State:
    return {name: tensor for name, tensor in WEIGHT.items() if name not in names}


GAPS = zlib.compress(bytes([1, 0, 3]))
HOSTILE: dict[str, tuple[Any, ...]] = {
    "values without a mask": (without("w:px_mask"), {}, "'w:px_values' without its counterpart"),
    "a mask without values": (without("w:px_values"), CODED, "'w:px_mask' without its counterpart"),
    "whole and pruned": ({**WEIGHT, "w": torch.ones(2, 4)}, CODED, "both whole and pruned"),
    "values of integers": ({**WEIGHT, "w:px_values": torch.tensor([1, 2, 3])}, CODED, "its values are not"),
    "values of two dimensions": ({**WEIGHT, "w:px_values": torch.ones(1, 3)}, CODED, "its values are not"),
    "a mask of floats": ({**WEIGHT, "w:px_mask": torch.ones(1)}, CODED, "its mask is not a U8"),
    "a mask of two dimensions": ({**WEIGHT, "w:px_mask": WEIGHT["w:px_mask"].reshape(1, 1)}, CODED, "its mask is not"),
    "a dtype that is not allowed": ({**WEIGHT, "bias": torch.ones(1, dtype=torch.complex64)}, CODED, "dtype C64"),
    "too few values": ({**WEIGHT, "w:px_values": torch.ones(2)}, CODED, "do not agree"),
    "too many values": ({**WEIGHT, "w:px_values": torch.ones(4)}, CODED, "do not agree"),
    "no coding": (WEIGHT, {}, "its metadata says"),
    "coding of a whole tensor": (WEIGHT, {**CODED, "bias": {"coding": "bits", "shape": [1]}}, "its metadata says"),
    "an unknown coding": (*coded(b"\x46", "rice", [8]), "'rice' is none of"),
    "an unknown key": (WEIGHT, {"w:px_mask": {**CODED["w:px_mask"], "more": 1}}, "its metadata says"),
    "a negative size": (*coded(b"\x46", "bits", [-2, -4]), "its metadata says"),
    "a size that is no integer": (*coded(b"\x46", "bits", [8.0]), "its metadata says"),
    "a size that is true": (*coded(b"\x46", "bits", [True, 8]), "its metadata says"),
    "an enormous size": (*coded(b"\x46", "bits", [2**48]), "its metadata says"),
    "enormous sizes": (*coded(b"\x46", "bits", [2**40, 2**40]), "are not opened"),
    "sizes that overflow to little": (*coded(b"\x46", "bits", [2**32, 2**32]), "are not opened"),
    "too many sizes": (*coded(b"\x46", "bits", [1] * 65), "its metadata says"),
    "a bomb of gaps": (*coded(zlib.compress(b"\xff" * 2**20), "deflated-gaps", [2**28], 0), "are not opened"),
    "bits too short": (*coded(b"\x46", "bits", [9]), "has 1 bytes of bits, expected 2"),
    "bits too long": (*coded(b"\x46\0", "bits", [8]), "has 2 bytes of bits, expected 1"),
    "bits beyond the end": (*coded(b"\x46", "bits", [6]), "goes on beyond its 6 weights"),
    "inflated bits too short": (*coded(zlib.compress(b"\x46"), "deflated-bits", [9]), "has 1 bytes of bits"),
    "inflated bits too long": (*coded(zlib.compress(b"\x46\0"), "deflated-bits", [8]), "of another length"),
    "a kept weight beyond the end": (*coded(GAPS, "deflated-gaps", [6]), "goes on beyond its 6 weights"),
    "more gaps than weights": (*coded(zlib.compress(bytes(9)), "deflated-gaps", [8], 9), "goes on beyond its 8"),
    "more gaps than values": (*coded(zlib.compress(bytes(4)), "deflated-gaps", [8]), "of another length"),
    "fewer gaps than values": (*coded(zlib.compress(bytes(2)), "deflated-gaps", [8]), "do not agree"),
    "an unfinished gap": (*coded(zlib.compress(b"\1\0\3\xff"), "deflated-gaps", [800]), "ends within a gap"),
    "no zlib stream": (*coded(b"garbage!", "deflated-gaps", [8]), "not a zlib stream"),
    "half a zlib stream": (*coded(GAPS[:-1], "deflated-gaps", [8]), "of another length"),
    "more after a zlib stream": (*coded(GAPS + b"\0", "deflated-gaps", [8]), "of another length"),
    "no payload": (*coded(b"", "deflated-gaps", [8], 0), "of another length"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused(name: str, tmp_path: Path) -> None:
    tensors, about, message = HOSTILE[name]
    forge(tmp_path, tensors, about)
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)
    with pytest.raises(Exception):  # noqa: B017 - of whatever kind
        compact_oracle.read(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"version": 3}, "of format version 3, and this px_hf knows 1 and 2: upgrade px_hf"),
        ({"version": True}, "of format version True"),
        ({"version": "1"}, "of format version 1"),
        ({"tensors": []}, "has no version and tensors"),
        ({"tensors": {}}, "not those that its metadata lists: 'bias'"),
        ({"tensors": {"other": {"crc32": 0}}}, "not those that its metadata lists"),
        ({"more": 1}, "has no version and tensors"),
    ],
)
def test_hostile_metadata_is_refused(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    forge(tmp_path, WEIGHT, CODED, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        CompactFile.open(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "no entry 'px_sparse'"),
        ({"format": "pt"}, "no entry 'px_sparse'"),
        ({"px_sparse": "{"}, "cannot be used"),
        ({"px_sparse": "[" * 100_000}, "nested too deeply"),
        ({"px_sparse": '{"version": 1, "version": 1, "tensors": {}}'}, "a name occurs twice"),
        ({"px_sparse": "9" * 10_000}, "cannot be used"),
    ],
)
def test_metadata_that_cannot_be_read_is_refused(
    metadata: dict[str, str] | None, message: str, tmp_path: Path
) -> None:
    save_file(WEIGHT, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        CompactFile.open(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "cannot be used"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"bias": "../model.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"bias": "/etc/model.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"bias": "..\\\\\\\\model.safetensors"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"bias": "pytorch_model.bin"}}', "not a safetensors file beside it"),
        ('{"weight_map": {"bias": ["model-1.safetensors"]}}', "not a safetensors file beside it"),
        ('{"weight_map": {"bias": "model-1.safetensors"}}', "there is no such file"),
        ('{"weight_map": {"a": "model-2.safetensors", "b": "model-3.safetensors"}}', "is also in model-2"),
    ],
)
def test_a_hostile_index_is_refused(index: str, message: str, tmp_path: Path) -> None:
    for name in ("model-2.safetensors", "model-3.safetensors"):
        forge(tmp_path, WEIGHT, CODED, name=name)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        CompactFile.open(tmp_path)


@pytest.mark.parametrize("twice", ['"bias":', '"data_offsets":', '"__metadata__":'])
def test_a_header_that_repeats_a_name_is_refused(twice: str, tmp_path: Path) -> None:
    forge(tmp_path, WEIGHT, CODED)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].decode()
    entry = json.JSONDecoder().raw_decode(header[header.index(twice) + len(twice) :])[0]
    repeated = header.replace(twice, f"{twice}{json.dumps(entry)},{twice}", 1).encode()
    file.write_bytes(len(repeated).to_bytes(8, "little") + repeated + content[8 + length :])
    with pytest.raises(CheckpointError, match="cannot be used"):
        CompactFile.open(tmp_path)


@pytest.mark.parametrize("coding", ["deflated-bits", "deflated-gaps"])
def test_a_bomb_is_not_inflated(coding: str, tmp_path: Path) -> None:
    forge(tmp_path, *coded(zlib.compress(bytes(2**27)), coding, [1000]))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="of another length"):
            read(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_no_more_gaps_are_inflated_than_there_are_values(tmp_path: Path) -> None:
    forge(tmp_path, *coded(zlib.compress(bytes(2**24)), "deflated-gaps", [2**24]))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="of another length"):
            CompactFile.open(tmp_path).masks()
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("where", ["everywhere", "in one layer"])
def test_one_weight_in_a_thousand_is_enough(where: str, dtype: torch.dtype, tmp_path: Path) -> None:
    count = 80 * 2**20 // dtype.itemsize  # more than a small file may decode to
    kept = torch.arange(0, count, 1000) + 7
    masks = {name: torch.zeros(count, dtype=torch.bool) for name in ("a", "b")}
    for name in masks if where == "everywhere" else "a":
        masks[name][kept] = True
    masks["a"][kept + 1] |= where == "in one layer"
    state = {name: mask.to(dtype) for name, mask in masks.items()}
    write_compact(state, Masks(masks), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * len(kept) * (dtype.itemsize + 2) + 1000
    file = CompactFile.open(tmp_path)
    assert all(file.tensor(name).equal(tensor) for name, tensor in state.items())


PEAK = """
import resource, sys
import px_hf as px

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

before = peak()
for folder in sys.argv[1:]:
    try:
        px.Masks.from_pretrained(folder)
    except px.CheckpointError as error:
        assert "are not opened" in str(error), error
    else:
        raise SystemExit("it was loaded")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_a_small_file_of_a_huge_model_takes_no_memory(tmp_path: Path) -> None:
    folders = []
    for number, (content, coding, values) in enumerate(
        [
            (b"", "deflated-gaps", 0),
            (bytes(2**24), "deflated-bits", 0),
            (bytes([*[255] * 16, 15]) * 2**15, "deflated-gaps", 2**15),  # in every page of the mask one weight
        ]
    ):
        folders.append(tmp_path / str(number))
        (folders[-1] / "sparse").mkdir(parents=True)
        tensors, about = coded(zlib.compress(content, 9), coding, [2**27], values)
        tensors["w:px_values"] = tensors["w:px_values"].half()
        forge(folders[-1] / "sparse", tensors, about)
        assert (folders[-1] / "sparse/model.safetensors").stat().st_size < 2**17
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, timeout=200, check=True
    )
    assert int(done.stdout) < 2**24


def test_decoding_takes_the_memory_of_what_it_returns(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {f"{i}.weight": torch.randn(1024, 1024 * i, generator=generator) for i in range(1, 6)}
    masks = Masks({name: tensor > 0 for name, tensor in state.items()})
    write_compact({name: tensor * masks[name] for name, tensor in state.items()}, masks, tmp_path)
    honest = sum(tensor.nbytes for tensor in state.values())
    tracemalloc.start()
    try:
        file = CompactFile.open(tmp_path)
        tensors = [file.tensor(name) for name in file.shapes]
        assert honest <= tracemalloc.get_traced_memory()[1] < 1.05 * honest
        del file, tensors
        assert tracemalloc.get_traced_memory()[0] < 0.01 * honest
    finally:
        tracemalloc.stop()


def test_tensors_are_apart_and_aligned_as_those_of_torch(tmp_path: Path) -> None:
    state, masks = pruned_state()
    write_compact(state, masks, tmp_path)
    file = CompactFile.open(tmp_path)
    for _ in range(2):  # more than the memory was made for
        tensors = {name: file.tensor(name) for name in masks}
        assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())
        for tensor in tensors.values():
            tensor.fill_(3)
    assert all(same(file.tensor(name), tensor) for name, tensor in state.items())
    save_file(tensors, tmp_path / "again.safetensors")  # which refuses tensors that share memory


def test_a_file_that_is_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    state, masks = pruned_state()
    write_compact(state, masks, tmp_path)
    file = CompactFile.open(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as opened:
        opened.truncate(file._stored["a.weight:px_values"].start + 3)
    with pytest.raises(CheckpointError, match=r"'a.weight' in .*the file ends within it|'a.weight' in .*zlib"):
        file.tensor("a.weight")


# ------------------------------------------------------------------------------------------------ writing: refused


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "The mask of 'w' is .* and the tensor to write is none"),
        ({"w": torch.ones(4, 2)}, r"The mask of 'w' is \[2, 4\] and the tensor to write is \[4, 2\]"),
        ({"w": torch.ones(2, 4, dtype=torch.int64)}, "'w' is of torch.int64"),
        ({"w": torch.ones(2, 4), "v": torch.ones(1, dtype=torch.complex64)}, "'v' is of torch.complex64"),
        ({"w": torch.ones(2, 4), "v:px_mask": torch.ones(1)}, "reserved"),
    ],
)
def test_what_the_format_does_not_hold_is_not_written(state: State, message: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message):
        write_compact(state, Masks({"w": torch.ones(2, 4).bool()}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_of_hardly_any_weights_can_be_read_again(tmp_path: Path) -> None:
    mask = torch.zeros(2**25, dtype=torch.bool)  # 128 MiB, which zlib would put into a few kilobytes
    mask[12_345] = True
    write_compact({"w": mask.float()}, Masks({"w": mask}), tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 2**25 / 8 + 1000
    assert CompactFile.open(tmp_path).tensor("w").equal(mask.float())


def test_every_stored_dtype_is_in_the_oracle() -> None:
    from px_hf.compact.layout import DTYPES

    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == SIZES

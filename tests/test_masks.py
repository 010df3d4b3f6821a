"""Masks: a value that cannot be changed, exact zeros, one small file that is refused when damaged."""

import copy
import hashlib
import json
import pickle
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from px_hf.errors import CheckpointError, InvalidArgumentError, TargetError
from px_hf.masks import Masks


def random_masks(seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "b.weight": (5, 3),
        "a.weight": (4, 2, 3, 3),
        "one": (1,),
        "none": (0, 4),
        "scalar": (),
        "byte": (8,),
    }
    return Masks({name: torch.rand(shape, generator=generator) < 0.4 for name, shape in shapes.items()})


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def masks_for(model: nn.Module, seed: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    return Masks(
        {
            name: torch.rand(parameter.shape, generator=generator) < 0.5
            for name, parameter in model.named_parameters()
            if name.endswith("weight")
        }
    )


def test_counts_by_hand() -> None:
    masks = Masks({"a": torch.tensor([[True, False], [False, False]]), "b": torch.tensor([True])})
    assert (masks.kept, masks.total, masks.density, masks.sparsity) == (2, 5, 2 / 5, 3 / 5)
    assert list(masks) == ["a", "b"]
    assert len(masks) == 2
    assert "a" in masks
    assert "c" not in masks
    assert repr(masks) == "Masks(2 tensors, 2 of 5 weights kept, sparsity 0.6)"


def test_nothing_outside_changes_them() -> None:
    source = {"a": torch.tensor([True, False])}
    masks = Masks(source)
    source["a"].fill_(False)
    source["b"] = torch.tensor([True])
    for view in (masks["a"], next(iter(masks.values())), dict(masks)["a"], masks.get("a")):
        view.fill_(True)
    assert masks["a"].tolist() == [True, False]
    assert list(masks) == ["a"]
    with pytest.raises(TypeError):
        masks["a"] = torch.tensor([True, True])  # type: ignore[index]
    with pytest.raises(TypeError):
        del masks["a"]  # type: ignore[attr-defined]
    for name in ("kept", "total", "sparsity"):
        with pytest.raises(AttributeError):
            setattr(masks, name, 0)


def test_equality_and_fingerprint() -> None:
    masks = random_masks()
    same = Masks(dict(reversed(list(masks.items()))))
    assert masks == same == Masks(masks) == copy.deepcopy(masks) == pickle.loads(pickle.dumps(masks))
    assert masks.fingerprint() == same.fingerprint()

    flipped = masks["a.weight"]
    flipped[0, 0, 0, 0] ^= True
    others = [
        random_masks(seed=1),
        Masks({**masks, "a.weight": flipped}),
        Masks({**masks, "a.weight": masks["a.weight"].reshape(2, 4, 3, 3)}),
        Masks({name: mask for name, mask in masks.items() if name != "one"}),
        Masks({("two" if name == "one" else name): mask for name, mask in masks.items()}),
    ]
    for other in others:
        assert masks != other
        assert masks.fingerprint() != other.fingerprint()
    assert masks != dict(masks)


def test_any_memory_layout_is_read_in_logical_order() -> None:
    mask = torch.rand(2, 3, 4, 5) < 0.5
    assert Masks({"a": mask.contiguous(memory_format=torch.channels_last)}) == Masks({"a": mask})
    assert Masks({"a": mask.transpose(0, 3)}) == Masks({"a": mask.transpose(0, 3).contiguous()})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "at least one weight"),
        ({"a": torch.zeros(0, dtype=torch.bool)}, "at least one weight"),
        ({"a": torch.ones(3)}, "'a' must be a bool tensor, got torch.float32"),
        ({"a": [True]}, "'a' must be a bool tensor, got list"),
        ({3: torch.tensor([True])}, "parameter names, got 3"),
        ([("a", torch.tensor([True]))], "mapping of name to bool tensor, got list"),
    ],
)
def test_bad_masks(bad: object, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Masks(bad)  # type: ignore[arg-type]


def test_apply_gives_exact_positive_zeros_and_leaves_the_rest() -> None:
    model = two_layers()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
        model[0].weight[0, 1] = float("-inf")
        model[0].weight[0, 2] = -1.0
    masks = masks_for(model)
    pruned_first_row = masks["0.weight"]
    pruned_first_row[0] = False
    masks = Masks({**masks, "0.weight": pruned_first_row})
    before = copy.deepcopy(model.state_dict())
    masks.apply_(model)
    for name, parameter in model.named_parameters():
        keep = masks[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[keep], before[name][keep])
        assert torch.all(parameter[~keep] == 0)
        assert not torch.signbit(parameter[~keep]).any()
        assert parameter.requires_grad
        assert parameter.is_leaf


def test_revived_counts_pruned_weights_that_are_not_zero() -> None:
    model = two_layers()
    masks = masks_for(model)
    pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert masks.revived(model) == pruned
    masks.apply_(model)
    assert masks.revived(model) == {}
    with torch.no_grad():
        model[2].weight[tuple((~masks["2.weight"]).nonzero()[0])] = float("nan")
    assert masks.revived(model) == {"2.weight": 1}
    with pytest.raises(TargetError):
        masks.revived(Tied())


def wrapped_in_data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compiled_data_parallel(model: nn.Module) -> nn.Module:
    return compiled(nn.DataParallel(model))


def data_parallel_compiled(model: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(model))


def compiled_inside(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(compiled(module) for module in model))


@pytest.mark.parametrize(
    "wrap",
    [wrapped_in_data_parallel, compiled, compiled_data_parallel, data_parallel_compiled, compiled_inside],
)
def test_wrapped_models(wrap) -> None:
    model = two_layers()
    masks = masks_for(model)
    masks.apply_(wrap(model))
    assert sum(int((model.get_parameter(name) == 0).sum()) for name in masks) == masks.total - masks.kept


def test_a_level_that_is_called_module_is_no_wrapper() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = two_layers()

    model = Holder()
    masks_for(model).apply_(model)
    with pytest.raises(TargetError, match=r"'0\.weight' is not a parameter"):
        masks_for(model.module).apply_(model)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight


@pytest.mark.parametrize("names", [["first.weight"], ["second.weight"], ["first.weight", "second.weight"]])
def test_tied_weights_answer_to_each_name(names: list[str]) -> None:
    model = Tied()
    masks = Masks({name: torch.eye(3, dtype=torch.bool) for name in names})
    masks.apply_(model)
    assert torch.equal(model.first.weight != 0, torch.eye(3, dtype=torch.bool))


def meta_model() -> nn.Module:
    with torch.device("meta"):
        return two_layers()


def lazy_model() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3), nn.ReLU(), nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (two_layers, {"gone.weight": torch.ones(2).bool()}, "'gone.weight' is not a parameter of the model"),
        (
            two_layers,
            {"2.weight": torch.ones(3, 2).bool()},
            r"'2.weight' is \[2, 3\] in the model and \[3, 2\]",
        ),
        (meta_model, {}, "'0.weight' holds no values here.*Load the model whole, without device_map"),
        (lazy_model, {}, "'0.weight' holds no values here"),
        (Tied, {}, "'0.weight' is not a parameter"),
        (lambda: "a name", {}, "torch.nn.Module, got str"),
    ],
)
def test_a_misfit_is_one_error_and_changes_nothing(model, changes, message) -> None:
    target = model()
    before = copy.deepcopy(target.state_dict()) if model is two_layers else {}
    masks = Masks({**masks_for(two_layers()), **changes})
    with pytest.raises(TargetError, match=message):
        masks.apply_(target)
    for name, value in before.items():
        assert torch.equal(target.state_dict()[name], value)


def test_one_tied_parameter_with_two_masks_is_refused() -> None:
    masks = Masks({"first.weight": torch.eye(3).bool(), "second.weight": torch.ones(3, 3).bool()})
    with pytest.raises(TargetError, match=r"'second.weight' and 'first.weight' are one parameter"):
        masks.apply_(Tied())


def test_all_misfits_are_listed() -> None:
    masks = Masks({name: torch.ones(7).bool() for name in ("0.weight", "nope", "2.weight")})
    with pytest.raises(TargetError, match=r"3 of 3 masks.*0\.weight.*nope.*2\.weight"):
        masks.apply_(two_layers())


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    masks = random_masks()
    path = tmp_path / "deeper" / "masks.safetensors"
    masks.save(path)
    loaded = Masks.load(path)
    assert loaded == masks
    assert list(loaded) == list(masks)
    assert [p.name for p in path.parent.iterdir()] == ["masks.safetensors"]
    first = hashlib.sha256(path.read_bytes()).digest()
    loaded.save(path)
    assert hashlib.sha256(path.read_bytes()).digest() == first
    assert Masks.from_pretrained(path.parent) == Masks.from_pretrained(tmp_path, subfolder="deeper") == masks


def test_the_documented_bit_order(tmp_path: Path) -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, 0] = mask[0, 3] = mask[1, 4] = True
    Masks({"a": mask}).save(tmp_path / "m")
    with safe_open(tmp_path / "m", framework="numpy") as file:
        assert file.get_tensor("a").tolist() == [0b0000_1001, 0b0000_0010]
        assert json.loads(file.metadata()["px_hf.masks"]) == {"version": 1, "shapes": [["a", [2, 5]]]}


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "masks.safetensors"
    random_masks().save(path)

    def full_disk(self: Path, content: bytes) -> int:
        with open(self, "wb") as file:
            file.write(content[:5])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        random_masks(seed=1).save(path)
    assert Masks.load(path) == random_masks()
    assert [p.name for p in tmp_path.iterdir()] == ["masks.safetensors"]


def file_of(
    shapes: object,
    *,
    version: object = 1,
    tensors: dict[str, tuple[str, list[int], bytes]] | None = None,
    metadata: dict[str, str] | None = None,
) -> bytes:
    """A safetensors file by hand; by default of one good mask "a" with 9 weights."""
    tensors = {"a": ("U8", [2], b"\xff\x01")} if tensors is None else tensors
    if metadata is None:
        metadata = {"px_hf.masks": json.dumps({"version": version, "shapes": shapes})}
    header: dict[str, object] = {"__metadata__": metadata}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


GOOD = [["a", [3, 3]]]


def test_the_file_by_hand_is_good(tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(file_of(GOOD))
    assert Masks.load(tmp_path / "m") == Masks({"a": torch.ones(3, 3).bool()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header"),
        (b"\xff" * 100, "header"),
        (file_of(GOOD)[:-1], "header"),
        (file_of(GOOD) + b"\0", "header"),
        (file_of(None, metadata={}), "no entry 'px_hf.masks'"),
        (file_of(None, metadata={"px_hf.masks": "{"}), "Expecting"),
        (file_of(None, metadata={"px_hf.masks": "[" * 200_000}), "nested too deeply"),
        (file_of(None, metadata={"px_hf.masks": "[]"}), "no format version"),
        (file_of(GOOD, version=True), "no format version"),
        (file_of(GOOD, version=2), "version 2, and this px_hf knows 1"),
        (file_of(None), "name, .size"),
        (file_of([["a"]]), "name, .size"),
        (file_of([["a", 9]]), "name, .size"),
        (file_of([["a", [3, -3]]]), "name, .size"),
        (file_of([["a", [-3, -3]]]), "name, .size"),
        (file_of([["a", [9.0]]]), "name, .size"),
        (file_of([["a", [True, 9]]]), "name, .size"),
        (file_of([["a", [10**30]]]), "name, .size"),
        (file_of([["a", [1] * 100]]), "name, .size"),
        (file_of([["a", [2**47, 2**47, 2**47]]]), "expected U8"),
        (file_of([["a", [17]]]), "expected U8 .3."),
        (file_of([["a", [8]]]), "expected U8 .1."),
        (file_of([["a", [3, 3]], ["a", [3, 3]]]), "'a' twice"),
        (file_of([["a", [3, 3]], ["b", [3, 3]]]), "not those that its metadata lists"),
        (file_of([]), "not those that its metadata lists"),
        (file_of([], tensors={}), "at least one weight"),
        (file_of(GOOD, tensors={"a": ("I8", [2], b"\xff\x01")}), "stored as I8"),
        (file_of(GOOD, tensors={"a": ("U8", [1, 2], b"\xff\x01")}), r"stored as U8 \[1, 2\]"),
        (file_of(GOOD, tensors={"a": ("U8", [2], b"\xff\x03")}), "beyond the last weight"),
        (file_of([["a", [0, 2**47, 2**47]]], tensors={"a": ("U8", [0], b"")}), "masks"),
    ],
)
def test_damaged_and_hostile_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Masks.load(tmp_path / "m")


@pytest.mark.parametrize("where", ["nothing-there", "."])
def test_a_missing_file(tmp_path: Path, where: str) -> None:
    with pytest.raises(CheckpointError, match="no masks file"):
        Masks.load(tmp_path / where)


@pytest.mark.parametrize(
    ("source", "message"),
    [("some/where/not/there", "not a local folder"), ("nobody/no-such-repo", "not a local folder")],
)
def test_from_pretrained_of_nothing(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=message):
        Masks.from_pretrained(source)


def test_from_pretrained_of_a_folder_without_masks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nor a masks file"):
        Masks.from_pretrained(tmp_path)

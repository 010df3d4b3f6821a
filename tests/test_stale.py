"""Two truths in one folder: whatever makes the dense copy and the compact one part, every reader notices."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compact_oracle
import pytest
import timm
import torch
from hub_server import HubServer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_hub import contents, logits, pruned, timm_resnet, vit
from timm.models import save_for_hf
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTImageProcessor,
)

import px_hf as px
from px_hf.commands import evaluate_downstream, prune_finetune
from px_hf.compact.dense import PIECE, PIECES, describe, pieces, samples
from px_hf.runs.arguments import ModelArguments
from px_hf.runs.saved_model import load
from px_hf.runs.sparse_backbone import CARRIED, has_zeros
from px_hf.runs.subjects import dense_and_pruned

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, by huggingface_hub 2.4
REPO = "alice/model"
stock = AutoModelForImageClassification.from_pretrained


def trained(folder: Path) -> PreTrainedModel:
    """What stock transformers loads, changed everywhere, zeros too."""
    model = stock(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


# ------------------------------------------------------------------------------- ways in which another library saves


def stock_saves(folder: Path) -> None:
    trained(folder).save_pretrained(folder)


def stock_saves_shards(folder: Path) -> None:
    trained(folder).save_pretrained(folder, max_shard_size=4000)


def half_precision(folder: Path) -> None:
    stock(folder).half().save_pretrained(folder)


def one_bias(folder: Path) -> None:
    model = stock(folder)
    model.classifier.bias.data[1] += 1e-7
    model.save_pretrained(folder)


def one_layer(folder: Path) -> None:
    model = stock(folder)
    weight = next(
        parameter for name, parameter in model.named_parameters() if "fc1.weight" in name or "intermediate" in name
    )
    weight.data[weight.data != 0] *= 1.001
    model.save_pretrained(folder)


def trainer_saves(folder: Path, *callbacks: Any) -> None:
    model = stock(folder)
    settings = TrainingArguments(
        str(folder / "run"), max_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True
    )
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": k % 3} for k in range(8)]
    trainer = Trainer(model, settings, train_dataset=data, callbacks=list(callbacks))
    trainer.train()
    trainer.save_model(str(folder))


def with_other_classes(folder: Path) -> None:
    stock(folder, num_labels=7, ignore_mismatched_sizes=True).save_pretrained(folder)


def a_pickle_alone(folder: Path) -> None:
    torch.save(trained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def anothers_file(folder: Path) -> None:
    torch.manual_seed(7)
    vit().save_pretrained(folder)


def another_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(pointer("0" * 64))


def pointer(oid: str) -> str:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize 1000\n"


WAYS = [
    *(stock_saves, stock_saves_shards, half_precision, one_bias, one_layer, trainer_saves, with_other_classes),
    *(a_pickle_alone, cut_short, anothers_file, another_pointer),
]

READERS: dict[str, Callable[[Path], object]] = {
    "px": px.from_pretrained,
    "px, through transformers": lambda folder: px.from_pretrained(folder, device_map="cpu"),
    "px, subfolder": lambda folder: px.from_pretrained(folder, subfolder="sparse"),
    "px, the folder itself": lambda folder: px.from_pretrained(folder / "sparse"),
    "stock, subfolder": lambda folder: stock(folder, subfolder="sparse"),
    "stock, the folder itself": lambda folder: stock(folder / "sparse"),
    "export": lambda folder: load(str(folder)),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "out", provenance={"criterion": "PX()"})
    return tmp_path / "out"


ROWS = [(way, False) for way in WAYS]
ROWS += [(way, True) for way in WAYS if way not in (a_pickle_alone, cut_short, another_pointer)]  # these need one file


@pytest.mark.parametrize(("way", "shards"), ROWS, ids=[f"{way.__name__}{'-shards' * many}" for way, many in ROWS])
def test_every_reader_refuses_older_weights(way: Callable[[Path], None], shards: bool, tmp_path: Path) -> None:
    model, masks = pruned()
    folder = tmp_path / "out"
    px.save_pretrained(model, masks, folder, max_shard_size=4000 if shards else "50GB")
    way(folder)
    for name, read in READERS.items():
        with pytest.raises(px.CheckpointError, match=r"not the same model.*overwrite=True.*delete sparse") as error:
            read(folder)
        assert str(folder) in str(error.value), name


def test_the_error_says_which_tensors(saved: Path) -> None:
    one_bias(saved)
    with pytest.raises(px.CheckpointError, match=r"^model.safetensors in .*: 1 of the \d+ dense .* 'classifier.bias'"):
        px.from_pretrained(saved)


@pytest.mark.parametrize("make", ["timm", "TimmWrapper"])
def test_timm_saves_over_it(make: str, tmp_path: Path) -> None:
    if make == "timm":
        model = timm.create_model("test_resnet", num_classes=3)
        masks = px.prune(model, [], px.Magnitude(), sparsity=0.8, progress=False)
        masks.apply_(model)
    else:
        model, masks = pruned(timm_resnet)
    px.save_pretrained(model, masks, tmp_path / "out")
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    save_for_hf(again, str(tmp_path / "out"), safe_serialization=True)  # the same weights
    px.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        next(iter(again.parameters())).add_(0.01)
    save_for_hf(again, str(tmp_path / "out"), safe_serialization=True)
    for read in (px.from_pretrained, px.Masks.from_pretrained):
        with pytest.raises(px.CheckpointError, match=r"not the same model"):
            read(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ masks, and a way out


def test_masks_are_given_only_if_the_new_weights_have_their_zeros(saved: Path) -> None:
    masks = px.Masks.from_pretrained(saved)
    trainer_saves(saved, px.KeepMasks(masks))
    with pytest.raises(px.CheckpointError, match="not the same model"):
        px.from_pretrained(saved)
    assert px.Masks.from_pretrained(saved) == masks == px.Masks.from_pretrained(saved, subfolder="sparse")

    model = stock(saved)  # the way out that the error names
    px.save_pretrained(model, px.Masks.from_pretrained(saved), saved, overwrite=True)
    assert torch.equal(logits(px.from_pretrained(saved)), logits(copy.deepcopy(model.eval())))


BREAKING = [trainer_saves, stock_saves_shards, with_other_classes, a_pickle_alone, cut_short, another_pointer]


@pytest.mark.parametrize("way", BREAKING, ids=lambda way: way.__name__)
def test_masks_that_the_new_weights_break(way: Callable[[Path], None], saved: Path) -> None:
    if way is with_other_classes:  # of which one is masked
        model, masks = pruned()
        head = {"classifier.weight": torch.rand(3, 16) < 0.5}
        masks = px.Masks({**masks, **head})
        masks.apply_(model)
        px.save_pretrained(model, masks, saved, overwrite=True)
    way(saved)
    for where in (saved, saved / "sparse"):
        with pytest.raises(px.CheckpointError, match=r"\d+ masks do not hold there, for example that of"):
            px.Masks.from_pretrained(where)


def test_the_weights_of_before_are_still_there(saved: Path, tmp_path: Path) -> None:
    before = logits(px.from_pretrained(saved))
    masks = px.Masks.from_pretrained(saved)
    stock_saves(saved)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(saved / "sparse", tmp_path / "elsewhere")
    for where in (tmp_path / "elsewhere", tmp_path / "elsewhere/sparse"):
        assert torch.equal(logits(px.from_pretrained(where)), before)
        assert px.Masks.from_pretrained(where) == masks


def test_a_checkpoint_whose_weights_lost_their_zeros(saved: Path, tmp_path: Path) -> None:
    masks, folder = px.Masks.from_pretrained(saved), tmp_path / "checkpoint-1"
    stock(saved).save_pretrained(folder)
    masks.save(folder / "masks.safetensors")
    assert px.Masks.from_pretrained(folder) == masks
    stock_saves(folder)
    with pytest.raises(px.CheckpointError, match=r"masks.safetensors does not belong to the weights beside it"):
        px.Masks.from_pretrained(folder)
    with pytest.raises(px.CheckpointError, match="not zero"):
        px.from_pretrained(folder)


# --------------------------------------------------------------------------------------- what is the same is accepted


def rewritten(folder: Path) -> None:
    stock(folder).save_pretrained(folder)


def in_shards(folder: Path) -> None:
    stock(folder).save_pretrained(folder, max_shard_size=4000)
    (folder / "model.safetensors").unlink()


def with_metadata(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors", metadata={"who": "they"})


def without_dense(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def as_pointer(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_text(pointer(hashlib.sha256(file.read_bytes()).hexdigest()))


def touched(folder: Path) -> None:
    copied = folder.with_name("copied")
    shutil.copytree(folder, copied, copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    copied.rename(folder)


def a_narrow_copy_beside(folder: Path) -> None:
    stock(folder).half().save_pretrained(folder.with_name("half"))
    shutil.move(folder.with_name("half") / "model.safetensors", folder / "model.fp16.safetensors")


def of_another_transformers(folder: Path) -> None:
    edit(folder / "config.json", transformers_version="4.0.0", a_new_default=1)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def without_record(folder: Path) -> None:
    """The compact copy as px_hf wrote it before there were records."""
    file = folder / "sparse/model.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = {key: value for key, value in opened.metadata().items() if key != "px_dense"}
    save_file(load_file(file), file, metadata=metadata)


SAME = [
    *(rewritten, in_shards, with_metadata, without_dense, without_config, as_pointer, touched, a_narrow_copy_beside),
    *(of_another_transformers, without_record),
]


@pytest.mark.parametrize("way", SAME, ids=lambda way: way.__name__)
def test_every_reader_accepts_the_same_weights(way: Callable[[Path], None], saved: Path) -> None:
    expected, masks = px.from_pretrained(saved).state_dict(), px.Masks.from_pretrained(saved)
    way(saved)
    for name, read in READERS.items():
        if not (name == "export" and way is without_config):
            found = read(saved)
            assert isinstance(found, nn.Module)
            assert all(torch.equal(tensor, expected[key]) for key, tensor in found.state_dict().items())
    assert px.Masks.from_pretrained(saved) == masks


@pytest.mark.parametrize("way", [stock_saves, half_precision, one_bias, trainer_saves], ids=lambda way: way.__name__)
def test_copies_without_a_record_are_compared_by_their_whole_tensors(way: Callable[[Path], None], saved: Path) -> None:
    without_record(saved)
    way(saved)
    for read in READERS.values():
        with pytest.raises(px.CheckpointError, match="not the same model"):
            read(saved)


def test_shards_of_two_models_are_not_one(tmp_path: Path) -> None:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "a", max_shard_size=4000)
    model.vit.layernorm.bias.data += 1
    px.save_pretrained(model, masks, tmp_path / "b", max_shard_size=4000)
    one = sorted((tmp_path / "b/sparse").glob("*.safetensors"))[0]
    shutil.copy(one, tmp_path / "a/sparse")
    with pytest.raises(px.CheckpointError, match="written with another dense model than the shards before it"):
        px.from_pretrained(tmp_path / "a")


def test_the_record_is_checked(saved: Path) -> None:
    file = saved / "sparse/model.safetensors"
    for record in ("[]", '{"../x": {}}', '{"model.safetensors": {"size": "1"}}', "{"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() | {"px_dense": record}
        save_file(load_file(file), file, metadata=metadata)
        with pytest.raises(px.CheckpointError, match="cannot be used"):
            px.from_pretrained(saved)


def large() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(1000, 300) * (torch.rand(1000, 300) < 0.01)
    return {"a.weight": weight, "a.bias": torch.randn(7), "empty": torch.zeros(0)}


def test_the_record_is_that_of_the_specification(tmp_path: Path) -> None:
    save_file(large(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    content = (tmp_path / "model.safetensors").read_bytes()
    assert describe(tmp_path) == {
        "model.safetensors": {
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "samples": compact_oracle.samples(content),
        }
    }


def test_training_one_very_sparse_layer_alone_shows_in_its_samples(tmp_path: Path) -> None:
    tensors = large()
    save_file(tensors, tmp_path / "a")
    tensors["a.weight"] *= 1.0001  # of one weight in a hundred
    save_file(tensors, tmp_path / "b")
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size
    assert samples(tmp_path / "a") != samples(tmp_path / "b")


@pytest.mark.parametrize("size", [0, 1, PIECES * PIECE, PIECES * PIECE + 1, 10**7 + 3])
def test_pieces_reach_from_the_first_byte_to_the_last(size: int) -> None:
    found = list(pieces(size))
    assert (found[0][0], found[-1][1]) == (0, size)
    assert sum(end - start for start, end in found) == min(size, PIECES * PIECE)


# ------------------------------------------------------------------------------------------------------- other configs


def test_configs_that_part(saved: Path) -> None:
    names = {"id2label": {"0": "ant", "1": "bee", "2": "dog"}, "label2id": {"ant": 0, "bee": 1, "dog": 2}}
    edit(saved / "config.json", **names)
    for read in READERS.values():
        with pytest.raises(px.CheckpointError, match=r"do not agree on id2label, label2id.*the same change in both"):
            read(saved)
    edit(saved / "sparse/config.json", **names)
    assert px.from_pretrained(saved).config.id2label[2] == "dog"
    entry = json.loads((saved / "config.json").read_text())["px"]
    edit(saved / "config.json", px=entry | {"masks_sha256": "0" * 64})
    for read in READERS.values():
        with pytest.raises(px.CheckpointError, match="do not agree on px"):
            read(saved)


# ---------------------------------------------------------------------------------- "px" carried to a new dense folder


@pytest.fixture
def carried(saved: Path) -> Path:
    """A dense model in a new folder, whose config stock saving has copied."""
    trained(saved).save_pretrained(saved.with_name("dense"))
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(saved.with_name("dense"))
    return saved.with_name("dense")


def test_a_dense_model_with_a_carried_config_is_dense(carried: Path, saved: Path) -> None:
    assert "px" in json.loads((carried / "config.json").read_text())
    with pytest.warns(UserWarning, match="ordinary dense model"):
        assert torch.equal(logits(load(str(carried))), logits(copy.deepcopy(stock(carried).eval())))
    subjects, notes = dense_and_pruned(ModelArguments(model_name_or_path=str(carried)), None)
    assert [subject.kind for subject in subjects] == ["dense"]
    assert notes == [f"dense: {CARRIED}"]
    for read in (px.from_pretrained, px.Masks.from_pretrained):
        with pytest.raises(px.CheckpointError, match=r"neither a compact copy.*config.json says sparsity 0\.\d+"):
            read(carried)
    assert not has_zeros(stock(carried), stock(carried).config)
    assert has_zeros(stock(saved), stock(saved).config)
    stock(saved).save_pretrained(saved.with_name("still"))  # its zeros are there, so it is not taken as dense
    with pytest.raises(px.CheckpointError, match="neither a compact copy"):
        dense_and_pruned(ModelArguments(model_name_or_path=str(saved.with_name("still"))), None)


def test_the_recipe_prunes_a_dense_model_with_a_carried_config(
    carried: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--model_name_or_path", str(carried), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    argv += ["--criterion", "magnitude", "--sparsity", "0.5", "--rounds", "1", "--max_train_samples", "60"]
    argv += ["--examples_per_class", "1"]
    prune_finetune.main([*argv, "--disable_tqdm", "true", "--report_to", "none", "--use_cpu", "true"])
    said = " ".join(capsys.readouterr().out.split())
    assert "it is taken as an ordinary dense model" in said
    assert "is sparse already" not in said
    assert px.Masks.from_pretrained(tmp_path / "run").sparsity == pytest.approx(0.5, abs=1e-3)


# ------------------------------------------------------------------------------------------------------------- the Hub


@pytest.fixture
def pushed(hub: HubServer) -> tuple[HubServer, px.Masks]:
    model, masks = pruned()
    px.push_to_hub(model, masks, REPO, image_processor=ViTImageProcessor())
    return hub, masks


HUB_READERS: dict[str, Callable[..., object]] = {
    "px": px.from_pretrained,
    "px, subfolder": lambda repo, **more: px.from_pretrained(repo, subfolder="sparse", **more),
    "stock": lambda repo, **more: stock(repo, subfolder="sparse", **more),
    "masks": px.Masks.from_pretrained,
}


@pytest.mark.parametrize("max_shard_size", ["1GB", 4000], ids=["one file", "shards"])
def test_a_stock_push_over_a_repository(pushed: tuple[HubServer, px.Masks], max_shard_size: Any) -> None:
    hub, masks = pushed
    before = hub.repos[REPO].branches["main"]
    expected = logits(px.from_pretrained(REPO))
    model = stock(REPO)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    model.push_to_hub(REPO, max_shard_size=max_shard_size)
    for read in HUB_READERS.values():
        with pytest.raises(px.CheckpointError, match=rf"in {REPO}, commit [0-9a-f]{{40}} and the compact copy"):
            read(REPO)
    assert torch.equal(logits(px.from_pretrained(REPO, revision=before)), expected)
    assert px.Masks.from_pretrained(REPO, revision=before) == masks


def test_the_dense_file_is_not_downloaded_to_compare_it(pushed: tuple[HubServer, px.Masks], tmp_path: Path) -> None:
    hub, _masks = pushed
    for read in HUB_READERS.values():
        read(REPO)
    assert hub.count(r"^GET .*/resolve/[^/]+/model\.safetensors") == 0
    assert hub.count("paths-info") >= len(HUB_READERS)
    for read in HUB_READERS.values():
        read(REPO, local_files_only=True)
    asked = hub.count("paths-info")
    read = HUB_READERS["px"]
    stock(REPO)  # now the dense file is in the cache, where its samples are compared
    read(REPO)
    assert hub.count("paths-info") == asked


def test_a_cache_of_ones_own(pushed: tuple[HubServer, px.Masks], tmp_path: Path) -> None:
    _, masks = pushed
    model = stock(REPO)
    model.classifier.bias.data += 1
    model.push_to_hub(REPO)
    assert px.Masks.from_pretrained(REPO, cache_dir=tmp_path / "own") == masks  # which hold there
    for read in (px.from_pretrained, HUB_READERS["stock"]):
        with pytest.raises(px.CheckpointError, match=r"1 of the \d+ dense tensors hold other values") as error:
            read(REPO, cache_dir=tmp_path / "own")
        assert "classifier.bias" in str(error.value)


def test_the_same_weights_pushed_in_other_files(pushed: tuple[HubServer, px.Masks]) -> None:
    hub, _masks = pushed
    files = hub.repos[REPO].files("main")
    model = stock(REPO)
    model.push_to_hub(REPO, max_shard_size=4000)
    assert "model.safetensors.index.json" in hub.repos[REPO].files("main")
    assert hub.repos[REPO].files("main")["model.safetensors"] == files["model.safetensors"]
    for read in HUB_READERS.values():
        read(REPO)


def test_a_hub_that_cannot_say(pushed: tuple[HubServer, px.Masks]) -> None:
    hub, _ = pushed
    hub.fail("POST", "paths-info", times=100, status=403)
    with pytest.warns(UserWarning, match="still belongs to its dense copy could not be asked"):
        px.from_pretrained(REPO)
    hub.faults.clear()
    hub.fail("POST", "paths-info", times=100, status=500)
    with pytest.raises(px.CheckpointError, match="The Hub does not tell"):
        px.from_pretrained(REPO)


def test_an_edited_card_of_other_masks_is_named(pushed: tuple[HubServer, px.Masks], tmp_path: Path) -> None:
    from hub_git import Blob

    hub, masks = pushed
    repo = hub.repos[REPO]
    card = repo.files("main")["README.md"].content
    repo.commit(
        "main", {**repo.files("main"), "README.md": Blob(card.replace(b"# model", b"# Mine"))}, "", "", "alice", False
    )
    model = px.from_pretrained(REPO)
    fewer = px.Masks({name: mask & (torch.rand(mask.shape) < 0.5) for name, mask in masks.items()})
    fewer.apply_(model)
    with pytest.warns(UserWarning, match="although it describes other masks"):
        px.push_to_hub(model, fewer, REPO)


# ----------------------------------------------------------------------------------------- what is scored is published


def test_what_is_scored_is_what_is_published(saved: Path, hub: HubServer, tmp_path: Path) -> None:
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(saved)
    trainer_saves(saved, px.KeepMasks(px.Masks.from_pretrained(saved)))
    before = contents(saved)
    argv = ["--model_name_or_path", str(saved), "--output_dir", str(tmp_path / "report"), "--tasks", "digits"]
    with pytest.raises(px.CheckpointError, match="not the same model"):
        evaluate_downstream.main([*argv, "--push_to_hub", "--hub_model_id", REPO, "--disable_tqdm", "true"])
    assert contents(saved) == before
    assert REPO not in hub.repos

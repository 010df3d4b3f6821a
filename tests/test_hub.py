"""What is saved is loaded by stock transformers, with exactly the promised zeros; damage is always noticed."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from px_hf.errors import CheckpointError, InvalidArgumentError, OutputExistsError, TargetError
from px_hf.hub.loading import from_pretrained
from px_hf.hub.saving import save_pretrained
from px_hf.masks import Masks
from px_hf.model.empty import build_empty

CLASSES = {"id2label": {0: "ant", 1: "bee", 2: "cat"}, "label2id": {"ant": 0, "bee": 1, "cat": 2}}


def vit() -> PreTrainedModel:
    return ViTForImageClassification(
        ViTConfig(
            image_size=16,
            patch_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            **CLASSES,
        )
    )


def resnet() -> PreTrainedModel:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **CLASSES)
    )


def timm_resnet() -> PreTrainedModel:
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", **CLASSES))


def timm_vit() -> PreTrainedModel:
    return TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 16, "patch_size": 8}, **CLASSES)
    )


MODELS = {"vit": vit, "resnet": resnet, "timm resnet": timm_resnet, "timm vit": timm_vit}


def is_large(parameter: nn.Parameter) -> bool:
    return parameter.dim() in (2, 4) and parameter.numel() > 64


def pruned(make: Callable[[], PreTrainedModel] = vit) -> tuple[PreTrainedModel, Masks]:
    torch.manual_seed(0)
    model = make().eval()
    masks = Masks({name: torch.rand(p.shape) < 0.25 for name, p in model.named_parameters() if is_large(p)})
    masks.apply_(model)
    return model, masks


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)).logits


STOCK = """
import sys
sys.modules["px_hf"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification
try:
    import px_hf
except ImportError:
    pass
else:
    raise SystemExit("px_hf could be imported")
found = {}
for name in sys.argv[1:]:
    model = AutoModelForImageClassification.from_pretrained(name).eval()
    with torch.no_grad():
        found[name] = model(pixel_values=torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)).logits
    large = [p for p in model.parameters() if p.dim() in (2, 4) and p.numel() > 64]
    found[name + " zeros"] = torch.tensor(sum(int((p == 0).sum()) for p in large))
    print(model.config.px["criterion"], model.config.id2label)
save_file(found, "found.safetensors")
"""


def test_stock_transformers_loads_it_where_px_hf_cannot_be_imported(tmp_path: Path) -> None:
    models = {name.replace(" ", "-"): pruned(make) for name, make in MODELS.items()}
    for name, (model, masks) in models.items():
        save_pretrained(model, masks, tmp_path / name, provenance={"criterion": "PX()"})
    done = subprocess.run(
        [sys.executable, "-c", STOCK, *models],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["PX() {0: 'ant', 1: 'bee', 2: 'cat'}"] * len(models)
    found = load_file(tmp_path / "found.safetensors")
    for name, (model, masks) in models.items():
        torch.testing.assert_close(found[name], logits(model), rtol=0, atol=1e-6)
        assert int(found[name + " zeros"]) == masks.total - masks.kept


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_round_trip(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    model, masks = pruned(make)
    config, weights = copy.deepcopy(model.config.to_dict()), copy.deepcopy(model.state_dict())
    save_pretrained(model, masks, tmp_path / "a" / "out")
    now = model.config.to_dict()
    # transformers itself notes the class and dtype when it saves a model.
    assert {key for key in now | config if now.get(key) != config.get(key)} <= {"architectures", "dtype"}
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert contents(tmp_path / "a" / "out").keys() == {
        "config.json",
        "model.safetensors",
        "sparse/config.json",
        "sparse/model.safetensors",
    }
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]

    loaded = from_pretrained(tmp_path / "a" / "out")
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert Masks.from_pretrained(tmp_path / "a" / "out") == masks

    save_pretrained(loaded, masks, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "a" / "out")


def test_provenance_survives_stock_configs(tmp_path: Path) -> None:
    model, masks = pruned()
    base = {"id": "some/vit", "revision": "abc"}
    told = {"criterion": "PX()", "rounds": 10, "base_model": base, "loss": float("nan")}
    save_pretrained(model, masks, tmp_path / "out", provenance=told)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    config.save_pretrained(tmp_path / "config")
    px = AutoConfig.from_pretrained(tmp_path / "config").px
    assert px == json.loads((tmp_path / "out" / "config.json").read_text())["px"]
    assert {name: px[name] for name in told} == {**told, "loss": None}
    assert px["sparsity"] == masks.sparsity
    assert (px["weights"], px["weights_kept"], px["masks_sha256"]) == (masks.total, masks.kept, masks.fingerprint())
    assert set(px["versions"]) - {"px_hf_commit"} == {"px_hf", "torch", "transformers"}
    assert not hasattr(model.config, "px")


def test_the_image_processor_goes_with_it(tmp_path: Path) -> None:
    model, masks = pruned()
    processor = ViTImageProcessor(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    save_pretrained(model, masks, tmp_path / "out", image_processor=processor)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").image_mean == pytest.approx([0.1, 0.2, 0.3])


def test_wrapped_models_and_narrow_weights(tmp_path: Path) -> None:
    model, masks = pruned()
    save_pretrained(nn.DataParallel(torch.compile(model, backend="eager")), masks, tmp_path / "wrapped")
    assert torch.equal(logits(from_pretrained(tmp_path / "wrapped")), logits(model))
    save_pretrained(model.to(torch.bfloat16), masks, tmp_path / "narrow")
    assert from_pretrained(tmp_path / "narrow").dtype == torch.bfloat16
    assert from_pretrained(tmp_path / "narrow", dtype=torch.float32).dtype == torch.float32


# --------------------------------------------------------------------------------------- saving: refused, undone


def test_weights_that_came_back_are_not_saved(tmp_path: Path) -> None:
    model, masks = pruned()
    name = next(iter(masks))
    with torch.no_grad():
        model.get_parameter(name)[tuple((~masks[name]).nonzero()[0])] = 1.0
    with pytest.raises(TargetError, match=rf"1 weights .* '{name}'. masks.apply_\(model\)"):
        save_pretrained(model, masks, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": nn.Linear(3, 3)}, InvalidArgumentError, "needs a model of transformers or timm, got Linear"),
        ({"masks": Masks({"nope": torch.ones(2).bool()})}, TargetError, "'nope' is not a parameter"),
        ({"provenance": {"path": Path("x")}}, InvalidArgumentError, "JSON"),
        ({"provenance": ["x"]}, InvalidArgumentError, "JSON"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str, tmp_path: Path) -> None:
    model, masks = pruned()
    with pytest.raises(error, match=message):
        save_pretrained(**{"model": model, "masks": masks, "folder": tmp_path / "out", **change})  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


REPLACED = ["config.json", "model.safetensors", "preprocessor_config.json", "sparse"]
REMOVED = ["masks.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("name", REPLACED + REMOVED)
def test_nothing_is_overwritten_unless_asked(name: str, tmp_path: Path) -> None:
    model, masks = pruned()
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-3" / "config.json").write_text("theirs")
    (tmp_path / "out" / "notes.txt").write_text("theirs")
    file = "sparse/model.safetensors" if name == "sparse" else name
    (tmp_path / "out" / file).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / file).write_text("theirs")
    before = contents(tmp_path)
    with pytest.raises(OutputExistsError, match=f"already holds {name}"):
        save_pretrained(model, masks, tmp_path / "out", image_processor=ViTImageProcessor())
    assert contents(tmp_path) == before

    save_pretrained(model, masks, tmp_path / "out", image_processor=ViTImageProcessor(), overwrite=True)
    after = contents(tmp_path)
    assert {path for path in before if after.get(path) != before[path]} == {f"out/{file}"}
    assert (f"out/{file}" in after) == (name in REPLACED)
    assert torch.equal(logits(from_pretrained(tmp_path / "out")), logits(model))


def test_a_folder_with_other_files_is_added_to(tmp_path: Path) -> None:
    model, masks = pruned()
    (tmp_path / "out").mkdir()
    save_pretrained(model, masks, tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "training_args.bin").write_text("theirs")
    save_pretrained(model, masks, tmp_path / "other")
    assert (tmp_path / "other" / "training_args.bin").read_text() == "theirs"
    for folder in ("out", "other"):
        assert torch.equal(logits(from_pretrained(tmp_path / folder)), logits(model))
    (tmp_path / "file").write_text("theirs")
    with pytest.raises(OutputExistsError, match="is a file"):
        save_pretrained(model, masks, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_leaves_the_folder_as_it_was(overwrite: bool, tmp_path: Path) -> None:
    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError("No space left on device")

    model, masks = pruned()
    if overwrite:
        save_pretrained(model, masks, tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, masks, tmp_path / "out", image_processor=FullDisk(), overwrite=overwrite)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * overwrite


# ------------------------------------------------------------------------------------------- loading: damage found


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def truncate(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-9])


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def edit_config(**entries: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))

    return damage


def other_masks(folder: Path) -> None:
    masks = Masks.load(folder / "masks.safetensors")
    Masks({name: ~mask for name, mask in masks.items()}).save(folder / "masks.safetensors")


def masks_of_another_model(folder: Path) -> None:
    pruned(resnet)[1].save(folder / "masks.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "cannot load"),
        (remove("model.safetensors"), "cannot load"),
        (remove("masks.safetensors"), "nor a masks file"),
        (truncate("config.json"), "cannot load"),
        (truncate("model.safetensors"), "cannot load"),
        (truncate("masks.safetensors"), "not a whole file"),
        (edit_config(model_type="no_such_model"), "cannot load"),
        (edit_config(num_hidden_layers=3), "parameters of ViTForImageClassification are not in"),
        (edit_config(hidden_size=32), "cannot load|another shape"),
        (edit_weights(lambda weights: weights.pop("classifier.bias")), "1 parameters .* 'classifier.bias'"),
        (edit_weights(lambda weights: [w.add_(1) for w in weights.values()]), "are not zero"),
        (other_masks, "are not zero"),
        (masks_of_another_model, r"not about its model: .*\(Written by {'px_hf'"),
    ],
)
def test_a_damaged_dense_folder_is_never_loaded(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    model, masks = pruned()
    save_pretrained(model, masks, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "sparse")
    masks.save(tmp_path / "out" / "masks.safetensors")  # as px_hf saved before there was a compact copy
    assert torch.equal(logits(copy.deepcopy(from_pretrained(tmp_path / "out"))), logits(model))
    damage(tmp_path / "out")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "out")


HUGE = {"hidden_size": 2**24, "num_attention_heads": 2, "intermediate_size": 2**24}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "sparse/config.json: it is missing"),
        (truncate("config.json"), "Cannot load .*sparse/config.json"),
        (remove("model.safetensors"), "neither a compact copy"),
        (truncate("model.safetensors"), "cannot be used"),
        (edit_config(model_type="no_such_model"), "no_such_model"),
        (edit_config(model_type="resnet"), "parameters of ResNetForImageClassification are not in the compact copy"),
        (edit_config(num_hidden_layers=3), "8 parameters|16 parameters"),
        (edit_config(num_hidden_layers=1), "tensors of .* are none of ViTForImageClassification"),
        (edit_config(hidden_size=32), "config and weights do not belong together"),
        (edit_config(id2label={"0": "ant"}, label2id={"ant": 0}), "it would be random"),
        (edit_config(num_attention_heads=0), "cannot be built: ZeroDivisionError"),
        (edit_config(hidden_size="sixteen"), "cannot load the config|cannot be built"),
        (edit_config(hidden_act="no_such_activation"), "cannot be built"),
        (edit_config(**HUGE), "do not belong together|cannot be built"),
        (edit_config(architecture="test_vit", model_type="timm_wrapper", num_classes=3), "parameters of TimmWrapper"),
        (edit_config(architecture="hf-hub:some/repo", model_type="timm_wrapper"), "knows no architecture"),
        (
            edit_config(
                architecture="test_vit", model_type="timm_wrapper", model_args={"checkpoint_path": "evil.pth"}
            ),
            "tells timm what to read: checkpoint_path",
        ),
    ],
)
def test_a_damaged_compact_copy_is_never_loaded(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    model, masks = pruned()
    save_pretrained(model, masks, tmp_path / "out")
    damage(tmp_path / "out" / "sparse")
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path / "out")


REMOTE_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

class TinyConfig(PretrainedConfig):
    model_type = "tiny_of_ours"

class Tiny(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(768, config.num_labels)
        self.post_init()
    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.layer(pixel_values.flatten(1)))
"""


def test_code_from_the_folder_runs_only_if_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    base = tmp_path / "base"
    base.mkdir()
    (base / "tiny.py").write_text(REMOTE_CODE)
    auto_map = {"AutoConfig": "tiny.TinyConfig", "AutoModelForImageClassification": "tiny.Tiny"}
    config = {"model_type": "tiny_of_ours", "auto_map": auto_map, "num_labels": 3, "architectures": ["Tiny"]}
    (base / "config.json").write_text(json.dumps(config))
    save_file({"layer.weight": torch.randn(3, 768), "layer.bias": torch.zeros(3)}, base / "model.safetensors")
    model = AutoModelForImageClassification.from_pretrained(base, trust_remote_code=True)
    masks = Masks({"layer.weight": torch.rand(3, 768) < 0.5})
    masks.apply_(model)
    save_pretrained(model, masks, tmp_path / "out")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        from_pretrained(tmp_path / "out")
    assert torch.equal(logits(from_pretrained(tmp_path / "out", trust_remote_code=True)), logits(model))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_to_be_filled_has_no_weights_and_all_else(make: Callable[[], PreTrainedModel]) -> None:
    whole = make()
    empty = build_empty(make, "here")
    assert all(parameter.is_meta for parameter in empty.parameters())
    buffers = dict(empty.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in whole.named_buffers())


def test_what_has_values_is_initialised_while_a_model_is_built() -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("table", nn.init.constant_(torch.empty(3), 2).mul_(torch.arange(3)), persistent=False)

    assert build_empty(Sums, "here").table.tolist() == [0, 2, 4]


@pytest.mark.parametrize("extra", [{}, {"ignore_mismatched_sizes": True}])
def test_another_head_is_not_made_up(extra: dict[str, bool], tmp_path: Path) -> None:
    model, masks = pruned()
    save_pretrained(model, masks, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"(it|they) would be random|cannot load"):
        from_pretrained(tmp_path / "out", num_labels=7, **extra)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a local folder"):
        from_pretrained(str(tmp_path / "nothing"), local_files_only=True)


def test_a_stock_folder_without_masks(tmp_path: Path) -> None:
    pruned()[0].save_pretrained(tmp_path / "out")
    with pytest.raises(CheckpointError, match="nor a masks file"):
        from_pretrained(tmp_path / "out")
    AutoModelForImageClassification.from_pretrained(tmp_path / "out")

"""peft on a sparse model: its names, its masks, and adapters that are merged with the zeros kept."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from networks import build, hf_vit, images
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import px_hf as px
from px_hf.model.targets import prunable
from px_hf.model.wrappers import named_parameters, paths_of_tensors, unwrap

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft asks transformers for it by its old name."""

BATCHES = [(images(4), torch.tensor([0, 1, 2, 3]))]


def vit() -> nn.Module:
    return build("hf vit")


def with_lora(model: nn.Module, **settings: Any) -> Any:
    torch.manual_seed(1)
    given: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "fc1"], "modules_to_save": ["classifier"]}
    return peft.get_peft_model(model, peft.LoraConfig(**(given | settings)))


def trained(model: Any, seed: int = 2) -> Any:
    """With adapters and a head as after some training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def some_masks(model: nn.Module, sparsity: float = 0.7) -> px.Masks:
    return px.prune(model, [], px.Magnitude(), sparsity=sparsity, progress=False)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=images(4)).logits


def test_zeros_are_kept_inside_distributed_data_parallel(tmp_path: Path) -> None:
    """As `px-hf prune --lora --num_processes`, which tests/test_lora_recipe.py runs on two."""
    model = vit()
    masks = some_masks(model)
    masks.apply_(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        peft_model = with_lora(model).train()
        with px.mask_lora(peft_model, masks):
            parallel = nn.parallel.DistributedDataParallel(peft_model)
            optimizer = torch.optim.AdamW([p for p in parallel.parameters() if p.requires_grad], lr=0.05)
            for _ in range(3):
                nn.functional.cross_entropy(parallel(pixel_values=images(4)).logits, BATCHES[0][1]).backward()
                optimizer.step()
                optimizer.zero_grad()
            before = logits(parallel)
            merged = px.merge_lora_(parallel, masks)
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    assert not masks.revived(merged)
    torch.testing.assert_close(logits(merged), before)
    changed = merged.get_parameter("vit.layers.0.mlp.fc1.weight")
    assert not torch.equal(changed, build("hf vit").get_parameter("vit.layers.0.mlp.fc1.weight") * (changed != 0))


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["query", "q_proj", "classifier"], "modules_to_save": None},
        {"target_modules": "all-linear"},
        {"target_modules": ["projection", "o_proj"], "use_dora": True},
        {"modules_to_save": ["classifier", "fc2"]},
    ],
    ids=["lora", "head adapted", "all linear", "dora on a convolution", "a layer trained whole"],
)
@pytest.mark.filterwarnings("ignore:.*LoRA adapter.*:UserWarning")
def test_names_and_targets_are_those_of_the_plain_model(settings: dict[str, Any]) -> None:
    plain = vit()
    model = with_lora(copy.deepcopy(plain), **settings)
    ours = named_parameters(model)
    assert set(dict(plain.named_parameters())) <= ours.keys()
    assert len(ours) == len(list(model.parameters()))
    assert {name: p.shape for name, p in prunable(model).items()} == {n: p.shape for n, p in prunable(plain).items()}
    assert prunable(model, prune_head=True).keys() == prunable(plain, prune_head=True).keys()
    state = unwrap(model).state_dict(keep_vars=True)
    assert all(state[path] is ours[name] for name, path in paths_of_tensors(unwrap(model)).items() if name in ours)


def test_the_head_that_trains_is_the_one_that_masks_speak_of() -> None:
    model = with_lora(vit())
    head = unwrap(model).classifier.modules_to_save["default"]
    assert named_parameters(model)["classifier.weight"] is head.weight
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, prune_head=True, progress=False)
    masks.apply_(model)
    assert (head.weight[~masks["classifier.weight"]] == 0).all()


@pytest.mark.parametrize("other", [peft.IA3Config(target_modules=["q_proj", "fc1"], feedforward_modules=["fc1"]),
                                   peft.LoHaConfig(target_modules=["q_proj"], r=2)],
                         ids=["ia3", "loha"])  # fmt: skip
def test_other_adapters_are_looked_through_too_and_not_merged_as_lora(other: Any) -> None:
    plain = vit()
    model = peft.get_peft_model(copy.deepcopy(plain), other)
    assert some_masks(model) == some_masks(plain)
    with pytest.raises(px.TargetError, match="not all of LoRA"):
        px.merge_lora_(model, some_masks(plain))


# ------------------------------------------------------------------------------------------------ pruning


@pytest.mark.parametrize(
    "criterion", [px.PX(), px.PX(paths="active"), px.SNIP(), px.Magnitude(), px.SynFlow(), px.Wanda()],
    ids=lambda c: type(c).__name__,
)  # fmt: skip
def test_scores_are_those_of_the_plain_model(criterion: px.Criterion) -> None:
    plain = vit()
    model = with_lora(copy.deepcopy(plain), lora_dropout=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    ours, theirs = criterion.score(model, BATCHES), criterion.score(plain, BATCHES)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], score) for name, score in theirs.items())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(layer._disable_adapters for layer in model.modules() if hasattr(layer, "lora_A"))


@pytest.mark.parametrize("scope", ["layer", "2:4", "structured"])
def test_masks_are_those_of_the_plain_model(scope: str) -> None:
    plain = vit()
    settings: Any = {"sparsity": 0.5, "scope": scope, "rounds": 2, "progress": False}
    masks = px.prune(with_lora(copy.deepcopy(plain)), BATCHES, px.PX(), **settings)
    assert masks == px.prune(plain, BATCHES, px.PX(), **settings)


def test_trained_adapters_are_not_scored_and_it_says_so() -> None:
    model = trained(with_lora(vit()))
    with pytest.warns(UserWarning, match="4 LoRA adapter.s. have been trained.*merge them first"):
        some_masks(model)
    model.merge_adapter()
    with pytest.raises(px.TargetError, match="unmerge_adapter"):
        px.Magnitude().score(model)


def test_the_report_is_that_of_the_plain_model() -> None:
    plain = vit()
    masks = some_masks(plain)
    ours, theirs = px.report(with_lora(copy.deepcopy(plain)), masks), px.report(plain, masks)
    assert ours.macs is not None
    assert ours.to_dict() == theirs.to_dict()


def test_shrinking_and_saving_need_the_plain_model(tmp_path: Path) -> None:
    plain = vit()
    masks = px.prune(plain, BATCHES, px.PX(), sparsity=0.5, scope="structured", progress=False)
    masks.apply_(plain)
    model = with_lora(plain)
    with pytest.raises(px.TargetError, match=r"px\.merge_lora_"):
        px.shrink(model, masks, BATCHES[0])
    with pytest.raises(px.PxError):
        px.save_pretrained(model, masks, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_without_a_peft_model(tmp_path: Path) -> None:
    plain = vit()
    masks = some_masks(plain)
    masks.apply_(plain)
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), plain)
    assert some_masks(model) == masks
    assert not masks.revived(model)
    for call in (lambda: px.merge_lora_(model, masks), lambda: px.save_pretrained(model, masks, "nowhere")):
        with pytest.raises(px.TargetError, match=r"without a PeftModel.*layer\.merge\(\); model\.set_submodule"):
            call()
    expected = logits(trained(model))
    for path, layer in list(model.named_modules()):  # as the error says
        if hasattr(layer, "base_layer"):
            layer.merge()
            model.set_submodule(path, layer.base_layer)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    masks.apply_(model)
    px.save_pretrained(model, masks, tmp_path)
    assert not masks.revived(px.from_pretrained(tmp_path))


def test_attention_that_peft_takes_apart_is_refused() -> None:
    """Its in_proj_weight is now a parameter and now none, while there is an adapter."""
    plain = build("torchvision vit")
    masks = some_masks(plain)
    masks.apply_(plain)
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(target_modules=["self_attention"], r=2))
    with pytest.raises(px.TargetError, match=r"self_attention.*prune first, and give the model adapters then"):
        some_masks(model)
    with pytest.raises(px.TargetError, match=r"px\.mask_lora cannot mask"):
        px.mask_lora(model, masks)
    merged = px.merge_lora_(model, masks)
    assert not masks.revived(merged)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in merged.state_dict().items())


# ------------------------------------------------------------------------------------------------ training


def test_zeros_are_kept_while_adapters_and_head_train() -> None:
    plain = vit()
    masks = px.prune(plain, [], px.Magnitude(), sparsity=0.7, prune_head=True, progress=False)
    model = with_lora(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with px.keep_masks(optimizer, model, masks):
        for _ in range(2):
            model.train()(pixel_values=BATCHES[0][0], labels=BATCHES[0][1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not masks.revived(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in moved)
    assert any("classifier" in name for name in moved)


def test_trainer_saves_adapters_and_masks_and_resumes(tmp_path: Path) -> None:
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(*BATCHES[0], strict=True)]

    def train(steps: int, resume: bool) -> tuple[Any, px.Masks]:
        plain = vit()
        masks = some_masks(plain)
        model = with_lora(plain)
        args = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=2, label_names=["labels"], remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=rows, callbacks=[px.KeepMasks(masks)])
        trainer.train(resume_from_checkpoint=resume)
        return model, masks

    train(1, False)
    assert {"adapter_model.safetensors", "masks.safetensors"} <= {
        p.name for p in (tmp_path / "checkpoint-1").iterdir()
    }
    model, masks = train(2, True)
    assert not masks.revived(model)


# ------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"target_modules": ["projection", "q_proj"]}],
                         ids=["lora", "dora", "a convolution"])  # fmt: skip
def test_merging_is_peft_and_then_the_masks(settings: dict[str, Any]) -> None:
    plain = vit()
    masks = some_masks(plain)
    masks.apply_(plain)
    model = trained(with_lora(copy.deepcopy(plain), **settings))
    expected = copy.deepcopy(model).merge_and_unload()
    assert masks.revived(expected), "or there is nothing to do"
    masks.apply_(expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        merged = px.merge_lora_(model, masks)
    assert type(merged) is type(plain)
    assert not masks.revived(merged)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in merged.state_dict().items())


def test_what_is_lost_is_told() -> None:
    plain = vit()
    masks = some_masks(plain, 0.9)
    masks.apply_(plain)
    with pytest.warns(UserWarning, match=r"\d\d% of what the adapters have learned.*px.mask_lora"):
        px.merge_lora_(trained(with_lora(plain)), masks)


@pytest.mark.parametrize("network", ["hf vit", "hf resnet"])
def test_under_the_mask_nothing_is_lost(network: str, recwarn: pytest.WarningsRecorder) -> None:
    plain = build(network)
    layers = ["q_proj", "fc1"] if network == "hf vit" else ["convolution"]
    masks = some_masks(plain)
    masks.apply_(plain)
    model = with_lora(plain, target_modules=layers, lora_dropout=0.1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    x = images(4) if network == "hf vit" else torch.randn(4, 3, 32, 32)
    with px.mask_lora(model, masks):
        for _ in range(3):
            model.train()(pixel_values=x, labels=BATCHES[0][1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            before = model.eval()(pixel_values=x).logits
            copied = copy.deepcopy(model)(pixel_values=x).logits
            with model.disable_adapter():
                alone = model(pixel_values=x).logits
        merged = px.merge_lora_(model, masks)
    with torch.no_grad():
        after = merged(pixel_values=x).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(copied, before)
    assert not torch.allclose(alone, before, atol=1e-3), "the adapters do something, or this test could not fail"
    assert not masks.revived(merged)
    assert not [w for w in recwarn if "is lost" in str(w.message)]


def test_the_mask_can_be_taken_off() -> None:
    plain = vit()
    masks = some_masks(plain)
    masks.apply_(plain)
    model = trained(with_lora(plain))
    keys, expected = list(model.state_dict()), logits(model)
    handle = px.mask_lora(model, masks)
    assert list(model.state_dict()) == keys
    assert not torch.allclose(logits(model), expected)
    with pytest.raises(px.TargetError, match="masked already"):
        px.mask_lora(model, masks)
    handle.remove()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "has a bias"), ({"target_modules": ["classifier"],
      "modules_to_save": None}, "none of the layers with an adapter is masked")],
)  # fmt: skip
def test_what_cannot_be_masked(settings: dict[str, Any], message: str) -> None:
    plain = vit()
    masks = some_masks(plain)
    with pytest.raises(px.TargetError, match=message):
        px.mask_lora(with_lora(plain, **settings), masks)


def test_errors_change_nothing() -> None:
    plain = vit()
    masks = some_masks(plain)
    with pytest.raises(px.TargetError, match="ViTForImageClassification is no PeftModel"):
        px.merge_lora_(plain, masks)
    model = trained(with_lora(plain))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(px.TargetError, match="do not fit"):
        px.merge_lora_(model, px.Masks({"nope": torch.ones(2).bool()}))
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = torch.nan
    with pytest.raises(px.NonFiniteError, match="lora_B"):
        px.merge_lora_(model, masks)
    assert model.state_dict().keys() == before.keys()


def test_without_peft() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import importlib.util, torch, px_hf as px\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'peft' else find(name)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
        "masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)\n"
        "try: px.merge_lora_(model, masks)\n"
        "except px.DependencyError as error: assert 'px-hf[peft]' in str(error)\n"
        "else: raise SystemExit('no error')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hf_vit_has_the_layers_that_are_named_here() -> None:
    assert {"q_proj", "fc1", "projection"} <= {path.rpartition(".")[2] for path, _ in hf_vit().named_modules()}

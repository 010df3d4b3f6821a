"""prune: the loop around score and select, and what it does with bad input."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from networks import NETWORKS, build, images
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils.prune import identity

import px_hf as px
from px_hf.model.targets import prunable


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", NETWORKS)
def test_sparsity_is_exact(name: str, sparsity: float, scope: str) -> None:
    model = build(name)
    before = copy.deepcopy(model.state_dict())
    masks = px.prune(model, [images(3)], px.PX("active"), sparsity=sparsity, rounds=2, scope=scope, progress=False)
    if scope == "global":
        assert masks.total - masks.kept == round(sparsity * masks.total)
    for mask in masks.values() if scope == "layer" else ():
        assert abs(int((~mask).sum()) - sparsity * mask.numel()) <= 1
    assert list(masks) == list(prunable(model))
    for n, value in model.state_dict().items():
        assert torch.equal(value, before[n])


def test_rounds_are_nested_and_follow_the_schedule() -> None:
    model = build("cnn")
    seen: list[tuple[float, dict[str, Tensor]]] = []

    class Watching(px.Magnitude):
        iterative = True

        def score(self, model, batches=(), *, masks=None, prune_head=False):
            if masks is not None:
                seen.append((1 - px.Masks(masks).sparsity, {n: m.clone() for n, m in masks.items()}))
            return super().score(model, batches, masks=masks, prune_head=prune_head)

    last = px.prune(model, [images()], Watching(), sparsity=0.9, rounds=4, progress=False)
    seen.append((1 - last.sparsity, dict(last)))
    assert [density for density, _ in seen] == pytest.approx([0.1 ** (t / 4) for t in (1, 2, 3, 4)], abs=2e-3)
    for (_, before), (_, after) in itertools.pairwise(seen):
        assert all(bool((before[n] | ~after[n]).all()) for n in after)


def test_one_round_is_score_and_select() -> None:
    model, batches = build("hf vit"), [images()]
    masks = px.prune(model, batches, px.PX(), sparsity=0.5, rounds=1, progress=False)
    assert masks == px.select(px.PX().score(model, batches), sparsity=0.5)


def test_same_seed_same_mask() -> None:
    def once() -> px.Masks:
        return px.prune(build("hf resnet"), [images(4)], px.PX(), sparsity=0.8, rounds=3, progress=False)

    assert once() == once()


@pytest.mark.parametrize("form", ["pair", "mapping", "loader", "bare"])
def test_every_form_of_batches_gives_the_same_mask(form: str) -> None:
    model, x = build("hf vit"), images(6)
    labels = torch.zeros(6, dtype=torch.long)
    forms = {
        "bare": [x[:3], x[3:]],
        "pair": [(x[:3], labels[:3]), [x[3:], labels[3:]]],
        "mapping": [{"pixel_values": x[:3], "labels": labels[:3]}, {"pixel_values": x[3:]}],
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=3),
    }
    expected = px.prune(model, forms["bare"], px.PX(), sparsity=0.5, rounds=2, progress=False)
    assert px.prune(model, forms[form], px.PX(), sparsity=0.5, rounds=2, progress=False) == expected


def test_wrapped_models_have_the_names_of_the_model_inside() -> None:
    model = build("mlp")
    masks = px.prune(nn.DataParallel(model), [images()], px.PX(), sparsity=0.5, rounds=1, progress=False)
    assert masks == px.prune(model, [images()], px.PX(), sparsity=0.5, rounds=1, progress=False)


def test_progress_bar_goes_to_stderr_and_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    px.prune(build("mlp"), [images()], px.PX(), sparsity=0.5, rounds=2)
    assert "Pruning with PX" in capsys.readouterr().err
    px.prune(build("mlp"), [images()], px.PX(), sparsity=0.5, rounds=2, progress=False)
    assert capsys.readouterr().err == ""


HEADS = [
    ("hf vit", "classifier.weight"),
    ("hf resnet", "classifier.1.weight"),
    ("timm vit", "head.weight"),
    ("timm resnet", "fc.weight"),
    ("torchvision vit", "heads.head.weight"),
]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_the_head_stays_dense_unless_asked_for(name: str, head: str) -> None:
    model = build(name)
    assert head not in prunable(model)
    assert list(prunable(model, prune_head=True))[-1] == head
    assert set(prunable(model)) == set(prunable(model, prune_head=True)) - {head}
    assert all(p.dim() > 1 for p in prunable(model).values())


def test_a_layer_called_fc_inside_the_backbone_is_pruned() -> None:
    assert {"blocks.0.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"} <= set(prunable(build("timm vit")))


def test_embeddings_norms_tokens_and_biases_are_not_prunable() -> None:
    names = set(prunable(build("hf vit"), prune_head=True))
    assert len(names) == 2 * 6 + 1
    assert not [n for n in names if "bias" in n or "norm" in n or "embeddings" in n]
    assert "patch_embed.proj.weight" not in prunable(build("timm vit"))
    assert "conv_proj.weight" not in prunable(build("torchvision vit"))
    assert "resnet.embedder.embedder.convolution.weight" in prunable(build("hf resnet"))


def poisoned() -> nn.Module:
    model = build("mlp")
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    return model


def overflowing() -> nn.Module:
    model = build("mlp")
    with torch.no_grad():
        for layer in (1, 3, 5):
            model[layer].weight.fill_(3e30)
    return model


X = [images()]
NAN = [images().fill_(torch.nan)]

BAD = [
    ("sparsity 1", {"sparsity": 1.0}, ValueError, "sparsity"),
    ("sparsity negative", {"sparsity": -0.1}, ValueError, "sparsity"),
    ("sparsity nan", {"sparsity": float("nan")}, ValueError, "sparsity"),
    ("sparsity in percent", {"sparsity": 90}, ValueError, "sparsity"),
    ("no rounds", {"rounds": 0}, ValueError, "rounds=0"),
    ("rounds not whole", {"rounds": 2.5}, ValueError, r"rounds=2\.5"),
    ("floor above the budget", {"min_layer_density": 0.6}, ValueError, r"min_layer_density=0\.6.*\[0, 0\.5\]"),
    ("floor nan", {"min_layer_density": float("nan")}, ValueError, "min_layer_density=nan"),
    ("unknown scope", {"scope": "channel"}, ValueError, "'channel'.*'global'"),
    ("criterion class", {"criterion": px.PX}, ValueError, r"PX\(\)"),
    ("criterion name", {"criterion": "px"}, ValueError, "not a criterion"),
    ("empty batches", {"batches": []}, ValueError, "empty"),
    ("exhausted batches", {"batches": iter(X)}, ValueError, "only once"),
    ("batches a tensor", {"batches": X[0]}, ValueError, "re-iterable"),
    ("batches None", {"batches": None}, ValueError, "re-iterable"),
    ("mapping without pixels", {"batches": [{"image": X[0]}]}, ValueError, "pixel_values"),
    ("integers", {"batches": [X[0].byte()]}, ValueError, "uint8"),
    ("numpy", {"batches": [X[0].numpy()]}, ValueError, "ndarray"),
    ("an empty batch", {"batches": [X[0][:0]]}, ValueError, "shape"),
    ("NaN images", {"batches": NAN}, ValueError, "not finite"),
    ("NaN images, active", {"batches": NAN, "criterion": px.PX(paths="active")}, ValueError, "not finite"),
    ("NaN in a later batch", {"batches": X + NAN}, ValueError, "batch 1"),
    ("NaN weights", {"model": poisoned()}, ValueError, r"1\.weight"),
    ("activations overflow", {"model": overflowing()}, ValueError, "not finite"),
    ("no prunable weights", {"model": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192))}, ValueError, "no prunable"),
    ("only a head", {"model": nn.ModuleDict({"fc": nn.Linear(2, 2)})}, ValueError, "prune_head"),
    ("strange output", {"model": nn.Sequential(nn.Linear(8, 2), nn.LSTM(2, 2)), "batches": [torch.ones(2, 8)]},
     NotImplementedError, "lstm"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_a_clear_error(changes: dict, kind: type[Exception], message: str) -> None:
    arguments = {"model": build("mlp"), "batches": X, "criterion": px.PX(), "sparsity": 0.5, "rounds": 1} | changes
    with pytest.raises(kind, match=message) as caught:
        px.prune(**arguments, progress=False)
    assert isinstance(caught.value, px.PxError)


def test_an_emptied_layer_is_named() -> None:
    model = build("mlp")
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"1 layer\(s\) lost all their weights and 0 nearly all.*: 3\.weight"):
        px.prune(model, X, px.Magnitude(), sparsity=0.9, progress=False)


@pytest.mark.parametrize("rounds", [1, 3])
def test_min_layer_density_keeps_every_layer_alive(rounds: int) -> None:
    model = build("mlp")
    with torch.no_grad():
        model[3].weight.mul_(1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = px.prune(
            model, X, px.PX(), sparsity=0.9, rounds=rounds, min_layer_density=0.05, prune_head=True, progress=False
        )
    assert masks.total - masks.kept == round(0.9 * masks.total)
    for name, mask in masks.items():
        assert int(mask.sum()) >= round(0.05 * mask.numel()), name
    best = px.select(px.PX().score(model, X), sparsity=0.95, scope="layer")
    if rounds == 1:
        assert all(bool((masks[name] | ~kept).all()) for name, kept in best.items())


COMPUTED = {
    "torch's pruning": (lambda layer: identity(layer, "weight"), r"prune\.remove\(layer, 'weight'\)"),
    "old weight norm": (utils.weight_norm, r"remove_weight_norm\(layer, 'weight'\)"),
    "weight norm": (utils.parametrizations.weight_norm, r"remove_parametrizations\(layer, 'weight'\)"),
    "spectral norm": (utils.parametrizations.spectral_norm, r"remove_parametrizations\(layer, 'weight'\)"),
    "old spectral norm": (utils.spectral_norm, r"remove_spectral_norm\(layer, 'weight'\)"),
}


@pytest.mark.filterwarnings("ignore:.*_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", COMPUTED)
def test_layers_whose_weight_is_computed_are_named(name: str) -> None:
    change, undo = COMPUTED[name]
    model = build("cnn")
    change(model[3])
    with pytest.raises(px.TargetError, match=rf"of 1 layer\(s\) are computed.*: 3\. Make them plain first: .*{undo}"):
        px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)


def test_a_head_whose_weight_is_computed_stays_dense() -> None:
    model = build("timm resnet")
    utils.parametrizations.weight_norm(model.fc)
    assert "conv1.0.weight" in prunable(model)
    with pytest.raises(px.TargetError, match="fc"):
        prunable(model, prune_head=True)

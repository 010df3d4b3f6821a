"""What makes scoring cheap changes no score, and is really done."""

from __future__ import annotations

import gc

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from networks import NETWORKS, build, images, sizes
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import px_hf as px
from px_hf.criteria import px as module
from px_hf.ops import ACTIVE, ForgottenError, G, H, Tracer, Weight, tracer
from px_hf.ops.companions import Later, Paths
from px_hf.scoring.sums import add_, add_up


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.dim() > 1}


def inputs(name: str, count: int = 6) -> Tensor:
    size = sizes(name)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=2e-6, atol=1e-6 * float(expected[name].max()))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_dense_mask_as_channel_sums(name: str) -> None:
    model = build(name)
    x = inputs(name)
    assert_equal(px.PX().score(model, [x]), px.PX().score(model, [x], masks=everything(model)))


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_channel_sums_of_grouped_convolutions(layer: type[nn.Conv2d], groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), layer(6, 12, 3, 2, 1, groups=groups), nn.ReLU(),
                          nn.Flatten(), nn.LazyLinear(4))  # fmt: skip
    x = images()
    model(x)
    found = px.PX().score(model, [x], prune_head=True)
    assert_equal(found, px.PX().score(model, [x], masks=everything(model), prune_head=True))


@pytest.mark.parametrize("paths", ["all", "active"])
def test_parts_of_a_batch(paths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("hf resnet")
    x = inputs("hf resnet")
    whole = px.PX(paths=paths).score(model, [x])
    monkeypatch.setattr(module, "NUMBERS_AT_A_TIME", 2 * x[0].numel() + 1)
    assert_equal(px.PX(paths=paths).score(model, [x]), whole)


@pytest.mark.filterwarnings("ignore:.*lost all their weights")
@pytest.mark.parametrize("head", [False, True], ids=["dense head", "pruned head"])
@pytest.mark.parametrize("name", NETWORKS)
def test_rounds_of_eq9_with_a_dense_head_need_the_images_once(
    name: str, head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And find what all images in every round find."""
    model = build(name)
    x = inputs(name)
    passes: list[int] = []
    real = module._data_factors
    monkeypatch.setattr(module, "_data_factors", lambda *given: (passes.append(1), real(*given))[1])
    settings = {"sparsity": 0.8, "rounds": 3, "prune_head": head, "progress": False}
    found = px.prune(model, [x[:4], x[4:]], px.PX(), **settings)
    plain = name in ("mlp", "cnn")  # without a classifier that could be told from the rest
    assert len(passes) == (3 if head or plain else 1)
    passes.clear()
    monkeypatch.setattr(module, "_classes_alike", lambda *_: False)
    assert px.prune(model, [x[:4], x[4:]], px.PX(), **settings) == found
    assert len(passes) == 3


def test_classes_are_alike_where_the_last_weights_stay() -> None:
    def alike(model: nn.Module, **settings: bool) -> bool | None:
        criterion = px.PX().begin()
        criterion.score(model.eval(), [images()], **settings)
        return criterion._rounds.alike  # type: ignore[union-attr]

    class Net(nn.Module):
        def __init__(self, last: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.fc, self.last = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), last

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(self.body(x).relu().mean((2, 3))))

    assert alike(Net(nn.Identity()))
    assert not alike(Net(nn.Identity()), prune_head=True)
    assert not alike(Net(nn.Linear(3, 3)))  # prunable, and behind what is not
    assert not alike(Net(nn.ReLU()))  # a gate of each class
    assert alike(Net(nn.Linear(3, 1)))  # one class


def test_bad_images_are_found_in_the_first_round_of_eq9() -> None:
    x = inputs("hf resnet")
    x[-1] = float("nan")
    with pytest.raises(px.NonFiniteError, match="batch 1 is not finite"):
        px.prune(build("hf resnet"), [x[:4], x[4:]], px.PX(), sparsity=0.5, rounds=2, progress=False)


@pytest.mark.parametrize("reading", [G, ACTIVE], ids=["G", "ACTIVE"])
def test_batchnorm_in_the_product_before_it(reading, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded where the result is larger than the weight, and equal to what is not folded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double().eval()
    nn.init.uniform_(model[1].weight, 0.5, 2)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    x = images(dtype=torch.float64)
    folded = 0
    real = Tracer._later

    def counting(self: Tracer, flow, parents) -> Later:
        nonlocal folded
        folded += flow.scale is None and flow.weight is not None
        return real(self, flow, parents)

    def sums() -> Tensor:
        weights = {p: Weight(p.detach().square().requires_grad_()) for p in model.parameters()}
        with torch.no_grad(), Tracer(model, reading, weights, torch.float64) as tracer:
            tracer.start(x, x.square())
            paths = tracer.paths(model(x))
        assert paths is not None
        return paths.data * 2.0 ** int(paths.exponent)

    monkeypatch.setattr(Tracer, "_later", counting)
    found = sums()
    assert folded == 2  # the product, and the product with BatchNorm in it
    monkeypatch.setattr(Later, "made", property(lambda self: True))
    torch.testing.assert_close(found, sums(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_backward_is_left_one_pattern_a_layer(implementation: str) -> None:
    """The squared one that path sums meet: the flows to queries and keys are made when they are needed."""
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, num_labels=5,
                       image_size=32, patch_size=4, attn_implementation=implementation)  # fmt: skip
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[-2:] == (65, 65):
            kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        px.PX(paths="active").score(ViTForImageClassification(config).eval(), [torch.randn(2, 3, 32, 32)])
    assert len(kept) == 3


def test_queries_and_keys_have_no_path_sums_in_h(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("hf vit")
    made: list[tuple[int, ...]] = []
    real = Later.__getattr__

    def noting(self: Later, name: str) -> object:
        value = real(self, name)
        made.append(tuple(self.data.shape))
        return value

    monkeypatch.setattr(Later, "__getattr__", noting)
    x = images()
    with torch.no_grad(), Tracer(model, H, {p: Weight(None) for p in model.parameters()}, torch.float32) as tracer:
        tracer.start(x, x.square())
        model(pixel_values=x)
    heads = [shape for shape in made if shape[1:] == (2, 5, 8)]
    assert len(heads) == 2, made  # the values of each block; with queries and keys there would be six


@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize("name", ["hf resnet", "hf vit", "torchvision vit"])
def test_nothing_is_left_behind(name: str, paths: str) -> None:
    """No hook on modules, no path sums: memory does not grow with the images."""
    model = build(name)
    x = inputs(name)
    px.PX(paths=paths).score(model, [x])
    gc.collect()
    assert not any(type(thing) in (Tracer, Paths, Later) for thing in gc.get_objects())
    assert not torch.nn.modules.module._global_forward_hooks


class FarGate(nn.Module):
    """A gate whose branch leaves the value path many sums further up."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.gate, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 5)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(5))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        first = after = self.stem(x)
        for block in self.blocks[:2]:
            after = after + block(after).relu()
        middle, side = after, self.blocks[2](after)  # the branch leaves here, before three more sums
        for block in self.blocks[3:]:
            after = after + block(after).relu() + middle
        trunk = after + first if self.skip else first
        return self.head((trunk * self.gate(side).sigmoid()).mean((2, 3)))


@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize("name", [*NETWORKS, "far gate", "far gate, skip"])
@pytest.mark.filterwarnings("ignore:2 prunable weight")  # of the far gate, which does not use its last two blocks
def test_history_that_is_let_go_of(name: str, paths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a gate asks for it after all, it is there; scores are the same to the bit."""
    far = name.startswith("far")
    model, x = (FarGate(name.endswith("skip")).eval(), images()) if far else (build(name), inputs(name))
    asked = []
    real = ForgottenError.__init__
    monkeypatch.setattr(ForgottenError, "__init__", lambda self: (asked.append(1), real(self))[1])
    found = px.PX(paths=paths).score(model, [x], prune_head=True)
    assert len(asked) == far
    monkeypatch.setattr(tracer, "_REMEMBERED", 10**6)
    whole = px.PX(paths=paths).score(model, [x], prune_head=True)
    assert len(asked) == far
    for key, score in whole.items():
        torch.testing.assert_close(found[key], score, rtol=0, atol=0)


@pytest.mark.parametrize("reading", [G, ACTIVE], ids=["G", "ACTIVE"])
def test_history_does_not_grow_with_depth(reading) -> None:
    def remembered(depth: int) -> int:
        config = ViTConfig(hidden_size=8, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=8,
                           image_size=8, patch_size=4, num_labels=5)  # fmt: skip
        model, x = ViTForImageClassification(config).eval(), images()
        weights = {p: Weight(p.detach().square().requires_grad_()) for p in model.parameters()}
        with torch.no_grad(), Tracer(model, reading, weights, torch.float32) as running:
            running.start(x, x.square())
            logits = model(pixel_values=x).logits
            seen, stack = set(), [running.paths(logits)]
            while stack:
                node = stack.pop()
                if node not in seen:
                    seen.add(node)
                    stack += node.parents
            return len(seen)

    assert remembered(9) == remembered(4)


def test_sums_of_parts_and_of_batches() -> None:
    terms = [(torch.tensor([1.0, 0.5], dtype=torch.float64), 3), (torch.tensor([2.0, 4.0], dtype=torch.float64), -1)]
    data, exponent = add_up(terms)
    assert (data * 2.0**exponent).tolist() == [9.0, 6.0]
    data, exponent = add_up([(torch.zeros(1, dtype=torch.float64), 2000), *[(d[:1], e) for d, e in terms]])
    assert (data * 2.0**exponent).tolist() == [9.0]
    total, term = torch.zeros(300_000, dtype=torch.float64), torch.rand(300_000)
    add_(total, term, 4.0)
    torch.testing.assert_close(total, 4 * term.double(), rtol=0, atol=0)


@pytest.mark.parametrize("paths", ["all", "active"])
def test_a_model_placed_by_accelerate(paths: str) -> None:
    """device_map with one device, with Accelerate's hooks around every module."""
    model = build("hf resnet")
    x = inputs("hf resnet")
    expected = px.PX(paths=paths).score(model, [x])
    placed = accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    try:
        found = px.PX(paths=paths).score(placed, [x])
    finally:
        remove_hook_from_submodules(placed)
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name], rtol=2e-6, atol=0)


def test_an_offloaded_model_is_to_be_loaded_first() -> None:
    model = accelerate.cpu_offload(build("mlp"), execution_device=torch.device("cpu"))
    with pytest.raises(px.TargetError, match=r"meta device.*fully_shard or offloading.*px\.LAMP\(\)"):
        px.prune(model, [images()], px.PX(), sparsity=0.5, progress=False)


BY_LAYER = [px.Magnitude(), px.LAMP(), px.Random(seed=1), px.Random(densities="erk")]


@pytest.mark.parametrize("criterion", BY_LAYER, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("where", ["cpu", "disk", "some on disk"])
def test_criteria_of_single_layers_prune_an_offloaded_model(where: str, criterion: px.Criterion, tmp_path) -> None:
    """Layer by layer, to the masks of the whole model, which stays offloaded."""
    expected = px.prune(build("hf vit"), [], criterion, sparsity=0.7, scope="2:4", progress=False)
    model = build("hf vit")
    if where == "some on disk":
        device_map = {"vit": "cpu", "vit.layers.1": "disk", "classifier": "cpu"}
        model = accelerate.dispatch_model(model, device_map, offload_dir=tmp_path)
    else:
        offload = accelerate.cpu_offload if where == "cpu" else accelerate.disk_offload
        folder = {"offload_dir": tmp_path} if where == "disk" else {}
        model = offload(model, execution_device=torch.device("cpu"), **folder)
    assert any(p.is_meta for p in model.parameters())
    masks = px.prune(model, [], criterion, sparsity=0.7, scope="2:4", progress=False)
    assert masks == expected
    assert any(p.is_meta for p in model.parameters())
    for refused in (masks.apply_, masks.revived, lambda model: px.report(model, masks)):
        with pytest.raises(px.TargetError, match=r"holds no values here.*Load the model whole"):
            refused(model)
    with pytest.raises(px.TargetError, match="does not hold its weights"):
        px.prune(model, [], criterion, sparsity=0.5, scope="structured", progress=False)


def test_a_model_on_the_meta_device_is_nowhere() -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(px.TargetError, match="does not hold its weights: it has weights on the meta device"):
        px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)

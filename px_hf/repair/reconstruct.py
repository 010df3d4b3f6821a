"""Repair a pruned network with a few hundred unlabelled images: the only orchestration here."""

from __future__ import annotations

import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..distributed import processes
from ..errors import InvalidArgumentError, TargetError, listed
from ..masks import Masks
from ..model.adapters import adapters_off
from ..model.inputs import Batches, Inputs, call
from ..model.modes import device_of, evaluating, full_precision
from ..model.outputs import has_class_token
from ..model.targets import require_whole
from ..model.undisturbed import undisturbed
from ..model.wrappers import named_parameters, unwrap
from ..scoring.agreement import require_agreement
from ..scoring.masking import masked
from .adam import Adam
from .blocks import Block, blocks_of
from .images import Images, read
from .layers import LeastSquares
from .network import Whole
from .networks import Network
from .outcome import LayerRepair, RepairReport
from .probe import Record, probe, same_but_for_size
from .route import Step, route
from .states import States
from .walk import Walk

METHODS: Final = ("layers", "blocks", "network")
RATES: Final = {"blocks": 1e-3, "network": 3e-4}
"""Adam's largest step, if none is asked for."""


def reconstruct_(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    dense: nn.Module | None = None,
    *,
    method: str = "layers",
    ridge: float = 0.01,
    iterations: int = 50,
    class_token: float = 50.0,
    blocks: Sequence[str] | None = None,
    epochs: int = 10,
    rate: float | None = None,
    augment: bool = True,
    progress: bool = True,
) -> RepairReport:
    """Make good what pruning broke, in place: the kept weights take over from the pruned ones, without training.

    ```python
    masks = px.prune(model, batches, px.Wanda(), sparsity=0.5)
    report = px.reconstruct_(model, masks, batches)  # applies the masks, too
    print(report)
    ```

    In running order each masked linear layer and convolution is fitted, by least squares, to the outputs that it has
    in the dense network, on the inputs that the layers before it, pruned and repaired, leave (`px_hf.repair.layers`).
    With ``method="blocks"`` whole residual blocks are then matched too, by Adam (`px_hf.repair.blocks`); with
    ``method="network"`` all of them at once (`px_hf.repair.network`), which needs gradients through the network.

    Masks are not changed, and pruned weights are exactly zero afterwards. Only weights that have masks and the biases
    of their layers change; with blocks also the other biases, norms and scales inside the blocks, with network all. If
    it fails, the model is as it was. One image in five is not fitted to: on these a layer, or block, must have become
    better, or it stays. Images, and what flows between blocks, lie in temporary files, so that memory does not grow
    with the images.

    Under ``accelerate launch`` or ``torchrun`` call it on every process with the same model and the same batches, as
    `prune`: each process works on its share of them, and all end with the same weights, to the bit.

    Args:
        model: what `prune` takes, dense, or pruned already with its parent as ``dense``.
        masks: of this model; any criterion and scope.
        batches: images as for `prune`; labels are not looked at. A few hundred images.
        dense: the model as it was before the masks were applied; None: ``model`` is that still.
        method: "layers"; "blocks" for layers and then blocks; or "network" for layers and then the network as a whole.
        ridge: how firmly weights are held where they are, relative to the mean square of their input, ≥ 0.
        iterations: the most of conjugate gradients for a layer.
        class_token: how many tokens the class token counts for in least squares, > 0, where the model has one; unless
            1, blocks and the network match it as much as all tokens together.
        blocks: names of the modules that method "blocks" or "network" matches; None: repeated modules of a list or
            sequence.
        epochs: with method "blocks" or "network", how often Adam sees each image.
        rate: Adam's largest step; None: 1e-3 for blocks, 3e-4 for the network.
        augment: with method "network", fit to a random crop or its mirror image, another one in each epoch.
        progress: show a bar over the layers, on the main process.

    Returns:
        The errors of layers and blocks before and after, on the images fitted to and on those held out, and the
        weights that were left out with reasons.

    Raises:
        InvalidArgumentError: a setting outside its range, or no block.
        TargetError: the masks do not fit the model, or ``dense`` is not its parent.
        DataError: ``batches`` is empty or malformed.
        NonFiniteError: inputs or outputs of a layer are not finite; names it.
        LaunchError: several processes that do not know of each other, or that were given different models.
    """
    model = unwrap(model)
    require_whole(model)
    parameters = masks.match(model)
    rate = RATES.get(method, 1.0) if rate is None else rate
    _check(method, iterations, epochs, ridge=ridge, class_token=class_token, rate=rate)
    _check_parent(model, masks, dense)
    parent = model if dense is None else unwrap(dense)
    with ExitStack() as stack:
        for each in {model, parent}:
            stack.enter_context(evaluating(each))
            stack.enter_context(adapters_off(each))
        stack.enter_context(full_precision(device_of(model)))
        stack.enter_context(undisturbed(model, batches))
        stack.enter_context(torch.no_grad())
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # one operation, in which no layer is seen
        if processes().world_size > 1:
            require_agreement(model, batches)
        states = States(stack.enter_context(tempfile.TemporaryDirectory(prefix="px_hf-repair-")))
        images = read(batches, model, states)
        first = {p: name for name, p in reversed(parameters.items())}  # of tied weights one stands for all
        sparse = Network(model, {name: masked(p, masks.tensors[name]) for p, name in reversed(first.items())})
        walk = Walk(Network(parent, {}), sparse, images, states, device_of(model))
        record = _record(sparse, images, walk)
        skipped = _skipped(record, masks, parameters)
        _with_biases(sparse, record)
        steps = route(record, _blocks(record, blocks) if method == "blocks" else None)
        adam = Adam(epochs, rate)
        counts = class_token if has_class_token(model) else 1.0

        def repair_block(path: str) -> LayerRepair:
            return adam.repair_(walk, Block(walk, path, counts != 1), masks.tensors)

        layers = LeastSquares(ridge, iterations, counts)
        found, whole = _walk(walk, steps, layers, repair_block if method == "blocks" else None, masks, progress)
        if method == "network":
            paths = blocks_of(record) if blocks is None else _blocks(record, blocks)
            whole.append(adam.repair_(walk, Whole(walk, paths, augment, counts != 1), masks.tensors))
        _warn_of_few_rows(found)
        written = dict(sparse.tensors)
    own = named_parameters(model, remove_duplicate=False)
    with torch.no_grad():
        for name, tensor in written.items():
            own[name].copy_(tensor)
    return RepairReport(method, images.fitted, images.held_out, tuple(found), skipped, tuple(whole))


def _walk(
    walk: Walk,
    steps: list[Step],
    least_squares: LeastSquares,
    repair_block: Callable[[str], LayerRepair] | None,
    masks: Masks,
    progress: bool,
) -> tuple[list[LayerRepair], list[LayerRepair]]:
    found: list[LayerRepair] = []
    whole: list[LayerRepair] = []
    count = sum(len(group) for step in steps for group in step.groups)
    with tqdm(total=count, desc="Repairing", unit="layer", disable=not (progress and processes().is_main)) as bar:
        for k, step in enumerate(steps):
            walk.enter(step)
            for group in step.groups:
                found += least_squares.repair_(walk, group, masks.tensors)
                bar.update(len(group))
            if repair_block is not None and step.visit is not None:
                whole.append(repair_block(step.visit.path))
            if k + 1 < len(steps) and steps[k + 1].follows is not None:
                walk.leave()
    return found, whole


def _record(sparse: Network, images: Images, walk: Walk) -> Record:
    first = images.example
    names = list(sparse.tensors)

    def record(count: int) -> Record:
        repeated = Inputs(
            first.images.repeat(count, *[1] * (first.images.dim() - 1)),
            {name: other.repeat(count, *[1] * (other.dim() - 1)) for name, other in first.others.items()},
        )
        return probe(sparse, names, lambda: call(sparse.model, repeated))

    found = same_but_for_size(record(1), record(2))
    return found if len(images.shapes) == 1 else Record(found.layers, [])


def _blocks(record: Record, named: Sequence[str] | None) -> list[str]:
    paths = [visit.path for visit in record.visits]
    if named is None:
        found = blocks_of(record)
        if not found:
            raise InvalidArgumentError(
                "no repeated blocks with two or more masked layers were found in the model. Name them (blocks=), or "
                "use method='layers'."
            )
        return found
    unknown = [name for name in named if name not in paths]
    if unknown:
        raise InvalidArgumentError(
            f"blocks={list(named)!r}: {listed(unknown)} is no module that the model calls once; expected names of "
            "model.named_modules()."
        )
    return list(named)


def _with_biases(sparse: Network, record: Record) -> None:
    """Biases that belong to one weight are repaired with it."""
    biases = [layer.bias for layer in record.layers.values()]
    for name in biases:
        if name and biases.count(name) == 1:
            sparse.tensors[name] = sparse.parameter(name).detach().clone()


def _skipped(record: Record, masks: Masks, parameters: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    skipped = {}
    for name in masks:
        again = first.setdefault(id(parameters[name]), name)
        if again != name:
            skipped[name] = f"it is the same parameter as {again}"
        elif name not in record.layers:
            skipped[name] = (
                "no linear layer or convolution multiplies its input by it as it is (it is taken apart, computed with "
                "first, transposed, or not used)"
            )
    return skipped


def _warn_of_few_rows(found: list[LayerRepair]) -> None:
    few = [
        f"{layer.name} ({layer.rows} samples, {layer.inputs} inputs)" for layer in found if layer.rows < layer.inputs
    ]
    if few and processes().is_main:
        warnings.warn(
            f"{len(few)} layer(s) have more inputs than samples, and lean on the ridge: {listed(few)}. Pass more "
            "images.",
            stacklevel=3,
        )


def _check(method: str, iterations: int, epochs: int, **numbers: float) -> None:
    if method not in METHODS:
        raise InvalidArgumentError(f"method={method!r}: expected {', '.join(map(repr, METHODS))}.")
    for name, number in numbers.items():
        least = 0.0 if name == "ridge" else 1e-12
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not least <= number < math.inf:
            raise InvalidArgumentError(f"{name}={number!r}: expected a finite number {'≥' if least == 0 else '>'} 0.")
    for name, count in (("iterations", iterations), ("epochs", epochs)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise InvalidArgumentError(f"{name}={count!r}: expected a whole number ≥ 1.")


def _check_parent(model: nn.Module, masks: Masks, dense: nn.Module | None) -> None:
    """The dense network must be the one that the kept weights come from."""
    if dense is None:
        if masks.kept < masks.total and not masks.revived(model):
            raise TargetError(
                "every weight that the masks prune is zero in the model already, so the dense network is not known. "
                "Pass dense=, the model as it was before masks.apply_, or repair before you apply them."
            )
        return
    parents = masks.match(dense)
    for name, parameter in masks.match(model).items():
        parent, mask = parents[name], masks.tensors[name]
        if (parent.dtype, parent.device) != (parameter.dtype, parameter.device):
            raise TargetError(
                f"{name} is {parameter.dtype} on {parameter.device} in the model and {parent.dtype} on "
                f"{parent.device} in dense; bring both to one dtype and device."
            )
        if not torch.equal(masked(parent, mask), masked(parameter, mask)):
            raise TargetError(
                f"dense is not the parent of the model: kept weights of {name} differ. Pass the model that the masks "
                "were applied to, as it was before; after training there is none."
            )

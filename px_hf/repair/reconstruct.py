"""Repair a pruned network with a few hundred unlabelled images: the only orchestration here."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..distributed import processes
from ..errors import InvalidArgumentError, TargetError, listed
from ..masks import Masks
from ..model.adapters import adapters_off
from ..model.inputs import Batches, Inputs, call
from ..model.modes import device_of, evaluating, full_precision
from ..model.undisturbed import undisturbed
from ..model.wrappers import named_parameters, unwrap
from ..scoring.masking import masked
from .images import Images, read
from .layers import LeastSquares
from .networks import Network
from .outcome import LayerRepair, RepairReport
from .probe import Record, probe, same_but_for_size
from .route import Step, route
from .states import States
from .walk import Walk


def reconstruct_(
    model: nn.Module,
    masks: Masks,
    batches: Batches,
    dense: nn.Module | None = None,
    *,
    method: str = "layers",
    ridge: float = 0.01,
    iterations: int = 50,
    progress: bool = True,
) -> RepairReport:
    model = unwrap(model)
    parameters = masks.match(model)
    _check(method, ridge, iterations)
    _check_parent(model, masks, dense)
    parent = model if dense is None else unwrap(dense)
    with ExitStack() as stack:
        for each in {model, parent}:
            stack.enter_context(evaluating(each))
            stack.enter_context(adapters_off(each))
        stack.enter_context(full_precision(device_of(model)))
        stack.enter_context(undisturbed(model, batches))
        stack.enter_context(torch.no_grad())
        states = States(stack.enter_context(tempfile.TemporaryDirectory(prefix="px_hf-repair-")))
        images = read(batches, model, states)
        sparse = Network(model, {name: masked(p, masks.tensors[name]) for name, p in parameters.items()})
        walk = Walk(Network(parent, {}), sparse, images.parts, states, device_of(model))
        record = _record(sparse, masks, images, walk)
        skipped = _skipped(record, masks, parameters)
        _with_biases(sparse, record)
        found = _walk(walk, route(record), LeastSquares(ridge, iterations), masks, progress)
        _warn_of_few_rows(found)
        written = dict(sparse.tensors)
    own = named_parameters(model)
    with torch.no_grad():
        for name, tensor in written.items():
            own[name].copy_(tensor)
    return RepairReport(method, images.fitted, images.held_out, tuple(found), skipped)


def _walk(
    walk: Walk, steps: list[Step], method: LeastSquares, masks: Masks, progress: bool
) -> list[LayerRepair]:
    found: list[LayerRepair] = []
    count = sum(len(group) for step in steps for group in step.groups)
    with tqdm(total=count, desc="Repairing", unit="layer", disable=not (progress and processes().is_main)) as bar:
        for k, step in enumerate(steps):
            walk.enter(step)
            for group in step.groups:
                found += method.repair_(walk, group, masks.tensors)
                bar.update(len(group))
            if k + 1 < len(steps) and steps[k + 1].follows is not None:
                walk.leave()
    return found


def _record(sparse: Network, masks: Masks, images: Images, walk: Walk) -> Record:
    first = images.parts[0].inputs(walk.states, walk.device)

    def record(count: int) -> Record:
        repeated = Inputs(
            first.images[:1].repeat(count, *[1] * (first.images.dim() - 1)),
            {name: other[:1].repeat(count, *[1] * (other.dim() - 1)) for name, other in first.others.items()},
        )
        return probe(sparse, masks.tensors, lambda: call(sparse.model, repeated))

    found = same_but_for_size(record(1), record(2))
    return found if len(images.shapes) == 1 else Record(found.layers, [])


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
    few = [f"{layer.name} ({layer.rows} samples, {layer.inputs} inputs)" for layer in found if layer.rows < layer.inputs]
    if few and processes().is_main:
        warnings.warn(
            f"{len(few)} layer(s) have more inputs than samples, and lean on the ridge: {listed(few)}. Pass more images.",
            stacklevel=3,
        )


def _check(method: str, ridge: float, iterations: int) -> None:
    if method not in ("layers", "blocks"):
        raise InvalidArgumentError(f"method={method!r}: expected 'layers' or 'blocks'.")
    if isinstance(ridge, bool) or not isinstance(ridge, (int, float)) or not 0 <= ridge < float("inf"):
        raise InvalidArgumentError(f"ridge={ridge!r}: expected a number ≥ 0, relative to the inputs' mean square.")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
        raise InvalidArgumentError(f"iterations={iterations!r}: expected a whole number ≥ 1.")


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

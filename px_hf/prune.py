"""Prune: score, select, repeat. The only orchestration in the package."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from . import select_nm
from .criteria import Criterion
from .distributed import processes, same_everywhere
from .errors import DataError, InvalidArgumentError, LaunchError, TargetError
from .masks import Masks
from .model.example import example_of
from .model.inputs import Batches, inputs_of
from .model.targets import prunable, unwrap
from .select import check_count, check_min_layer_density, check_selection, check_sparsity, select_step
from .structured.choose import STRUCTURED, check_reachable, choose_units
from .structured.heads import with_counts
from .structured.units import Family, trace_units


def prune(
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    *,
    sparsity: float,
    rounds: int = 100,
    scope: str | None = None,
    prune_head: bool = False,
    min_layer_density: float = 0.0,
    progress: bool = True,
) -> Masks:
    """Find the masks of a sparse subnetwork of ``model``, which is left untouched.

    In round t of T the network masked so far is scored, and the best fraction
    ``(1 - sparsity)^(t/T)`` of its weights is kept; a weight once pruned stays pruned.

    ```python
    masks = px.prune(model, loader, px.PX(), sparsity=0.9)
    masks.apply_(model)
    ```

    Under ``accelerate launch`` or ``torchrun`` call it on every process with the same model and the
    same batches (not a DataLoader that Accelerate has already split): each process scores its share
    of them, and all end with the masks that one process would find.

    Args:
        model: any module whose output is a tensor [N, K] or has ``.logits``.
        batches: re-iterable of calibration batches: tensors [N, C, H, W], pairs (images, labels), or
            mappings with ``pixel_values`` and, where the criterion needs them, ``labels``.
        criterion: what to score by, for example ``PX()``, ``Magnitude()``.
        sparsity: fraction of the prunable weights to prune, in [0, 1).
        rounds: T ≥ 1. The paper uses 100. One is enough for criteria whose scores do not change.
        scope: ``"global"`` ranks all weights together, ``"layer"`` prunes every layer alike, ``"row"`` every
            output of every layer. ``"n:m"``, such as ``"2:4"``, keeps at most n of every m consecutive inputs of
            an output (`px_hf.select_nm`): exactly n with sparsity 1 - n/m, fewer with a higher one, which is then
            ranked over all weights; in every round the n best of each group stay as long as the budget allows.
            Layers with fewer inputs than m (a stem on 3 colours, depthwise convolutions) stay dense and have no
            masks. ``"structured"`` prunes whole units, hidden units, heads and channels, which `px_hf.shrink` takes
            out, ``"structured:uniform"`` hidden units and channels, the same share of every layer
            (docs/STRUCTURED.md). Default: the criterion's own, which is ``"global"`` for most.
        prune_head: also prune the classifier head.
        min_layer_density: with scope ``"global"``, the fraction of each layer that is kept in any case, in
            [0, 1 - sparsity], against layers that are pruned empty; with a structured scope, of its units.
        progress: show a bar over the rounds, on the main process.

    Returns:
        Masks over the prunable weights, with ``round(sparsity · weights)`` of these pruned; with a structured scope
        no more than ``sparsity · weights``, and fewer by less than one unit.

    Raises:
        InvalidArgumentError: a setting outside its range.
        TargetError: no prunable weights, weights that no path reaches, inputs that ``"n:m"`` does not divide, or units
            that hold less than ``sparsity``.
        DataError: ``batches`` is empty, can be read only once, or is malformed.
        UnsupportedOpError: the criterion does not know an operation of the model.
        NonFiniteError: the model's output or a score is not finite.
        LaunchError: several processes that do not know of each other, or that were given different models.
    """
    scope = _validate(criterion, sparsity, rounds, scope)
    check_min_layer_density(min_layer_density, sparsity)
    model = unwrap(model)
    targets: Mapping[str, Tensor] = prunable(model, prune_head)
    if pattern := select_nm.parse(scope):
        targets = select_nm.in_groups(model, targets, pattern[1])
        check_count(scope, sparsity, targets)
    _require_finite(targets)
    group = processes()
    rounds = rounds if criterion.iterative else 1
    families: list[Family] = []
    if scope in STRUCTURED:
        families = _units(model, batches, targets)
        check_reachable(families, targets, scope=scope, sparsity=sparsity, min_layer_density=min_layer_density)
    if group.world_size > 1:
        _require_agreement(model, batches if criterion.needs_data else None)
    masks: Masks | None = None
    title = f"Pruning with {type(criterion).__name__}"
    criterion = criterion.begin()
    for t in tqdm(range(1, rounds + 1), desc=title, unit="round",
                  disable=not (progress and group.is_main)):  # fmt: skip
        scores = criterion.score(model, batches, masks=None if masks is None else masks.tensors, prune_head=prune_head)
        target = sparsity if t == rounds else 1 - (1 - sparsity) ** (t / rounds)
        scores = {name: score for name, score in scores.items() if name in targets}
        if families:
            masks = choose_units(
                scores, families, sparsity=target, scope=scope, within=masks, min_layer_density=min_layer_density,
                power=criterion.unit_power or 1,
            )  # fmt: skip
        else:
            masks = select_step(scores, target, scope, masks, min_layer_density, final=t == rounds)
    assert masks is not None
    if group.is_main:
        _warn_of_empty_layers(masks.tensors, 1 - sparsity)
    return masks


def check_scope(scope: str) -> None:
    """InvalidArgumentError unless `prune` knows `scope`."""
    if scope not in STRUCTURED:
        check_selection(scope)


def _validate(criterion: Criterion, sparsity: float, rounds: int, scope: str | None) -> str:
    """The scope to use."""
    if not isinstance(criterion, Criterion):
        hint = f"{criterion.__name__}()" if isinstance(criterion, type) else "px.PX()"
        raise InvalidArgumentError(f"criterion={criterion!r} is not a criterion; expected an object such as {hint}.")
    check_sparsity(sparsity)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidArgumentError(f"rounds={rounds!r}: expected a whole number ≥ 1.")
    scope = criterion.scope if scope is None else scope
    check_scope(scope)
    if scope in STRUCTURED and criterion.unit_power is None:
        raise InvalidArgumentError(
            f"the scores of {type(criterion).__name__} rank weights and cannot be added up to those of units, which "
            f"scope={scope!r} needs. Use another criterion, such as px.PX()."
        )
    return scope


def _units(model: nn.Module, batches: Batches, targets: Mapping[str, Tensor]) -> list[Family]:
    """The units that can be pruned, found by running the model on one image of ``batches``, or on zeros."""
    batch = next(iter(batches), None) if not isinstance(batches, Iterator) else None
    inputs = example_of(model, batch)
    return with_counts(model, inputs, trace_units(model, inputs, targets))


def _require_agreement(model: nn.Module, batches: Batches | None) -> None:
    """Every process must hold the same weights and see the same batches: a fresh head drawn without a
    common seed, or a DataLoader that shuffles or is already split, would give other masks on each."""
    weights = hashlib.sha256()
    for name, p in model.named_parameters():
        weights.update(f"{name}{tuple(p.shape)}{float(p.detach().double().sum())!r}".encode())
    if not same_everywhere(weights.digest(), model):
        raise LaunchError(
            "the processes hold models with different weights. Seed every process alike before a head is drawn at "
            "random (accelerate.utils.set_seed), or load the same checkpoint everywhere."
        )
    if batches is None:
        return
    data = hashlib.sha256()
    for inputs in inputs_of(batches, model):
        images = inputs.images
        data.update(f"{tuple(images.shape)}{float(images.double().sum())!r}{float(images.flatten()[0])!r}".encode())
    if not same_everywhere(data.digest(), model):
        raise DataError(
            "the processes were given different batches. Give all of them to every process, in the same order: "
            "a DataLoader without shuffle that has not gone through accelerator.prepare. prune shares them out."
        )


def _require_finite(targets: Mapping[str, Tensor]) -> None:
    for name, weight in targets.items():
        if not bool(torch.isfinite(weight.detach()).all()):
            raise TargetError(f"the weight {name} holds NaN or infinity; load the model again before pruning it.")


_NEARLY_EMPTY = 0.01
"""A layer is named in a warning if its density is below this share of the density asked for."""


def _warn_of_empty_layers(masks: Mapping[str, Tensor], density: float) -> None:
    kept = {name: float(mask.double().mean()) for name, mask in masks.items() if mask.numel()}
    poor = [name for name, share in kept.items() if share < _NEARLY_EMPTY * density]
    if poor:
        empty = sum(kept[name] == 0 for name in poor)
        warnings.warn(
            f"{empty} layer(s) lost all their weights and {len(poor) - empty} nearly all (under {_NEARLY_EMPTY:.0%} "
            f"of the density asked for): {', '.join(poor[:8])}{' ...' if len(poor) > 8 else ''}. Pass "
            "min_layer_density, use more rounds or scope='layer', or prune less.",
            stacklevel=3,
        )

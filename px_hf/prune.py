"""Prune: score, select, repeat. The only orchestration in the package."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .criteria import Criterion
from .criteria.layers import each_layer
from .distributed import in_contact, processes
from .errors import InvalidArgumentError, TargetError, listed
from .masks import Masks
from .model.adapters import adapters_off, warn_of_trained_adapters
from .model.inputs import Batches
from .model.offloaded import fetched, is_offloaded
from .model.outputs import Output, check_output, has_no_classifier
from .model.reached import reached
from .model.shards import gathered, require_same_layout, shards_of
from .model.targets import prunable
from .model.wrappers import named_parameters, unwrap
from .scopes import Scope, as_scope, check_min_layer_density, check_sparsity
from .scoring.agreement import require_agreement
from .sharded_round import ShardedRound

ROUNDS: Final = 10
"""By default. More move weights at the threshold and change no accuracy that was measured (docs/RESULTS.md)."""


def prune(
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    *,
    sparsity: float,
    rounds: int = ROUNDS,
    scope: str | Scope | None = None,
    prune_head: bool = False,
    min_layer_density: float = 0.0,
    output: Output = None,
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
    of them, and all end with the masks that one process would find. A model whose weights are sharded over the
    processes (FSDP2) gets masks that are sharded alike, `ShardedMasks`: ``masks.whole()`` has all of them.

    Args:
        model: any module whose output is a tensor [N, K] or has ``.logits``, or a backbone without a classifier, see
            ``output``. A ``PeftModel`` is pruned as the model that it was made of, without its adapters.
        batches: re-iterable of calibration batches: tensors [N, C, H, W], pairs (images, labels), or
            mappings with ``pixel_values`` and, where the criterion needs them, ``labels`` or ``label``.
        criterion: what to score by, for example ``PX()``, ``Magnitude()``.
        sparsity: fraction of the prunable weights to prune, in [0, 1).
        rounds: T ≥ 1. The paper uses 100, ten are as accurate. Criteria whose scores do not change need one.
        scope: what competes with what (docs/SCOPES.md), as text or as an object of `px_hf.scopes`. ``"global"`` ranks
            all weights together, ``"layer"`` prunes every layer alike, ``"row"`` every output of every layer.
            ``"n:m"``, such as ``"2:4"``, keeps at most n of every m consecutive inputs of an output: exactly n with
            sparsity 1 - n/m, fewer with a higher one, which is then ranked over all weights; layers with fewer inputs
            than m stay dense and have no masks. ``"structured"`` prunes whole units, hidden units, heads and channels,
            which `px_hf.shrink` takes out, ``"structured:uniform"`` hidden units and channels, the same share of
            every layer. Default: the criterion's own, which is ``"global"`` for most.
        prune_head: also prune the classifier head.
        min_layer_density: with scope ``"global"``, the fraction of each layer that is kept in any case, in
            [0, 1 - sparsity], against layers that are pruned empty; with a structured scope, of its units.
        output: which of the model's outputs the weights are scored for: its name (``"pooler_output"``,
            ``"class_token"``, ``"last_hidden_state"``, ``"feature_maps"``, ...), or a function of all that the model
            returns to a tensor [N, K, ...]. Default: the logits; of a model without a classifier, what it is used
            for (docs/BACKBONES.md). Weights that the output does not depend on stay dense, and a warning names them.
        progress: show a bar over the rounds, on the main process.

    Returns:
        Masks over the prunable weights, with ``round(sparsity · weights)`` of these pruned; with a structured scope
        no more than ``sparsity · weights``, and fewer by less than one unit.

    Raises:
        InvalidArgumentError: a setting outside its range, or a criterion of a loss for a model without a classifier.
        TargetError: no prunable weights, weights that no path reaches, inputs that ``"n:m"`` does not divide, or units
            that hold less than ``sparsity``.
        DataError: ``batches`` is empty, can be read only once, or is malformed.
        UnsupportedOpError: the criterion does not know an operation of the model.
        NonFiniteError: the model's output or a score is not finite.
        LaunchError: several processes that do not know of each other, that were given different models, or of which
            one has ended.
    """
    with in_contact("before the first round"):
        pruning = Rounds(
            model, batches, criterion, sparsity=sparsity, rounds=rounds, scope=scope, prune_head=prune_head,
            min_layer_density=min_layer_density, output=output,
        )  # fmt: skip
    title = f"Pruning with {type(criterion).__name__}"
    with pruning.at_hand():
        for _ in tqdm(range(pruning.count), desc=title, unit="round",
                      disable=not (progress and processes().is_main)):  # fmt: skip
            pruning.step()
    assert pruning.masks is not None
    return pruning.masks


class Rounds:
    """The rounds of one pruning: all at once in `prune`, or with something else in between.

    Arguments and errors are those of `prune`. Settings, weights and units are checked, and that all processes agree,
    when the object is made; `step` makes the next round.

    Args:
        repeat: make all rounds also for a criterion whose scores no round changes, which needs one: what comes in
            between, such as training, changes them.

    Attributes:
        count: T, how many rounds there are.
        done: t, how many have been made.
        masks: what round t left; None before the first.
        targets: name -> the weights that may be pruned.
        scope: what chooses, with what it knows of the model.
        criterion: what scores, with what it remembers of the rounds before.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        criterion: Criterion,
        *,
        sparsity: float,
        rounds: int,
        scope: str | Scope | None = None,
        prune_head: bool = False,
        min_layer_density: float = 0.0,
        output: Output = None,
        repeat: bool = False,
    ) -> None:
        found = check_settings(criterion, sparsity, rounds, scope, min_layer_density, output)
        self.model = unwrap(model)
        criterion.require_classes(self.model, output)
        shards = shards_of(self.model)
        if shards is not None:
            require_same_layout(self.model)
        self._offloaded = (
            criterion.by_layer
            and is_offloaded(self.model)
            and not (found.whole_units or has_no_classifier(self.model, output) or processes().world_size > 1)
        )
        weights = prunable(self.model, prune_head, anywhere=shards is not None or self._offloaded)
        self._sharded = None if shards is None else ShardedRound(self.model, weights, shards, found)
        if shards is None and not self._offloaded:
            _require_finite(weights)
        warn_of_trained_adapters(self.model)
        with adapters_off(self.model):
            chosen = self._reached(weights, batches, output)
            self.targets = found.targets(self.model, chosen)
            self.scope = found.begin(self.model, batches, self.targets, criterion)
        self.scope.check_budget(self.targets, sparsity, min_layer_density)
        self.batches, self.sparsity, self.prune_head = batches, sparsity, prune_head
        self.min_layer_density, self.output = min_layer_density, output
        self.count = rounds if repeat or criterion.iterative else 1
        self.done = 0
        self.masks: Masks | None = None
        if processes().world_size > 1:
            self._require_agreement(batches if criterion.needs_data else None)
        self.criterion = criterion.begin()

    def _reached(
        self, weights: Mapping[str, nn.Parameter], batches: Batches, output: Output
    ) -> dict[str, nn.Parameter]:
        """Those of the weights that the output depends on."""
        if self._sharded is None or not has_no_classifier(self.model, output):
            return reached(self.model, weights, batches, output, warn=True)
        with gathered(self.model):
            whole = named_parameters(self.model)
            found = reached(self.model, {name: whole[name] for name in weights}, batches, output, warn=True)
        return {name: weights[name] for name in found}

    def _require_agreement(self, batches: Batches | None) -> None:
        if self._sharded is None:
            require_agreement(self.model, batches)
        elif batches is not None:
            with gathered(self.model):
                require_agreement(self.model, batches)

    def at_hand(self) -> AbstractContextManager[None]:
        """For several steps in a row: a sharded model whose network is to run is gathered once for all of them."""
        runs = self._sharded is not None and self._sharded.runs_network(self.criterion)
        return gathered(self.model) if runs else nullcontext()

    def step(self) -> Masks:
        """Score the network as it is now, with the masks so far, and prune it to ``1 - (1 - sparsity)^(t/T)``."""
        with in_contact(f"in round {self.done + 1} of {self.count}"):
            return self._step(self.done + 1)

    def _step(self, t: int) -> Masks:
        final = t == self.count
        sparsity = self.sparsity if final else 1 - (1 - self.sparsity) ** (t / self.count)
        named: dict[str, Any] = {} if self.output is None else {"output": self.output}  # a score() of a user's own
        if self._sharded is not None:
            self.masks = self._sharded.masks(
                self.criterion, self.batches, self.targets, sparsity, within=self.masks, prune_head=self.prune_head,
                min_layer_density=self.min_layer_density, final=final, named=named,
            )  # fmt: skip
        else:
            masks = {} if self.masks is None else self.masks.tensors
            if self._offloaded:
                scores = dict(each_layer(self.criterion, self.model, fetched(self.model, self.targets), masks.get))
            else:
                scores = self.criterion.score(
                    self.model, self.batches, masks=masks or None, prune_head=self.prune_head, **named
                )
            self.masks = self.scope.choose(
                {name: score for name, score in scores.items() if name in self.targets},
                sparsity,
                within=self.masks,
                min_layer_density=self.min_layer_density,
                final=final,
            )
        self.done = t
        if final:
            densities = self.masks.densities()
            if processes().is_main:
                _warn_of_empty_layers(densities, 1 - self.sparsity)
        return self.masks


def check_settings(
    criterion: Criterion,
    sparsity: float,
    rounds: int,
    scope: str | Scope | None,
    min_layer_density: float = 0.0,
    output: Output = None,
) -> Scope:
    """The scope to use, if the settings of `prune` are right whatever the model.

    Raises:
        InvalidArgumentError: they are not.
    """
    if not isinstance(criterion, Criterion):
        hint = f"{criterion.__name__}()" if isinstance(criterion, type) else "px.PX()"
        raise InvalidArgumentError(f"criterion={criterion!r} is not a criterion; expected an object such as {hint}.")
    check_sparsity(sparsity)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise InvalidArgumentError(f"rounds={rounds!r}: expected a whole number ≥ 1.")
    check_output(output)
    found = as_scope(criterion.scope if scope is None else scope)
    found.check_criterion(criterion)
    check_min_layer_density(min_layer_density, sparsity)
    return found


def _require_finite(targets: Mapping[str, Tensor]) -> None:
    for name, weight in targets.items():
        if not bool(torch.isfinite(weight.detach()).all()):
            raise TargetError(f"the weight {name} holds NaN or infinity; load the model again before pruning it.")


_NEARLY_EMPTY = 0.01
"""A layer is named in a warning if its density is below this share of the density asked for."""


def _warn_of_empty_layers(kept: Mapping[str, float], density: float) -> None:
    poor = [name for name, share in kept.items() if share < _NEARLY_EMPTY * density]
    if poor:
        empty = sum(kept[name] == 0 for name in poor)
        warnings.warn(
            f"{empty} layer(s) lost all their weights and {len(poor) - empty} nearly all (under {_NEARLY_EMPTY:.0%} "
            f"of the density asked for): {listed(poor)}. Pass "
            "min_layer_density, use more rounds or scope='layer', or prune less.",
            stacklevel=4,
        )

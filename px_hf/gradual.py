"""Prune while the network learns: in rounds during the first part of training, keeping every zero from then on.

    with gradual_pruning(optimizer, model, batches, PX(), sparsity=0.9, total_steps=1000) as pruning:
        ...                                       # train as ever
    pruning.masks

The scores of a network that is learning the task say more than those of one that has not begun: at the same number of
steps and the same sparsity, what is pruned in this way ends up well ahead of what is pruned at once (docs/RESULTS.md).

| symbol | variable | meaning |
|---|---|---|
| S | `total_steps` | optimizer steps of the whole training |
| u | `until` | the share of them by the end of which the sparsity is reached, in (0, 1] |
| T | `rounds` | how many times the network is pruned |
| s | `sparsity` | share of the prunable weights that is pruned in the end, in [0, 1) |

Round t = 1, ..., T keeps the share `(1 - s)^(t/T)` of the weights, as in `px_hf.prune`, of the network as it is by
then, and is made when `⌊(t - 1) · ⌊u S⌋ / (T - 1)⌋` steps have been made: the first before the first step, the last
after `⌊u S⌋`. With T = 1 all is pruned before the first step, which is `prune(..., rounds=1)` and `keep_masks`.

What a round prunes is zero from then on (see `px_hf.keep.keep_masks`), and so are its entries in the optimizer's
state, so that neither momentum nor a running mean remembers it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import Criterion
from .distributed import processes, same_everywhere
from .errors import CheckpointError, DataError, LaunchError
from .keep import MaskKeeper
from .masked_steps import unwrapped_optimizer
from .masks import Masks
from .model.inputs import Batches, inputs_of
from .model.outputs import Output
from .model.targets import require_whole
from .model.undisturbed import undisturbed
from .model.wrappers import unwrap
from .plan import ROUNDS, UNTIL, Plan
from .prune import Rounds
from .scopes import Scope


def gradual_pruning(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    batches: Batches,
    criterion: Criterion,
    *,
    sparsity: float,
    total_steps: int,
    rounds: int = ROUNDS,
    until: float = UNTIL,
    scope: str | Scope | None = None,
    prune_head: bool = False,
    min_layer_density: float = 0.0,
    output: Output = None,
    state: Mapping[str, Any] | None = None,
) -> GradualPruner:
    """Prune `model` now, and again after steps of `optimizer`, until `sparsity` is reached; keep all zeros.

    ```python
    pruning = px.gradual_pruning(optimizer, model, batches, px.PX(), sparsity=0.9, total_steps=len(loader) * epochs)
    ...                                            # train as ever
    pruning.remove()
    px.save_pretrained(model, pruning.masks, "out")
    ```

    A round scores the network in eval mode and leaves no trace in training but its zeros: modes, BatchNorm
    statistics, gradients and random states are as they were. It takes place inside `optimizer.step()`, after the
    step. Steps are counted by the calls that reach the optimizer: with gradient accumulation one for all its
    micro-batches; one that GradScaler skips does not count, unless the optimizer is fused.

    For what `keep_masks` is for: any optimizer of torch's class, also in Accelerate's wrapper,
    DistributedDataParallel, torch.compile, autocast, GradScaler. State that does not have the weight's shape
    (Adafactor's factors, 8-bit moments) is left alone, and the weights stay zero all the same. In an average of the
    weights (EMA, SWA) made beside the training the pruned ones fade slowly: `pruning.masks.apply_(ema.module)` before
    it is used. The kept ones do not depend on when that is done.

    To resume, hand over what `state_dict` gave, after weights and optimizer have been loaded.

    Args:
        optimizer: what trains the model.
        model: as for `px.prune`.
        batches: what to score on, as for `px.prune`: re-iterable and of its own, no DataLoader that training reads.
            With several processes all of them on each.
        criterion: what to score by, for example ``PX("active")``. It scores anew in each round, also where
            `px.prune` would make one round do, since weights have changed.
        sparsity: fraction of the prunable weights that is pruned in the end, in [0, 1).
        total_steps: how many steps of the optimizer the training has, ≥ 1.
        rounds: T, in [1, `total_steps`].
        until: the share of the steps after which the last round is made, in (0, 1].
        scope, prune_head, min_layer_density, output: as for `px.prune`.
        state: what `state_dict` of a handle with the same settings gave, to go on from there.

    Returns:
        The handle: `masks` and `finished` say what was reached, `remove()` or leaving a `with` ends it.

    Raises:
        InvalidArgumentError: a setting outside its range, or more rounds than steps to make them in.
        TargetError: the model cannot be pruned (see `px.prune`), or the optimizer steps none of its prunable weights.
        DataError: ``batches`` is empty, can be read only once, is malformed, or was prepared by Accelerate.
        CheckpointError: ``state`` is of other settings, or the model does not have its zeros.
        LaunchError: the processes hold different models.
    """
    plan = Plan(criterion, sparsity, rounds, until, scope, prune_head, min_layer_density, output)
    return GradualPruner(optimizer, model, batches, plan, total_steps, state=state)


class GradualPruner:
    """What `gradual_pruning` returns, which has the meaning of the arguments.

    Args:
        count_steps: make the rounds when the optimizer has made the steps; False: whoever trains calls `reach`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        batches: Batches,
        plan: Plan,
        total_steps: int,
        *,
        state: Mapping[str, Any] | None = None,
        count_steps: bool = True,
    ) -> None:
        self._model, self._optimizer = model, unwrapped_optimizer(optimizer, "gradual_pruning")
        self._steps = 0
        self._at = plan.steps(total_steps)
        require_own(batches)
        require_whole(model)
        with undisturbed(model, batches):
            self._rounds = Rounds(
                model, batches, plan.criterion, sparsity=plan.sparsity, rounds=plan.rounds, scope=plan.scope,
                prune_head=plan.prune_head, min_layer_density=plan.min_layer_density, output=plan.output, repeat=True,
            )  # fmt: skip
            if plan.criterion.needs_data:  # a resumed run would only meet them at its next round
                next(inputs_of(batches, unwrap(model)))
        self._settings = plan.describe(self._rounds.scope, total_steps)
        dense = {name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in self._rounds.targets.items()}
        self._keeper = MaskKeeper(optimizer, model, Masks(dense), when_loaded=False)  # masks of then come next
        self._active = True
        self._counting = self._optimizer.register_step_post_hook(self._stepped) if count_steps else None
        try:
            if state is None:
                self.reach(0)
            else:
                self.load_state_dict(state)
        except BaseException:
            self.release()
            raise

    @property
    def masks(self) -> Masks:
        """What the rounds so far have left. They keep more than they are to in the end until `finished`."""
        assert self._rounds.masks is not None, "the first round is made with the object"
        return self._rounds.masks

    @property
    def finished(self) -> bool:
        """Whether the last round has been made, so that `masks` have the sparsity that was asked for."""
        return self._rounds.done == self._rounds.count

    @property
    def unfinished(self) -> str:
        """One sentence on what is missing, for a warning; empty if nothing is."""
        if self.finished:
            return ""
        done, count, due = self._rounds.done, self._rounds.count, self._at[-1]
        return (
            f"Pruning ended with round {done} of {count}, after {self._steps} steps; the last was due after {due}. "
            f"The model is {self.masks.sparsity:.4f} sparse and not {self._settings['sparsity']:g}; its masks say so."
        )

    def reach(self, step: int) -> bool:
        """Make the rounds that are due when `step` optimizer steps have been made; whether there were any."""
        self._steps, before = step, self._rounds.done
        while not self.finished and self._at[self._rounds.done] <= step:
            self._prune()
        return self._rounds.done > before

    def remove(self) -> None:
        """Stop pruning and keeping zeros. Warns if the last round has not been made: train longer, or it is less."""
        if self.release() and self.unfinished:
            warnings.warn(
                f"{self.unfinished} Make total_steps the number of steps that training has.",
                stacklevel=2,
            )

    def release(self) -> bool:
        """`remove` without a warning; whether there was something to stop."""
        if self._counting is not None:
            self._counting.remove()
        self._keeper.remove()
        active, self._active = self._active, False
        return active

    def __enter__(self) -> GradualPruner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.remove()
        else:  # which says enough
            self.release()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs, of tensors and plain values: `torch.load(weights_only=True)` reads it."""
        return {
            "settings": dict(self._settings),
            "steps": self._steps,
            "rounds": self._rounds.done,
            "masks": dict(self.masks),
            "criterion": self._rounds.criterion.memory() if not self.finished else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; weights and optimizer have been loaded by now, after this object was made.

        The object's own first round has then been in vain, which `gradual_pruning(..., state=)` spares.

        Raises:
            CheckpointError: the state is of other settings, or the model does not have the zeros of its masks.
        """
        self._compare(state)
        masks = Masks(state["masks"])
        if revived := masks.revived(self._model):
            raise CheckpointError(
                f"{sum(revived.values())} weights that the masks of the state prune are not zero in the model, for "
                f"example in {next(iter(revived))!r}. Load the weights that were saved with it before this."
            )
        self._steps = state["steps"]
        self._rounds.masks, self._rounds.done = masks, state["rounds"]
        targets = self._rounds.targets
        memory = {name: value.to(targets[name].device) for name, value in state["criterion"].items()}
        self._rounds.criterion.remember(memory)
        self._keeper.replace(masks)

    def _compare(self, state: Mapping[str, Any]) -> None:
        try:
            theirs, done = dict(state["settings"]), int(state["rounds"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(
                "The state is not one that GradualPruner.state_dict() gave. Pass that of the run to resume, or none "
                "to start anew."
            ) from None
        mine = dict(self._settings)
        if done == self._rounds.count:  # the schedule is over: training may go on for longer than was planned
            theirs["total_steps"] = mine["total_steps"]
        different = [
            f"{name}={theirs.get(name)!r} there and {mine.get(name)!r} here"
            for name in mine | theirs
            if theirs.get(name) != mine.get(name)
        ]
        if different:
            raise CheckpointError(
                f"The run to resume was pruned with other settings: {', '.join(different)}. Use the same, or start "
                "anew."
            )

    def _stepped(self, *_: Any) -> None:
        self.reach(self._steps + 1)

    def _prune(self) -> None:
        """One round."""
        with undisturbed(self._model, self._rounds.batches):
            masks = self._rounds.step()
        if processes().world_size > 1 and not same_everywhere(bytes.fromhex(masks.fingerprint()), self._model):
            raise LaunchError(
                f"the processes found different masks in round {self._rounds.done}: their weights or their batches "
                "are no longer the same. Train inside DistributedDataParallel, and give every process the same "
                "batches in the same order each time, from a DataLoader without shuffle."
            )
        self._keeper.replace(masks)
        _forget_(self._optimizer, masks, self._model)


@torch.no_grad()
def _forget_(optimizer: torch.optim.Optimizer, masks: Masks, model: nn.Module) -> None:
    """Zero what the optimizer remembers of pruned weights: floating state of their shape, such as moments."""
    for name, parameter in masks.match(model).items():
        for value in optimizer.state.get(parameter, {}).values():
            # A subclass of Tensor may hold codes, of which 0 is no zero.
            if type(value) is Tensor and value.is_floating_point() and value.shape == parameter.shape:
                value.masked_fill_(~masks.tensors[name].to(value.device), 0)


def require_own(batches: Batches, training: Any = None) -> None:
    """Reading `batches` must not upset the training: Accelerate's state, or the loader `training` itself.

    Accelerate's loaders tell it when an epoch ends, which gradient accumulation goes by, and hold a share of the data.

    Raises:
        DataError: it would.
    """
    accelerate = sys.modules.get("accelerate.data_loader")
    prepared = accelerate is not None and isinstance(batches, accelerate.DataLoaderStateMixin)
    if prepared or (training is not None and _samplers(batches) & _samplers(training)):
        whose = "Accelerate has prepared" if prepared else "training reads"
        raise DataError(
            f"batches is a {type(batches).__name__} that {whose}: each round reads it from its start, which would "
            "upset the training. Expected batches of its own: a list, or another DataLoader, without shuffle, which "
            "does not go through accelerator.prepare."
        )


def _samplers(loader: Any) -> set[int]:
    """By identity: a loader, what it wraps, and the samplers that say what comes next."""
    found: dict[int, Any] = {}
    waiting = [loader]
    while waiting:
        it = waiting.pop()
        if it is not None and id(it) not in found:
            found[id(it)] = it
            waiting += [getattr(it, name, None) for name in ("base_dataloader", "sampler", "batch_sampler")]
    return set(found)

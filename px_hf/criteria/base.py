"""What every criterion has in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..model.adapters import adapters_off
from ..model.inputs import Batches
from ..model.modes import device_of, full_precision
from ..model.outputs import Output, check_output, has_no_classifier, text_of
from ..model.wrappers import unwrap
from ..scoring.given import Given
from ..scoring.masking import masked


class Criterion:
    """Scores weights; the lowest scores are pruned. Subclasses are frozen dataclasses that state a `formula`.

    Attributes:
        iterative: whether pruning changes the scores of what remains, so that rounds matter.
        needs_data: whether the batches are looked at.
        needs_labels: whether they must have labels.
        by_layer: whether the scores of a weight depend on that weight, its name and its shape alone, so that the model
            need not be held as a whole.
        unit_power: with a structured scope, a unit adds up the scores of its weights to that power; None if the
            scores say an order and no amounts, so that they cannot be added.
        scope: what the scores are meant to be compared within, see `px_hf.select`.
    """

    iterative: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    by_layer: ClassVar[bool] = False
    unit_power: ClassVar[int | None] = 1
    scope: ClassVar[str] = "global"

    def begin(self) -> Criterion:
        """What scores the rounds of one pruning: a criterion that learns from round to round returns a fresh
        object that remembers; any other is its own."""
        return self

    def memory(self) -> dict[str, Tensor]:
        """What `begin`'s object remembers of the rounds so far, by parameter name, so that a run can be resumed."""
        return {}

    def remember(self, memory: Mapping[str, Tensor]) -> None:
        """Take over the `memory` of another run; its tensors are on the devices of the weights."""
        if memory:
            raise NotImplementedError(f"{type(self).__name__} has no memory to take over.")

    def score(
        self,
        model: nn.Module,
        batches: Batches = (),
        *,
        masks: Mapping[str, Tensor] | None = None,
        prune_head: bool = False,
        output: Output = None,
    ) -> dict[str, Tensor]:
        """Score every prunable weight of ``model``, which is left untouched, in its own dtype whatever autocast is on.

        Args:
            model: any module whose output is a tensor [N, K] or has ``.logits``, or a backbone without a classifier
                (`px_hf.model.outputs`); also inside DistributedDataParallel, DataParallel, ``torch.compile`` or a
                ``PeftModel``, whose adapters are switched off: the weights are scored as those of the plain model.
            batches: re-iterable of batches, see `px_hf.model.inputs`; criteria that need no data ignore it.
            masks: parameter name -> bool tensor (True = kept). The network is scored as if the
                other weights were zero, and these get the score 0; a name that is absent is dense.
            prune_head: also score the classifier head.
            output: what to score for, as for `px_hf.prune`.

        Returns:
            Name of the parameter (of the model outside wrappers) -> scores of its shape, non-negative, finite. Weights
            that the output of a backbone does not depend on have none.

        Raises:
            InvalidArgumentError: the criterion needs labels, and the output is no logits.
        """
        check_output(output)
        given = Given(unwrap(model), batches, masks or {}, prune_head, output)
        self.require_classes(given.model, output)
        with adapters_off(given.model), full_precision(device_of(given.model)):
            scores = dict(self.formula(given))
        for name in scores.keys() & given.masks.keys():  # one after the other: they are as large as the model
            scores[name] = masked(scores[name], given.masks[name])
        return scores

    def require_classes(self, model: nn.Module, output: Output) -> None:
        """A criterion of a loss needs the logits that the loss is of.

        Raises:
            InvalidArgumentError: the criterion needs labels, and the output is no logits.
        """
        if self.needs_labels and has_no_classifier(model, output):
            what = f"{type(model).__name__} has no classifier: it" if output is None else f"output={text_of(output)!r}"
            raise InvalidArgumentError(
                f"{repr(self).partition('(')[0]} scores by a loss with labels, and {what} gives no logits. Use a "
                "criterion that needs no labels: px.PX(), px.NTKSAP(), px.NTKTrace(), px.SynFlow(), px.Wanda(), "
                "px.LAMP() or px.Magnitude(). Or give the model a classifier first."
            )

    def formula(self, given: Given) -> dict[str, Tensor]:
        """The scores of the kept weights by name; what stands where a weight is pruned is not looked at."""
        raise NotImplementedError(f"{type(self).__name__} states no formula(given): a criterion is that.")

"""What a criterion is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from ..model.inputs import Batches
from ..model.outputs import Output
from ..model.reached import reached
from ..model.targets import prunable
from .masked_network import MaskedNetwork
from .masking import masked
from .path_network import PathNetwork


@dataclass(frozen=True)
class Given:
    """One question to a criterion: what are the weights of this model worth, where so many are pruned already?

    A criterion asks for the weights alone, for the network as a function of them, or for its path sums; each has
    the pruned weights at zero.

    Attributes:
        model: outside any wrapper.
        batches: see `px_hf.model.inputs`.
        masks: parameter name -> bool tensor (True = kept); a name that is absent is dense.
        prune_head: whether the classifier head is scored too.
        output: what of the model's outputs is scored for, see `px_hf.model.outputs`.
    """

    model: nn.Module
    batches: Batches
    masks: Mapping[str, Tensor]
    prune_head: bool
    output: Output = None

    @cached_property
    def _targets(self) -> dict[str, nn.Parameter]:
        return reached(self.model, prunable(self.model, self.prune_head), self.batches, self.output)

    def targets(self) -> dict[str, nn.Parameter]:
        """The prunable weights as the model holds them, see `prunable`, that the output depends on."""
        return dict(self._targets)

    def weights(self) -> dict[str, Tensor]:
        """The prunable weights θ ⊙ m, detached."""
        return {name: masked(p, self.masks.get(name)) for name, p in self.targets().items()}

    def network(self) -> MaskedNetwork:
        """For criteria that differentiate the model."""
        return MaskedNetwork(self.model, self.targets(), self.masks, self.output)

    def paths(self, order: int = 2) -> PathNetwork:
        """For criteria that sum over paths, of products of |θ|^order."""
        return PathNetwork(self.model, self.targets(), self.masks, order, self.output)

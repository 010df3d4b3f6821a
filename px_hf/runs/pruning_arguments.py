"""The arguments of the pruning of one network: its repair, its teacher, and what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

import px_hf as px

from ..controls import CONTROLS
from ..distillation import Distillation
from ..repair.by_name import NONE, REPAIRS
from .lora_arguments import LoraArguments
from .schedule_arguments import GRADUAL, ONE_SHOT, ScheduleArguments

TEACHER_DENSE = "dense"
"""As `--distill`: the dense network of the same run."""


@dataclass
class SparsityArguments(ScheduleArguments):
    """The pruning of one network, its repair, and whether the unpruned one is trained beside it."""

    topic: ClassVar[str] = "pruning"

    repair: str = field(
        default=NONE,
        metadata={
            "help": "Change what stays so that it makes up for what is pruned, without training, on the images that "
            "weights are scored on: statistics folds removed units into the others or corrects means, and measures "
            "BatchNorm anew; layers, blocks and network fit layers, then whole blocks one by one, or all at once, to "
            "the dense network.",
            "choices": [NONE, *REPAIRS],
        },
    )
    int8: bool = field(
        default=False,
        metadata={
            "help": "Round weights to INT8, multiples of a scale of each row, before the trained model is evaluated "
            "and saved: its compact copy then takes a byte for each kept weight."
        },
    )
    compare_dense: bool = field(
        default=False,
        metadata={"help": "Train the unpruned network as well, with the same settings. On for the digits."},
    )

    def check(self) -> None:
        super().check()
        if self.repair != NONE and self.gradual:
            raise px.InvalidArgumentError(
                f"--repair {self.repair} is for a network that is pruned before training, and --schedule "
                f"{self.schedule} repairs by training. Leave one out."
            )

    def describe(self) -> dict[str, Any]:
        return super().describe() | ({"repair": self.repair} if self.repair != NONE else {})


@dataclass
class PruneArguments(LoraArguments, SparsityArguments):
    """The sparse subnetwork of a classifier."""

    topic: ClassVar[str] = "pruning"
    topics: ClassVar[Mapping[str, Sequence[str]]] = {
        "distillation": ("distill", "distill_alpha", "distill_temperature", "distill_hidden"),
    }

    keep_masks: bool = field(
        default=False,
        metadata={"help": "The backbone is sparse, by px_hf: prune nothing more, and keep exactly its masks."},
    )
    control: str = field(
        default="none",
        metadata={
            "help": "Instead of the found mask: the same in random order within each layer (a random mask of the "
            "found layer densities), the same with units permuted, or the same on weights drawn anew.",
            "choices": list(CONTROLS),
        },
    )
    dense: bool = field(default=False, metadata={"help": "Prune nothing: train the ceiling to compare with."})
    distill: str | None = field(
        default=None,
        metadata={
            "help": "Learn from a teacher as well: 'dense', the network that --compare_dense trains, or a folder or a "
            "Hub id of a model for the same classes."
        },
    )
    distill_alpha: float = field(
        default=Distillation.alpha,
        metadata={"help": "With --distill: the weight of the teacher's logits, in [0, 1]; the labels have the rest."},
    )
    distill_temperature: float = field(
        default=Distillation.temperature, metadata={"help": "With --distill: what both logits are divided by, > 0."}
    )
    distill_hidden: float = field(
        default=Distillation.beta,
        metadata={
            "help": "With --distill: the weight of the hidden states, 0 for none; for a teacher of the same shape."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.compare_dense = self.compare_dense or self.distill_dense

    def default_schedule(self) -> str:
        """Gradual, unless the masks are to be there before training, or a smaller network is to be trained."""
        needs_masks = self.keep_masks or self.dense or self.control != "none" or self.repair != NONE or self.lora
        return ONE_SHOT if needs_masks or self.takes_out_units else GRADUAL

    @property
    def distill_dense(self) -> bool:
        """Whether the teacher is the dense network of the same run."""
        return self.distill == TEACHER_DENSE

    def distillation(self, teacher: nn.Module) -> Distillation:
        """What to learn from that teacher.

        Raises:
            InvalidArgumentError: a weight or a temperature outside its range.
        """
        return Distillation(
            teacher, alpha=self.distill_alpha, temperature=self.distill_temperature, beta=self.distill_hidden
        )

    def check(self) -> None:
        super().check()
        self.distillation(nn.Identity())  # the settings, before any teacher is there
        chosen = (self.distill_alpha, self.distill_temperature, self.distill_hidden)
        if self.distill is None and chosen != (Distillation.alpha, Distillation.temperature, Distillation.beta):
            raise px.InvalidArgumentError("--distill_alpha, --distill_temperature, --distill_hidden need --distill.")

    @property
    def takes_out_units(self) -> bool:
        return super().takes_out_units and not self.keep_masks

    def short_name(self) -> str:
        """As in the name of the output folder: px-active90, magnitude80-shuffle, dense, kept."""
        if self.keep_masks or self.dense:
            return "kept" if self.keep_masks else "dense"
        name = f"{self.criterion_name}{100 * self.sparsity:g}"
        name += f"-{self.scope}".replace(":", "-") if self.takes_out_units else ""
        name += f"-{self.schedule}" if self.gradual else ""
        name += f"-{self.repair}" if self.repair != NONE else ""
        return name if self.control == "none" else f"{name}-{self.control}"

    def describe(self) -> dict[str, Any]:
        criterion = {"criterion": "none (dense)"} if self.dense else {}
        return super().describe() | criterion | {"control": self.control}

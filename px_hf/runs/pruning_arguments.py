"""The arguments of pruning: how weights are scored, how far a network is pruned, what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

import px_hf as px

from ..controls import CONTROLS
from ..distillation import Distillation
from ..model.inputs import Batches
from ..plan import ROUNDS as GRADUAL_ROUNDS
from ..plan import SCHEDULES, UNTIL, check_until, most_rounds
from ..prune import ROUNDS
from ..repair.by_name import NONE, REPAIRS
from ..scopes import as_scope, check_sparsity
from .lora_arguments import LoraArguments

ONE_SHOT, GRADUAL = SCHEDULES
CRITERION = "px-active"
"""By default, before training."""

GRADUAL_CRITERION = "px-balanced"
"""By default, while training: docs/RESULTS.md."""

TEACHER_DENSE = "dense"
"""As `--distill`: the dense network of the same run."""


@dataclass
class ScoringArguments:
    """How weights are ranked for pruning."""

    topic: ClassVar[str] = "pruning"

    criterion: str | None = field(
        default=None,
        metadata={"help": f"How weights are scored. Default: {CRITERION}.", "choices": list(px.CRITERIA)},
    )
    power: float | None = field(
        default=None, metadata={"help": "Exponent of the path flow in the px criteria: 1 = the paper, 0 = magnitude."}
    )
    rounds: int | None = field(
        default=None, metadata={"help": f"Rounds of scoring and pruning. Default: {ROUNDS}. The paper uses 100."}
    )
    scope: str | None = field(
        default=None,
        metadata={
            "help": "Rank all weights together (global), within each layer or each output (row), or n:m, as in 2:4: "
            "keep at most n of m inputs in a row; structured takes out whole units, which are hidden units, heads and "
            "channels, structured:uniform the same share of every layer and no heads. Default: the criterion's own.",
        },
    )
    min_layer_density: float = field(
        default=0.0,
        metadata={
            "help": "With scope global: the fraction of each layer that is kept in any case; structured: of its units."
        },
    )
    prune_head: bool = field(default=False, metadata={"help": "Prune the classifier head too."})
    examples_per_class: int = field(default=10, metadata={"help": "Training images of each class to score with."})
    scoring_batch_size: int = field(
        default=16, metadata={"help": "Images scored at once. Smaller saves memory; scores do not depend on it."}
    )

    def __post_init__(self) -> None:
        if self.scope is not None:
            as_scope(self.scope)
        if self.rounds is None:
            self.rounds = self.default_rounds()

    def default_rounds(self) -> int:
        """How many rounds there are where nobody says it."""
        return ROUNDS

    @property
    def criterion_name(self) -> str:
        """What weights are scored by, also where nobody says it."""
        return self.criterion or CRITERION

    @property
    def takes_out_units(self) -> bool:
        """Whether the scope is one of whole units, which leave a smaller model."""
        return self.scope is not None and as_scope(self.scope).whole_units

    def criterion_object(self) -> px.Criterion:
        """The criterion of that name, with `power`.

        Raises:
            InvalidArgumentError: `power` for a criterion that takes none.
        """
        criterion = px.CRITERIA[self.criterion_name]
        if self.power is None:
            return criterion
        if not isinstance(criterion, px.PX):
            raise px.InvalidArgumentError(f"--power is for the px criteria, and --criterion is {self.criterion_name}.")
        return replace(criterion, power=self.power)

    def find_masks(self, model: nn.Module, batches: Batches, sparsity: float, progress: bool) -> px.Masks:
        """Those that `px.prune` finds with these settings."""
        return px.prune(
            model, batches, self.criterion_object(), sparsity=sparsity, progress=progress, **self._settings()
        )

    def _settings(self) -> dict[str, Any]:
        """What `px.prune` and `px.GradualPruning` are both told."""
        return {
            "rounds": self.rounds,
            "scope": self.scope,
            "prune_head": self.prune_head,
            "min_layer_density": self.min_layer_density,
        }


@dataclass
class ScheduleArguments(ScoringArguments):
    """How far a network is pruned, and when."""

    topic: ClassVar[str] = "pruning"

    criterion: str | None = field(
        default=None,
        metadata={
            "help": f"How weights are scored. Default: {CRITERION}, with --schedule gradual {GRADUAL_CRITERION}.",
            "choices": list(px.CRITERIA),
        },
    )
    rounds: int | None = field(
        default=None,
        metadata={
            "help": f"Rounds of scoring and pruning. Default: {ROUNDS}, with --schedule gradual {GRADUAL_ROUNDS}. The "
            "paper uses 100."
        },
    )
    schedule: str | None = field(
        default=None,
        metadata={
            "help": "Prune gradually, in rounds during the first part of fine-tuning, or once before it (one-shot). "
            "Gradually is far better at high sparsity. Default: see the page of the command, docs/FINETUNING.md.",
            "choices": list(SCHEDULES),
        },
    )
    until: float = field(
        default=UNTIL,
        metadata={"help": "With --schedule gradual: the share of the training steps after which the last round is."},
    )
    sparsity: float = field(default=0.9, metadata={"help": "Fraction of the weights to prune, in [0, 1)."})

    def __post_init__(self) -> None:
        self.schedule = self.schedule or self.default_schedule()
        self._rounds_by_default = self.rounds is None
        super().__post_init__()

    def default_schedule(self) -> str:
        """When the network is pruned where nobody says it."""
        return ONE_SHOT

    @property
    def gradual(self) -> bool:
        """Whether the network is pruned while it is fine-tuned."""
        return self.schedule == GRADUAL

    def fit_rounds(self, total_steps: int) -> None:
        """Of a training of few steps: as many rounds as fit into it, unless their number was given."""
        if self._rounds_by_default:
            self.rounds = min(self.default_rounds(), most_rounds(self.until, total_steps))

    def default_rounds(self) -> int:
        return GRADUAL_ROUNDS if self.gradual else ROUNDS

    @property
    def criterion_name(self) -> str:
        return self.criterion or (GRADUAL_CRITERION if self.gradual else CRITERION)

    def check(self) -> None:
        """Find out before any work what `px.prune` would refuse.

        Raises:
            InvalidArgumentError: a sparsity or a setting of the criterion or the schedule outside its range.
        """
        check_sparsity(self.sparsity)
        check_until(self.until)
        if self.until != UNTIL and not self.gradual:
            raise px.InvalidArgumentError("--until says when --schedule gradual ends. Pass that too, or leave it out.")
        self.criterion_object()

    def gradual_pruning(self, batches: Batches) -> px.GradualPruning:
        """The callback that prunes with these settings while Trainer trains.

        Raises:
            InvalidArgumentError: a setting outside its range.
        """
        return px.GradualPruning(
            self.criterion_object(), batches, sparsity=self.sparsity, until=self.until, **self._settings()
        )

    def describe(self) -> dict[str, Any]:
        """The settings that the masks depend on, as JSON can say them."""
        schedule = {"schedule": self.schedule, "until": self.until} if self.gradual else {}
        return schedule | {
            "criterion": repr(self.criterion_object()),
            "sparsity_asked": self.sparsity,
            "rounds": self.rounds,
            "scope": self.scope or px.CRITERIA[self.criterion_name].scope,
            "min_layer_density": self.min_layer_density,
            "prune_head": self.prune_head,
        }


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

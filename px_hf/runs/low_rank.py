"""Fine-tuning a sparse network by LoRA: adapters beside its layers, merged in the end with the zeros kept."""

from __future__ import annotations

from transformers import PreTrainedModel, Trainer

import px_hf as px

from .job import Job, MaskSource
from .pruning_run import PruningRun
from .schedules import BeforeTraining


class ByLora(BeforeTraining):
    """Masks that are found once; what trains are adapters under them, which are merged when training has ended."""

    def __init__(self, run: PruningRun, job: Job, network: PreTrainedModel, source: MaskSource) -> None:
        super().__init__(run, job, network, source)
        self.model = job.adapted(self.model)
        self._masking = px.mask_lora(self.model, self.masks)
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in self.model.parameters())
        run.say(f"LoRA: {trained:,} of {total:,} parameters train")

    def fine_tune(self, trainer: Trainer, checkpoint: str | None) -> None:
        super().fine_tune(trainer, checkpoint)
        self.model = px.merge_lora_(self.model, self.masks)

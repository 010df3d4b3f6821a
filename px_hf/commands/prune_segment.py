"""Semantic segmentation: prune a backbone with PX, fine-tune it with its zeros kept, report mean IoU.

recipes/prune_segment.py says how it is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import px_hf as px

from ..distributed import processes
from ..runs.arguments import EXAMPLE_MODEL, FineTuneArguments, ModelArguments, one_thread
from ..runs.help import Usage
from ..runs.parsing import parse_groups
from ..runs.segmentation_job import SegmentArguments, SegmentationJob
from .prune_finetune import prune_and_fine_tune

USAGE = Usage(
    "px-hf segment",
    "Semantic segmentation: prune a backbone, fine-tune it with its zeros kept, report mean IoU. Without arguments: "
    "the embedded ResNet on rendered scenes of four shapes.",
    (
        "px-hf segment --model_name_or_path nvidia/mit-b0 --dataset_name user/camvid --sparsity 0.8",
        "px-hf segment --model_name_or_path microsoft/resnet-50 --train_file train.parquet --test_file test.parquet",
    ),
    (
        *("model_name_or_path", "dataset_name", "train_file", "validation_file", "class_names_file", "ignore_index"),
        *("sparsity", "criterion", "schedule", "compare_dense", "num_train_epochs", "learning_rate", "output_dir"),
    ),
)

EXAMPLE = {
    "num_train_epochs": 10.0,
    "learning_rate": 3e-3,
    "random_crop": False,
    "compare_dense": True,
    "decoder_size": 48,
    "per_device_train_batch_size": 8,
    "scoring_images": 30,
    "sparsity": 0.5,
}
"""What differs from the defaults for the embedded scenes."""


def main(argv: list[str]) -> None:
    processes()  # first of all: a wrong launch must not write anything
    model_args, args, training = parse(argv)
    if not args.source() and model_args.model_name_or_path == EXAMPLE_MODEL:
        one_thread()
    prune_and_fine_tune(SegmentationJob(model_args, args, training))


def parse(argv: Sequence[str]) -> tuple[ModelArguments, SegmentArguments, FineTuneArguments]:
    """The three groups from the command line and the files it names.

    Raises:
        InvalidArgumentError: an argument outside its range.
    """
    model_args, args, training = parse_groups(
        argv,
        (ModelArguments, SegmentArguments, FineTuneArguments),
        USAGE,
        lambda named: (
            {"output_dir": "outputs/{model}-segment"} | ({} if named.dataset_name or named.train_file else EXAMPLE)
        ),
    )
    args.check()
    if args.scoring_images < 1:
        raise px.InvalidArgumentError(f"--scoring_images must be at least 1, got {args.scoring_images}.")
    training.name_output(model=Path(model_args.model_name_or_path).name)
    training.batch_eval_metrics = True  # counts, not all pixels, are kept
    return model_args, args, training

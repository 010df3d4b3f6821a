"""Labelled images for pruning and fine-tuning: read, check, transform, draw the calibration set.

raw = read_dataset(DataSource(dataset_name="beans"))                # any source -> DatasetDict
task = classification_task(raw, validation_share=0.15, seed=0)      # checked labels, three splits
pixels = Preprocess(AutoImageProcessor.from_pretrained("..."))      # RGB images -> [N, 3, H, W]
batches = calibration_set(task.train, task.labels, pixels, examples_per_class=10, seed=0)
"""

from .calibration import CalibrationSet, calibration_set
from .source import DataSource, read_dataset
from .split import Split
from .task import ClassificationTask, classification_task
from .transform import Augment, Preprocess

__all__ = [
    "Augment",
    "CalibrationSet",
    "ClassificationTask",
    "DataSource",
    "Preprocess",
    "Split",
    "calibration_set",
    "classification_task",
    "read_dataset",
]

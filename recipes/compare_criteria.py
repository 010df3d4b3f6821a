"""Compare pruning criteria: methods × sparsities × seeds × (model, task), the same budget and data order for all.

    python recipes/compare_criteria.py

compares four criteria on the embedded example in about a minute on one CPU core and without a network, and writes
outputs/comparison: results.jsonl (a line for each cell), results.md (a table for each task, and one over all tasks and
sparsities), comparison.png. On real data:

    python recipes/compare_criteria.py --output_dir outputs/cifar100 --workers 2 \\
        --model_name_or_path models/cifar10_resnet20 --trust_remote_code --dataset_name datasets/cifar100 \\
        --methods px-active px-active:power=0.5 magnitude magnitude:scope=layer snip:rounds=1 snip random-erk \\
        --sparsities 0.5 0.7 0.8 0.9 0.95 0.98 --seeds 0 1 2 --max_train_samples 20000 --horizontal_flip

A run that was killed goes on with the cells that are missing: run the same command again. More methods, sparsities
or seeds only add cells; another budget (epochs, learning rate, ...) makes cells of its own in the same file, and the
tables show those of the command's budget.

A method is the name of a criterion, with settings: `px-active:power=0.5:rounds=50`, `magnitude:scope=layer`,
`magnitude:scope=2:4`, `snip:rounds=1` (the single shot), `magnitude:control=shuffle` (see px_hf.controls). The dense
network is always one of the rows. For each cell:

1. Draw `examples_per_class` training images by the seed, draw a head by the seed (or take the fitted one), prune.
2. *No fine-tuning*: accuracy with a head that was fitted once to the dense model's features (logistic regression,
   its strength chosen on the validation split), so that a mask can be judged on another label set before training.
3. Fine-tune all weights that are left, order and augmentation of the data by the seed; accuracy at the end. There is
   no early stopping: nothing is chosen on the split that is reported.

Every cell is measured on the validation and the test split. Given several `--learning_rate`s, each method takes the
one that is best on validation, at each sparsity; tables show the test split (`--report_on`) and the rate. Cost is that
of scoring alone, in forward passes of one image.
"""

from px_hf.commands import run
from px_hf.commands.compare_criteria import main

if __name__ == "__main__":
    run(main)

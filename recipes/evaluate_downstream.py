"""What a pruned model can still do, on tasks it was not pruned for, next to its dense parent and a random mask.

    accelerate launch recipes/evaluate_downstream.py

prunes 90 % of the embedded ResNet on the letters it was pretrained on, without training it, and evaluates three
models (dense, pruned, the same density at random in each layer) on handwritten digits and Greek letters by four
methods: k-NN, ridge regression and a linear probe on frozen features, and fine-tuning with the zeros kept. It takes
about 55 seconds on one CPU core, and no network, and writes outputs/downstream-resnet. Expected on the Greek letters,
linear probe and fine-tuned: dense 89 and 90 %, pruned 62 and 75 %, random 29 and 34 %.

    accelerate launch recipes/evaluate_downstream.py --model_name_or_path outputs/my-pruned-model \\
        --tasks beans cifar100 photos/ my_task.yaml --num_train_epochs 3
    accelerate launch recipes/evaluate_downstream.py --model_name_or_path timm/resnet50.a1_in1k \\
        --sparsity 0.5 0.7 0.9 --unlabelled_dir photos/ --tasks beans --methods knn ridge linear

A task is an embedded one (digits, greek, letters), a dataset of the Hub, a local folder, or a YAML file of data
arguments (dataset_name, train_file, test_file, image_column_name, max_train_samples, ...; see --help of
recipes/prune_finetune.py). Probes are fitted on the training split, their one setting is chosen on the validation
split, and everything is reported on the test split, which nothing else sees; where there is no test split, the
validation split is it, and another is taken off the training split. Fine-tuning chooses nothing.

The output folder holds downstream.json, downstream.png, downstream.md (a section for a model card), tasks/ and
features/. --add_to_model copies the first three into the model's own folder, where px.push_to_hub finds them;
--push_to_hub --hub_model_id me/name publishes the model with them: the page is in its card, every metric of every task
in the card's model-index. An interrupted run continues where it stopped: results are written task by task and model by
model. A task that fails is in the report, the others run, and the exit status is 1. Two processes without a GPU:

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/evaluate_downstream.py
"""

from px_hf.commands import run
from px_hf.commands.evaluate_downstream import main

if __name__ == "__main__":
    run(main)

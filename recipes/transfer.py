"""Prune once, transfer many times: how much of each target's dense accuracy does one subnetwork keep?

    accelerate launch recipes/transfer.py

prunes 90 % of the embedded ResNet on letters, the task it was pretrained on, and fine-tunes that one subnetwork on
digits and on Greek letters; beside it the dense network, subnetworks found on each target's own images and on a mix of
both (the comparison of the paper), and a random mask. It takes about 90 seconds on one CPU core, and no network, and
writes outputs/transfer-resnet.

    accelerate launch recipes/transfer.py --model_name_or_path timm/resnet50.a1_in1k --source imagenet_sample.yaml \\
        --targets beans cifar100 --sparsity 0.9 --num_train_epochs 10
    accelerate launch recipes/transfer.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --unlabelled_dir photos --prune_on source --targets beans

With `--schedule gradual` the network is pruned while it learns: the source once, from where the sparse network goes on
to each target (it is kept in the output folder as source/), and each target itself.

Otherwise nothing is trained before: on the source the network is scored with the source's head (on unlabelled images
with its own), once for all targets; on a target, and on the mix, with the new head that is then fine-tuned. The mix
has half of the images of each. Images come from training splits. Tasks, output folder, resuming and failures are as in
recipes/evaluate_downstream.py. `--summarize` puts several runs into one table, and `--protocol 12-tasks` is a
published protocol of transfer: docs/DOWNSTREAM.md.
"""

from px_hf.commands import run
from px_hf.commands.transfer import main

if __name__ == "__main__":
    run(main)

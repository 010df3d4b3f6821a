"""Prune a pretrained backbone with PX, fine-tune it with its zeros kept, save it, load it again.

    accelerate launch recipes/prune_finetune.py

fine-tunes a small ResNet that was pretrained on rendered letters on scikit-learn's handwritten digits (1,149 training
images), prunes 90 % of it in eight rounds during the first half of that, does the same without pruning, and writes
outputs/resnet-digits-px-balanced90-gradual. It takes about 50 seconds on one CPU core, and no network. Expected on the
360 test images: dense 99.7 %, pruned 99.7 %; with `--model_name_or_path recipes/demo/vit` 99.4 and 98.3 %.

    accelerate launch recipes/prune_finetune.py --model_name_or_path google/vit-base-patch16-224-in21k \\
        --dataset_name beans --sparsity 0.8 --learning_rate 1e-4 --bf16
    accelerate launch recipes/prune_finetune.py --model_name_or_path timm/resnet50.a1_in1k \\
        --train_dir photos/train --validation_dir photos/validation --compare_dense
    accelerate launch recipes/prune_finetune.py --resume_from_checkpoint true      # an interrupted run
    accelerate launch recipes/prune_finetune.py --push_to_hub --hub_model_id me/digits-px90    # and publish it
    accelerate launch recipes/prune_finetune.py --model_name_or_path me/digits-px90 --keep_masks \\
        --train_dir photos/train                           # the same sparse network, with its masks, on another task
    accelerate launch recipes/prune_finetune.py --dense                            # the unpruned ceiling alone
    accelerate launch recipes/prune_finetune.py --scope structured --sparsity 0.5  # a smaller model
    accelerate launch recipes/prune_finetune.py --schedule one-shot                # pruned once, before it learns
    accelerate launch recipes/prune_finetune.py --distill dense                    # the dense network teaches it

Two processes on a machine without a GPU (`accelerate launch --cpu` would silently start one):

    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 recipes/prune_finetune.py

The output folder holds the model for stock transformers, with exact zeros (config.json, model.safetensors, the image
processor), a compact copy of it in sparse/, report.html, all_results.json, per_layer_sparsity.png, training_curve.png,
the Trainer's checkpoints with their masks, and run.json, which a resumed run reads. It is never overwritten unless
--overwrite_output_dir says so.
`--help` lists every argument; those of transformers.TrainingArguments are among them.
"""

from px_hf.commands import run
from px_hf.commands.prune_finetune import main

if __name__ == "__main__":
    run(main)

"""Semantic segmentation: prune a backbone with PX, fine-tune it with its zeros kept, report mean IoU.

    accelerate launch recipes/prune_segment.py

puts a UPerNet decoder on the embedded ResNet, prunes 50 % of the backbone on rendered scenes of four shapes, and
trains it next to the dense network. It takes about 70 seconds of one CPU core, and no network. Mean IoU on the 200
test scenes, one run: dense 60 %, pruned 54 %.

    accelerate launch recipes/prune_segment.py --model_name_or_path nvidia/mit-b0 --dataset_name user/camvid \\
        --class_names_file classes.json --ignore_index 11 --sparsity 0.9 --num_train_epochs 30 --learning_rate 1e-4
    accelerate launch recipes/prune_segment.py --model_name_or_path microsoft/resnet-50 --train_file train.parquet \\
        --test_file test.parquet --annotation_column_name mask --reduce_labels

A model is one that `AutoModelForSemanticSegmentation` loads (SegFormer, UPerNet, DPT, BEiT, ...), or a backbone
(ResNet, Swin, ConvNeXt, DINOv2, ..., or one of timm), which gets a new UPerNet decoder. The decoder stays dense
unless --prune_head; an auxiliary head is left out. Data: any dataset with a column of images and one of maps, a class
number for each pixel. All of it is read once before anything is trained. Mean IoU is over all pixels of a split that
count, at the size that the image processor makes; its interval is a bootstrap over images. The output folder is that
of recipes/prune_finetune.py, with segmentation.png.
"""

from px_hf.commands import run
from px_hf.commands.prune_segment import main

if __name__ == "__main__":
    run(main)

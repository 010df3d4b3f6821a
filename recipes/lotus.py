"""Half the patches, a third of the weights: what is lost, and what does it save?

    python recipes/lotus.py --model_name_or_path recipes/demo/vit --dataset_name digits --seeds 0 1 2
    python recipes/lotus.py --model_name_or_path google/vit-base-patch16-224-in21k --dataset_name beans --layers 3 6 9

After LOTUS (Upadhyay, arXiv 2405.00906): the pretrained network, frozen, picks the patches of each image that get most
attention (`px.PatchTickets`), and a copy of it is fine-tuned on these alone, dense or with pruned weights, PX beside
the paper's magnitude. Beside it: all patches, as many random ones, and both for as long as all patches take.

One CPU core, three minutes for a seed with the demo ViT. docs/TICKETS.md has the results.
"""

from px_hf.commands import run
from px_hf.commands.lotus import main

if __name__ == "__main__":
    run(main)

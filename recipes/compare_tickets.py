"""Which weights are worth tuning? Tickets of rows, beside full fine-tuning, the head alone, and random rows.

    python recipes/compare_tickets.py --model_name_or_path recipes/demo/vit --dataset_name greek --seeds 0 1 2

============ ==============================================================================================
full, head   everything, or the new classifier head alone; in all others the head trains too
norms        the head and the norms
ks           rows that a pilot of `--pilot_epochs` has shifted (`px.KS`), the most shifted `--fraction` of them
px, ...      the top `--fraction` of the rows by px-active, magnitude or Fisher information
talos        those to which the network's own answers are least sensitive
random       as many rows, drawn at random; NAME:random as many of the same lengths as NAME has
============ ==============================================================================================

One CPU core, a minute for a seed with the demo ViT. Of several `--learning_rate` each method takes the one that is
best on the validation split. docs/TICKETS.md has the results.
"""

from px_hf.commands import run
from px_hf.commands.compare_tickets import main

if __name__ == "__main__":
    run(main)

"""How should PX score queries and keys? The candidates, compared with the budget and options of compare_criteria.py.

    python recipes/compare_attention.py --model_name_or_path recipes/demo/vit --sparsities 0.5 0.7 0.9 --seeds 0 1 2

With the attention pattern frozen no value path leads through W_Q and W_K (docs/MATHEMATICS.md, section 4), so their
scores are a policy. On active paths, for a layer whose values receive the flow F = Σ_{θ∈W_V} θ² ∂R/∂θ²:

============ ==============================================================================================
px-active    what px_hf does: Q and K gate each other, entry by entry of the pattern
qk-means     one u for each head, mean_tokens(q̃) · mean_tokens(k̃): Q and K share F without regard to the data
qk-fisher    (∂f/∂θ)² over the images and one random sign vector each (`NTKTrace`), scaled so that the layer has F
qk-spread    F spread evenly: magnitude inside the layer
qk-dense     queries and keys stay dense, the other weights make up for it
============ ==============================================================================================

All with power 1/4. For ViTs of transformers, whose projections are layers of their own. docs/MATHEMATICS.md has the
results.
"""

from px_hf.commands import run
from px_hf.commands.compare_attention import main

if __name__ == "__main__":
    run(main)

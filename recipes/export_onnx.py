"""Export saved models to ONNX files that are checked by running them.

    python recipes/export_onnx.py --model_name_or_path outputs/my-pruned-model

writes outputs/my-pruned-model/model.onnx and prints its size and how far its logits are from the model's. Takes
folders and ids of the Hub: models that px_hf saved, of transformers, of timm, in TimmWrapper. Without arguments: the
two embedded backbones, into outputs/onnx, in ten seconds on one CPU core, without a network. Needs
`pip install "px-hf[export]"`.

OpenVINO, TensorRT, CoreML and the browser's runtimes read ONNX files.
"""

from px_hf.commands import run
from px_hf.commands.export_onnx import main

if __name__ == "__main__":
    run(main)

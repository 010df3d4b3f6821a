"""Export saved models to ONNX files that are checked by running them.

    python recipes/export_onnx.py --model_name_or_path outputs/my-pruned-model

writes outputs/my-pruned-model/model.onnx and prints its size and how far its logits are from the model's. Takes
folders and ids of the Hub: models that px_hf saved, of transformers, of timm, in TimmWrapper. Without arguments: the
two embedded backbones, into outputs/onnx, in ten seconds on one CPU core, without a network. Needs
`pip install "px-hf[export]"`.

OpenVINO, TensorRT, CoreML and the browser's runtimes read ONNX files.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from saved_model import example, load
from transformers.utils import logging

import px_hf as px
from px_hf.export import require_libraries

DEMO = [str(Path(__file__).parent / "demo" / name) for name in ("resnet", "vit")]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", nargs="+", default=DEMO, help="folders, or ids of the Hub")
    parser.add_argument("--output_dir", type=Path, help="default: each model's own folder")
    parser.add_argument("--image_size", type=int, help="default: what the image processor or the config says")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of weights and input")
    parser.add_argument("--overwrite", action="store_true", help="replace model.onnx where it is there")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    require_libraries()
    if args.model_name_or_path is DEMO:
        args.output_dir, args.overwrite = args.output_dir or Path("outputs", "onnx"), True
    targets = {
        name: target(name, args.output_dir, len(args.model_name_or_path) > 1) for name in args.model_name_or_path
    }
    table = Table("model", "file", "size", "largest difference of a logit")
    for name, path in targets.items():
        model = load(name, args.trust_remote_code)
        image = example(name, model, args.image_size)
        model = model.half() if args.dtype == "float16" else model.float()
        found = px.export_onnx(model, path, example=image, overwrite=args.overwrite)
        table.add_row(name, str(path), f"{found.bytes / 1e6:.2f} MB", f"{found.difference:.1e} of the largest")
    Console().print(table)


def target(name: str, output_dir: Path | None, several: bool) -> Path:
    """Where the file of a model goes."""
    if output_dir is not None:
        return output_dir / (f"{Path(name).name}.onnx" if several else "model.onnx")
    if not Path(name).is_dir():
        raise px.InvalidArgumentError(f"{name!r} is no local folder. Pass --output_dir for its ONNX file.")
    return Path(name, "model.onnx")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except px.PxError as error:
        sys.exit(f"{type(error).__name__}: {error}")

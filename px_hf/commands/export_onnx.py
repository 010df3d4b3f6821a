"""Export saved models to ONNX files that are checked by running them.

recipes/export_onnx.py says how it is run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import px_hf as px

from ..runs.embedded_models import EMBEDDED, embedded

DEMO = list(EMBEDDED.values())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "px-hf export",
        description="Export saved models to ONNX files that are checked by running them. Without arguments: the two "
        'embedded backbones, into outputs/onnx. Needs pip install "px-hf[export]".',
        epilog="example: px-hf export --model_name_or_path outputs/my-pruned-model",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model_name_or_path", nargs="+", default=DEMO, help="folders, ids of the Hub, demo-resnet, demo-vit"
    )
    parser.add_argument("--output_dir", type=Path, help="default: each model's own folder")
    parser.add_argument("--image_size", type=int, help="default: what the image processor or the config says")
    parser.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="of weights and input")
    parser.add_argument("--overwrite", action="store_true", help="replace model.onnx where it is there")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    args = parser.parse_args(argv)

    from rich.console import Console
    from rich.table import Table
    from transformers.utils import logging

    from ..export import require_libraries
    from ..runs.saved_model import example, load

    logging.disable_progress_bar()
    require_libraries()
    if args.model_name_or_path is DEMO:
        args.output_dir, args.overwrite = args.output_dir or Path("outputs", "onnx"), True
    else:
        args.model_name_or_path = [embedded(name) for name in args.model_name_or_path]
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

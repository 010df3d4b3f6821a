"""Sparse and INT8: accuracy and file sizes of a dense and of a pruned model, in fp32 and in INT8 by four ways.

    python recipes/benchmarks/int8.py --models path/to/dense path/to/pruned --test_file images.parquet --skip 200

A few minutes on one CPU core for a ViT-Ti and 800 images; no network. Needs ``pip install "px-hf[export,int8]"``.

Each model is a folder of transformers or timm, whose head knows the classes of the Parquet file. The first `--skip`
rows are left out, for pruning and repair may have seen them; `--calibrate` of them calibrate static quantization.
Columns: accuracy in percent; the bytes of the weights as a file; how many pruned weights are not exactly zero.

- fp32; with px_hf's compact copy beside it.
- rounded: `px.round_to_int8_`, weights alone, and the compact copy of that.
- torchao, weights alone, and with dynamic activations: linear layers only. The file holds its codes and scales.
- ONNX Runtime, dynamic (linear layers) and static (convolutions too, on `--calibrate` images).
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

import px_hf as px
from px_hf.atomic import whole

Batch = tuple[Tensor, Tensor]
Run = Callable[[Tensor], Tensor]
PART = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders")
    parser.add_argument("--test_file", required=True, help="Parquet file with columns image and label")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many rows at the start")
    parser.add_argument("--limit", type=int, help="test on at most so many")
    parser.add_argument("--calibrate", type=int, default=100, help="rows at the start for static quantization")
    parser.add_argument("--output", type=Path, help="also write the table to this file")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = load_dataset("parquet", data_files=args.test_file, split="train")
    lines = ["| model | numbers | accuracy | file | MB | pruned, not zero |", "|" + "---|" * 6]
    for folder in args.models:
        read = AutoImageProcessor.from_pretrained(folder)
        end = len(rows) if args.limit is None else min(len(rows), args.skip + args.limit)
        test = list(batches(read, rows, args.skip, end))
        calibration = list(batches(read, rows, 0, args.calibrate))
        for line in measured(folder, test, calibration):
            print(line, file=sys.stderr)
            lines.append(f"| {Path(folder).name} {line}")
    print("\n".join(lines))
    if args.output:
        with whole(args.output) as unfinished:
            unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")


def batches(read: Any, rows: Any, start: int, end: int) -> Iterator[Batch]:
    for k in range(start, end, PART):
        part = rows[k : min(k + PART, end)]
        images = [image.convert("RGB") for image in part["image"]]
        yield read(images, return_tensors="pt")["pixel_values"], torch.tensor(part["label"])


def measured(folder: str, test: list[Batch], calibration: list[Batch]) -> Iterator[str]:
    """The rows of a table for one model."""
    sparse = Path(folder, "sparse").is_dir()
    plain = px.from_pretrained(folder) if sparse else AutoModelForImageClassification.from_pretrained(folder).eval()
    masks = px.Masks.from_pretrained(folder) if sparse else None

    def row(numbers: str, run: Run, size: dict[str, int], broken: int | str) -> str:
        told = ", ".join(size), ", ".join(f"{each / 1e6:.2f}" for each in size.values())
        return f"| {numbers} | {accuracy(run, test):.1f} | {told[0]} | {told[1]} | {broken} |"

    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        yield row("fp32", logits(plain), saved(plain, masks, out / "fp32"), revived(masks, plain))
        rounded = copy.deepcopy(plain)
        px.round_to_int8_(rounded)
        yield row("weights rounded", logits(rounded), saved(rounded, masks, out / "rounded"), revived(masks, rounded))
        yield from (row(*found) for found in by_torchao(plain, masks, out))
        yield from (row(*found) for found in by_onnx(plain, masks, calibration, out))


def saved(model: nn.Module, masks: px.Masks | None, out: Path) -> dict[str, int]:
    """Bytes of the files; of a dense model the compact copy has masks that keep everything."""
    if masks is None:
        everything = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in px.Magnitude().score(model).items()}
        px.save_pretrained(model, px.Masks(everything), out)
    else:
        px.save_pretrained(model, masks, out)
    return {name: (out / name).stat().st_size for name in ("model.safetensors", "sparse/model.safetensors")}


def by_torchao(model: nn.Module, masks: px.Masks | None, out: Path) -> Iterator[tuple[str, Run, dict[str, int], Any]]:
    try:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        print(f"torchao: {error}", file=sys.stderr)
        return
    for name, config in {
        "torchao, weights": Int8WeightOnlyConfig(version=2),
        "torchao, dynamic": Int8DynamicActivationInt8WeightConfig(version=2),
    }.items():
        quantized = copy.deepcopy(model)
        quantize_(quantized, config)
        tensors, metadata = flatten_tensor_state_dict(quantized.state_dict())
        file = out / "torchao.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata=metadata)
        yield name, logits(quantized), {"safetensors": file.stat().st_size}, revived(masks, quantized)


def by_onnx(
    model: nn.Module, masks: px.Masks | None, calibration: list[Batch], out: Path
) -> Iterator[tuple[str, Run, dict[str, int], Any]]:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self._images = iter([{"pixel_values": images.numpy()} for images, _ in calibration])

        def get_next(self) -> Any:
            return next(self._images, None)

    plain = out / "plain.onnx"
    px.export_onnx(model, plain, example=calibration[0][0][:1])
    yield "ONNX, fp32", session(plain), {"onnx": plain.stat().st_size}, not_zero(masks, model, plain)
    prepared = out / "prepared.onnx"
    quant_pre_process(plain, prepared)
    dynamic = out / "dynamic.onnx"
    linear = ["MatMul", "Gemm"]
    quantize_dynamic(prepared, dynamic, weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=linear)
    yield "ONNX, dynamic", session(dynamic), {"onnx": dynamic.stat().st_size}, not_zero(masks, model, dynamic)
    static = out / "static.onnx"
    quantize_static(
        prepared, static, Images(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8, op_types_to_quantize=[*linear, "Conv"],
    )  # fmt: skip
    yield "ONNX, static", session(static), {"onnx": static.stat().st_size}, not_zero(masks, model, static)


def session(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    found = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(found.run(["logits"], {"pixel_values": images.numpy()})[0])


def not_zero(masks: px.Masks | None, model: nn.Module, path: Path) -> int | str:
    """How many more numbers than in the model are not zero in a file, of the matrices of each size with a mask."""
    if masks is None:
        return ""
    import onnx

    graph = onnx.load(path).graph
    sizes: dict[int, int] = {}
    for initializer in graph.initializer:
        found = onnx.numpy_helper.to_array(initializer)
        if found.ndim > 1 and found.dtype in ("float32", "int8"):
            sizes[found.size] = sizes.get(found.size, 0) + int((found != 0).sum())
    ours: dict[int, int] = {}
    for weight in model.parameters():  # others of the same size as a masked one too
        ours[weight.numel()] = ours.get(weight.numel(), 0) + int(weight.count_nonzero())
    return sum(max(0, sizes.get(size, 0) - ours[size]) for size in {mask.numel() for mask in masks.values()})


def logits(model: nn.Module) -> Run:
    def run(images: Tensor) -> Tensor:
        found = model(images)
        return found if isinstance(found, Tensor) else found.logits

    return run


def revived(masks: px.Masks | None, model: nn.Module) -> int | str:
    return "" if masks is None else sum(masks.revived(model).values())


@torch.inference_mode()
def accuracy(run: Run, test: list[Batch]) -> float:
    right = sum(int((run(images).argmax(1) == labels).sum()) for images, labels in test)
    return 100 * right / sum(len(labels) for _, labels in test)


if __name__ == "__main__":
    main()

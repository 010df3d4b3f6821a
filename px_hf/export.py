"""Export an image classifier to ONNX, and run the exported file to check that it computes the same.

    px.export_onnx(px.from_pretrained("out"), "out/model.onnx")

Any model goes: of transformers, of timm, in TimmWrapper, made smaller by structured pruning, any other module whose
output is logits. The file has one input `pixel_values` [batch, C, H, W] and one output `logits` [batch, K], any batch
size, and runs without px_hf, transformers and torch. Zeros are stored as zeros: the file of a model with unstructured
or n:m sparsity is as large as that of the dense one.

`pip install "px-hf[export]"` has what is needed: onnx, onnxscript, onnxruntime.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .atomic import whole
from .errors import CheckpointError, DependencyError, InvalidArgumentError, OutputExistsError, UnsupportedOpError
from .model.example import default_example
from .model.inputs import Inputs, inputs_of, run
from .model.modes import evaluating
from .model.outputs import default_name
from .model.wrappers import unwrap

_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_MOST_BYTES = 2**31 - 2**26  # a file is one protobuf message, which ends at 2 GiB
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2}


@dataclass(frozen=True)
class Export:
    """The file, its size, and how far its logits are from the model's, relative to the largest of these."""

    path: Path
    bytes: int
    difference: float


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], *, example: Any = None, overwrite: bool = False
) -> Export:
    """Write `model` as one ONNX file, checked with ONNX Runtime at batch sizes 1, 2 and 3.

    `model`: an image classifier in float32 or float16, on a CPU, also in DistributedDataParallel or torch.compile; or
    a backbone without a classifier, whose default output (docs/BACKBONES.md) the file then gives as `logits`. It is
    exported in eval mode and left as it was.
    `example`: a batch of images as the model takes them, for their size; by default zeros of the size that the
    configuration names.
    `overwrite`: replace a file that is there.

    The file is written beside `path` and moved, when it has been run: on random images its logits must be those of the
    model, within 0.001 of the largest in float32 and 0.02 in float16.

    Raises:
        DependencyError: a library is missing. This and the next two come before any work.
        OutputExistsError: there is such a file.
        InvalidArgumentError: the dtype or device is another, the weights are more than 2 GiB, or no image size is
            known.
        UnsupportedOpError: torch cannot export the model.
        CheckpointError: the file computes something else.
    """
    require_libraries()
    model, path = unwrap(model), Path(path).absolute()
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputExistsError(f"{path} exists. Choose another name, or pass overwrite=True to replace a file.")
    tolerance = _check(model)
    if example is None and (example := default_example(model)) is None:
        raise InvalidArgumentError("The model's configuration names no image size. Pass example=images.")
    images = next(inputs_of([example], model)).images[:1]
    with whole(path) as unfinished, evaluating(model), torch.no_grad():
        _write(model, images, unfinished)
        difference = _largest_difference(model, images, unfinished)
        if not difference <= tolerance:
            raise CheckpointError(
                f"The exported {type(model).__name__} gives other logits than the model: they differ by "
                f"{difference:.3g} of the largest, more than {tolerance:g}. Nothing was written to {path}."
            )
    return Export(path, path.stat().st_size, difference)


def require_libraries(names: Sequence[str] = _LIBRARIES) -> None:
    """DependencyError that names the missing libraries, if there are any."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise DependencyError(f'ONNX export needs {", ".join(missing)}: pip install "px-hf[export]".')


class _Logits(nn.Module):
    """The model as a function of one tensor that returns one tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.output = default_name(model)  # which cannot be seen while torch traces

    def forward(self, pixel_values: Tensor) -> Tensor:
        return run(self.model, Inputs(pixel_values), self.output)


def _check(model: nn.Module) -> float:
    """The tolerance for a model of this dtype."""
    tensors = list(model.state_dict(keep_vars=True).values())
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    if len(dtypes) > 1 or not dtypes <= _TOLERANCE.keys():
        raise InvalidArgumentError(
            f"The model's dtype is {', '.join(sorted(map(str, dtypes)))}; ONNX export takes float32 or float16. "
            "Call model.float() before."
        )
    if others := {str(tensor.device) for tensor in tensors} - {"cpu"}:
        raise InvalidArgumentError(f"The model is on {', '.join(sorted(others))}. Call model.cpu() before.")
    if (size := sum(tensor.nbytes for tensor in tensors)) > _MOST_BYTES:
        raise InvalidArgumentError(
            f"The model has {size / 2**30:.1f} GiB of weights, and a file ends at 2. Use half()."
        )
    return _TOLERANCE[dtypes.pop()]


def _write(model: nn.Module, images: Tensor, path: Path) -> None:
    try:
        program = torch.onnx.export(
            _Logits(model).eval(),
            (torch.cat([images, images]),),  # of one image torch would make a constant
            dynamo=True,
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
        assert program is not None
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # stack traces, with the folders of this machine
        program.save(path, external_data=False)
    except (torch.onnx.errors.OnnxExporterError, torch.onnx.OnnxExporterError) as error:
        raise UnsupportedOpError(
            f"torch cannot export {type(model).__name__} to ONNX with any batch size: {_last_line(error)}"
        ) from error


def _largest_difference(model: nn.Module, images: Tensor, path: Path) -> float:
    """Over batches of 1, 2 and 3 random images, relative to the largest logit of the model."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for count in (1, 2, 3):
        x = torch.randn(count, *images.shape[1:], generator=generator).to(images.dtype)
        expected = run(model, Inputs(x)).float()
        (found,) = session.run(["logits"], {"pixel_values": x.numpy()})
        difference = (torch.from_numpy(found).float() - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        worst = max(worst, float(difference)) if torch.isfinite(difference) else float("inf")
    return worst


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

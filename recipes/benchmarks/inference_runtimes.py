"""What runs a model in the inference benchmark: a family of runtimes is measured against its dense eager one."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import px_hf as px
from px_hf.export import require_libraries

Call = Callable[[Tensor], object]


class Unavailable(Exception):
    """This runtime does not run this model here; the message says why."""


@dataclass(frozen=True)
class Runtime:
    """`prepare(model)` is a function of images on a CPU, in float32, that ends when the logits are there.

    Those of one `family` are measured in turn, and compared with the dense model in the family's first.
    """

    family: str
    prepare: Callable[[nn.Module], Call]


def _eager(model: nn.Module) -> Call:
    return torch.inference_mode()(model)


def _csr(model: nn.Module) -> Call:
    model = copy.deepcopy(model)
    px.accelerate_csr_(model)
    return _eager(model)


def _compiled(model: nn.Module) -> Call:
    return torch.inference_mode()(torch.compile(model, dynamic=False))


def _onnx(model: nn.Module) -> Call:
    require_libraries()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        px.export_onnx(model, path, example=model.example)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(["logits"], {"pixel_values": images.numpy()})


def _on_gpu(model: nn.Module) -> nn.Module:
    if not torch.cuda.is_available():
        raise Unavailable("torch finds no GPU")
    return copy.deepcopy(model).half().cuda()


def _synchronized(model: Call) -> Call:
    @torch.inference_mode()
    def call(images: Tensor) -> None:
        model(images.cuda().half())
        torch.cuda.synchronize()

    return call


def _cuda(model: nn.Module) -> Call:
    return _synchronized(_on_gpu(model))


def _cuda_24(model: nn.Module) -> Call:
    model = _on_gpu(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls this API a prototype
        px.accelerate_24_(model)
    return _synchronized(model)


def _cuda_compiled(model: nn.Module) -> Call:
    return _synchronized(torch.compile(_on_gpu(model), dynamic=False))


RUNTIMES = {
    "eager": Runtime("eager", _eager),
    "eager, CSR": Runtime("eager", _csr),
    "torch.compile": Runtime("torch.compile", _compiled),
    "ONNX Runtime": Runtime("ONNX Runtime", _onnx),
    "CUDA fp16": Runtime("CUDA fp16", _cuda),
    "CUDA fp16, 2:4": Runtime("CUDA fp16", _cuda_24),
    "CUDA fp16, torch.compile": Runtime("CUDA fp16", _cuda_compiled),
}
"""In each family the plain runtime is first."""


def prepare(name: str, model: nn.Module, images: Tensor) -> Call:
    """The call of `model` in this runtime, which has been tried on `images`.

    Raises:
        Unavailable: it does not run here.
    """
    try:
        call = RUNTIMES[name].prepare(model)
        call(images)
    except torch.OutOfMemoryError as error:
        raise Unavailable("out of memory") from error
    except Unavailable:
        raise
    except Exception as error:  # a runtime that does not work here is a row that says so
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise Unavailable(f"{type(error).__name__}: {lines[0]}") from error
    return call

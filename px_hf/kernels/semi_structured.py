"""2:4 weights on NVIDIA's sparse tensor cores, by torch's own `torch.sparse.to_sparse_semi_structured`.

Such a weight is stored as its kept half and two bits for the place of each kept value, and the GPU multiplies only
the kept half: at best half the time of the dense product in large layers and batches, in small ones none. Needs CUDA
and compute capability 8.0 (Ampere) or more, float16 or bfloat16, and sizes that are multiples of a small block, which
torch checks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import TargetError
from ..model.wrappers import unwrap
from .conversion import Conversion, require_some, sort_out

_DTYPES = (torch.float16, torch.bfloat16)
_CAPABILITY = (8, 0)


def accelerate_24_(model: nn.Module) -> Conversion:
    """Convert the 2:4 linear layers of a model on a GPU, in place, for inference.

        masks = px.prune(model, batches, criterion, sparsity=0.5, scope="2:4")
        masks.apply_(model)
        print(px.accelerate_24_(model.half().cuda().eval()))

    The weights become `torch.sparse.SparseSemiStructuredTensor`s without gradient; logits stay the same up to
    rounding. Save the model before: a converted one has no dense weights to save. Convolutions stay dense (torch has
    no such kernel for them; TensorRT has).

    Raises:
        TargetError: the model is not on such a GPU, or no layer can be converted; it is left as it was.
    """
    model = unwrap(model)
    require_gpu(model)
    fit, skipped = sort_out(model, unfit)
    weights: dict[str, Tensor] = {}
    for name, layer in fit.items():
        try:
            weights[name] = torch.sparse.to_sparse_semi_structured(layer.weight.detach().contiguous())
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            skipped[name] = f"refused by torch ({str(error).splitlines()[0]})"
    fit = {name: layer for name, layer in fit.items() if name in weights}
    require_some(fit, skipped, "2:4 kernels", 'Prune with scope="2:4", apply the masks, and call model.half().')
    for name, layer in fit.items():
        layer.weight = nn.Parameter(weights[name], requires_grad=False)
    return Conversion(tuple(fit), skipped)


def require_gpu(model: nn.Module) -> None:
    """All parameters must be on a GPU with sparse tensor cores.

    Raises:
        TargetError: they are not.
    """
    device = next((p.device for p in model.parameters() if p.device.type != "cuda"), None)
    if device is not None:
        raise TargetError(
            f"2:4 kernels need the model on an NVIDIA GPU, and it is on {device}, where 2:4 weights run as dense ones "
            "do. Move it with model.half().cuda(). On a CPU, very sparse models gain from accelerate_csr_."
        )
    for device in {p.device for p in model.parameters()}:
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            raise TargetError(
                f"2:4 kernels need compute capability 8.0 or more (Ampere), and {torch.cuda.get_device_name(device)} "
                f"has {'.'.join(map(str, capability))}: the model stays dense."
            )


def unfit(layer: nn.Linear) -> str | None:
    """Why 2:4 kernels do not take this layer, None if they may."""
    if layer.weight.dtype not in _DTYPES:
        return f"{layer.weight.dtype} and not float16 or bfloat16"
    if layer.in_features % 4:
        return "with inputs that cannot be divided by 4"
    in_groups = layer.weight.detach().unflatten(1, (-1, 4)).count_nonzero(dim=2)
    return None if bool((in_groups <= 2).all()) else "not 2:4"

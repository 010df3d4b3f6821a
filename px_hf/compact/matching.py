"""Which tensor of a compact copy belongs to which of a model."""

from __future__ import annotations

from torch import nn

from ..errors import CheckpointError
from .reader import CompactFile


def match(model: nn.Module, file: CompactFile, prefix: str = "") -> dict[str, str]:
    """For each tensor of `model.state_dict()` its name in `file`. The model may be on the meta device.

    `prefix`: the attribute under which a model holds its backbone; the names of the file may have it where those of
    the model lack it, and the other way round. Tied parameters need one of their names in the file.

    Raises:
        CheckpointError: a tensor of the model has none, or its pruned one has another shape or is not of floats.
    """
    tensors = model.state_dict(keep_vars=True)
    found: dict[str, str] = {}
    by_identity: dict[int, str] = {}
    for name, tensor in tensors.items():
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in file.shapes:
                found[name] = by_identity[id(tensor)] = candidate
                break
    for name, tensor in tensors.items():
        if name not in found and id(tensor) in by_identity:
            found[name] = by_identity[id(tensor)]
    if missing := tensors.keys() - found.keys():
        raise CheckpointError(
            f"{len(missing)} parameters of {type(model).__name__} are not in the compact copy, for example "
            f"{min(missing)!r}: they would be random. Load the model class that was saved; for another head or task, "
            "load the dense copy in the folder above."
        )
    coded = set(file.coded)
    for name, stored in found.items():
        tensor = tensors[name]
        if stored in coded and not (tensor.is_floating_point() and file.shapes[stored] == list(tensor.shape)):
            raise CheckpointError(
                f"{name!r} is {list(tensor.shape)} of {tensor.dtype} in {type(model).__name__} and "
                f"{file.shapes[stored]} of floats in the compact copy: config and weights do not belong together."
            )
    return found

"""Fill a model that was built without weights from a compact copy."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import CheckpointError
from .ahead import Ahead
from .matching import match
from .reader import CompactFile


def fill(model: nn.Module, file: CompactFile, source: str, *, stored_dtypes: bool = False) -> None:
    """Give a model of `build_empty` the tensors of a compact copy, in its own dtypes or in those stored.

    Raises:
        CheckpointError: a tensor of the file is none of the model or of another shape, or one of the model is not in
            the file; the model is then left without weights.
    """
    expected: dict[str, Tensor] = model.state_dict(keep_vars=True)
    names = match(model, file)
    if unknown := file.shapes.keys() - set(names.values()):
        raise CheckpointError(
            f"{len(unknown)} tensors of {source!r} are none of {type(model).__name__}, for example {min(unknown)!r}: "
            "config and weights do not belong together."
        )
    for name, stored in names.items():
        if list(expected[name].shape) != file.shapes[stored]:
            raise CheckpointError(
                f"{name!r} is {list(expected[name].shape)} in {type(model).__name__} and {file.shapes[stored]} in "
                f"{source!r}: it would be random. To give the model another head, load the dense copy with "
                "transformers and its masks with Masks.from_pretrained."
            )

    def load(name: str) -> Tensor:
        tensor, dtype = file.tensor(names[name]), expected[name].dtype
        if dtype != tensor.dtype and not (dtype.is_floating_point and tensor.is_floating_point()):
            raise CheckpointError(f"{name!r} is {dtype} in {type(model).__name__} and {tensor.dtype} in {source!r}.")
        return tensor if stored_dtypes else tensor.to(dtype)

    first: dict[int, str] = {}
    for name, tensor in expected.items():
        first.setdefault(id(tensor), name)
    tied = {name: first[id(tensor)] for name, tensor in expected.items() if first[id(tensor)] != name}
    coded = set(file.coded)
    pruned = [name for name in first.values() if names[name] in coded]
    pruned.sort(key=lambda name: -expected[name].numel())  # so that no thread is left with a large one at the end
    with Ahead(load, pruned) as ahead:
        loaded = {name: load(name) for name in first.values() if names[name] not in coded}
        loaded |= {name: ahead.get(name) for name in pruned}
    model.load_state_dict(loaded | {name: loaded[owner] for name, owner in tied.items()}, assign=True)
    for name, owner in tied.items():
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, model.get_parameter(owner))

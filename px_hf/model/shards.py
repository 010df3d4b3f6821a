"""Weights that are sharded over processes by FSDP2 (`torch.distributed.fsdp.fully_shard`), as DTensors.

Each process holds some rows of every parameter: of n rows over N processes, process r has those from r·⌈n/N⌉ on, at
most ⌈n/N⌉ of them (`torch.chunk`). Flattened, they follow one another in the order of the processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed import same_everywhere
from ..errors import LaunchError, TargetError


@dataclass(frozen=True)
class Shards:
    """The processes that share the weights of a model, and which of them is this one.

    Attributes:
        group: the process group over which the rows are spread.
        rank: of this process in it.
        size: how many processes there are in it.
        device: where its collectives work.
    """

    group: dist.ProcessGroup
    rank: int
    size: int
    device: torch.device

    def rows(self, count: int) -> slice:
        """Which of so many rows this process has."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def part(self, whole: Tensor) -> Tensor:
        """This process's rows of a whole tensor: a view."""
        return whole[self.rows(whole.shape[0])]

    def whole(self, part: Tensor, shape: torch.Size) -> Tensor:
        """The whole tensor of that shape on every process, of the parts that each of them passes; on `device`."""
        each = -(-shape[0] // self.size)
        own = torch.zeros((each, *shape[1:]), dtype=part.dtype, device=self.device)
        own[: part.shape[0]] = part.to(self.device)
        sent = own.view(torch.uint8) if part.dtype == torch.bool else own
        parts = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.group)
        return torch.cat(parts).view(part.dtype)[: shape[0]]

    def total(self, counts: Tensor) -> Tensor:
        """The sum over the processes, on the CPU."""
        moved = counts.to(self.device, copy=True)
        dist.all_reduce(moved, group=self.group)
        return moved.cpu()

    def of_each(self, counts: Tensor) -> Tensor:
        """What each process passes, one row for each of them, on the CPU."""
        moved = counts.to(self.device)
        found = [torch.empty_like(moved) for _ in range(self.size)]
        dist.all_gather(found, moved, group=self.group)
        return torch.stack(found).cpu()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only some rows of a parameter or gradient."""
    return hasattr(tensor, "placements")  # a DTensor; torch.distributed.tensor takes a second to import


def is_sharded_model(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` is sharded."""
    return any(map(is_sharded, model.parameters()))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or gradient: the same memory."""
    return cast(Tensor, _as_dtensor(tensor).to_local()) if is_sharded(tensor) else tensor


def part_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Of a whole tensor what this process holds of ``parameter``: a view."""
    if not is_sharded(parameter):
        return whole
    shards = _layout(parameter)
    return whole if shards is None else shards.part(whole)


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, detached, on every process; a collective if it is sharded."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor
    sharded = _as_dtensor(tensor)
    kind = sharded.device_mesh.device_type
    return cast(Tensor, (sharded if tensor.device.type == kind else sharded.to(kind)).full_tensor())  # CPU offload


def shards_of(model: nn.Module) -> Shards | None:
    """How the weights of ``model`` are sharded; None if they are not. What a forward left gathered is freed.

    Raises:
        TargetError: they are sharded in a way that is not supported.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
        if isinstance(module, FullyShardedDataParallel):
            raise _unsupported(model, "by FullyShardedDataParallel (FSDP1), which flattens its weights")
    found = [p for p in model.parameters() if is_sharded(p)]
    if not found:
        return None
    if len({(p.device_mesh, tuple(p.placements)) for p in map(_as_dtensor, found)}) > 1:
        raise _unsupported(model, "in more than one way (several meshes or placements)")
    shards = _layout(found[0])
    if shards is None:
        raise _unsupported(model, f"as {list(_as_dtensor(found[0]).placements)}")
    return shards


def _as_dtensor(tensor: Tensor) -> Any:
    """For the type checker, since importing DTensor takes a second."""
    return tensor


def _layout(parameter: Tensor) -> Shards | None:
    """How a DTensor is spread, if it is by rows over one dimension of its mesh."""
    mesh, placements = _as_dtensor(parameter).device_mesh, _as_dtensor(parameter).placements
    dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    if len(dims) != 1 or not placements[dims[0]].is_shard(0):
        return None
    group, rank, size = mesh.get_group(dims[0]), mesh.get_local_rank(dims[0]), mesh.size(dims[0])
    return Shards(group, rank, size, torch.device(mesh.device_type))


def _unsupported(model: nn.Module, how: str) -> TargetError:
    return TargetError(
        f"{type(model).__name__} cannot be pruned as it is: its weights are sharded {how}. px_hf works with weights "
        "sharded by rows on one mesh, as torch.distributed.fsdp.fully_shard does, and Accelerate with "
        "FullyShardedDataParallelPlugin(fsdp_version=2). Or prune it, and apply the masks, before "
        "accelerator.prepare: load it whole, and call px.prune and masks.apply_(model) on every process."
    )


def require_same_layout(model: nn.Module) -> None:
    """All processes must hold shards of models of the same layers.

    Raises:
        LaunchError: they do not.
    """
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name}{tuple(p.shape)}{p.dtype}".encode())
    if not same_everywhere(digest.digest(), model):
        raise LaunchError(
            "the processes hold shards of different models: names, shapes or dtypes of their parameters differ. "
            "Build the same model on every process before fully_shard or accelerator.prepare."
        )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Every process holds the weights of ``model`` whole for the time being, and FSDP's hooks rest.

    The parameters are others meanwhile; afterwards the sharded ones are back, untouched. Of a model that is not
    sharded, or is gathered already, nothing happens. A collective, with memory for all weights.
    """
    if shards_of(model) is None:
        yield
        return
    tensors: dict[Tensor, nn.Parameter] = {}
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    hooks: list[tuple[dict[int, Callable[..., Any]], dict[int, Callable[..., Any]]]] = []
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    if parameter not in tensors:
                        tensors[parameter] = nn.Parameter(whole(parameter), parameter.requires_grad)
                    swapped.append((module, name, parameter))
                    module._parameters[name] = tensors[parameter]
            own: Any
            for own in (module._forward_pre_hooks, module._forward_hooks):
                if any(_is_of_fsdp(hook) for hook in own.values()):
                    hooks.append((own, dict(own)))
                    _put(own, {key: hook for key, hook in own.items() if not _is_of_fsdp(hook)})
        yield
    finally:
        for module, name, parameter in swapped:
            module._parameters[name] = parameter
        for own, before in hooks:
            _put(own, before | {key: hook for key, hook in own.items() if key not in before})


def _is_of_fsdp(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


def _put(hooks: dict[int, Callable[..., Any]], content: Mapping[int, Callable[..., Any]]) -> None:
    hooks.clear()
    hooks.update(content)

"""Masks: which weights of a model are kept.

    masks = Masks({"fc.weight": torch.tensor([[True, False]])})
    masks.sparsity                      # 0.5
    masks.apply_(model)                 # zeroes model.fc.weight[0, 1]
    masks.save("masks.safetensors")
    masks == Masks.load("masks.safetensors")

The file is described in `px_hf.masks_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import masks_file
from .atomic import whole
from .errors import CheckpointError, InvalidArgumentError, TargetError, listed
from .masks_file import MASKS_FILE
from .model.nesting import where_they_fit
from .model.quantized import plain, require_plain
from .model.shards import local, part_like, shards_of
from .model.wrappers import named_parameters


class Masks(Mapping[str, Tensor]):
    """An immutable mapping: parameter name -> bool tensor of the parameter's shape, True = kept.

    The masks live on the CPU, in the order they were given in. What goes in and what comes out are
    copies, so nothing done to them changes the masks. Two `Masks` are equal if they hold the same names
    with the same shapes and values, in whatever order.

    `masks.tensors` is the same mapping without the copies, for those who only read.

    Raises:
        InvalidArgumentError: a name is not a string, a mask is not a bool tensor, or there is not one weight to mask.
    """

    __slots__ = ("_kept", "_tensors", "_total")
    _tensors: dict[str, Tensor]

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        if not isinstance(masks, Mapping):
            raise InvalidArgumentError(
                f"Masks are made from a mapping of name to bool tensor, got {type(masks).__name__}."
            )
        # The items of another Masks would be copies already.
        source = masks._tensors if isinstance(masks, Masks) else masks
        for name, mask in source.items():
            if not isinstance(name, str):
                raise InvalidArgumentError(f"Masks are keyed by parameter names, got {name!r}.")
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise InvalidArgumentError(f"The mask of {name!r} must be a bool tensor, got {found}.")
        self._tensors = {
            name: mask.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, mask in source.items()
        }
        self._total = sum(mask.numel() for mask in self._tensors.values())
        self._kept = sum(int(mask.count_nonzero()) for mask in self._tensors.values())
        if self._total == 0:
            raise InvalidArgumentError("Masks need at least one weight to speak about, got none.")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return self._tensors.keys() == other._tensors.keys() and all(
            torch.equal(mask, other._tensors[name]) for name, mask in self._tensors.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counts = f"{self.kept:,} of {self.total:,} weights kept"
        return f"Masks({len(self)} tensors, {counts}, sparsity {self.sparsity:.6g})"

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The masks themselves, without a copy. Never write to them: other holders of the masks would see it."""
        return MappingProxyType(self._tensors)

    def whole(self) -> Masks:
        """These masks with all that they say on this process: themselves, unless they are `ShardedMasks`."""
        return self

    def part(self, name: str, parameter: Tensor) -> Tensor:
        """The mask of what this process holds of ``parameter``, its rows if that is sharded. Only to read."""
        return part_like(self._tensors[name], parameter)

    def _each(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole mask, one after the other, in the order of the names."""
        for name in sorted(self._tensors):
            yield name, self._tensors[name]

    def _shape(self, name: str) -> torch.Size:
        return self._tensors[name].shape

    @property
    def kept(self) -> int:
        """How many of the masked weights are kept."""
        return self._kept

    @property
    def total(self) -> int:
        """How many weights the masks speak about, kept and pruned."""
        return self._total

    @property
    def density(self) -> float:
        """The fraction of the masked weights that is kept, in [0, 1]."""
        return self.kept / self.total

    @property
    def sparsity(self) -> float:
        """The fraction of the masked weights that is pruned, in [0, 1]."""
        return (self.total - self.kept) / self.total

    def densities(self) -> dict[str, float]:
        """Name -> the fraction of that mask that is kept, of those that are not empty."""
        return {name: int(mask.count_nonzero()) / mask.numel() for name, mask in self._tensors.items() if mask.numel()}

    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of names, shapes and values: equal exactly for equal masks."""
        digest = hashlib.sha256()
        for name, mask in self._each():
            digest.update(json.dumps([name, list(mask.shape)]).encode())
            digest.update(masks_file.pack(mask).tobytes())
        return digest.hexdigest()

    def match(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of `model` that the masks speak about, in the order of the masks.

        Wrappers by DataParallel, DistributedDataParallel, torch.compile and peft are looked through, and a
        parameter with several names (tied weights) is found under each of them. Of a model that `fully_shard` has
        sharded they are its DTensors.

        Raises:
            TargetError: a name is not a parameter of the model, a shape differs, a parameter holds no values (meta
                device, lazy), or two names of one parameter have different masks; lists every misfit, and names the
                part of the model that the masks fit, if there is one.
        """
        if not isinstance(model, nn.Module):
            raise TargetError(f"Masks apply to a torch.nn.Module, got {type(model).__name__}.")
        parameters = named_parameters(model, remove_duplicate=False)
        misfits: list[str] = []
        tied: dict[nn.Parameter, str] = {}
        for name, mask in self._tensors.items():
            parameter = parameters.get(name)
            if parameter is None:
                misfits.append(f"{name!r} is not a parameter of the model")
            elif parameter.is_meta or nn.parameter.is_lazy(parameter):
                misfits.append(f"{name!r} holds no values here (meta device, offloaded, or lazy module)")
            elif parameter.shape != (shape := self._shape(name)):
                misfits.append(f"{name!r} is {list(parameter.shape)} in the model and {list(shape)} in the masks")
            elif not torch.equal(mask, self._tensors[tied.setdefault(parameter, name)]):
                misfits.append(f"{name!r} and {tied[parameter]!r} are one parameter and have different masks")
        if misfits:
            require_plain(model, "Masks.match")
            advice = where_they_fit(model, {name: self._shape(name) for name in self}) or (
                "Masks belong to the architecture that they were made for: use the model they came from, or prune "
                "this one."
            )
            if any(p is not None and p.is_meta for p in map(parameters.get, self)):
                advice = (
                    "Load the model whole, without device_map or offloading, for what needs its values; "
                    "masks.save(file) keeps the masks meanwhile."
                )
            raise TargetError(
                f"The masks do not fit the model ({type(model).__name__}), nothing was changed: "
                f"{len(misfits)} of {len(self)} masks: {listed(misfits, 10, '; ')}. {advice}"
            )
        return {name: parameters[name] for name in self._tensors}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned weights of `model` to zero (+0.0, whatever they held), in place.

        Of a sharded model call it on every process: each masks the rows that it holds.

        Raises:
            TargetError: the masks do not fit the model, see `match`, or it is quantized; then nothing was changed.
        """
        parameters = self.match(model)
        require_plain(model, "masks.apply_")
        for name, parameter in parameters.items():
            local(parameter).masked_fill_(~self.part(name, parameter).to(parameter.device), 0)

    @torch.no_grad()
    def revived(self, model: nn.Module) -> dict[str, int]:
        """How many pruned weights of `model` are not zero, for the names where there are any; NaN is not zero.

        Weights that torchao has quantized are compared as the numbers that they stand for. Of a sharded model call it
        on every process: each counts its rows, and all get the sums.

        Raises:
            TargetError: the masks do not fit the model: see `match`.
        """
        shards = shards_of(model)
        counts = {
            name: int(
                local(plain(parameter)).masked_fill(self.part(name, parameter).to(parameter.device), 0).count_nonzero()
            )
            for name, parameter in self.match(model).items()
        }
        if shards is not None:
            total = shards.total(torch.tensor([counts[name] for name in sorted(counts)], dtype=torch.int64))
            counts |= dict(zip(sorted(counts), total.tolist(), strict=True))
        return {name: count for name, count in counts.items() if count}

    def under(self, path: str) -> Masks:
        """The same masks for a model that holds the masked one as its part `path`, such as a detector's backbone.

        ```python
        masks = px.prune(detector.model.backbone, batches, px.PX(), sparsity=0.5).under("model.backbone")
        ```
        """
        return Masks({f"{path}.{name}": mask for name, mask in self._tensors.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to one safetensors file, one bit a weight; missing parent folders are made.

        The file appears whole or not at all, and the same masks always give the same bytes.
        """
        with whole(path) as unfinished:
            unfinished.write_bytes(masks_file.written(self._tensors))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Read the masks that `save` wrote. At most 16 bytes are allocated for each byte of the file.

        Raises:
            CheckpointError: the file is missing, damaged, not a file of masks, or of a version that this px_hf does
                not know.
        """
        path = Path(path)
        if not path.is_file():
            raise CheckpointError(
                f"There is no masks file {path}. Masks.save() and px_hf.save_pretrained() write one."
            )
        try:
            return cls(masks_file.read(path))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{path} is not a whole file of masks: {error}. Save it again with Masks.save()."
            ) from error

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str = "",
        **download: Any,
    ) -> Masks:
        """Read the masks of a folder or Hub repository: those of its compact copy, or its masks file.

        `px_hf.save_pretrained` writes the one, and `KeepMasks` the other into the Trainer's checkpoints.
        `revision`, `token`, `subfolder` and what else `huggingface_hub.hf_hub_download` takes (`cache_dir`,
        `local_files_only`, ...) are for the Hub; a folder only looks at `subfolder`.

        Weights that were saved anew beside them, with the zeros kept, do not matter.

        Raises:
            CheckpointError: there is no such folder or repository, it holds no masks, or its weights do not have the
                zeros of the masks.
        """
        from .compact import CompactFile
        from .compact.agreement import broken_masks, parted_from
        from .compact.dense import dense_files
        from .compact.files import find, find_compact

        download |= {"revision": revision, "token": token, "subfolder": subfolder}
        compact = find_compact(folder_or_repo_id, **download)
        if compact is not None:
            file = CompactFile(compact.files)
            masks = file.masks()
            parted = parted_from(compact, file, folder_or_repo_id, **download)
            if parted and (broken := broken_masks(masks, parted.files)):
                raise parted.error(_not_zero(broken))
            return cls(masks)
        path = find(folder_or_repo_id, MASKS_FILE, required=True, **download)
        if path is None:
            raise CheckpointError(
                f"{str(folder_or_repo_id)!r} has neither a compact copy in sparse/ nor a masks file {MASKS_FILE}"
                f"{f' in {subfolder!r}' if subfolder else ''}: px_hf.save_pretrained() writes the one, Masks.save() "
                f"the other.{_claim(folder_or_repo_id, download)}"
            )
        found = cls.load(path)
        if broken := broken_masks(found.tensors, dense_files(path.parent), samples=True):
            raise CheckpointError(
                f"{path} does not belong to the weights beside it.{_not_zero(broken)} They were trained or saved "
                "without the masks. Prune them anew, or masks.apply_(model) with Masks.load of that file."
            )
        return found


def _not_zero(names: list[str]) -> str:
    return (
        f" {len(names)} masks do not hold there, for example that of {names[0]!r}: weights that it prunes are not "
        "zero, or cannot be read."
    )


def _claim(folder_or_repo_id: str | os.PathLike[str], download: Mapping[str, Any]) -> str:
    """What a config says that stock saving has carried into another folder."""
    from .compact.files import find

    config = find(folder_or_repo_id, "config.json", **download)
    try:
        entry = json.loads(config.read_text(encoding="utf-8")).get("px") if config is not None else None
    except (OSError, ValueError, AttributeError):
        return ""
    if not isinstance(entry, dict):
        return ""
    return (
        f" Its config.json says sparsity {entry.get('sparsity')}, an entry that stock saving carries along "
        "whatever the weights are: load it with transformers or timm as an ordinary model."
    )

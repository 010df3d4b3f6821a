"""Controls: what a found mask must beat to be worth finding.

| control | keeps | destroys | asks |
|---|---|---|---|
| `shuffle` | how many weights each layer keeps | which | is it only the layers' densities? |
| `permute_units` | and how many the units of a layer keep, as a set | which units, which weights | or the shape? |
| `shuffle_rows` | how many rows of each length are tuned, and so how many weights | which | does it matter which? |
| `reinitialize_` | the mask | the values of the pretrained weights | or the mask, without the weights? |

(Frankle, Dziugaite, Roy, Carbin, ICLR 2021, arXiv 2009.08576; Su et al., NeurIPS 2020, arXiv 2009.11094.)
A mask shuffled within each layer and a random mask of the same layer densities are one and the same draw, so
`shuffle` is both.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError
from .masks import Masks
from .model.rows import rows


def shuffle(masks: Masks, seed: int = 0) -> Masks:
    """Each layer's mask in random order: a random mask that keeps as many weights of each layer."""
    return Masks({name: _shuffled(mask, _generator(seed, name)) for name, mask in masks.items()})


def permute_units(masks: Masks, seed: int = 0) -> Masks:
    """Each layer's mask with its outputs (first axis) and inputs (second axis) in random order.

    The layer keeps its pattern: as many dead and as many dense units as were found, but other ones.
    """
    permuted = {}
    for name, mask in masks.items():
        generator = _generator(seed, name)
        for axis in range(min(2, mask.dim())):
            mask = mask.index_select(axis, torch.randperm(mask.shape[axis], generator=generator))
        permuted[name] = mask
    return Masks(permuted)


def shuffle_rows(masks: Masks, seed: int = 0, within: Masks | None = None) -> Masks:
    """As many rows of each length, drawn anew from all rows of that length that the masks speak about.

    For a ticket of whole rows (`px.select_trainable`). ``within``: masks of a pruned model, whose zeros stay out.
    """
    flags: dict[int, list[Tensor]] = {}
    for mask in masks.tensors.values():
        matrix = rows(mask)
        flags.setdefault(matrix.shape[1], []).append(matrix.any(1))
    drawn = {
        d: iter(_shuffled(torch.cat(found), _generator(seed, f"rows of {d}")).split([len(f) for f in found]))
        for d, found in flags.items()
    }
    shuffled = {}
    for name, mask in masks.tensors.items():
        matrix = rows(mask)
        chosen = next(drawn[matrix.shape[1]])[:, None].expand(matrix.shape).reshape(mask.shape)
        shuffled[name] = chosen & within.tensors[name] if within is not None and name in within else chosen
    return Masks(shuffled)


@torch.no_grad()
def reinitialize_(model: nn.Module, masks: Masks, seed: int = 0) -> None:
    """Draw the weights that ``masks`` speak about anew, N(0, 2/fan-in) (He et al., 2015), in place; pruned ones are 0.

    Biases, norms, embeddings and the head stay as they are.

    Raises:
        TargetError: the masks do not fit the model: see `Masks.match`.
    """
    for name, parameter in masks.match(model).items():
        fresh = torch.empty(parameter.shape)
        nn.init.kaiming_normal_(fresh, generator=_generator(seed, name))
        parameter.copy_(fresh)
    masks.apply_(model)


CONTROLS = ("none", "shuffle", "permute-units", "reinitialize")
"""Names for the command line."""


def apply_control_(name: str, model: nn.Module, masks: Masks, seed: int = 0) -> Masks:
    """The masks of the control of that name; ``"reinitialize"`` also draws weights of ``model`` anew.

    Raises:
        InvalidArgumentError: there is no such control.
    """
    if name == "shuffle":
        return shuffle(masks, seed)
    if name == "permute-units":
        return permute_units(masks, seed)
    if name == "reinitialize":
        reinitialize_(model, masks, seed)
    elif name != "none":
        raise InvalidArgumentError(f"control {name!r}: expected one of {', '.join(map(repr, CONTROLS))}.")
    return masks


def _generator(seed: int, name: str) -> torch.Generator:
    """Of one layer: the same on every process and device, and apart from that of `Random`."""
    return torch.Generator().manual_seed(zlib.crc32(f"control:{seed}:{name}".encode()))


def _shuffled(mask: Tensor, generator: torch.Generator) -> Tensor:
    return mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)

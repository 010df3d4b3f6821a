"""Let a vision transformer read some patches of each image, and no others, through all of its blocks.

    with read_patches(model):
        model(pixel_values=images, patches=patches)       # tokens of these patches alone
        model(pixel_values=images)                        # all of them, as ever

Tokens are taken out after positions were added to them, so a patch keeps its position. Class, distillation and
register tokens are read always.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, TargetError
from ..model.example import example_of
from ..model.modes import evaluating
from ..model.wrappers import unwrap
from .tokens import Tokens, patches_of

ARGUMENT = "patches"


def read_patches(model: nn.Module, example: Any = None) -> PatchReader:
    """From now on `model` takes ``patches=``, int [N, k], and reads only these patches of its images.

    ```python
    handle = px.read_patches(model)
    model(pixel_values=images, patches=patches).loss       # fewer tokens: less time and memory
    handle.remove()
    ```

    For ViT, DeiT and DINOv2 of transformers and the VisionTransformer of timm, also in TimmWrapper,
    DistributedDataParallel or torch.compile; parameters and saved files do not change. Without ``patches`` the model
    does what it did. With transformers' Trainer: a column "patches" in the data set, ``remove_unused_columns=False``
    and ``label_names=["labels"]`` in the arguments.

    `example`: a batch of images, where the configuration of the model names no size.

    Raises:
        TargetError: the model has no patches, or cannot do with fewer: windows, rotary or relative positions.
        DataError: at a call, ``patches`` are not places of patches, one row for each image; or there is no example.
    """
    return PatchReader(model, example)


class PatchReader:
    """What `read_patches` returns: `remove()` ends it, and so does leaving a `with`."""

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        model = unwrap(model)
        tokens = Tokens.of(model)
        self._given: Tensor | None = None
        self._count = 0
        self._hooks = [
            model.register_forward_pre_hook(self._take, with_kwargs=True),
            tokens.convolution.register_forward_hook(self._counted),
            tokens.together.register_forward_hook(self._gather),
            model.register_forward_hook(self._forget, always_call=True),
        ]
        try:
            self._try(model, example)
        except Exception:
            self.remove()
            raise

    def remove(self) -> None:
        """Stop it: the model takes no ``patches`` any more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> PatchReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _try(self, model: nn.Module, example: Any) -> None:
        """Whether the model can do with one patch less."""
        images = example_of(model, example).images
        with evaluating(model), torch.no_grad():
            model(images)
            some = torch.arange(max(1, self._count - 1), device=images.device)[None]
            try:
                model(images, patches=some)
            except (RuntimeError, ValueError, IndexError, TypeError) as error:
                raise TargetError(
                    f"{type(model).__name__} cannot do with fewer patches ({error}): its positions are relative or "
                    "rotary, or it works on windows of the image. Patch tickets need absolute positions, as in ViT, "
                    "DeiT and DINOv2."
                ) from error

    def _take(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.pop(ARGUMENT, None)
        if given is not None and not isinstance(given, Tensor):
            given = torch.as_tensor(given)
        if given is not None and (given.dim() != 2 or given.is_floating_point() or given.dtype == torch.bool):
            raise DataError(f"patches are {given.dtype} of shape {list(given.shape)}; expected whole numbers [N, k].")
        self._given = given
        return args, kwargs

    def _counted(self, module: nn.Module, args: Any, maps: Tensor) -> None:
        self._count = patches_of(maps)

    def _gather(self, module: nn.Module, args: Any, together: Tensor) -> Tensor:
        given = self._given
        if given is None:
            return together
        if not isinstance(together, Tensor) or together.dim() != 3 or together.shape[1] < self._count:
            raise TargetError("the tokens are not one tensor [N, T, D] with all patches in it")
        if len(given) != len(together) or given.shape[1] < 1:
            raise DataError(f"patches are {list(given.shape)} for {len(together)} images; expected [N, k], k ≥ 1.")
        if int(given.min()) < 0 or int(given.max()) >= self._count:
            raise DataError(
                f"patches lie in {int(given.min())} to {int(given.max())}, and the images have patches 0 to "
                f"{self._count - 1}. Were they selected at another resolution or patch size?"
            )
        prefix = together.shape[1] - self._count
        places = given.to(together.device, torch.int64)[:, :, None].expand(-1, -1, together.shape[2]) + prefix
        return torch.cat([together[:, :prefix], together.gather(1, places)], dim=1)

    def _forget(self, *_: Any) -> None:
        self._given = None

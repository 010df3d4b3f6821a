"""Where a vision transformer makes tokens of patches, and where they are all there with their positions.

| model | tokens with positions | class token |
|---|---|---|
| transformers' ViT, DeiT, DINOv2 (with registers), and others with `embeddings` around the patch convolution | output of `embeddings` | the first, if there are more tokens than patches |
| timm's VisionTransformer, also in TimmWrapper | output of `patch_drop` | `cls_token`, if there is one |

Other tokens before the patches (distillation, registers) are read always, as the class token is.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import TargetError
from ..model.targets import patch_embedding
from ..model.wrappers import unwrap


@dataclass(frozen=True, eq=False)
class Tokens:
    """The places in one model.

    Attributes:
        convolution: cuts the image into patches; its output is [N, D, h, w].
        together: its output is [N, T, D], the tokens with their positions: some prefix, then all h·w patches.
        timm: timm's VisionTransformer; None if the model is one of transformers.
    """

    convolution: nn.Module
    together: nn.Module
    timm: nn.Module | None

    @classmethod
    def of(cls, model: nn.Module) -> Tokens:
        """Those of ``model``.

        Raises:
            TargetError: it has no patches, or no place where all tokens are together.
        """
        model = unwrap(model)
        found = patch_embedding(model)
        if not found:
            raise TargetError(
                f"{type(model).__name__} does not cut images into patches: its first layer is no convolution whose "
                "windows lie side by side. Patch tickets are for vision transformers such as ViT, DeiT and DINOv2."
            )
        convolution = next(iter(found))
        timm = getattr(model, "timm_model", model)
        together = getattr(timm, "patch_drop", None)
        if isinstance(together, nn.Module) and hasattr(timm, "blocks"):
            return cls(convolution, together, timm)
        for path, module in model.named_modules():
            if path.rpartition(".")[2] == "embeddings" and convolution in set(module.modules()):
                return cls(convolution, module, None)
        raise TargetError(
            f"{type(model).__name__} has no place where the tokens of all patches are together with their positions: "
            "neither transformers' embeddings nor timm's patch_drop. Networks that work on windows of the image, such "
            "as Swin, need every patch."
        )

    def has_class_token(self, prefix: int) -> bool:
        """Whether the first of ``prefix`` tokens is the class token."""
        return prefix > 0 and (self.timm is None or getattr(self.timm, "cls_token", None) is not None)


def patches_of(maps: Tensor) -> int:
    """How many patches the convolution's output [N, D, h, w] has."""
    return int(maps.shape[-2] * maps.shape[-1])

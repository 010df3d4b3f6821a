"""Which of a model's outputs its weights are scored for: chosen here, and nowhere else.

A classifier has logits. A backbone without one returns embeddings, tokens or feature maps, and the first of these that
it has is taken, unless `output` names another:

=================== =========================== ======================================================================
name                tensor                      what it is
=================== =========================== ======================================================================
logits              [N, K] or [N, K, H, W]      of a classifier or a segmentation model
image_embeds        [N, D]                      of CLIP and SigLIP: what is compared with texts
pooler_output       [N, D] or [N, D, 1, 1]      unless the pooler was never trained: its biases are all 0
class_token         [N, D]                      the first token of ``last_hidden_state``, if the model has class tokens
token_mean          [N, D]                      the mean of ``last_hidden_state`` over tokens or positions
feature_maps        [N, D1 + D2 + ...]          all maps of a backbone, each averaged over its positions
=================== =========================== ======================================================================

``last_hidden_state``, all its tokens or positions as [N, D, T] or [N, D, H, W], and any other output that the model
gives a name can be named too; a callable gets what the model returns and returns one tensor. Dimension 1 counts the
outputs of an image; what comes after it are positions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import DataError, InvalidArgumentError, listed

Output: TypeAlias = str | Callable[[Any], Tensor] | None
"""The name of an output, what takes it from all that the model returns, or None for the first that there is."""

_FROM_HIDDEN: Final = ("class_token", "token_mean")
_KNOWN: Final = ("logits", "image_embeds", "pooler_output", *_FROM_HIDDEN, "last_hidden_state", "feature_maps")
_CLASS_TOKENS: Final = ("cls_token", "class_token", "class_embedding", "class_embed")


def check_output(output: Any) -> None:
    """Whether `output` can say which output is meant.

    Raises:
        InvalidArgumentError: it is neither a text nor callable.
    """
    if output is not None and not isinstance(output, str) and not callable(output):
        raise InvalidArgumentError(
            f"output={output!r}: expected the name of an output of the model, such as {listed(_KNOWN)}, or a function "
            "of what the model returns."
        )


def text_of(output: Output) -> str | None:
    """An output as a settings file can say it."""
    return output if output is None or isinstance(output, str) else getattr(output, "__qualname__", repr(output))


def tensor_of(returned: Any, model: nn.Module, output: Output = None) -> Tensor:
    """The output [N, K, ...] among what `model` has returned.

    Raises:
        InvalidArgumentError: the model returns none of that name.
        DataError: there is no output that can be scored for, or a callable found none.
    """
    if callable(output):
        found = output(returned)
        if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
            raise DataError(
                f"output={text_of(output)} returned {_told(found)}; expected a floating-point tensor [N, K, ...]."
            )
        return found
    found = _first(returned, model) if output is None else _named(returned, model, output)
    if not isinstance(found, Tensor) or found.dim() < 2:
        raise DataError(
            f"{type(model).__name__} returned {_told(found)}; expected a tensor [N, K] or an output with .logits, "
            f"or one of {listed(_KNOWN[1:])}. Name one, output='...', or pass a function that takes a tensor [N, K] "
            "from what the model returns: px.prune(..., output=lambda outputs: outputs[0])."
        )
    return found


def default_name(model: nn.Module) -> str | None:
    """The name of what stands for an untrained pooler's output; None where the pooler is trained or there is none."""
    if not (has_no_classifier(model) and _pooler_untrained(model)):
        return None
    return "class_token" if has_class_token(model) else "token_mean"


def has_no_classifier(model: nn.Module, output: Output = None) -> bool:
    """Whether the output is known to be no logits: it has another name, or the model is one without a classifier.

    A model of which that cannot be seen counts as a classifier.
    """
    if output is not None:
        return output != "logits"
    return (
        is_bare(model)
        or callable(getattr(model, "get_image_features", None))
        or getattr(model, "num_classes", None) == 0
        or (hasattr(model, "feature_info") and not hasattr(model, "get_classifier"))
        or isinstance(getattr(model, "fc", getattr(model, "classifier", getattr(model, "head", None))), nn.Identity)
    )


def is_bare(model: nn.Module) -> bool:
    """Whether it is one of transformers' own models without a head: their names say what a head is for."""
    transformers = sys.modules.get("transformers")
    kind = type(model)
    return (
        transformers is not None
        and isinstance(model, transformers.PreTrainedModel)
        and kind.__module__.startswith("transformers.models.")
        and "For" not in kind.__name__
    )


def _first(returned: Any, model: nn.Module) -> Any:
    """The first output that there is; what was returned itself, if there is none."""
    if isinstance(returned, Tensor):
        return _channels_second(returned, model)
    logits = _field(returned, "logits")
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    hidden = _field(returned, "last_hidden_state")
    if isinstance(hidden, Tensor) and hidden.dim() == 2:  # the logits of transformers' PPLCNet
        return hidden
    for found in (logits, _field(returned, "image_embeds")):
        if isinstance(found, Tensor):
            return found
    pooled = _field(returned, "pooler_output")
    if isinstance(pooled, Tensor) and not _pooler_untrained(model):
        return pooled
    if isinstance(hidden, Tensor):
        tokens = hidden.dim() == 3 and has_class_token(model)
        return _named(returned, model, "class_token" if tokens else "token_mean")
    maps = _maps(returned)
    if maps:
        return _pooled(maps, model)
    return returned[0] if isinstance(returned, (tuple, list)) and returned else returned


def _named(returned: Any, model: nn.Module, name: str) -> Any:
    """The output of that name, its dimension 1 that of its channels."""
    if name == "feature_maps" and (maps := _maps(returned)):
        return _pooled(maps, model)
    found = _field(returned, "last_hidden_state" if name in _FROM_HIDDEN else name)
    if isinstance(found, (tuple, list)) and found and all(isinstance(each, Tensor) for each in found):
        return _pooled([_tokens_last(each) for each in found], model)
    if not isinstance(found, Tensor):
        names = _names(returned)
        raise InvalidArgumentError(
            f"output={name!r}: {type(model).__name__} returns "
            + (f"{listed(names)}. Name one of them" if names else f"{_told(returned)}. Leave output= out")
            + ", or pass a function of what it returns."
        )
    if name == "class_token":
        if found.dim() != 3:
            raise InvalidArgumentError(
                f"output='class_token': last_hidden_state of {type(model).__name__} has shape {tuple(found.shape)}; "
                "expected tokens [N, T, D]. Use output='token_mean'."
            )
        return found[:, 0]
    found = found if name == "logits" else _tokens_last(found)
    return _pooled([found], model) if name == "token_mean" else found


def _field(returned: Any, name: str) -> Any:
    """An output by name: of an object, or of a mapping."""
    return returned.get(name) if isinstance(returned, Mapping) else getattr(returned, name, None)


def _names(returned: Any) -> list[str]:
    if not isinstance(returned, Mapping):
        return []
    return [str(name) for name, value in returned.items() if isinstance(value, (Tensor, tuple, list))]


def _maps(returned: Any) -> list[Tensor]:
    """The feature maps of a backbone of transformers, timm or torchvision: of that name, in a list, or a mapping."""
    found = _field(returned, "feature_maps")
    if found is None and isinstance(returned, Mapping):
        found = list(returned.values())
    elif found is None and isinstance(returned, (tuple, list)) and len(returned) > 1:
        found = returned
    maps = list(found) if isinstance(found, Sequence) else []
    return maps if all(isinstance(each, Tensor) and each.dim() > 2 for each in maps) else []


def _pooled(maps: Sequence[Tensor], model: nn.Module) -> Tensor:
    """Each map averaged over its positions, one after the other: [N, D1 + D2 + ...]."""
    maps = [_channels_second(each, model) for each in maps]
    means = [each.flatten(2).mean(2) if each.dim() > 2 else each for each in maps]
    return means[0] if len(means) == 1 else torch.cat(means, 1)


def _tokens_last(value: Tensor) -> Tensor:
    """Tokens [N, T, D] as [N, D, T]."""
    return value.transpose(1, 2) if value.dim() == 3 else value


def _channels_second(value: Tensor, model: nn.Module) -> Tensor:
    """What a model of timm returns without a classifier may have its channels last: maps of Swin, and tokens."""
    maps = value.dim() == 4 and str(getattr(model, "output_fmt", "")).endswith("NHWC")
    tokens = value.dim() == 3 and getattr(model, "num_features", None) == value.shape[2] and has_no_classifier(model)
    return value.movedim(-1, 1) if maps or tokens else value


def has_class_token(model: nn.Module) -> bool:
    """Whether it puts a token of its own before those of the image, as its parameters' names say."""
    return any(name.rpartition(".")[2] in _CLASS_TOKENS for name, _ in model.named_parameters())


def _pooler_untrained(model: nn.Module) -> bool:
    """Whether the model has a pooler of linear layers whose biases are still all 0, as they are initialised."""
    poolers = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "pooler"]
    biases = [layer.bias for pooler in poolers for layer in pooler.modules()
              if isinstance(layer, nn.Linear) and layer.bias is not None]  # fmt: skip
    return bool(biases) and not any(bool(bias.detach().any()) for bias in biases)


def _told(found: Any) -> str:
    """What was found, for a message."""
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    names = _names(found)
    return type(found).__name__ + (f" with {listed(names)}" if names else "")

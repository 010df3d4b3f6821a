"""Attention weights of a vision transformer, also where fused kernels hide them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidArgumentError, TargetError
from ..model.inputs import Inputs, call
from .tokens import Tokens

Weights = Callable[[Inputs], list[Tensor]]


@contextmanager
def attention_weights(model: nn.Module, tokens: Tokens, layers: Sequence[int]) -> Iterator[Weights]:
    """A function that runs ``model`` and gives the attention of ``layers``, counted from 1, each [N, heads, T, T].

    Inside, attention is spelt out ("eager"); afterwards it is what it was.

    Raises:
        TargetError: there are no attention weights to be had.
        InvalidArgumentError: the model has fewer layers.
    """
    with (_of_timm if tokens.timm is not None else _of_transformers)(model, tokens, layers) as weights:
        yield weights


@contextmanager
def _of_transformers(model: Any, tokens: Tokens, layers: Sequence[int]) -> Iterator[Weights]:
    def weights(inputs: Inputs) -> list[Tensor]:
        asked: Any = {"output_attentions": True, **inputs.others}
        found = getattr(call(model, Inputs(inputs.images, asked)), "attentions", None)
        if not found or any(not isinstance(each, Tensor) or each.dim() != 4 for each in found):
            raise TargetError(
                f"{type(model).__name__} returns no attention weights [N, heads, T, T], by which patches are ranked. "
                "Expected a vision transformer such as ViT, DeiT or DINOv2."
            )
        _check_layers(layers, len(found), model)
        return [found[layer - 1] for layer in layers]

    if not hasattr(model, "set_attn_implementation"):
        raise TargetError(f"{type(model).__name__} is neither a vision transformer of transformers nor of timm.")
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield weights
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _of_timm(model: nn.Module, tokens: Tokens, layers: Sequence[int]) -> Iterator[Weights]:
    blocks: Any = getattr(tokens.timm, "blocks", ())
    _check_layers(layers, len(blocks), model)
    attentions: list[Any] = [getattr(blocks[layer - 1], "attn", None) for layer in layers]
    if any(not hasattr(each, "fused_attn") or not hasattr(each, "attn_drop") for each in attentions):
        raise TargetError(f"the blocks of {type(tokens.timm).__name__} have no attention whose weights can be read.")
    caught: list[Tensor] = []
    fused = [each.fused_attn for each in attentions]
    hooks = [each.attn_drop.register_forward_hook(lambda _, __, out: caught.append(out)) for each in attentions]

    def weights(inputs: Inputs) -> list[Tensor]:
        caught.clear()
        call(model, inputs)
        return list(caught)

    for each in attentions:
        each.fused_attn = False
    try:
        yield weights
    finally:
        for hook, each, before in zip(hooks, attentions, fused, strict=True):
            hook.remove()
            each.fused_attn = before


def _check_layers(layers: Sequence[int], count: int, model: nn.Module) -> None:
    if max(layers) > count:
        raise InvalidArgumentError(
            f"layers={tuple(layers)}: {type(model).__name__} has {count} layers, counted from 1. Name some of these, "
            f"such as layers={tuple(sorted({max(1, count * part // 4) for part in (1, 2, 3)}))}."
        )

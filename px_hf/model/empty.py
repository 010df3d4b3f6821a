"""Build a model without weights, with nothing but public APIs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import CheckpointError, PxError


def build_empty(build: Callable[[], nn.Module], source: str) -> nn.Module:
    """The model that `build` makes from a config, with its parameters on the meta device and its buffers real.

    Raises:
        CheckpointError: it cannot be built: a config that anybody may have written can fail in any way.
    """
    try:
        with init_empty_weights(include_buffers=False), _NothingToFill():
            return build()
    except PxError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"The model that config.json of {source!r} describes cannot be built: {type(error).__name__}: {error}"
        ) from error


class _NothingToFill(TorchFunctionMode):
    """Leaves out what initialises tensors of the meta device, which took most of the time of building a model."""

    fills = frozenset({"normal_", "uniform_", "fill_", "zero_", "erfinv_", "mul_", "add_", "clamp_"})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in self.fills:
            filled = args[0] if args else kwargs.get("tensor")  # as torch.nn.init passes it
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return func(*args, **kwargs)

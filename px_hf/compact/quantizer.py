"""Stock `from_pretrained(repo, subfolder="sparse")`: the compact format as a quantization method of transformers.

transformers asks its quantizers how to turn the tensors of a file into those of a model. This one turns a mask and
values into the dense weight; what comes out is an ordinary model, which can be trained and saved like any other.
`px_hf.registration` registers it when px_hf and transformers are both imported, in whichever order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, InvalidArgumentError
from ..structured.structure import restore_
from .layout import MASK, QUANT_METHOD, VALUES, VERSION
from .matching import match
from .reader import CompactFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class CompactConfig(QuantizationConfigMixin):
    """`quantization_config` of a compact copy. `dequantize` is always true: the loaded model is dense."""

    def __init__(self, version: int = VERSION, **_: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # its annotation knows built-in methods only
        self.version = version
        self.dequantize = True


@register_quantizer(QUANT_METHOD)
class CompactQuantizer(HfQuantizer):
    """Decodes pruned weights while transformers loads a compact copy.

    Raises CheckpointError before a model is returned if the files are damaged, or a parameter would not come
    from them.
    """

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise InvalidArgumentError(
                f"{QUANT_METHOD!r} is how px_hf stores pruned models; it does not prune. Use px_hf.prune, then "
                "px_hf.save_pretrained."
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        self._file = CompactFile(checkpoint_files or [])
        noted = getattr(model.config, "px", None)
        if isinstance(noted, dict) and "structure" in noted:
            restore_(model, noted["structure"], str(model.config.name_or_path))
        self._names = match(model, self._file, model.base_model_prefix)
        self._file.verify_whole()  # what transformers reads by itself
        self._failure: CheckpointError | None = None

    def get_weight_conversions(self) -> list[Any]:
        """One conversion for each last part of a pruned parameter's name, `weight` for most."""
        from transformers.core_model_loading import ConversionOps, WeightConverter

        class Decode(ConversionOps):
            def __init__(self, quantizer: CompactQuantizer) -> None:
                self.hf_quantizer = quantizer

            def __deepcopy__(self, memo: object) -> Decode:  # transformers copies conversions for each tensor
                return self

            def convert(self, input_dict: dict[str, Any], *_: Any, **about: Any) -> dict[str, Any]:
                stored = next(iter(input_dict.values()))
                device = (stored[0] if isinstance(stored, list) else stored).device
                name = about["full_layer_name"]
                return {name: self.hf_quantizer.decode(name, about["model"]).to(device)}

        class OnlyForLoading(WeightConverter):
            def was_used(self) -> bool:  # else transformers would undo it when the model is saved
                return False

        leaves = sorted({name.rpartition(".")[2] for name in self._file.pruned})
        return [OnlyForLoading([leaf + MASK, leaf + VALUES], leaf, [Decode(self)]) for leaf in leaves]

    def decode(self, name: str, model: PreTrainedModel) -> Tensor:
        """A parameter of `model` from the file, in the dtype of the model."""
        parameter = model.get_parameter(name)
        try:
            return self._file.tensor(self._names[name]).to(parameter.dtype)
        except CheckpointError as error:
            # transformers would log it and go on; it is raised when all else is loaded
            self._failure = self._failure or error
            return torch.empty_like(parameter, device="cpu")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        failure = self._failure
        del self._file, self._names, self._failure
        if failure is not None:
            raise failure

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

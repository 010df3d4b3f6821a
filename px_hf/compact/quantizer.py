"""Stock `from_pretrained(repo, subfolder="sparse")`: the compact format as a quantization method of transformers.

transformers asks its quantizers how to turn the tensors of a file into those of a model. This one turns a mask and
values into the dense weight; what comes out is an ordinary model, which can be trained and saved like any other.
`px_hf.hub.registration` registers it when px_hf and transformers are both imported, in whichever order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, InvalidArgumentError
from ..model.widths import restore_
from .agreement import check, check_configs
from .ahead import Ahead
from .files import located
from .layout import CONFIG_FILE, MASK, QUANT_METHOD, SCALES, VALUES, VERSION
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

    Raises:
        CheckpointError: the files are damaged, a parameter would not come from them, or they no longer belong to the
            dense copy beside them; no model is returned then.
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
        file = CompactFile(checkpoint_files or [])
        noted = getattr(model.config, "px", None)
        if isinstance(noted, dict) and "structure" in noted:
            restore_(model, noted["structure"], str(model.config.name_or_path))
        names = match(model, file, model.base_model_prefix)
        _check_copies(model, file, checkpoint_files or [])
        file.verify_whole()  # what transformers reads by itself
        self._coded, self._expected = set(file.coded), model.state_dict()
        first: dict[str, str] = {}
        for name, stored in names.items():  # of tied parameters transformers asks for one
            first.setdefault(stored, name)
        self._ahead = Ahead(
            lambda name: file.tensor(names[name]).to(self._expected[name].dtype),
            [name for stored, name in first.items() if stored in self._coded],
        )
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
                return {name: self.hf_quantizer.decoded(name).to(device)}

        class OnlyForLoading(WeightConverter):
            def was_used(self) -> bool:  # else transformers would undo it when the model is saved
                return False

        leaves = sorted({name.rpartition(".")[2] for name in self._coded})
        return [OnlyForLoading([leaf + MASK, leaf + VALUES, leaf + SCALES], leaf, [Decode(self)]) for leaf in leaves]

    def decoded(self, name: str) -> Tensor:
        """A parameter of the model from the file, in the dtype of the model."""
        try:
            return self._ahead.get(name)
        except CheckpointError as error:
            # transformers would log it and go on; it is raised when all else is loaded
            self._failure = self._failure or error
            return torch.empty_like(self._expected[name], device="cpu")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        failure = self._failure
        self._ahead.close()
        del self._coded, self._expected, self._ahead, self._failure
        if failure is not None:
            raise failure

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _check_copies(model: PreTrainedModel, file: CompactFile, checkpoint_files: list[str]) -> None:
    """Raise CheckpointError unless the files belong to the dense copy beside them, where there is one."""
    source = str(model.config.name_or_path)
    found, download = located([Path(name) for name in checkpoint_files], source)
    check(found, file, source, **download)
    config = found.files[0].with_name(CONFIG_FILE)
    if config.is_file():
        check_configs(found, source, json.loads(config.read_text(encoding="utf-8")), **download)

"""Quantised checkpoints: what `quantization_config` says, how each tensor is stored, and how transformers reads them.

A model is always computed with floats: integer weights are dequantised one by one as they are loaded.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from unspool_kernels.native.packed import Format
from unspool_kernels.reference.quantization import (
    GROUP,
    IntegerFormat,
    Part,
    QuantizedMatrix,
    dequantize,
    parts,
)

METHOD = "unspool"

WeightFormat = Literal["bf16", "fp16", "int8", "int4"]

PACKED_FORMATS: dict[WeightFormat, Format] = {"bf16": "bfloat16", "fp16": "float16", "int8": "int8", "int4": "int4"}
BITS: dict[WeightFormat, int] = {"bf16": 16, "fp16": 16, "int8": 8, "int4": 4}
FLOATS: dict[Format, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def quantization_config(format: WeightFormat) -> dict[str, Any]:
    """The block of `config.json` that names this format."""
    return {"quant_method": METHOD, "format": format, "group_size": GROUP}


def weight_format(config: PreTrainedConfig) -> WeightFormat | None:
    """The format that a checkpoint's configuration names, or None.

    Raises ValueError, naming the field, for a block that is not one of ours.
    """
    block = getattr(config, "quantization_config", None)
    if block is None:
        return None
    if isinstance(block, UnspoolQuantizationConfig):
        return block.format
    if not isinstance(block, Mapping):
        raise ValueError("quantization_config: must be an object")
    return UnspoolQuantizationConfig(**block).format


def stored_format(name: str, shape: tuple[int, ...], format: WeightFormat) -> Format:
    """How a checkpoint of this format keeps a parameter: what the native kernels need of it, and no more."""
    packed = PACKED_FORMATS[format]
    if name.endswith("_map"):
        return map_format(packed)
    if ".far." in name or len(shape) != 2:
        return "float32"
    return vocabulary_format(packed) if name in _VOCABULARY else packed


def vocabulary_format(format: Format) -> Format:
    """Of the embedding and the head: four bits there cost more quality than in all other matrices together."""
    return "int8" if format == "int4" else format


def map_format(format: Format) -> Literal["float32", "float16"]:
    """Of the feature maps."""
    return "float32" if format == "float32" else "float16"


def stored_parts(name: str, shape: tuple[int, ...], format: WeightFormat) -> dict[str, Part]:
    """The tensors that a checkpoint of this format holds for a parameter: their names, shapes and dtypes."""
    kept = stored_format(name, shape, format)
    if kept in FLOATS:
        return {name: Part(shape, FLOATS[kept])}
    rows, columns = shape
    return {part_name(name, field): part for field, part in parts(rows, columns, integer_format(kept)).items()}


def part_name(name: str, field: str) -> str:
    """Where a field of a QuantizedMatrix lies in the checkpoint."""
    return name if field == "codes" else f"{name}_{field}"


def integer_format(format: Format) -> IntegerFormat:
    """A format that is not one of FLOATS."""
    assert format == "int8" or format == "int4"
    return format


@register_quantization_config(METHOD)
class UnspoolQuantizationConfig(QuantizationConfigMixin):
    """The block `quantization_config`. Raises ValueError, naming the field, for any value but those we write."""

    dequantize = True
    """What transformers asks to know whether the loaded model is an ordinary one."""

    def __init__(
        self, quant_method: str | None = None, format: str | None = None, group_size: int = GROUP, **unknown: Any
    ) -> None:
        for field, value, known in (
            ("quant_method", quant_method, (METHOD,)),
            ("format", format, get_args(WeightFormat)),
            ("group_size", group_size, (GROUP,)),
        ):
            if value not in known:
                raise ValueError(f"quantization_config.{field}: {value!r} is not {' or '.join(map(str, known))}")
        if unknown:
            raise ValueError(f"quantization_config.{sorted(unknown)[0]}: is no field of this format")
        self.quant_method: Any = quant_method
        self.format: WeightFormat = format  # type: ignore[assignment]  # just checked
        self.group_size = group_size


class _Float(NamedTuple):
    """What a parameter is when it is not quantised."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@register_quantizer(METHOD)
class UnspoolQuantizer(HfQuantizer):
    """Gives a model the parameters that the checkpoint stores, and after loading makes floats of them again."""

    quantization_config: UnspoolQuantizationConfig

    def __init__(self, quantization_config: UnspoolQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._floats: dict[str, _Float] = {}

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        tied = model._tied_weights_keys if model.config.tie_word_embeddings else {}
        for name, parameter in list(model.named_parameters()):
            if name in tied:
                continue
            stored = stored_parts(name, tuple(parameter.shape), self.quantization_config.format)
            if stored[name].dtype.is_floating_point:
                continue
            self._floats[name] = _Float(tuple(parameter.shape), parameter.dtype)
            for part, (shape, dtype) in stored.items():
                _set_parameter(model, part, torch.empty(shape, dtype=dtype, device="meta"))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, (shape, dtype) in self._floats.items():
            stored = stored_parts(name, shape, self.quantization_config.format)
            matrix = QuantizedMatrix(*(_take_part(model, part, expected) for part, expected in stored.items()))
            _set_parameter(model, name, dequantize(matrix, shape[1], dtype))
        model.tie_weights()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    parameter = nn.Parameter(value, requires_grad=value.dtype.is_floating_point)
    model.get_submodule(owner).register_parameter(attribute, parameter)


def _take_part(model: nn.Module, name: str, expected: Part) -> Tensor:
    """The loaded tensor, removed from the model. Raises ValueError when there is none, or another."""
    owner, _, attribute = name.rpartition(".")
    parameter = model.get_parameter(name)
    delattr(model.get_submodule(owner), attribute)
    if not getattr(parameter, "_is_hf_initialized", False):
        raise ValueError(f"{name} is missing, which quantization_config asks for")
    if tuple(parameter.shape) != expected.shape or parameter.dtype != expected.dtype:
        found = f"{parameter.dtype} {list(parameter.shape)}"
        raise ValueError(
            f"{name} is {found}, but quantization_config and config.json ask for {expected.dtype} "
            f"{list(expected.shape)}"
        )
    return parameter.detach()

"""The account of a conversion: what becomes of every source tensor, from headers alone; no tensor data is read."""

import math
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool.executor import Quant
from unspool.model import UnspoolForCausalLM
from unspool.quantization import WeightFormat, quantization_config, stored_parts
from unspool.state import kv_cache_bytes, layer_state_specs, state_bytes
from unspool_conversion.architectures import UNCHANGED, Naming, Transform, naming_of
from unspool_conversion.distillation.adapter import layers_of
from unspool_conversion.kept_softmax import KeptSoftmax, kept_softmax
from unspool_conversion.options import ConvertOptions, OutputDtype
from unspool_conversion.teacher_config import TeacherConfig, translate_config
from unspool_conversion.tensor_source import TensorInfo, TensorSource

OUTPUT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HEAD = "lm_head.weight"

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


class PlannedTensor(NamedTuple):
    """A tensor of the converted model. `source` is the tensor it is made from; None marks a new parameter.

    `dtype` is that of its values, which a `format` rounds when they are written.
    """

    name: str
    source: str | None
    transform: Transform
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: WeightFormat | None = None

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        if self.format is None:
            return self.num_elements * self.dtype.itemsize
        parts = stored_parts(self.name, self.shape, self.format).values()
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)


@dataclass(frozen=True)
class ConversionPlan:
    """Every tensor of the converted model in its order, and every source tensor that is left out, with the reason."""

    config: UnspoolConfig
    tensors: tuple[PlannedTensor, ...]
    dropped: Mapping[str, str]
    dtype: torch.dtype
    """The dtype that holds most of the weights, which `config.json` names."""
    exact_tokens: int | None
    """Tokens up to which the converted model computes what the teacher computes; None: any number. Rounded weights
    compute it at none."""
    quant: Quant
    """The format of the weights on disk."""
    teacher_windows: tuple[int | None, ...]
    """Each layer's own sliding window in the teacher, where it has one."""

    @property
    def sourced(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.source is not None)

    @property
    def new(self) -> tuple[PlannedTensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.source is None)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for tensor in self.tensors)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def kept_softmax(self) -> KeptSoftmax | None:
        """The layers that keep full attention; None in a model of constant memory."""
        return kept_softmax(self.config.linearize)

    def accounting(self) -> dict[str, Any]:
        """Counts of source and destination tensors: every one of either is in exactly one line."""
        return {
            "source_tensors": len(self.sourced) + len(self.dropped),
            "used": len(self.sourced),
            "dropped": dict(self.dropped),
            "destination_tensors": len(self.tensors),
            "new": {tensor.name: list(tensor.shape) for tensor in self.new},
        }

    def sizes(self) -> dict[str, Any]:
        """Parameters, bytes on disk, and bytes of state per session, against the teacher's cache at full length.

        A session of a model that keeps softmax layers is sized for their capacity, with how much of it is theirs.
        """
        sizes = {
            "parameters": self.num_parameters,
            "new_parameters": sum(tensor.num_elements for tensor in self.new),
            "weight_bytes": self.num_bytes,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quant": self.quant,
            "state_bytes_per_session": state_bytes(self.config, self.dtype),
            "teacher_cache_bytes_per_token": kv_cache_bytes(self.config, 1, self.dtype),
        }
        if (kept := self.kept_softmax) is not None:
            specs = self.config.mixer_specs()
            layers = (layer_state_specs(self.config, specs[layer], self.dtype) for layer in kept.layers)
            sizes["softmax_bytes_per_session"] = sum(part.num_bytes for layer in layers for part in layer.values())
        return sizes


def plan_conversion(source: TensorSource, options: ConvertOptions) -> ConversionPlan:
    """Accounts for every tensor of the source and of the converted model.

    Raises UserError when a tensor is missing, unexpected or has a shape that the configuration contradicts.
    """
    teacher = translate_config(source.config)
    naming = naming_of(source.format, teacher.model_type)
    _check_layers(source.tensors, naming, teacher)
    config = _unspool_config(teacher, options)
    dropped = _dropped(source.tensors, naming, tied=config.tie_word_embeddings)
    format = None if options.quant == "none" else options.quant
    dtypes = _output_dtypes(source.tensors, "float32" if format else options.dtype)
    with torch.device("meta"):
        parameters = dict(UnspoolForCausalLM(config).named_parameters())
    _check_expected(source.tensors.keys() - dropped.keys(), naming, parameters.keys())
    tensors = []
    for name, parameter in parameters.items():
        mapped = naming.to_source(name)
        if mapped is None:
            tensors.append(PlannedTensor(name, None, UNCHANGED, tuple(parameter.shape), torch.float32, format))
            continue
        _check_shape(source.tensors, mapped.name, tuple(parameter.shape), config)
        dtype = dtypes[mapped.name]
        tensors.append(PlannedTensor(name, mapped.name, mapped.transform, tuple(parameter.shape), dtype, format))
    config.dtype = _most_common(tensors)
    if format is not None:
        config.quantization_config = quantization_config(format)
    return ConversionPlan(
        config=config,
        tensors=tuple(tensors),
        dropped=dropped,
        dtype=config.dtype,
        exact_tokens=_exact_tokens(config, teacher) if format is None else 0,
        quant=options.quant,
        teacher_windows=tuple(teacher.windows),
    )


def _unspool_config(teacher: TeacherConfig, options: ConvertOptions) -> UnspoolConfig:
    if options.adapter is not None and not options.names_layers:
        linearize = layers_of(options.adapter)
    else:
        linearize = options.linearize(teacher.windows, teacher.fields["max_position_embeddings"])
    try:
        return UnspoolConfig(
            **teacher.fields,
            linearize=linearize,
            architectures=[UnspoolForCausalLM.__name__],
        )
    except ValueError as error:
        raise UserError(f"config.json: {error}") from error


def _exact_tokens(config: UnspoolConfig, teacher: TeacherConfig) -> int | None:
    lengths = [
        0 if spec.join == "mixed" else spec.near_tokens
        for spec, window in zip(config.mixer_specs(), teacher.windows, strict=True)
        if (spec.join, spec.window, spec.sinks) != ("window", window, 0)
    ]
    return min(lengths, default=None)


def _check_layers(tensors: Mapping[str, TensorInfo], naming: Naming, teacher: TeacherConfig) -> None:
    ours = (mapped.name for name in tensors if (mapped := naming.to_unspool(name)) is not None)
    layers = {int(name.split(".")[2]) for name in ours if name.startswith("model.layers.")}
    expected = len(teacher.windows)
    if layers != set(range(expected)):
        found = f"layers up to {max(layers)}, {len(layers)} in all" if layers else "no layer that this converter knows"
        raise UserError(f"config.json says num_hidden_layers {expected}, but the weights hold {found}")


def _dropped(tensors: Mapping[str, TensorInfo], naming: Naming, *, tied: bool) -> dict[str, str]:
    dropped = {name: "follows from the configuration" for name in tensors if naming.drops(name)}
    head = naming.to_source(HEAD)
    if tied and head is not None and head.name in tensors:
        dropped[head.name] = "tied to the embedding"
    return dropped


def _check_expected(used: Set[str], naming: Naming, destination: Set[str]) -> None:
    for name in sorted(used):
        mapped = naming.to_unspool(name)
        if mapped is None or mapped.name not in destination:
            raise UserError(f"the weights hold {name}, which the configuration has no place for; check config.json")


def _check_shape(
    tensors: Mapping[str, TensorInfo], name: str, expected: tuple[int, ...], config: UnspoolConfig
) -> None:
    if name not in tensors:
        raise UserError(f"the weights lack {name}, which config.json asks for; download the checkpoint again")
    if tensors[name].shape != expected:
        sizes = ", ".join(f"{size} {getattr(config, size)}" for size in _SIZES)
        raise UserError(
            f"config.json says {sizes}; so {name} must be {list(expected)}, "
            f"but it is {list(tensors[name].shape)}: the two do not belong together"
        )


def _output_dtypes(tensors: Mapping[str, TensorInfo], dtype: OutputDtype) -> dict[str, torch.dtype]:
    if dtype == "auto":
        return {name: info.dtype for name, info in tensors.items()}
    return dict.fromkeys(tensors, OUTPUT_DTYPES[dtype])


def _most_common(tensors: list[PlannedTensor]) -> torch.dtype:
    elements: Counter[torch.dtype] = Counter()
    for tensor in tensors:
        if tensor.source is not None:
            elements[tensor.dtype] += tensor.num_elements
    return elements.most_common(1)[0][0]

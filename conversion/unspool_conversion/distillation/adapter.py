"""What training added to a model, apart from the model: a low-rank adapter in peft's layout, the far part's
parameters, and a description that says which model they belong to.

A merge is done tensor by tensor in float32, and stored in the tensor's own dtype.
"""

import hashlib
import json
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unspool.config import UnspoolConfig
from unspool.errors import UserError
from unspool_conversion.tensor_source import read_json

DESCRIPTION, RECIPE = "unspool_adapter.json", "recipe.yaml"
FAR, MIXERS = "far.safetensors", "mixers.safetensors"
LORA, LORA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
SCHEMA_VERSION = 1

_PEFT_PREFIX = "base_model.model."
_BASE_FIELDS = (
    "base_model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "attention_out_bias",
    "mlp_bias",
    "qk_norm",
    "tie_word_embeddings",
    "linearize",
)
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}

Load = Callable[[str], Tensor]


def describe_base(config: UnspoolConfig) -> dict[str, Any]:
    """The fields that fix every tensor's meaning and shape: the teacher's sizes, and how each layer mixes."""
    fields: dict[str, Any] = json.loads(json.dumps({name: getattr(config, name) for name in _BASE_FIELDS}))
    return fields


def fingerprint(base: Mapping[str, Any]) -> str:
    """The SHA-256 of what `describe_base` gave."""
    return hashlib.sha256(json.dumps(base, sort_keys=True).encode()).hexdigest()


def write_description(directory: Path, config: UnspoolConfig) -> None:
    """Says which model the adapter in the directory belongs to."""
    base = describe_base(config)
    text = json.dumps({"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint(base), "base": base}, indent=2)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def apply_adapter(directory: Path, config: UnspoolConfig, load: Load) -> Load:
    """Puts the adapter over `load`, which gives tensors of a freshly converted model with this configuration by name.

    What is returned gives the trained tensors, each in the dtype that `load` gives it. Raises UserError when the
    adapter is incomplete or damaged, or was trained for another model.
    """
    _check_base(directory, config)
    replaced = _read(directory / FAR) | (_read(directory / MIXERS) if (directory / MIXERS).exists() else {})
    lora = _read_lora(directory)

    def load_trained(name: str) -> Tensor:
        tensor = load(name)
        if name in replaced:
            _check_shape(directory, name, tuple(replaced[name].shape), tuple(tensor.shape))
        if name not in replaced and name not in lora:
            return tensor
        trained = replaced.get(name, tensor).float()
        if name in lora:
            delta = lora[name].delta()
            _check_shape(directory, name, tuple(delta.shape), tuple(tensor.shape))
            trained = trained + delta
        return trained.to(tensor.dtype).contiguous()

    return load_trained


def layers_of(directory: Path) -> dict[str, Any]:
    """The `linearize` block of the model that the adapter was trained for. Raises UserError as `apply_adapter` does."""
    linearize = _read_base(directory).get("linearize")
    if not isinstance(linearize, dict):
        raise UserError(f"{directory / DESCRIPTION} has no linearize block; train the adapter again")
    return linearize


def changes_teacher(directory: Path) -> bool:
    """Whether the adapter changes weights that the teacher has, so that short texts are no longer read as it reads
    them."""
    return any((directory / name).exists() for name in (LORA_CONFIG, MIXERS))


@dataclass(frozen=True)
class _LowRank:
    """What one projection [out, in] gains: scale up [out, rank] down [rank, in]."""

    down: Tensor
    up: Tensor
    scale: float

    def delta(self) -> Tensor:
        return self.scale * (self.up.float() @ self.down.float())


def _read_base(directory: Path) -> dict[str, Any]:
    """What `describe_base` gave for the model that the adapter was trained for."""
    if not (directory / DESCRIPTION).is_file():
        raise UserError(f"{directory} has no {DESCRIPTION}; pass the adapter directory that `unspool distill` wrote")
    description = read_json(directory / DESCRIPTION)
    if description.get("schema_version") != SCHEMA_VERSION:
        found = description.get("schema_version")
        raise UserError(f"{directory / DESCRIPTION} has schema_version {found!r}, not {SCHEMA_VERSION}; train it again")
    base = description.get("base")
    if not isinstance(base, dict) or description.get("fingerprint") != fingerprint(base):
        raise UserError(f"{directory / DESCRIPTION} has been changed since it was written; train the adapter again")
    return base


def _check_base(directory: Path, config: UnspoolConfig) -> None:
    base = _read_base(directory)
    for name, value in describe_base(config).items():
        if base.get(name) != value:
            raise UserError(
                f"{directory} was trained for a model whose {name} is {_short(base.get(name))}, and here it is "
                f"{_short(value)}; convert the model that it was trained for, and leave the options of layers out or "
                "give the same"
            )


def _short(value: object) -> str:
    return textwrap.shorten(repr(value), 200)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); the adapter is incomplete") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(f"{path}: {name} holds NaN or infinite values; train the adapter again")
    return tensors


def _read_lora(directory: Path) -> dict[str, _LowRank]:
    """The low-rank part by the name of the weight that it changes; none in an adapter without one."""
    if not (directory / LORA_CONFIG).exists():
        return {}
    values = read_json(directory / LORA_CONFIG)
    for name, allowed in _PLAIN_LORA.items():
        if name in values and values[name] not in allowed:
            raise UserError(f"{directory / LORA_CONFIG}: {name}={values[name]!r} is not merged, only {allowed[0]!r}")
    rank, alpha = values.get("r"), values.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{directory / LORA_CONFIG}: r and lora_alpha must be numbers")
    tensors = _read(directory / LORA)
    downs = [name for name in tensors if name.endswith(".lora_A.weight")]
    ups = {name: name.replace(".lora_A.", ".lora_B.") for name in downs}
    if set(tensors) != {*downs, *ups.values()}:
        raise UserError(f"{directory / LORA}: holds other tensors than pairs of lora_A and lora_B")
    return {
        down.removeprefix(_PEFT_PREFIX).replace(".lora_A.weight", ".weight"): _LowRank(
            tensors[down], tensors[up], alpha / rank
        )
        for down, up in ups.items()
    }


def _check_shape(directory: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise UserError(f"{directory}: {name} is {list(found)}, but the model has {list(expected)}")

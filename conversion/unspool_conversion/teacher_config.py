"""Translates a source's configuration into ours: which fields carry over, and what no converted model can represent."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN

from unspool.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ConfigRow:
    """One `model_type`. A bias is a constant, or the name of the field that says whether it is there."""

    read_as: str
    """The transformers configuration class, by its model_type, that supplies defaults and older spellings."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    attention_bias: bool | str = False
    attention_out_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: Literal["none", "every_layer", "by_layer_type"] = "none"


ROWS: dict[str, ConfigRow] = {
    "llama": ConfigRow(
        read_as="llama", attention_bias="attention_bias", attention_out_bias="attention_bias", mlp_bias="mlp_bias"
    ),
    "mistral": ConfigRow(read_as="mistral", windows="every_layer"),
    "ministral": ConfigRow(read_as="ministral", windows="by_layer_type"),
    "qwen2": ConfigRow(read_as="qwen2", attention_bias=True, windows="by_layer_type"),
    "qwen3": ConfigRow(
        read_as="qwen3",
        attention_bias="attention_bias",
        attention_out_bias="attention_bias",
        qk_norm=True,
        windows="by_layer_type",
    ),
    "seed_oss": ConfigRow(
        read_as="seed_oss",
        attention_bias="attention_bias",
        attention_out_bias="attention_out_bias",
        mlp_bias="mlp_bias",
    ),
    "exaone": ConfigRow(
        read_as="llama",
        renamed={
            "num_layers": "num_hidden_layers",
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "rms_norm_eps",
        },
        defaults={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5},
    ),
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_COPIED = (
    *_REQUIRED,
    "num_key_value_heads",
    "hidden_act",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

MAX_LAYERS = 1024

# Fields that would change what a layer computes, with the values under which they do nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "n_routed_experts": (None, 0),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "no_rope_layers": (None, []),
    "alibi": (None, False),
}

_ROPE_FIELDS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_ROPE_INERT = frozenset({"type", "finetuned", "partial_rotary_factor"})


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher in our terms: fields of UnspoolConfig, and each layer's own window in tokens (None sees all)."""

    model_type: str
    fields: dict[str, Any]
    windows: tuple[int | None, ...]


def translate_config(values: Mapping[str, Any]) -> TeacherConfig:
    """Reads a `config.json`. Raises UserError naming the field that is missing, wrong or not representable."""
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ROWS:
        raise UserError(f"config.json: model_type {model_type!r} is not converted; known are {', '.join(ROWS)}")
    row = ROWS[model_type]
    _check_representable(values)
    renamed = {row.renamed.get(name, name): value for name, value in {**row.defaults, **values}.items()}
    if missing := [name for name in _REQUIRED if renamed.get(name) is None]:
        raise UserError(f"config.json has no {missing[0]}; download the checkpoint again")
    layers = renamed["num_hidden_layers"]
    if isinstance(layers, int) and not 1 <= layers <= MAX_LAYERS:
        raise UserError(f"config.json: num_hidden_layers={layers} must be between 1 and {MAX_LAYERS}")
    config = _read(row.read_as, renamed)
    _check_sizes(config)
    fields = {name: getattr(config, name) for name in _COPIED}
    fields["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for bias in ("attention_bias", "attention_out_bias", "mlp_bias"):
        where = getattr(row, bias)
        fields[bias] = getattr(config, where) if isinstance(where, str) else where
    fields |= {"qk_norm": row.qk_norm, "base_model_type": model_type, "rope_parameters": _rope_parameters(config)}
    return TeacherConfig(model_type, fields, _windows(config, row))


def _read(model_type: str, values: dict[str, Any]) -> Any:
    values = {name: value for name, value in values.items() if name not in ("model_type", "architectures", "auto_map")}
    try:
        config: PreTrainedConfig = CONFIG_MAPPING[model_type].from_dict(values)
    except (StrictDataclassError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"config.json: {' '.join(str(error).split())}") from error
    return config


def _check_representable(values: Mapping[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        if name in values and values[name] not in neutral:
            raise UserError(f"config.json: {name}={values[name]!r} changes the model in a way that is not converted")


def _check_sizes(config: Any) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    for name in (*names, "num_key_value_heads", "max_position_embeddings"):
        if getattr(config, name) < 1:
            raise UserError(f"config.json: {name}={getattr(config, name)} must be at least 1")
    if config.hidden_act not in ACT2FN:
        raise UserError(f"config.json: hidden_act {config.hidden_act!r} is not an activation that transformers knows")


def _rope_parameters(config: Any) -> dict[str, Any]:
    rope = dict(config.rope_parameters or {})
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_FIELDS:
        raise UserError(f"config.json: rope_type {rope_type!r} is not converted; known are {', '.join(_ROPE_FIELDS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"config.json: partial_rotary_factor={rope['partial_rotary_factor']} is not converted, only 1.0"
        )
    known = _ROPE_FIELDS[rope_type] | {"rope_type", "rope_theta"}
    if unknown := sorted(rope.keys() - known - _ROPE_INERT):
        raise UserError(f"config.json: {unknown[0]!r} is not a known parameter of rope_type {rope_type!r}")
    return {name: value for name, value in rope.items() if name in known}


def _windows(config: Any, row: ConfigRow) -> tuple[int | None, ...]:
    layers: int = config.num_hidden_layers
    window: int | None = getattr(config, "sliding_window", None)
    if row.windows == "none" or window is None:
        return (None,) * layers
    if row.windows == "every_layer":
        return (window,) * layers
    if len(config.layer_types) != layers:
        raise UserError(f"config.json: layer_types has {len(config.layer_types)} entries for {layers} layers")
    return tuple(window if kind == "sliding_attention" else None for kind in config.layer_types)

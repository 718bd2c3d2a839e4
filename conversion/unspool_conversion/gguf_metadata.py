"""Reads a GGUF file's metadata as the HuggingFace configuration that it was made from, or says what it cannot read."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unspool.errors import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_REQUIRED = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "vocab_size": "vocab_size",
}
_READ_ELSEWHERE = frozenset(
    {
        "attention.value_length",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
    }
)
_TOKEN_IDS = {
    "tokenizer.ggml.bos_token_id": "bos_token_id",
    "tokenizer.ggml.eos_token_id": "eos_token_id",
    "tokenizer.ggml.padding_token_id": "pad_token_id",
}
_END_OF_TURN = "tokenizer.ggml.eot_token_id"
_DEFAULT_ROPE_THETA = 10000.0

# The rule by which Llama 3.1 and later stretch their frequencies; only the factor differs between releases.
_LLAMA3_RULE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_from_metadata(metadata: Mapping[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """The `config.json` content that the metadata describe, without frequency scaling that is stored as a tensor.

    Raises UserError for an architecture, a field or a value that no converted model can represent.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"general.architecture is {architecture!r}; this converter reads GGUF files of {known}")
    fields = {
        key.removeprefix(f"{architecture}."): value
        for key, value in metadata.items()
        if key.startswith(f"{architecture}.")
    }
    _refuse_unknown(fields, architecture)
    config: dict[str, Any] = {"model_type": architecture, "tie_word_embeddings": "output.weight" not in tensors}
    config |= {name: _single(fields, key) for key, name in _REQUIRED.items()}
    config |= {name: _single(fields, key) for key, name in _OPTIONAL.items() if key in fields}
    config |= _token_ids(metadata) | _biases(architecture, tensors) | _window(architecture, fields)
    if "vocab_size" not in config:
        config["vocab_size"] = len(metadata.get("tokenizer.ggml.tokens", ()))
    _check_rotated_channels(config, fields)
    config["rope_parameters"] = _rope_parameters(fields)
    return config


def end_of_text_ids(metadata: Mapping[str, Any]) -> list[int]:
    """Every token that ends a generation: end of text, and end of turn where the file has one."""
    ids = (metadata.get("tokenizer.ggml.eos_token_id"), metadata.get(_END_OF_TURN))
    return list(dict.fromkeys(token for token in ids if token is not None))


def llama3_scaling(divisors: NDArray[np.float32], config: Mapping[str, Any]) -> dict[str, Any]:
    """The `llama3` rope parameters that give these divisors [head_dim / 2] of the frequencies.

    GGUF stores the divisors, not the rule. Raises UserError when they do not follow Llama 3's rule.
    """
    theta = config["rope_parameters"]["rope_theta"]
    channels = 2 * len(divisors)
    frequencies = 1.0 / theta ** (np.arange(0, channels, 2, dtype=np.float64) / channels)
    factor = float(divisors.max())
    old_length = _LLAMA3_RULE["original_max_position_embeddings"]
    low, high = _LLAMA3_RULE["low_freq_factor"], _LLAMA3_RULE["high_freq_factor"]
    wavelengths = 2.0 * math.pi / frequencies
    smooth = (old_length / wavelengths - low) / (high - low)
    expected = 1.0 / ((1.0 - smooth.clip(0.0, 1.0)) / factor + smooth.clip(0.0, 1.0))
    if not np.allclose(divisors, expected, rtol=1e-3):
        raise UserError("rope_freqs.weight does not follow Llama 3's rule; convert from the safetensors checkpoint")
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor} | _LLAMA3_RULE


def _refuse_unknown(fields: Mapping[str, Any], architecture: str) -> None:
    if fields.get("expert_count"):
        raise UserError(
            f"{architecture}.expert_count is {fields['expert_count']}: mixtures of experts are not converted"
        )
    known = _REQUIRED.keys() | _OPTIONAL.keys() | _READ_ELSEWHERE | {"expert_count", "expert_used_count"}
    if unknown := sorted(fields.keys() - known):
        raise UserError(
            f"the metadata field {architecture}.{unknown[0]} is not known to this converter, which will not guess "
            "what it changes; convert from the safetensors checkpoint"
        )


def _single(fields: Mapping[str, Any], key: str) -> int | float:
    value = fields.get(key)
    if isinstance(value, list) and value and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int | float):
        raise UserError(f"the metadata field {key} is {value!r}; one number for all layers is needed")
    return value


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {name: metadata.get(key) for key, name in _TOKEN_IDS.items()}


def _biases(architecture: str, tensors: Collection[str]) -> dict[str, Any]:
    if architecture == "qwen2":
        return {}  # always on query, key and value
    return {
        "attention_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
    }


def _window(architecture: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    window = fields.get("attention.sliding_window")
    if not window:
        return {}
    if architecture != "llama":
        raise UserError(f"{architecture}.attention.sliding_window does not say which layers slide; convert safetensors")
    return {"model_type": "mistral", "sliding_window": window}


def _check_rotated_channels(config: dict[str, Any], fields: Mapping[str, Any]) -> None:
    head_dim = config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.get(key, head_dim) != head_dim:
            raise UserError(f"{key} is {fields[key]} and the heads have {head_dim} channels; both must be equal")


def _rope_parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": fields.get("rope.freq_base", _DEFAULT_ROPE_THETA), "rope_type": "default"}
    kind = fields.get("rope.scaling.type", "linear" if "rope.scale_linear" in fields else "none")
    factor = fields.get("rope.scaling.factor", fields.get("rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and "rope.scaling.original_context_length" in fields:
        original = fields["rope.scaling.original_context_length"]
        return rope | {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UserError(f"rope.scaling.type is {kind!r}, which this converter does not read; convert from safetensors")

"""Configurations: what carries over, older spellings, and what is refused by name."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from unspool.errors import UserError
from unspool_conversion.teacher_config import translate_config

SIZES: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def translate(**fields: Any) -> dict[str, Any]:
    return translate_config(SIZES | fields).fields


def windows(**fields: Any) -> tuple[int | None, ...]:
    return translate_config(SIZES | fields).windows


def test_fields_carry_over() -> None:
    fields = translate(rms_norm_eps=1e-5, tie_word_embeddings=True, eos_token_id=[2, 3], hidden_act="gelu")
    assert fields["rms_norm_eps"] == 1e-5
    assert fields["tie_word_embeddings"] is True
    assert fields["eos_token_id"] == [2, 3]
    assert fields["hidden_act"] == "gelu"
    assert fields["base_model_type"] == "llama"


def test_head_dim_is_read_or_derived() -> None:
    assert translate()["head_dim"] == 8
    assert translate(head_dim=16)["head_dim"] == 16
    assert translate(model_type="qwen2", head_dim=16)["head_dim"] == 16


@pytest.mark.parametrize(
    ("fields", "qkv", "out", "mlp"),
    [
        ({}, False, False, False),
        ({"attention_bias": True}, True, True, False),
        ({"mlp_bias": True}, False, False, True),
        ({"model_type": "mistral"}, False, False, False),
        ({"model_type": "qwen2"}, True, False, False),
        ({"model_type": "qwen3", "attention_bias": True}, True, True, False),
        ({"model_type": "seed_oss", "attention_out_bias": True}, True, True, False),
    ],
)
def test_biases(fields: dict[str, Any], qkv: bool, out: bool, mlp: bool) -> None:
    found = translate(**fields)
    assert (found["attention_bias"], found["attention_out_bias"], found["mlp_bias"]) == (qkv, out, mlp)


def test_only_qwen3_normalises_queries_and_keys() -> None:
    assert translate(model_type="qwen3")["qk_norm"] is True
    assert translate(model_type="qwen2")["qk_norm"] is False


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0}},
            {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 4.0},
        ),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 128,
                },
            },
            {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
            {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
    ids=["theta", "none", "linear-old", "dynamic", "llama3-old", "yarn-old"],
)
def test_rope_parameters_in_either_spelling(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translate(**fields)["rope_parameters"] == expected


def test_exaone_spellings() -> None:
    fields = translate_config(
        {
            "model_type": "exaone",
            "vocab_size": 100,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "activation_function": "silu",
            "layer_norm_epsilon": 2e-5,
            "head_dim": 8,
            "rope_theta": 5e5,
            "tie_word_embeddings": False,
            "auto_map": {"AutoConfig": "configuration_exaone.ExaoneConfig"},
        }
    ).fields
    assert fields["num_hidden_layers"] == 4
    assert fields["hidden_act"] == "silu"
    assert fields["rms_norm_eps"] == 2e-5
    assert fields["tie_word_embeddings"] is False
    assert fields["rope_parameters"]["rope_theta"] == 5e5


def test_windows_of_the_teacher() -> None:
    assert windows(sliding_window=7) == (None,) * 4  # Llama has none, whatever its file says
    assert windows(model_type="mistral", sliding_window=7) == (7,) * 4
    assert windows(model_type="mistral", sliding_window=None) == (None,) * 4
    assert windows(model_type="qwen2", sliding_window=7) == (None,) * 4
    sliding = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}
    assert windows(model_type="qwen2", **sliding) == (None, None, None, 7)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert windows(model_type="ministral", sliding_window=7, layer_types=kinds) == (None, 7, None, 7)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "seed_oss", "ministral"])
def test_absent_fields_mean_what_transformers_takes_them_to_mean(model_type: str) -> None:
    theirs = CONFIG_MAPPING[model_type].from_dict({k: v for k, v in SIZES.items() if k != "model_type"})
    ours = translate(model_type=model_type)
    for name in ("rms_norm_eps", "tie_word_embeddings", "hidden_act", "eos_token_id", "bos_token_id"):
        assert ours[name] == getattr(theirs, name)
    assert ours["rope_parameters"]["rope_theta"] == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not converted; known are llama"),
        ({"model_type": None}, "model_type None is not converted"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be between 1 and 1024"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"hidden_act": "wobble"}, "hidden_act 'wobble'"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor=0.25"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "wave": 3}}, "'wave'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
    ],
)
def test_what_cannot_be_represented_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        translate_config(SIZES | fields)

"""Rotations against transformers' own, their inverse, their precision far out, and the limit for sinks."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from unspool import UnspoolConfig
from unspool.rotary import Rotary

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 50000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
}
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


@pytest.mark.parametrize("name", SCALINGS)
def test_rotations_are_those_of_transformers(name: str) -> None:
    reference = LlamaConfig(**SIZES, rope_parameters=SCALINGS[name])
    rotary = Rotary(UnspoolConfig(**SIZES, head_dim=16, rope_parameters=SCALINGS[name]))
    q, k = torch.randn(2, 4, 300, 16), torch.randn(2, 4, 300, 16)
    positions = torch.arange(300)[None].expand(2, -1)
    cos, sin = LlamaRotaryEmbedding(reference)(q, positions)
    expected, _ = apply_rotary_pos_emb(q, k, cos, sin)
    rotated = rotary.rotation(positions, torch.float32).apply(q.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(rotated, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("start", [0, 1_000_000])
def test_the_inverse_undoes_a_rotation_at_any_position(name: str, start: int) -> None:
    rotary = Rotary(UnspoolConfig(**SIZES, head_dim=16, rope_parameters=SCALINGS[name]))
    k, positions = torch.randn(1, 9, 2, 16), torch.arange(9)[None] + start
    rotated = rotary.rotation(positions, torch.float32).apply(k)
    torch.testing.assert_close(rotary.inverse(positions, torch.float32).apply(rotated), k, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_distance_alone_even_at_a_million_tokens() -> None:
    rotary = Rotary(UnspoolConfig(**SIZES, head_dim=16, rope_parameters=SCALINGS["default"]))
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(position: int) -> torch.Tensor:
        rotate = [rotary.rotation(torch.tensor([[place]]), torch.float32) for place in (position, position - 7)]
        return (rotate[0].apply(q) * rotate[1].apply(k)).sum()

    torch.testing.assert_close(score(1_000_007), score(7), rtol=1e-5, atol=1e-5)


def test_sinks_stay_within_the_distance_that_the_teacher_knew() -> None:
    rotary = Rotary(UnspoolConfig(**SIZES, head_dim=16, rope_parameters=SCALINGS["default"]))
    positions = torch.tensor([[100, 511, 512, 40_000]])
    sink, own = rotary.sink_rotation(positions, torch.float32), rotary.rotation(positions, torch.float32)
    assert torch.equal(sink.cos[:, :2], own.cos[:, :2])
    assert torch.equal(sink.cos[0, 2:], own.cos[0, 1].expand(2, -1))


def test_an_unknown_rope_type_is_refused_by_name() -> None:
    config = UnspoolConfig(**SIZES, head_dim=16, rope_parameters=SCALINGS["default"])
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1.0}
    with pytest.raises(ValueError, match="longrope"):
        Rotary(config)

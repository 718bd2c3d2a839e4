"""Names and layouts: every row reads the same in both directions."""

from typing import Any

import pytest
import torch

from unspool import UnspoolConfig, UnspoolForCausalLM
from unspool.errors import UserError
from unspool_conversion.architectures import NAMINGS, naming_of


def config(**fields: Any) -> UnspoolConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 12,
        "head_dim": 8,
    }
    return UnspoolConfig(**sizes | {"num_attention_heads": 6, "num_key_value_heads": 2} | fields)


@pytest.mark.parametrize("key", NAMINGS, ids="-".join)
def test_every_parameter_goes_to_the_source_and_back(key: tuple[str, str]) -> None:
    naming, cfg = NAMINGS[key], config(attention_bias=True, attention_out_bias=True, mlp_bias=True, qk_norm=True)
    mapped = 0
    for name, parameter in UnspoolForCausalLM(cfg).named_parameters():
        source = naming.to_source(name)
        if source is None:
            assert ".far." in name or (key[1] == "exaone" and "_norm" in name)
            continue
        mapped += 1
        back = naming.to_unspool(source.name)
        assert back is not None and back.name == name
        there = source.transform.to_source(parameter, cfg)
        assert there.shape == parameter.shape
        torch.testing.assert_close(back.transform.to_unspool(there, cfg), parameter, rtol=0, atol=0)
    assert mapped >= 3 + 12 * 9


def test_exaone_names() -> None:
    naming = naming_of("safetensors", "exaone")
    expected = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.h.11.ln_1.weight": "model.layers.11.input_layernorm.weight",
        "transformer.h.11.attn.attention.out_proj.weight": "model.layers.11.self_attn.o_proj.weight",
        "transformer.h.11.mlp.c_fc_0.weight": "model.layers.11.mlp.gate_proj.weight",
        "transformer.h.11.mlp.c_fc_1.weight": "model.layers.11.mlp.up_proj.weight",
        "transformer.h.11.mlp.c_proj.weight": "model.layers.11.mlp.down_proj.weight",
        "transformer.ln_f.weight": "model.norm.weight",
    }
    for source, ours in expected.items():
        mapped = naming.to_unspool(source)
        assert mapped is not None and mapped.name == ours


def test_exaone_names_are_those_of_the_gguf_package() -> None:
    from gguf import MODEL_ARCH, get_tensor_name_map

    gguf_names = get_tensor_name_map(MODEL_ARCH.EXAONE, 2)
    gguf, exaone = naming_of("gguf", "qwen2"), naming_of("safetensors", "exaone")
    for row in exaone.rows:
        path = row.source.replace("{layer}", "1")
        mapped = gguf.to_unspool(f"{gguf_names.get_name(path)}.weight")
        assert mapped is not None and mapped.name == f"{row.unspool.replace('{layer}', '1')}.weight"


def test_gguf_llama_pairs_are_what_its_converter_stores() -> None:
    cfg = config()
    weight = torch.arange(48 * 48, dtype=torch.float32).reshape(48, 48)
    heads = cfg.num_attention_heads
    # The permutation of llama.cpp's convert_hf_to_gguf.py.
    stored = weight.reshape(heads, 2, 48 // heads // 2, 48).swapaxes(1, 2).reshape(48, 48)
    mapped = naming_of("gguf", "llama").to_unspool("blk.3.attn_q.weight")
    assert mapped is not None
    assert torch.equal(mapped.transform.to_unspool(stored, cfg), weight)
    assert torch.equal(mapped.transform.to_source(weight, cfg), stored)


@pytest.mark.parametrize(
    "name",
    ["model.layers.01.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scale", "model.layers.x.norm.weight", "x"],
)
def test_names_that_no_row_has_are_unknown(name: str) -> None:
    assert naming_of("safetensors", "llama").to_unspool(name) is None


def test_rotary_buffers_are_dropped_on_purpose() -> None:
    naming = naming_of("safetensors", "llama")
    assert naming.drops("model.layers.7.self_attn.rotary_emb.inv_freq")
    assert not naming.drops("model.layers.7.self_attn.q_proj.weight")


def test_unknown_architecture_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'mamba' is not converted from safetensors; known are llama"):
        naming_of("safetensors", "mamba")

"""The account: every tensor is used, dropped on purpose or new, and every disagreement is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unspool import UnspoolForCausalLM
from unspool.errors import UserError
from unspool.state import state_bytes
from unspool_conversion.mapped_tensors import check_tied_head
from unspool_conversion.options import ConvertOptions
from unspool_conversion.plan import ConversionPlan, plan_conversion
from unspool_conversion.sources import open_source

SaveTeacher = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def plan(directory: Path, **options: Any) -> ConversionPlan:
    return plan_conversion(
        open_source(str(directory)), ConvertOptions(source="", destination=Path("unused"), **options)
    )


def change_tensors(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_config(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_every_tensor_of_either_side_is_in_one_line(save_teacher: SaveTeacher) -> None:
    directory = save_teacher()
    found = plan(directory)
    stored = load_file(directory / "model.safetensors")
    assert {tensor.source for tensor in found.sourced} == stored.keys()
    assert {tensor.name: tensor.shape for tensor in found.tensors} == {
        name: tuple(parameter.shape) for name, parameter in UnspoolForCausalLM(found.config).named_parameters()
    }
    account = found.accounting()
    assert account["source_tensors"] == account["used"] == len(stored)
    assert account["used"] + len(account["new"]) == account["destination_tensors"]
    assert all(".far." in name for name in account["new"])


def test_sizes_are_those_of_the_model(save_teacher: SaveTeacher) -> None:
    found = plan(save_teacher(dtype=torch.bfloat16))
    model = UnspoolForCausalLM(found.config)
    new = sum(p.numel() for name, p in model.named_parameters() if ".far." in name)
    sizes = found.sizes()
    assert sizes["parameters"] == sum(p.numel() for p in model.parameters())
    assert sizes["new_parameters"] == new
    assert sizes["weight_bytes"] == 2 * (sizes["parameters"] - new) + 4 * new
    assert sizes["dtype"] == "bfloat16"
    assert sizes["state_bytes_per_session"] == state_bytes(found.config, torch.bfloat16)


def test_known_leftovers_are_dropped_with_a_reason(save_teacher: SaveTeacher) -> None:
    directory = save_teacher(tie_word_embeddings=True)

    def add_leftovers(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(directory, add_leftovers)
    assert plan(directory).dropped == {
        "model.layers.0.self_attn.rotary_emb.inv_freq": "follows from the configuration",
        "lm_head.weight": "tied to the embedding",
    }


def test_a_head_that_is_not_the_embedding_contradicts_the_tie(save_teacher: SaveTeacher) -> None:
    directory = save_teacher(tie_word_embeddings=False)
    change_config(directory, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        check_tied_head(open_source(str(directory)), plan(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"the weights lack model\.norm\.weight, which config\.json asks for"),
        (lambda t: t.pop("lm_head.weight"), r"the weights lack lm_head\.weight"),
        (lambda t: t.update({"model.extra.weight": torch.ones(2)}), r"the weights hold model\.extra\.weight"),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.bias": torch.ones(32)}),
            r"the weights hold model\.layers\.1\.self_attn\.q_proj\.bias, which the configuration has no place for",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(31)}),
            r"config\.json says .*hidden_size 32.*so model\.norm\.weight must be \[32\], but it is \[31\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    save_teacher: SaveTeacher, change: Callable[[Tensors], object], message: str
) -> None:
    directory = save_teacher()
    change_tensors(directory, change)
    with pytest.raises(UserError, match=message):
        plan(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hidden_size": 64},
            r"hidden_size 64.*model\.embed_tokens\.weight must be \[272, 64\], but it is \[272, 32\]",
        ),
        ({"vocab_size": 300}, r"vocab_size 300.*must be \[300, 32\]"),
        ({"num_hidden_layers": 2}, r"num_hidden_layers 2, but the weights hold layers up to 2, 3 in all"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 must be between 1 and 1024"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight must be \[32, 32\], but it is \[16, 32\]"),
        ({"num_key_value_heads": 3}, r"num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"attention_bias": True}, r"the weights lack model\.layers\.0\.self_attn\.q_proj\.bias"),
        ({"model_type": "exaone"}, r"no layer that this converter knows"),
    ],
)
def test_configurations_that_disagree_are_named(
    save_teacher: SaveTeacher, fields: dict[str, Any], message: str
) -> None:
    directory = save_teacher()
    change_config(directory, **fields)
    with pytest.raises(UserError, match=message):
        plan(directory)


@pytest.mark.parametrize(
    ("teacher", "options", "expected"),
    [
        ({}, {}, 260),
        ({}, {"preset": "liger-gla"}, 0),
        ({"model_type": "mistral", "sliding_window": 100}, {}, None),
        ({"model_type": "mistral", "sliding_window": 400}, {}, 260),
    ],
)
def test_exact_length(
    save_teacher: SaveTeacher, teacher: dict[str, Any], options: dict[str, Any], expected: int | None
) -> None:
    assert plan(save_teacher(**teacher), **options).exact_tokens == expected

"""Quantised checkpoints: the native kernels get the very bytes that they would make themselves, and damage is named."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from unspool import UnspoolForCausalLM, native
from unspool.errors import UserError
from unspool.executor import NativeExecutor, Quant, TorchExecutor
from unspool.loading import load
from unspool.local import LocalOptions, open_executor
from unspool.quantization import PACKED_FORMATS
from unspool_conversion.convert import convert
from unspool_conversion.options import ConvertOptions, PerLayer
from unspool_kernels.native.library import available
from unspool_kernels.native.packed import PackedMatrix

needs_native = pytest.mark.skipif(not available(), reason="the native library was not built")

QUANTS: tuple[Quant, ...] = ("bf16", "fp16", "int8", "int4")

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def make_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, byte_level_tokenizer: PreTrainedTokenizerFast
) -> MakeCheckpoint:
    """Converts one random teacher, with its head tied to the embedding or not; each result is made once."""
    made: dict[tuple[Quant, bool], Path] = {}

    def make(quant: Quant, tied: bool = False) -> Path:
        if (quant, tied) not in made:
            directory = tmp_path_factory.mktemp("checkpoint")
            save_teacher(directory / "teacher", byte_level_tokenizer, tied)
            made[quant, tied] = convert(
                ConvertOptions(
                    source=str(directory / "teacher"),
                    destination=directory / quant,
                    window=PerLayer(32, ()),
                    quant=quant,
                    max_shard_bytes=20_000,
                )
            ).destination
        return made[quant, tied]

    return make


def save_teacher(path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        attention_bias=True,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@pytest.fixture
def damaged(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> Path:
    """A copy of an int4 checkpoint to damage."""
    return Path(shutil.copytree(make_checkpoint("int4"), tmp_path / "damaged"))


def packed_tensors(value: Any) -> list[Tensor]:
    """Every tensor in the weights of a native decoder, in order."""
    if isinstance(value, PackedMatrix):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in packed_tensors(getattr(value, field.name))]
    return [tensor for item in value for tensor in packed_tensors(item)] if isinstance(value, list | tuple) else []


@needs_native
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quant", QUANTS)
def test_a_quantised_checkpoint_is_packed_to_the_bytes_of_the_float_one(
    make_checkpoint: MakeCheckpoint, quant: Quant, tied: bool
) -> None:
    format = PACKED_FORMATS[quant]
    expected = packed_tensors(native.pack(load(make_checkpoint("none", tied)).model, format).weights)
    found = packed_tensors(native.pack(load(make_checkpoint(quant, tied)).model, format).weights)
    assert len(expected) > 20
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@needs_native
@pytest.mark.parametrize("quant", QUANTS)
def test_it_runs_in_its_own_format_when_none_is_asked_for(make_checkpoint: MakeCheckpoint, quant: Quant) -> None:
    executor = open_executor(make_checkpoint(quant), LocalOptions())[1]
    reference = open_executor(make_checkpoint("none"), LocalOptions(quant=quant))[1]
    assert isinstance(executor, NativeExecutor) and isinstance(reference, NativeExecutor)
    assert executor.decoder.num_bytes == reference.decoder.num_bytes
    ours, theirs = (e.logits([[5, 6, 7]], e.new_pool(1), [0]) for e in (executor, reference))
    assert torch.equal(ours, theirs)


@needs_native
def test_a_coarser_format_is_taken_and_a_finer_one_refused(make_checkpoint: MakeCheckpoint) -> None:
    executor = open_executor(make_checkpoint("int8"), LocalOptions(quant="int4"))[1]
    assert isinstance(executor, NativeExecutor)
    with pytest.raises(UserError, match=r"quant bf16 is finer than the int8 weights of .*convert the source again"):
        open_executor(make_checkpoint("int8"), LocalOptions(quant="bf16"))


def test_plain_pytorch_runs_it_dequantised_and_says_so(
    make_checkpoint: MakeCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="unspool"):
        executor = open_executor(make_checkpoint("int8"), LocalOptions(backend="torch"))[1]
    assert isinstance(executor, TorchExecutor)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "int8" in message and "float32" in message
    assert executor.logits([[5, 6]], executor.new_pool(1), [0]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_loads_it_and_saves_it_as_floats(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("int4", tied=True), dtype=dtype)
    assert isinstance(model, UnspoolForCausalLM) and model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for name, p in model.named_parameters() if ".far." not in name} == {dtype}
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "floats").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_weights_are_near_the_float_ones(make_checkpoint: MakeCheckpoint) -> None:
    exact = load(make_checkpoint("none")).model.state_dict()
    for quant, error in (("int8", 0.01), ("int4", 0.12)):
        for name, tensor in load(make_checkpoint(quant)).model.state_dict().items():
            assert (tensor - exact[name]).norm() <= error * exact[name].norm(), name


def configure(path: Path, **block: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= block
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ({"quant_method": "gptq"}, "quant_method: 'gptq'"),
        ({"format": "int3"}, "format: 'int3'"),
        ({"format": None}, "format: None"),
        ({"group_size": 64}, "group_size: 64"),
        ({"bits": 4}, "bits"),
    ],
)
def test_a_block_that_is_not_ours_is_refused_by_field(damaged: Path, block: dict[str, Any], field: str) -> None:
    configure(damaged, **block)
    with pytest.raises(UserError, match=rf"^{damaged}/config\.json: .*quantization_config\.{field}"):
        load(damaged)


def change_weights(path: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> str:
    """Replaces or removes one stored tensor; returns the name of its file."""
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    file = path / index["weight_map"][name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    else:
        del index["weight_map"][name]
        index_file.write_text(json.dumps(index))
    save_file(tensors, file, metadata={"format": "pt"})
    return str(file.name)


@pytest.mark.parametrize("part", ["weight_scale", "weight_minimum"])
def test_a_missing_scale_is_named_with_its_file(damaged: Path, part: str) -> None:
    name = f"model.layers.1.mlp.down_proj.{part}"
    file = change_weights(damaged, name, lambda tensor: None)
    with pytest.raises(UserError, match=rf"^{damaged}/{file}: has no {name}, .*format int4.*convert the model again$"):
        load(damaged)
    with pytest.raises(ValueError, match=rf"{name} is missing"):
        AutoModelForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale", lambda tensor: tensor[:-1].clone()),
        ("model.layers.0.mlp.up_proj.weight_scale", lambda tensor: tensor.float()),
        ("model.layers.0.mlp.up_proj.weight", lambda tensor: tensor[:, :-1].contiguous()),
        ("model.embed_tokens.weight", lambda tensor: tensor.float()),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_named_with_its_file(
    damaged: Path, name: str, change: Callable[[Tensor], Tensor]
) -> None:
    file = change_weights(damaged, name, change)
    with pytest.raises(UserError, match=rf"^{damaged}/{file}: {name} is .*format int4.*convert the model again$"):
        load(damaged)


def test_a_float_checkpoint_that_claims_a_format_is_refused(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    path = Path(shutil.copytree(make_checkpoint("none"), tmp_path / "claims"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "unspool", "format": "int8", "group_size": 32}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="format int8"):
        load(path)

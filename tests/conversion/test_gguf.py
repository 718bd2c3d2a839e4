"""GGUF files as sources, crafted with the gguf package's own writer; transformers' own GGUF loader is the oracle."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from unspool.errors import UserError
from unspool_conversion.mapped_tensors import MappedTensors
from unspool_conversion.options import ConvertOptions
from unspool_conversion.plan import plan_conversion
from unspool_conversion.sources import open_source

WriteGGUF = Callable[..., Path]
VOCAB, HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 259, 64, 4, 2, 2, 96
QUANTISED = gguf.GGMLQuantizationType.Q8_0


def tensors_of(architecture: str, *, tied: bool, head_dim: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        block = {
            "attn_norm.weight": (HIDDEN,),
            "attn_q.weight": (HEADS * head_dim, HIDDEN),
            "attn_k.weight": (KV_HEADS * head_dim, HIDDEN),
            "attn_v.weight": (KV_HEADS * head_dim, HIDDEN),
            "attn_output.weight": (HIDDEN, HEADS * head_dim),
            "ffn_norm.weight": (HIDDEN,),
            "ffn_gate.weight": (INNER, HIDDEN),
            "ffn_up.weight": (INNER, HIDDEN),
            "ffn_down.weight": (HIDDEN, INNER),
        }
        if architecture == "qwen2":
            block |= {f"attn_{part}.bias": block[f"attn_{part}.weight"][:1] for part in "qkv"}
        if architecture == "qwen3":
            block |= {"attn_q_norm.weight": (head_dim,), "attn_k_norm.weight": (head_dim,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    alphabet = sorted(bytes_to_unicode().values())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*alphabet, "ab", "<|im_start|>", "<|im_end|>"])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL] * 2)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(258)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Writes a random model: architecture, stored type of matrices, tensors to add, metadata to add."""

    def write(
        architecture: str = "llama",
        *,
        kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
        tied: bool = True,
        head_dim: int = 16,
        extra_tensors: dict[str, Any] | None = None,
        extra_fields: dict[str, Any] | None = None,
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_name("Tiny")
        writer.add_license("apache-2.0")
        writer.add_block_count(LAYERS)
        writer.add_context_length(512)
        writer.add_embedding_length(HIDDEN)
        writer.add_feed_forward_length(INNER)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_rope_freq_base(20000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(VOCAB)
        if architecture == "llama":
            writer.add_rope_dimension_count(head_dim)
        if architecture == "qwen3":
            writer.add_key_length(head_dim)
            writer.add_value_length(head_dim)
        add_tokenizer(writer)
        for name, value in (extra_fields or {}).items():
            writer.add_key_value(name, value, _field_type(value))
        generator = np.random.default_rng(0)
        for name, shape in tensors_of(architecture, tied=tied, head_dim=head_dim).items():
            values = generator.normal(size=shape).astype(np.float32)
            stored = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)
        for name, values in (extra_tensors or {}).items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def _field_type(value: Any) -> gguf.GGUFValueType:
    kinds = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32, int: gguf.GGUFValueType.UINT32}
    return kinds[type(value)]


def converted(path: Path) -> dict[str, torch.Tensor]:
    source = open_source(str(path))
    plan = plan_conversion(source, ConvertOptions(source=str(path), destination=Path("unused")))
    mapped = MappedTensors(source, plan)
    return {tensor.name: mapped.load(tensor.name) for tensor in plan.sourced}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type_reads_as_transformers_reads_it(write_gguf: WriteGGUF, kind: str) -> None:
    path = write_gguf(kind=gguf.GGMLQuantizationType[kind])
    teacher = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).state_dict()
    for name, tensor in converted(path).items():
        assert torch.equal(tensor.float(), teacher[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("architecture", "head_dim"), [("llama", 16), ("qwen2", 16), ("qwen3", 128)])
def test_every_architecture_reads_as_transformers_reads_it(
    write_gguf: WriteGGUF, architecture: str, head_dim: int, tied: bool
) -> None:
    path = write_gguf(architecture, tied=tied, head_dim=head_dim)
    teacher = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    ours, theirs = converted(path), dict(teacher.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_channels_of_a_head_are_read_from_the_file(write_gguf: WriteGGUF) -> None:
    ours = converted(write_gguf("qwen3", head_dim=32))  # transformers would take qwen3's 128 for granted
    assert ours["model.layers.0.self_attn.q_proj.weight"].shape == (HEADS * 32, HIDDEN)


def test_a_llama_with_a_window_is_a_mistral(write_gguf: WriteGGUF) -> None:
    source = open_source(str(write_gguf(extra_fields={"llama.attention.sliding_window": 48})))
    assert source.config["model_type"] == "mistral"
    options = ConvertOptions(source="", destination=Path("unused"))
    specs = plan_conversion(source, options).config.mixer_specs()
    assert [(spec.join, spec.window, spec.sinks) for spec in specs] == [("window", 48, 0)] * LAYERS


def test_attention_biases_of_a_llama_are_found_and_permuted(write_gguf: WriteGGUF) -> None:
    sizes = {"attn_q": HIDDEN, "attn_k": 32, "attn_v": 32, "attn_output": HIDDEN}
    biases = {
        f"blk.{layer}.{part}.bias": np.arange(size, dtype=np.float32)
        for layer in range(2)
        for part, size in sizes.items()
    }
    ours = converted(write_gguf(extra_tensors=biases))
    key = ours["model.layers.0.self_attn.k_proj.bias"]
    assert key.tolist()[:16] == [*range(0, 16, 2), *range(1, 16, 2)]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequency_divisors_become_llama3_parameters(write_gguf: WriteGGUF, factor: float) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 20000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(head_dim=16, max_position_embeddings=131072, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / 20000.0 ** (torch.arange(0, 16, 2) / 16)
    source = open_source(str(write_gguf(extra_tensors={"rope_freqs.weight": (plain / scaled).numpy()})))
    assert source.config["rope_parameters"] == pytest.approx(rope)
    plan = plan_conversion(source, ConvertOptions(source="", destination=Path("unused")))
    assert plan.dropped == {"rope_freqs.weight": "follows from the configuration"}


def test_divisors_of_another_rule_are_refused(write_gguf: WriteGGUF) -> None:
    path = write_gguf(extra_tensors={"rope_freqs.weight": np.linspace(1, 4, 8, dtype=np.float32)})
    with pytest.raises(UserError, match="does not follow Llama 3's rule"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"llama.rope.scaling.type": "none"}, {"rope_type": "default"}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0},
            {"rope_type": "linear", "factor": 2.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
    ],
)
def test_frequency_scaling(write_gguf: WriteGGUF, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    rope = open_source(str(write_gguf(extra_fields=fields))).config["rope_parameters"]
    assert rope == {"rope_theta": 20000.0} | expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"llama.expert_count": 8}, "mixtures of experts"),
        ({"llama.attn_logit_softcapping": 50.0}, r"llama\.attn_logit_softcapping is not known"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.attention.value_length": 8}, "attention.value_length is 8"),
        ({"split.count": 3}, "one part of a split file.*--merge"),
    ],
)
def test_what_cannot_be_represented_is_named(write_gguf: WriteGGUF, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_source(str(write_gguf(extra_fields=fields)))


def test_unknown_architectures_are_named(write_gguf: WriteGGUF) -> None:
    with pytest.raises(UserError, match=r"general\.architecture is 'mamba'; this converter reads"):
        open_source(str(write_gguf("mamba")))


@pytest.mark.parametrize("kept", [0, 3, 20, 4000, 0.5, 0.999])
def test_truncated_files_are_named(write_gguf: WriteGGUF, kept: float) -> None:
    path = write_gguf(kind=QUANTISED)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(int(kept * size) if isinstance(kept, float) else kept)
    with pytest.raises(UserError, match=r"model\.gguf \(\d+ bytes\) is no GGUF file, or truncated or damaged"):
        open_source(str(path))


def test_tokenizer_files_behave_like_the_file_itself(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    path, directory = write_gguf(), tmp_path / "files"
    directory.mkdir()
    open_source(str(path)).write_side_files(directory)
    expected, found = (
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name),
        AutoTokenizer.from_pretrained(directory),
    )
    messages = [{"role": "user", "content": "Hello  there, 123!"}]
    assert found.apply_chat_template(messages, tokenize=False) == expected.apply_chat_template(messages, tokenize=False)
    for text in ("Hello  there, 123!", "<|im_start|>x<|im_end|>", " \n\tnaïve"):
        assert found(text).input_ids == expected(text).input_ids
    assert found.special_tokens_map == expected.special_tokens_map


def test_a_tokenizer_that_transformers_lacks_is_named(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    source = open_source(str(write_gguf(extra_fields={"tokenizer.ggml.unknown_token_id": 9999})))
    with pytest.raises(UserError, match=r"model\.gguf: transformers cannot read its tokenizer"):
        source.write_side_files(tmp_path)


def test_end_of_turn_also_ends_a_generation(write_gguf: WriteGGUF, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    path, directory = write_gguf(extra_fields={"tokenizer.ggml.eot_token_id": 257}), tmp_path / "files"
    directory.mkdir()
    open_source(str(path)).write_side_files(directory)
    assert GenerationConfig.from_pretrained(directory).eos_token_id == [258, 257]

"""The quick start's real GGUF file against transformers' own GGUF loader: weights, configuration, tokenizer."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from unspool_conversion.mapped_tensors import MappedTensors
from unspool_conversion.options import ConvertOptions
from unspool_conversion.plan import plan_conversion
from unspool_conversion.sources import open_source

SAME_FIELDS = (
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
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def test_weights_and_configuration_equal_what_transformers_loads(smollm2_gguf: Path) -> None:
    teacher = AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    source = open_source(str(smollm2_gguf))
    plan = plan_conversion(source, ConvertOptions(source=str(smollm2_gguf), destination=Path("unused")))
    assert {name: getattr(plan.config, name) for name in SAME_FIELDS} == {
        name: getattr(teacher.config, name) for name in SAME_FIELDS
    }
    mapped, theirs = MappedTensors(source, plan), dict(teacher.named_parameters())
    assert {tensor.name for tensor in plan.sourced} == theirs.keys()
    for name, parameter in theirs.items():
        ours = mapped.load(name)
        assert ours.dtype == torch.float32
        assert torch.equal(ours, parameter), name


def test_tokenizer_equals_the_one_transformers_reads_from_the_file(smollm2_gguf: Path, tmp_path: Path) -> None:
    open_source(str(smollm2_gguf)).write_side_files(tmp_path)
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.chat_template == theirs.chat_template
    for text in (
        "Hello  world 123",
        "<|im_start|>user\nhi<|im_end|>",
        " déjà vu\n\t東京 😀",
        "def f(x):\n    return x",
    ):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)
    messages = [{"role": "user", "content": "What is a spool?"}]
    chat = ours.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert chat == theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2

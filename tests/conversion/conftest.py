"""Tiny random teachers of transformers' own classes, saved as real checkpoints with a real tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SaveTeacher = Callable[..., Path]

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and two special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: index for index, piece in enumerate([*alphabet, "<|start|>", "<|end|>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>")
    wrapped.chat_template = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
    return wrapped


@pytest.fixture
def save_teacher(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> SaveTeacher:
    """Makes a directory of a random model: model_type, dtype, shard size, and fields of its configuration."""

    def save(
        model_type: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **fields: Any
    ) -> Path:
        directory = tmp_path / f"teacher-{len(list(tmp_path.iterdir()))}"
        teacher = random_teacher(model_type, dtype, **fields)
        teacher.save_pretrained(directory, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(directory)
        (directory / "LICENSE").write_text("Do as you like.\n")
        return directory

    return save


def random_teacher(model_type: str, dtype: torch.dtype, **fields: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SIZES | fields)
    teacher: PreTrainedModel = AutoModelForCausalLM.from_config(config).to(dtype)
    for name, parameter in teacher.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    teacher.generation_config = GenerationConfig(eos_token_id=257, temperature=0.7, do_sample=True)
    return teacher


@pytest.fixture(scope="session")
def stored_tensors() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Every tensor of a directory of safetensors files, by name."""
    from safetensors.torch import load_file

    def load(directory: Path) -> dict[str, torch.Tensor]:
        loaded: dict[str, torch.Tensor] = {}
        for path in directory.glob("*.safetensors"):
            loaded |= load_file(path)
        return loaded

    return load


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 400 words, of thirteen kinds."""
    words = ["thread", "spool", "of", "any", "length", "is", "drawn", "from", "a", "state", "that", "never", "grows"]
    order = torch.randint(len(words), (400,), generator=torch.Generator().manual_seed(3)).tolist()
    path = tmp_path / "words.txt"
    path.write_text(" ".join(words[i] for i in order))
    return path

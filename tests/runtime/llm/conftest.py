"""The tiny chat model behind `unspool.LLM`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from unspool import LLM, UnspoolConfig, UnspoolForCausalLM


@pytest.fixture(scope="session")
def llm(chat_model: Path) -> Iterator[LLM]:
    with LLM(chat_model, max_slots=8) as opened:
        yield opened


@pytest.fixture
def open_llm(chat_model: Path) -> Iterator[Callable[..., LLM]]:
    """Opens models with options, and closes them after the test."""
    opened: list[LLM] = []

    def start(model: Path = chat_model, **options: Any) -> LLM:
        opened.append(LLM(model, **options))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture(scope="session")
def letters_only(llm: LLM) -> dict[int, float]:
    """A bias that leaves only tokens of plain letters and blanks, so that texts have no tokens of their own kind."""
    tokenizer = llm.tokenizer
    texts = {token: str(tokenizer.decode([token])) for token in range(len(tokenizer))}
    return {token: -100.0 for token, text in texts.items() if not (text.isascii() and text.replace(" ", "a").isalpha())}


@pytest.fixture(scope="session")
def blanks_in_front(
    metaspace_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    """A model whose tokenizer begins a text with a token of its own and drops its first blank."""
    path = tmp_path_factory.mktemp("models") / "metaspace"
    torch.manual_seed(2)
    config = UnspoolConfig(
        vocab_size=len(metaspace_tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.4,
        eos_token_id=metaspace_tokenizer.eos_token_id,
    )
    UnspoolForCausalLM(config).save_pretrained(path)
    metaspace_tokenizer.save_pretrained(path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    begin = tokenizer.bos_token_id
    assert begin is not None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save_pretrained(path)
    with LLM(path) as opened:
        yield opened


@pytest.fixture(scope="session")
def only_new_words(blanks_in_front: LLM) -> dict[int, float]:
    """A bias towards the tokens of that model that begin with a blank."""
    tokens = range(len(blanks_in_front.tokenizer))
    pieces = blanks_in_front.tokenizer.convert_ids_to_tokens(list(tokens))
    return {token: 100.0 for token in tokens if pieces[token].startswith("\u2581")}

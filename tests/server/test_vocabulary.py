"""Tokens as bytes, for the kinds of tokenizer that models come with."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unspool_server.vocabulary import TextOffsets, Vocabulary


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A vocabulary of marked words with bytes to fall back on, as Llama 2 and Mistral have it."""
    pieces = ["<unk>", "<s>", *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581", "\u2581cat", "cat", "s"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40))
def test_bytes_of_a_texts_tokens_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    vocabulary = Vocabulary(tokenizer)
    tokens = tokenizer.encode(text)
    assert b"".join(map(vocabulary.token_bytes, tokens)).decode() == tokenizer.decode(tokens)


def test_byte_tokens_are_named_by_their_bytes() -> None:
    vocabulary = Vocabulary(sentencepiece_like())
    assert vocabulary.token_bytes(2 + 0xE2) == b"\xe2" and vocabulary.token_text(2 + 0xE2) == "bytes:\\xe2"
    assert vocabulary.token_text(2 + 0x41) == "A"


def test_word_marks_are_blanks_and_special_tokens_their_names() -> None:
    tokenizer = sentencepiece_like()
    vocabulary = Vocabulary(tokenizer)
    assert vocabulary.token_text(tokenizer.convert_tokens_to_ids("\u2581cat")) == " cat"
    assert vocabulary.token_text(1) == "<s>" and vocabulary.is_special(1)


def test_row_that_no_token_uses_has_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert Vocabulary(tokenizer).token_text(len(tokenizer) + 5) == ""


@pytest.mark.parametrize("text", ["the café, Grüße", "日本語 and 🧵", "plain"])
def test_offsets_point_at_each_token_in_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    vocabulary = Vocabulary(tokenizer)
    offsets = TextOffsets(vocabulary, text)
    read = b""
    for token in tokenizer.encode(text):
        assert offsets.advance(token) == len(read.decode(errors="ignore"))
        read += vocabulary.token_bytes(token)
    assert read.decode() == text


def test_tokens_that_the_text_lacks_take_no_room_in_it() -> None:
    tokenizer = sentencepiece_like()
    offsets = TextOffsets(Vocabulary(tokenizer), "cat cats")
    tokens = ["<s>", "\u2581cat", "\u2581cat", "s"]
    assert [offsets.advance(tokenizer.convert_tokens_to_ids(token)) for token in tokens] == [0, 0, 3, 7]

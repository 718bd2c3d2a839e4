from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from unspool.errors import UserError
from unspool.requests import InvalidRequest
from unspool.text import TextStream, encode_prompt, render_chat

TOKENIZERS = ["byte_level_tokenizer", "metaspace_tokenizer", "byte_fallback_tokenizer"]

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "東京は日本の首都です。人口は約1400万人です。",
    "😀👩‍👩‍👧🇫🇷 flags, families and faces 😃",
    "combining e\u0301 a\u0308\u0323 and ﬁ ligatures, नमस्ते, สวัสดี",
    "  leading, doubled  and trailing spaces  ",
    "line\n\n\tbreaks\r\n",
    "",
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    found: PreTrainedTokenizerFast = request.getfixturevalue(request.param)
    return found


def stream_pieces(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def pieces_by_id(tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str]]:
    return sorted((token, piece) for piece, token in tokenizer.get_vocab().items())


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    text = tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_equals_decoding_at_once(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert "".join(stream_pieces(TextStream(tokenizer), tokens)) == decode(tokenizer, tokens)


@pytest.mark.parametrize("name", ["byte_level_tokenizer", "metaspace_tokenizer"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_stream_to_their_decoding(
    request: pytest.FixtureRequest, name: str, skip_special_tokens: bool, data: st.DataObject
) -> None:
    tokenizer = request.getfixturevalue(name)
    # Ids beyond the vocabulary happen: a model's embedding is often padded.
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=60))
    pieces = stream_pieces(TextStream(tokenizer, skip_special_tokens=skip_special_tokens), tokens)
    assert "".join(pieces) == decode(tokenizer, tokens, skip_special_tokens=skip_special_tokens)


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_stream_to_their_decoding(byte_level_tokenizer: PreTrainedTokenizerFast, data: st.DataObject) -> None:
    """Runs of damaged UTF-8, one byte a token, with special tokens in between."""
    pieces = [byte_level_tokenizer.encode(chr(code)) for code in (0x41, 0xE9, 0x2603, 0x1F600)]
    single = sorted({token for piece in pieces for token in piece} | set(byte_level_tokenizer.all_special_ids))
    single += [token for token, piece in pieces_by_id(byte_level_tokenizer) if piece in "âĺĥðŁĺĢÃ"]
    tokens = data.draw(st.lists(st.sampled_from(single), max_size=60))
    streamed = "".join(stream_pieces(TextStream(byte_level_tokenizer), tokens))
    assert streamed == decode(byte_level_tokenizer, tokens)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=40))
def test_any_text_survives_a_byte_fallback_tokenizer(
    byte_fallback_tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    tokens = byte_fallback_tokenizer.encode(text)
    streamed = "".join(stream_pieces(TextStream(byte_fallback_tokenizer), tokens))
    assert streamed == decode(byte_fallback_tokenizer, tokens)


def test_an_incomplete_character_is_held_until_it_is_complete(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.encode("ab😀cd☃e")
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert all("\ufffd" not in stream.push(token) for token in tokens)


def test_text_comes_out_as_soon_as_it_is_certain(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = byte_level_tokenizer.encode("The quick 😀 fox")
    stream, seen = TextStream(byte_level_tokenizer), ""
    for count, token in enumerate(tokens, start=1):
        seen += stream.push(token)
        assert seen == decode(byte_level_tokenizer, tokens[:count]).rstrip("\ufffd")


def test_an_incomplete_character_at_the_end_is_written_by_finish(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = byte_level_tokenizer.encode("a😀")
    stream = TextStream(byte_level_tokenizer)
    assert "".join(stream.push(token) for token in tokens[:-1]) == "a"
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_special_tokens_do_not_change_the_spaces_around_them(metaspace_tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = metaspace_tokenizer.encode("again"), metaspace_tokenizer.encode("never")
    tokens = [*first, *[metaspace_tokenizer.eos_token_id] * 40, *second]
    assert "".join(stream_pieces(TextStream(metaspace_tokenizer), tokens)) == "again never"


@pytest.mark.parametrize("name", ["metaspace_tokenizer", "byte_fallback_tokenizer"])
def test_context_keeps_the_first_space(request: pytest.FixtureRequest, name: str) -> None:
    tokenizer = request.getfixturevalue(name)
    prompt, continuation = tokenizer.encode("the"), tokenizer.encode("hello")
    assert "".join(stream_pieces(TextStream(tokenizer), continuation)) == "hello"
    assert "".join(stream_pieces(TextStream(tokenizer, context=prompt), continuation)) == " hello"


def test_a_character_begun_in_the_context_comes_out_when_complete(
    byte_level_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens = byte_level_tokenizer.encode("a😀b")
    assert "".join(stream_pieces(TextStream(byte_level_tokenizer, context=tokens[:2]), tokens[2:])) == "😀b"


def test_the_decoder_never_sees_more_than_a_bounded_window(
    byte_level_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    original = byte_level_tokenizer.decode

    def measured(tokens: list[int], **options: Any) -> str:
        lengths.append(len(tokens))
        text = original(tokens, **options)
        assert isinstance(text, str)
        return text

    monkeypatch.setattr(byte_level_tokenizer, "decode", measured)
    broken = byte_level_tokenizer.convert_tokens_to_ids("Ģ")
    tokens = [*[broken] * 500, *byte_level_tokenizer.all_special_ids * 100, *byte_level_tokenizer.encode("text " * 300)]
    stream_pieces(TextStream(byte_level_tokenizer), tokens)
    assert max(lengths) <= 24
    assert len(lengths) <= 4 * len(tokens)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [(["fox"], "The quick brown "), (["n f", "own"], "The quick br"), (["lazy dog.", "absent"], None), ([], None)],
)
def test_text_ends_before_a_stop_string(
    tokenizer: PreTrainedTokenizerFast, stop: list[str], expected: str | None
) -> None:
    text = "The quick brown fox jumps over the lazy do"
    stream = TextStream(tokenizer, stop)
    streamed = "".join(stream_pieces(stream, tokenizer.encode(text)))
    assert stream.stopped == (expected is not None)
    assert streamed == (text if expected is None else expected)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("abé😀", max_size=30), stop=st.lists(st.text("abé😀", min_size=1, max_size=4), max_size=3))
def test_no_text_at_or_after_a_stop_string_comes_out(
    byte_level_tokenizer: PreTrainedTokenizerFast, text: str, stop: list[str]
) -> None:
    stream = TextStream(byte_level_tokenizer, stop)
    streamed = "".join(stream_pieces(stream, byte_level_tokenizer.encode(text)))
    ends = [(text.find(string) + len(string), -len(string)) for string in stop if string in text]
    end, length = min(ends, default=(len(text), 0))
    assert stream.stopped == bool(ends)
    assert streamed == text[: end + length]


def test_a_stop_string_across_tokens_never_leaks_its_beginning(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(byte_level_tokenizer, ["\n\nHuman:"])
    tokens = byte_level_tokenizer.encode("fine.\n\nHum") + byte_level_tokenizer.encode("an: more")
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) == "fine."
    assert stream.stopped
    assert stream.push(tokens[0]) == stream.finish() == ""


def test_an_empty_stop_string_is_refused(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        TextStream(byte_level_tokenizer, [""])


def test_a_chat_is_rendered_by_the_models_template(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Bonjour 😀"}]
    expected = byte_level_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    tokens = render_chat(byte_level_tokenizer, messages)
    assert tokens == expected
    assert decode(byte_level_tokenizer, tokens, skip_special_tokens=False).endswith("<|start|>assistant\n")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "at least one"),
        ([{"role": "tool", "content": "x"}], "unknown role tool"),
        ([{"role": "user"}], "content"),
        ([{"role": 3, "content": "x"}], "template refuses"),
        ([{"role": "user", "content": "\ud83d"}], "surrogate"),
    ],
)
def test_messages_that_the_template_refuses_are_invalid(
    byte_level_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, Any]], reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        render_chat(byte_level_tokenizer, messages)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("template", "reason"),
    [("{{ 1/0 }}", "division by zero"), ("{{ [][3].x }}", "no element"), ("{% if %}", "Expected")],
)
def test_whatever_a_template_raises_makes_the_messages_invalid(
    byte_level_tokenizer: PreTrainedTokenizerFast, template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_level_tokenizer, "chat_template", template)
    with pytest.raises(InvalidRequest, match=reason) as caught:
        render_chat(byte_level_tokenizer, [{"role": "user", "content": "x"}])
    assert caught.value.field == "messages"


def test_a_model_without_a_template_cannot_chat(metaspace_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="no chat template"):
        render_chat(metaspace_tokenizer, [{"role": "user", "content": "x"}])


def test_a_prompt_is_encoded_as_the_tokenizer_does_by_default(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(tokenizer, "The quick fox") == tokenizer.encode("The quick fox")


def test_a_prompt_that_is_not_unicode_is_invalid(byte_level_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        encode_prompt(byte_level_tokenizer, "a\udc80")

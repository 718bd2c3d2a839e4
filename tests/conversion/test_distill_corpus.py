"""Training text: where it comes from, how it fills windows, and which of its tokens are trained on."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from unspool.errors import UserError
from unspool_conversion.distillation.conversations import conversation_pieces
from unspool_conversion.distillation.corpus import check_tokenizer, read_corpus
from unspool_conversion.texts import Record

END = 257
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "so long"},
]
CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_lines(path: Path, *objects: Any) -> Path:
    data = "".join(json.dumps(each) + "\n" for each in objects).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def chat_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Any:
    template, tokenizer.chat_template = tokenizer.chat_template, CHATML
    yield tokenizer
    tokenizer.chat_template = template


def test_documents_fill_windows_with_an_end_token_between(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "a.jsonl.gz", {"text": "abcdef"}, {"text": "ghi"}, {"text": "jkl"})
    corpus = read_corpus([str(path)], tokenizer, sequences=9, length=4, held_out=1)
    ids = [*tokenizer.encode("abcdef"), END, *tokenizer.encode("ghi"), END, *tokenizer.encode("jkl")]
    assert corpus.tokens.flatten().tolist() == ids[:12]
    assert bool(corpus.trained.all()) and corpus.num_training == 2


def test_several_texts_take_turns(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("aaaaaaaa")
    (tmp_path / "b.txt").write_text("bbbb")
    corpus = read_corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tokenizer, 4, 2, 1)
    assert tokenizer.batch_decode(corpus.tokens) == ["aa", "bb", "aa", "bb"]
    corpus = read_corpus([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tokenizer, 6, 2, 1)
    assert tokenizer.batch_decode(corpus.tokens) == ["aa", "bb", "aa", "bb", "aa", "aa"]


def test_only_what_the_assistant_says_is_trained_on(tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write_lines(tmp_path / "chat.jsonl", {"messages": CHAT})
    pieces = conversation_pieces(Record({"messages": CHAT}, "here"), chat_tokenizer)
    texts = [(chat_tokenizer.decode(piece.tokens), piece.trained) for piece in pieces]
    assert texts == [
        ("<user>hi|<assistant>", False),
        ("hello|", True),
        ("<user>bye|<assistant>", False),
        ("so long|", True),
    ]
    corpus = read_corpus([str(path)], chat_tokenizer, 9, 11, 1)
    trained = [chat_tokenizer.decode(row[mask]) for row, mask in zip(corpus.tokens, corpus.trained, strict=True)]
    assert "".join(trained) == "hello|so long|"
    assert all(bool(mask.any()) for mask in corpus.trained)


def test_what_follows_the_last_answer_is_left_out(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    pieces = conversation_pieces(Record({"messages": CHAT[:3]}, "here"), chat_tokenizer)
    assert [piece.trained for piece in pieces] == [False, True]


def test_a_dataset_is_read_by_its_name(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "train.jsonl", {"text": "abcd"}, {"text": "efgh"})
    write_lines(folder / "test.jsonl", {"text": "ijklmnop"})
    corpus = read_corpus([f"datasets:{folder}"], tokenizer, 2, 4, 1)
    assert tokenizer.decode(corpus.tokens[0]) == "abcd"
    corpus = read_corpus([f"datasets:{folder}:test"], tokenizer, 2, 4, 1)
    assert tokenizer.decode(corpus.tokens[0]) == "ijkl"
    with pytest.raises(UserError, match=r"--text datasets:.*:validation: .*validation"):
        read_corpus([f"datasets:{folder}:validation"], tokenizer, 2, 4, 1)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", r'line 1: "messages" is not a list of objects'),
        ([{"role": "user"}], r'line 1: "messages" is not a list of objects'),
        ([{"role": "user", "content": "hi"}], r"line 1: no message has the role assistant"),
    ],
)
def test_malformed_conversations_are_named(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, messages: Any, message: str
) -> None:
    path = write_lines(tmp_path / "chat.jsonl", {"messages": messages})
    with pytest.raises(UserError, match=message):
        read_corpus([str(path)], chat_tokenizer, 2, 4, 1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"the model has no chat template; use plain text"),
        ("{{ raise_exception('roles must alternate') }}", r"chat template refuses the conversation \(roles must"),
        ("{{ messages | length }}{{ messages[-1]['content'] }}", r"chat template writes earlier turns anew"),
    ],
)
def test_a_template_that_cannot_serve_is_named(
    chat_tokenizer: PreTrainedTokenizerFast, template: str | None, message: str
) -> None:
    chat_tokenizer.chat_template = template
    with pytest.raises(UserError, match=message):
        conversation_pieces(Record({"messages": CHAT}, "here"), chat_tokenizer)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"", r"a\.txt is empty; give it text"),
        ("a.jsonl", b"\n", r"a\.jsonl is empty; give it text"),
        ("a.txt", b"\xff\xfe", r"cannot be read as UTF-8 text"),
        ("a.txt", b"abcdef", r"the text fills 1 windows of 4 tokens, and 1 are held out"),
        ("a.jsonl", b'{"words": 1}\n', r'line 1 is not an object with a "text" string'),
    ],
)
def test_text_that_does_not_serve_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_corpus([str(tmp_path / name)], tokenizer, 4, 4, 1)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    check_tokenizer(tokenizer, 258)
    with pytest.raises(UserError, match="the tokenizer has token 257 and the model's vocab_size is 200"):
        check_tokenizer(tokenizer, 200)

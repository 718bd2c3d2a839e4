"""Calibration text: file kinds, damage, and cutting into sequences."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from unspool.errors import UserError
from unspool_conversion import texts
from unspool_conversion.options import CalibrationOptions
from unspool_conversion.texts import calibration_tokens, cut_documents, pack_documents, read_documents

DOCUMENTS = ["alpha beta", "gämma\ndelta", "epsilon"]
END = 257


def write(path: Path, text: str) -> Path:
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_json_lines_are_documents(tmp_path: Path, name: str) -> None:
    lines = "\n\n".join(json.dumps({"text": text, "id": 1}) for text in DOCUMENTS)
    assert list(read_documents(write(tmp_path / name, lines), 1000)) == DOCUMENTS


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_plain_text_is_one_document(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\n".join(DOCUMENTS))
    assert list(read_documents(path, 1000)) == ["\n".join(DOCUMENTS)]
    assert list(read_documents(path, 7)) == ["alpha b"]


def test_reading_stops_when_there_is_enough(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "12345"}\n{"text": "67890"}\nnot json\n')
    assert list(read_documents(path, 10)) == ["12345", "67890"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r'line 2 is not an object with a "text" string'),
        ("a.jsonl", b"[1]\n", r"line 1 is not an object"),
        ("a.jsonl", b'{"text"\n', r"line 1 is not valid JSON"),
        ("a.txt", b"\xff\xfe\xfa", r"cannot be read as UTF-8 text"),
        ("a.txt.gz", b"plain", r"cannot be read as UTF-8 text"),
        ("a.txt.gz", gzip.compress(b"x" * 100)[:-12], r"cannot be read as UTF-8 text"),
        ("a.parquet", b"", r"is neither \.txt nor \.jsonl"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UserError, match=message):
        list(read_documents(path, 1000))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt does not exist"):
        list(read_documents(tmp_path / "a.txt", 1000))


def test_endless_lines_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MAX_LINE_BYTES", 20)
    path = write(tmp_path / "a.jsonl", json.dumps({"text": "x" * 100}))
    with pytest.raises(UserError, match="line 1 has more than 20 bytes"):
        list(read_documents(path, 1000))


def test_packing_joins_documents_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    packed = pack_documents(["abcd", "efg", "hi"], tokenizer, sequences=9, length=5)
    first, second = packed.tolist()
    assert first == [*tokenizer.encode("abcd"), END]
    assert second == [*tokenizer.encode("efg"), END, *tokenizer.encode("h")]


def test_cutting_keeps_documents_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = cut_documents(["abcdefg", "xy", "hijk"], tokenizer, sequences=9, length=3)
    assert cut.tolist() == [tokenizer.encode(text) for text in ("abc", "def", "hij")]


@pytest.mark.parametrize("cut", [cut_documents, pack_documents])
def test_no_more_sequences_than_asked_for_and_no_document_too_many(
    tokenizer: PreTrainedTokenizerFast, cut: Callable[..., object]
) -> None:
    consumed = []

    def documents() -> object:
        for text in ("abcdefgh", "ijklmnop", "qrst"):
            consumed.append(text)
            yield text

    assert tuple(getattr(cut(documents(), tokenizer, 2, 4), "shape")) == (2, 4)  # noqa: B009
    assert consumed == ["abcdefgh"]


@pytest.mark.parametrize("cut", [cut_documents, pack_documents])
def test_too_little_text_is_named(tokenizer: PreTrainedTokenizerFast, cut: Callable[..., object]) -> None:
    with pytest.raises(UserError, match="does not fill one sequence of 50 tokens"):
        cut(["short"], tokenizer, 2, 50)


def test_the_shipped_text_fills_sequences(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = calibration_tokens(CalibrationOptions(sequences=4, length=1024), tokenizer)
    assert tokens.shape == (4, 1024)

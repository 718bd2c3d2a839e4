"""Text to calibrate, verify and train on: reads documents from files of bounded size and cuts them into sequences."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unspool.errors import UserError
from unspool_conversion.options import CalibrationOptions

MAX_LINE_BYTES = 16 * 1024 * 1024
CHARACTERS_PER_TOKEN = 16
"""Text read per token wanted: more than any tokenizer needs on ordinary text."""
_TEXT = ".txt"
_JSON_LINES = (".jsonl", ".json")


def calibration_tokens(options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Token ids [sequences, length], int64; fewer sequences when the text is short.

    Raises UserError when the text cannot be read or has not even one sequence.
    """
    limit = options.num_tokens * CHARACTERS_PER_TOKEN
    documents = read_documents(options.text, limit) if options.text is not None else [_shipped_text()[:limit]]
    return pack_documents(documents, tokenizer, options.sequences, options.length)


def text_name(options: CalibrationOptions) -> str:
    """What to call the text in a report."""
    return options.text.name if options.text is not None else "the text shipped with Unspool"


class Record(NamedTuple):
    """One JSON object of a file, or a whole plain text as its `text`, and where it stands."""

    fields: dict[str, Any]
    where: str

    def text(self) -> str:
        """Raises UserError when the object has no text."""
        text = self.fields.get("text")
        if not isinstance(text, str):
            raise UserError(f'{self.where} is not an object with a "text" string')
        return text


def read_documents(path: Path, max_characters: int) -> Iterator[str]:
    """The documents of a .txt file (one) or a .jsonl file (each line's `text`), also with .gz, up to a total length.

    Raises UserError when the file is missing, of another kind, or malformed.
    """
    characters = 0
    for record in read_records(path, max_characters):
        text = record.text()
        yield text
        characters += len(text)
        if characters >= max_characters:
            return


def read_records(path: Path, max_characters: int) -> Iterator[Record]:
    """The records of a .txt file (one, cut off at that length) or a .jsonl file (one a line), also with .gz.

    Raises UserError as `read_documents` does, except for what the objects hold.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; pass a .txt or .jsonl file, which may be gzipped")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        with _open(path) as stream:
            if kind in _JSON_LINES:
                yield from _json_lines(stream, path)
            elif kind == _TEXT:
                text = io.TextIOWrapper(stream, encoding="utf-8").read(max_characters)
                yield Record({"text": text}, str(path))
            else:
                raise UserError(f"{path} is neither .txt nor .jsonl (nor one of these with .gz)")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from error


def cut_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> Tensor:
    """Cuts each document by itself into sequences [n, length], n <= sequences; the rest of each is dropped.

    A tokenizer that begins every text with its beginning token begins every sequence with it. Raises UserError when no
    document is long enough.
    """
    start = start_tokens(tokenizer)
    rows: list[list[int]] = []
    for document in documents:
        rows += _cut(tokenize(document, tokenizer), start, length)
        if len(rows) >= sequences:
            break
    return _stack(rows[:sequences], length)


def pack_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> Tensor:
    """As `cut_documents`, but of one text: the documents with an end-of-text token between two."""
    start = start_tokens(tokenizer)
    stream: list[int] = []
    for document in documents:
        if stream and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += tokenize(document, tokenizer)
        if len(stream) >= sequences * length:
            break
    return _stack(_cut(stream, start, length)[:sequences], length)


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a text alone, without those that begin or end one."""
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer begins every text with."""
    begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    return [tokenizer.bos_token_id] if begins else []


def _cut(tokens: list[int], start: list[int], length: int) -> list[list[int]]:
    body = length - len(start)
    if body < 1:
        return []
    return [start + tokens[i : i + body] for i in range(0, len(tokens) - body + 1, body)]


def _stack(rows: list[list[int]], length: int) -> Tensor:
    if not rows:
        raise UserError(
            f"the text does not fill one sequence of {length} tokens; use a longer text, or shorter sequences"
        )
    return torch.tensor(rows, dtype=torch.int64)


def _shipped_text() -> str:
    return (files("unspool_conversion") / "data" / "calibration.txt").read_text(encoding="utf-8")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _json_lines(stream: BinaryIO, path: Path) -> Iterator[Record]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{where} has more than {MAX_LINE_BYTES} bytes; split it")
        if line.strip():
            yield Record(_json_object(line, where), where)


def _json_object(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} is not an object")
    return value

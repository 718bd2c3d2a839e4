"""Text to calibrate and verify on: reads documents from files of bounded size and cuts them into sequences."""

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import BinaryIO, cast

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


def read_documents(path: Path, max_characters: int) -> Iterator[str]:
    """The documents of a .txt file (one) or a .jsonl file (each line's `text`), also with .gz, up to a total length.

    Raises UserError when the file is missing, of another kind, or malformed.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; pass a .txt or .jsonl file, which may be gzipped")
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    try:
        with _open(path) as stream:
            if kind in _JSON_LINES:
                yield from _json_lines(stream, path, max_characters)
            elif kind == _TEXT:
                yield io.TextIOWrapper(stream, encoding="utf-8").read(max_characters)
            else:
                raise UserError(f"{path} is neither .txt nor .jsonl (nor one of these with .gz)")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from error


def cut_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> Tensor:
    """Cuts each document by itself into sequences [n, length], n <= sequences; the rest of each is dropped.

    A tokenizer that begins every text with its beginning token begins every sequence with it. Raises UserError when no
    document is long enough.
    """
    start = _start_tokens(tokenizer)
    rows: list[list[int]] = []
    for document in documents:
        rows += _cut(_tokens(document, tokenizer), start, length)
        if len(rows) >= sequences:
            break
    return _stack(rows[:sequences], length)


def pack_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> Tensor:
    """As `cut_documents`, but of one text: the documents with an end-of-text token between two."""
    start = _start_tokens(tokenizer)
    stream: list[int] = []
    for document in documents:
        if stream and tokenizer.eos_token_id is not None:
            stream.append(tokenizer.eos_token_id)
        stream += _tokens(document, tokenizer)
        if len(stream) >= sequences * length:
            break
    return _stack(_cut(stream, start, length)[:sequences], length)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
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


def _json_lines(stream: BinaryIO, path: Path, max_characters: int) -> Iterator[str]:
    characters = 0
    for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{path}, line {number} has more than {MAX_LINE_BYTES} bytes; split it")
        if not line.strip():
            continue
        text = _text_field(line, f"{path}, line {number}")
        yield text
        characters += len(text)
        if characters >= max_characters:
            return


def _text_field(line: bytes, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error})") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} is not an object with a "text" string')
    return text

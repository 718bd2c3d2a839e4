"""Training text: sources by their specification, packed into windows of one length, with the tokens to train on."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unspool.errors import UserError
from unspool_conversion.distillation.conversations import Piece, conversation_pieces
from unspool_conversion.texts import CHARACTERS_PER_TOKEN, Record, read_records, start_tokens, tokenize

_DATASETS = "datasets:"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """Windows of text: tokens [N, T] int64, and which of them [N, T] are to be predicted. The last `held_out` windows
    are only measured on."""

    tokens: Tensor
    trained: Tensor
    held_out: int

    @property
    def num_training(self) -> int:
        return self.tokens.shape[0] - self.held_out

    def training(self, sequences: int | None) -> Tensor:
        """At most that many training windows [N, T]."""
        return self.tokens[: min(sequences or self.num_training, self.num_training)]


def read_corpus(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequences: int, length: int, held_out: int
) -> Corpus:
    """At most `sequences` windows, taken from the texts in turn; fewer, with a warning, when there is less text.

    A text is a .txt, .jsonl or chat .jsonl file (each also with .gz), or `datasets:NAME[:SPLIT]`. Raises UserError
    when one cannot be read or is empty, or when all of them do not fill the held-out windows and one more.
    """
    limit = sequences * length * CHARACTERS_PER_TOKEN
    streams = [_windows(text, tokenizer, length, limit) for text in texts]
    tokens, trained = [], []
    for window in islice(_in_turn(streams), sequences):
        tokens.append(window[0])
        trained.append(window[1])
    if len(tokens) <= held_out:
        raise UserError(
            f"the text fills {len(tokens)} windows of {length} tokens, and {held_out} are held out; use a longer text, "
            "or a recipe with a shorter length"
        )
    if len(tokens) < sequences:
        _log.warning("the text fills %d of the recipe's %d windows; they are used again", len(tokens), sequences)
    return Corpus(torch.stack(tokens), torch.stack(trained), held_out)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError when the tokenizer has tokens that the model does not."""
    if (largest := max(tokenizer.get_vocab().values(), default=-1)) >= vocab_size:
        raise UserError(
            f"the tokenizer has token {largest} and the model's vocab_size is {vocab_size}; the two do not belong "
            "together: convert the model again"
        )


def _in_turn(streams: list[Iterator[tuple[Tensor, Tensor]]]) -> Iterator[tuple[Tensor, Tensor]]:
    end = object()
    while streams:
        heads = [(stream, next(stream, end)) for stream in streams]
        streams = [stream for stream, window in heads if window is not end]
        yield from (window for _, window in heads if isinstance(window, tuple))


def _windows(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int, max_characters: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of one text's documents, joined by the end-of-text token; those with nothing to train on are left out."""
    start = start_tokens(tokenizer)
    body = length - len(start)
    tokens: list[int] = []
    trained: list[bool] = []
    is_empty = True
    for record in _records(text, max_characters):
        pieces = _pieces(record, tokenizer)
        is_empty &= not pieces
        if tokens and pieces and tokenizer.eos_token_id is not None:
            pieces = [Piece([tokenizer.eos_token_id], trained=True), *pieces]
        for piece in pieces:
            tokens += piece.tokens
            trained += [piece.trained] * len(piece.tokens)
        whole = len(tokens) - len(tokens) % body
        for i in range(0, whole, body):
            window = torch.tensor(start + tokens[i : i + body])
            mask = torch.tensor([False] * len(start) + trained[i : i + body])
            if bool(mask[1:].any()):
                yield window, mask
        del tokens[:whole], trained[:whole]
    if is_empty:
        raise UserError(f"{text} is empty; give it text, or leave it out")


def _pieces(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    if "messages" in record.fields:
        return conversation_pieces(record, tokenizer)
    tokens = tokenize(record.text(), tokenizer)
    return [Piece(tokens, trained=True)] if tokens else []


def _records(text: str, max_characters: int) -> Iterator[Record]:
    if text.startswith(_DATASETS):
        return _dataset_records(text)
    return read_records(Path(text).expanduser(), max_characters)


def _dataset_records(text: str) -> Iterator[Record]:
    if find_spec("datasets") is None:
        raise UserError(f"--text {text} needs the package datasets: pip install datasets")
    import datasets

    name, _, split = text.removeprefix(_DATASETS).partition(":")
    try:
        rows: Any = datasets.load_dataset(name, split=split or "train", streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--text {text}: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, start=1):
        yield Record(dict(row), f"{text}, row {number}")

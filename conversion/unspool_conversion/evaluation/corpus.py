"""The held-out text as token sequences that remember which document they were cut from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from unspool.errors import UserError
from unspool_conversion.texts import CHARACTERS_PER_TOKEN, cut_documents, pack_documents, read_documents


@dataclass(frozen=True)
class Corpus:
    """Sequences [S, T], and the number of the document of each."""

    sequences: Tensor
    documents: tuple[int, ...]

    @property
    def units(self) -> tuple[int, ...]:
        """What intervals resample: documents, or where there is only one, its pieces."""
        return self.documents if self.num_documents > 1 else tuple(range(len(self.documents)))

    @property
    def num_documents(self) -> int:
        return len(set(self.documents))


def read_corpus(path: Path, tokenizer: PreTrainedTokenizerBase, sequences: int, length: int) -> Corpus:
    """Cuts at most that many sequences, from as many documents as there are: a second one of a document only once
    every document has given its first.

    Raises UserError when the text cannot be read or gives fewer than two sequences.
    """
    pieces: list[tuple[int, int, Tensor]] = []
    for number, document in enumerate(read_documents(path, sequences * length * CHARACTERS_PER_TOKEN)):
        try:
            cut = cut_documents([document], tokenizer, sequences, length)
        except UserError:  # this document is too short: others may not be
            continue
        pieces += [(piece, number, tokens) for piece, tokens in enumerate(cut)]
    chosen = sorted(pieces, key=lambda piece: piece[:2])[:sequences]
    if len(chosen) < 2:
        raise UserError(
            f"--text {path} gives {len(chosen)} sequences of {length} tokens and an interval takes two: "
            "use a longer text, or a smaller --length"
        )
    return Corpus(torch.stack([tokens for *_, tokens in chosen]), tuple(number for _, number, _ in chosen))


def read_filler(path: Path, tokenizer: PreTrainedTokenizerBase, pieces: int, length: int) -> Tensor:
    """Running text [n, length], n <= pieces, each piece beginning as the tokenizer begins a text.

    Raises UserError when the text cannot be read or fills not even one piece.
    """
    documents = read_documents(path, pieces * length * CHARACTERS_PER_TOKEN)
    try:
        return pack_documents(documents, tokenizer, pieces, length)
    except UserError as error:
        raise UserError(
            f"--text {path} does not fill the {length} tokens between a fact and its question ({error}): use a longer "
            "text, or smaller --distances"
        ) from error

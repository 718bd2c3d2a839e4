"""Which tokens of which prompts to read next."""

import collections

from unspool.engine.sequence import EngineSequence, Piece
from unspool_kernels.logit_rows import LogitRows

SCORED_CHUNK = 64
"""Prompt tokens read at once when each one's log-probability is wanted, which takes the whole vocabulary's logits."""


def next_chunk(reading: collections.deque[EngineSequence], chunk: int) -> list[Piece]:
    """The next tokens of the prompt whose turn it is, up to a multiple of `chunk`: a prompt is always cut alike."""
    if not reading:
        return []
    sequence = reading[0]
    reading.rotate(-1)
    size = min(chunk, SCORED_CHUNK) if _is_scored(sequence) else chunk
    return [_piece(sequence, (sequence.consumed // size + 1) * size)]


def next_pieces(reading: collections.deque[EngineSequence], budget: int, longest: int) -> list[Piece]:
    """The next tokens of as many prompts as the budget allows, at most `longest` of one; those go first next time
    that got nothing."""
    pieces = []
    for sequence in list(reading):
        if budget < 1:
            break
        size = min(budget, longest, SCORED_CHUNK if _is_scored(sequence) else longest)
        piece = _piece(sequence, sequence.consumed + size)
        budget -= len(piece.tokens)
        pieces.append(piece)
    reading.rotate(-len(pieces))
    return pieces


def _is_scored(sequence: EngineSequence) -> bool:
    return sequence.request.prompt_logprobs is not None


def _piece(sequence: EngineSequence, end: int) -> Piece:
    """From where the sequence is to `end`, unless its prompt or a checkpoint comes first."""
    prompt = sequence.request.prompt
    end = min(end, len(prompt), *sequence.cuts[-1:])
    want: LogitRows = "every" if _is_scored(sequence) else "last" if end == len(prompt) else "none"
    return Piece(sequence, prompt[sequence.consumed : end], want)

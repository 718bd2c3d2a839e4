"""What a text with a given structure lets follow, token by token. Knows token ids and a compiled grammar, no text."""

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray


class ConstraintFailed(RuntimeError):
    """The grammar took more work than one token may, or met a token that it does not allow. Ends one request."""


class Constraint:
    """One generation's place in a grammar. Not thread-safe: whoever samples the generation owns it.

    `num_tokens` is the tokenizer's vocabulary; a model's logits may have more rows, whose tokens are never allowed.
    """

    def __init__(self, matcher: LLMatcher, num_tokens: int) -> None:
        self._matcher = matcher
        self._num_tokens = num_tokens

    @property
    def finished(self) -> bool:
        """Whether nothing may follow: the text is complete and cannot go on, or an end token was accepted."""
        return self._matcher.is_stopped()

    @property
    def complete(self) -> bool:
        """Whether the text so far is one that the grammar describes; it may still be able to go on."""
        return self._matcher.is_accepting()

    def allowed(self) -> NDArray[np.bool_]:
        """Which of the tokenizer's tokens [num_tokens] may come next. End tokens may where the text is complete.

        Where only one text can follow, it is the token with which the tokenizer itself would spell it, and no other.
        Raises ConstraintFailed when finding out takes too much work.
        """
        words = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(words, count=self._num_tokens, bitorder="little").view(np.bool_)

    def mask(self, scores: NDArray[np.float32]) -> None:
        """Sets the scores [vocab] of all tokens that may not come next to minus infinity."""
        allowed = self.allowed()
        known = min(len(scores), self._num_tokens)
        np.copyto(scores[:known], -np.inf, where=~allowed[:known])
        scores[known:] = -np.inf

    def accept(self, token: int) -> None:
        """Goes on to what follows this token. Raises ConstraintFailed when it is not allowed."""
        if self.finished:
            raise ConstraintFailed("the structured output is complete: no token may follow")
        self._matcher.consume_token(token)
        self._check()

    def fork(self) -> "Constraint":
        """An independent constraint at the same place."""
        return Constraint(self._matcher.deep_copy(), self._num_tokens)

    def _check(self) -> None:
        # The library's own message quotes the grammar and the text.
        if self._matcher.is_error():
            raise ConstraintFailed(
                "the structured output's grammar is too complex, or does not allow what was generated"
            )

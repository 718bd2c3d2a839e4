"""Between text and tokens: prompts and chats in, a stream of text out. Knows no model and no engine."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from unspool.errors import UserError
from unspool.requests import InvalidRequest
from unspool.stop_strings import StopScanner

UNDECODED = "\ufffd"
"""What a decoder writes for bytes that are no character, or not yet."""

MAX_CHARACTER_BYTES = 4
CONTEXT_TOKENS = 16


class TextStream:
    """Turns tokens into text as they come, holding back incomplete characters and beginnings of stop strings.

    Everything that `push` and `finish` return, put together, is `tokenizer.decode` of all tokens pushed (without
    clean-up of spaces), cut before the first stop string. Where a byte-fallback tokenizer spells text in an invalid run
    of bytes, `decode` gives up the whole run; here the characters that were already complete stay.
    `context` are the tokens before the first: with them a text that goes on inside a sentence keeps its first space.
    Stop strings do not count where they end in the text of the first `min_tokens` tokens.
    The work per token is bounded.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._scanner = StopScanner(stop)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        # The decoder looks at a window that begins with tokens whose text is out already: a token's text can depend on
        # the one before it.
        self._window = [token for token in context[-CONTEXT_TOKENS:] if not self._is_silent(token)]
        self._settled = len(self._window)
        """Tokens of the window that were there when text last came out."""
        self._text = self._decode(self._window)
        self._shown = self._text[: _complete_length(self._text)]
        """The part of the window's text that is out."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; all text before it has been returned, and no more will come."""
        return self._scanner.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._scanner.found

    def push(self, token: int) -> str:
        """The text that has become certain with this token."""
        if self.stopped:
            return ""
        self._num_tokens += 1
        text = self._decode([*self._window, token])
        if text == self._text and self._is_silent(token):
            return ""
        self._window.append(token)
        self._text = text
        return self._scan(self._take(text))

    def finish(self) -> str:
        """The rest, now that no more tokens will come: an incomplete character is written as U+FFFD."""
        if self.stopped:
            return ""
        rest = self._text[len(self._shown) :]
        self._shown = self._text
        return self._scan(rest) + self._scanner.finish()

    def _scan(self, text: str) -> str:
        return self._scanner.push(text, may_stop=self._num_tokens > self._min_tokens)

    def _take(self, text: str) -> str:
        """The new certain text of the window; what comes out moves the window on."""
        begun = len(self._window) - self._settled < MAX_CHARACTER_BYTES
        # Byte fallback undoes a run of bytes while its last character is incomplete: wait, as long as it can be.
        if text.endswith(UNDECODED) and begun and not text.startswith(self._shown):
            return ""
        certain = _complete_length(text)
        new = text[len(self._shown) : certain]
        if new:
            self._move_window(held=len(text) - certain)
        return new

    def _move_window(self, held: int) -> None:
        """Drops tokens whose text nothing that follows depends on; `held` characters at the end are not out yet."""
        # Three undecoded characters take nine tokens at most, and three more show where a character begins.
        start = self._settled if held == 0 else -3 * MAX_CHARACTER_BYTES
        self._window = self._window[start:]
        self._settled = len(self._window)
        self._text = self._decode(self._window)
        self._shown = self._text[: len(self._text) - held]

    def _decode(self, tokens: list[int], *, skip_special_tokens: bool | None = None) -> str:
        skip = self._skip_special_tokens if skip_special_tokens is None else skip_special_tokens
        text = self._tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _is_silent(self, token: int) -> bool:
        """Whether the token adds nothing wherever it stands: a special one to be skipped, or an id without a piece."""
        if self._decode([token]):
            return False
        return not self._tokenizer.convert_ids_to_tokens(token) or bool(
            self._decode([token], skip_special_tokens=False)
        )


class StopWatcher:
    """Says at which token a text is complete by a stop string: where a TextStream with the same options finds it.

    For the thread that generates, which needs no text: it costs nothing where there are no stop strings.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        skip_special_tokens: bool = True,
        context: Sequence[int] = (),
        min_tokens: int = 0,
    ) -> None:
        self._stream = TextStream(tokenizer, stop, skip_special_tokens, context, min_tokens) if stop else None

    def push(self, token: int) -> str | None:
        """The stop string that is complete with this token or was before."""
        if self._stream is None:
            return None
        self._stream.push(token)
        return self._stream.stop_string


def _complete_length(text: str) -> int:
    """Characters before the undecoded ones at the end that may be one incomplete character."""
    last = text[1 - MAX_CHARACTER_BYTES :]
    return len(text) - len(last) + len(last.rstrip(UNDECODED))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a prompt, with the special tokens that the tokenizer adds by default.

    Raises InvalidRequest when the text is not valid Unicode.
    """
    return _encode(tokenizer, text, "prompt", add_special_tokens=True)


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError when the model has no chat template."""
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template: use plain completions, or add a chat_template.jinja to it")


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Tokens of a chat up to where the assistant's answer begins, by the model's own template.

    Raises UserError when the model has no template, InvalidRequest when the template refuses the messages.
    """
    require_chat_template(tokenizer)
    if not messages:
        raise InvalidRequest("messages", "must hold at least one message")
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # the template is the model's own program: it can raise whatever a program can
        reason = str(error) or type(error).__name__
        raise InvalidRequest("messages", f"the model's chat template refuses them: {reason}") from error
    assert isinstance(text, str)
    return _encode(tokenizer, text, "messages", add_special_tokens=False)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, field: str, *, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(field, f"has half of a surrogate pair at character {error.start}") from error
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))

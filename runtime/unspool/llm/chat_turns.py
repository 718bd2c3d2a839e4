"""Chat messages as tokens that go on where a session's log ends, by the model's template. Knows no session.

A session has the tokens that were said, not the messages: so what is new is rendered after conversations that stand for
any, and must come out the same after each.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from unspool.requests import InvalidRequest
from unspool.text import render_chat, require_chat_template

USER = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Welcome"}
SYSTEM = {"role": "system", "content": "Be brief."}

Messages = Sequence[Mapping[str, Any]]


class ChatTurns:
    """`eos_ids` are the tokens with which the model ends what it says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._end_ids = eos_ids | frozenset(tokenizer.all_special_ids)

    def opening(self, messages: Messages) -> list[int]:
        """The beginning of a conversation, up to where the answer begins.

        Raises UserError when the model has no template, InvalidRequest when it refuses the messages.
        """
        return render_chat(self._tokenizer, messages)

    def continuation(self, messages: Messages, last: int) -> list[int]:
        """What follows an answer whose last token is `last`: its end, unless the model has written that itself, then
        the messages, up to where the next answer begins.

        Raises UserError when the model has no template, InvalidRequest when it refuses the messages, and when what it
        makes of them depends on what was said before.
        """
        require_chat_template(self._tokenizer)
        short, long = [USER, ANSWER], [*self._beginning, USER, ANSWER, USER, ANSWER]
        text = self._after(short, messages)
        if text is None or text != self._after(long, messages):
            raise InvalidRequest(
                "messages",
                "the model's chat template does not write a longer conversation as a shorter one and more, so that a "
                "session cannot go on with it; use append and generate with text of your own, or LLM.chat",
            )
        tokens = encode(self._tokenizer, text, "messages")
        return self._without_end(tokens, last)

    def opens_answer(self, given: Sequence[int]) -> bool:
        """Whether these tokens end as the template does where an answer begins."""
        opened = self._opening_text
        # No token is shorter than a byte of text, or it is a special one.
        tail = list(given[-len(opened.encode()) - 1 :])
        return str(self._tokenizer.decode(tail, clean_up_tokenization_spaces=False)).endswith(opened)

    @cached_property
    def _beginning(self) -> list[dict[str, str]]:
        """A system message, where the template knows such a thing."""
        try:
            self._render([SYSTEM, USER])
        except InvalidRequest:
            return []
        return [SYSTEM]

    @cached_property
    def _opening_text(self) -> str:
        """What the template writes between the messages and the answer."""
        before, opened = self._render([USER], opens_answer=False), self._render([USER])
        return opened.removeprefix(before) if opened.startswith(before) else ""

    def _after(self, context: list[dict[str, str]], messages: Messages) -> str | None:
        """What the template writes after the context's last answer; None when it does not go on from there."""
        asked = self._render(context[:-1])
        whole = self._render([*context, *messages])
        if not whole.startswith(asked):
            return None
        # Some templates put a space before each answer, which the model writes itself.
        rest, answer = whole[len(asked) :].lstrip(), context[-1]["content"]
        return rest.removeprefix(answer) if rest.startswith(answer) else None

    def _without_end(self, tokens: list[int], last: int) -> list[int]:
        """Without the end of the answer, and the blanks before it, when the log has that already."""
        if last not in self._end_ids:
            return tokens
        for index, token in enumerate(tokens):
            if token == last:
                return tokens[index + 1 :]
            if str(self._tokenizer.decode([token])).strip():
                break
        return tokens

    def _render(self, messages: Messages, *, opens_answer: bool = True) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=opens_answer
            )
        except Exception as error:  # the template is the model's own program: it can raise whatever a program can
            reason = str(error) or type(error).__name__
            raise InvalidRequest("messages", f"the model's chat template refuses them: {reason}") from error
        assert isinstance(text, str)
        return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str, parameter: str) -> list[int]:
    """Tokens of a text that others come before. Raises InvalidRequest when the text is not valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(parameter, f"has half of a surrogate pair at character {error.start}") from error
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def as_messages(said: str | Messages) -> Messages:
    """A text is the user's. Raises InvalidRequest when nothing is said."""
    if isinstance(said, str):
        return [{"role": "user", "content": said}]
    if not said:
        raise InvalidRequest("messages", "must hold at least one message")
    return said

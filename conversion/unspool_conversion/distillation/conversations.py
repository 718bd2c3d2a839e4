"""Chats as training text: the model's own template, and which of its tokens an assistant wrote."""

from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from unspool.errors import UserError
from unspool_conversion.texts import Record, tokenize


class Piece(NamedTuple):
    """Tokens of one document that are all trained on, or all read only."""

    tokens: list[int]
    trained: bool


def conversation_pieces(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The pieces of a record's `messages`: an assistant's turns, with what ends them, are trained on.

    Each piece is tokenized by itself, as a prompt and its answer are when the model is served. Raises UserError when
    the messages are malformed, no assistant speaks, or the template cannot tell the turns apart.
    """
    messages = _messages(record)
    if tokenizer.chat_template is None:
        raise UserError(f'{record.where} has "messages", but the model has no chat template; use plain text')
    pieces: list[Piece] = []
    before = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(messages[:number], tokenizer, record, begin_answer=True) if number else ""
        after = _render(messages[: number + 1], tokenizer, record, begin_answer=False)
        if not (prompt.startswith(before) and after.startswith(prompt)):
            raise UserError(
                f"{record.where}: the model's chat template writes earlier turns anew when later ones follow; make one "
                "conversation of every answer, or use plain text"
            )
        pieces += [
            Piece(tokenize(prompt.removeprefix(before), tokenizer), trained=False),
            Piece(tokenize(after.removeprefix(prompt), tokenizer), trained=True),
        ]
        before = after
    if not pieces:
        raise UserError(f"{record.where}: no message has the role assistant, so there is nothing to train on")
    return [piece for piece in pieces if piece.tokens]


def _messages(record: Record) -> list[dict[str, Any]]:
    messages = record.fields["messages"]
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise UserError(
            f'{record.where}: "messages" is not a list of objects with a "role" string and a "content" string'
        )
    return messages


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _render(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, record: Record, *, begin_answer: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begin_answer)
    except TemplateError as error:
        raise UserError(f"{record.where}: the model's chat template refuses the conversation ({error})") from error
    assert isinstance(text, str)
    return text

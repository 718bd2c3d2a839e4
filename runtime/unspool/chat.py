"""The verb `chat`: a conversation in the terminal, or one message a line from a pipe."""

import argparse
import contextlib
import importlib
import re
import sys
from collections.abc import Callable, Generator, Iterator

from unspool.errors import UserError
from unspool.local import LocalEngine, TextRequest, add_local_flags, open_engine, sampling_params
from unspool.requests import InvalidRequest, SamplingParams
from unspool.text import render_chat, require_chat_template

DEFAULT_MAX_TOKENS = 1024

HELP = """\
/reset  forget the conversation
/exit   leave (also Ctrl-D)
/help   show this
Ctrl-C stops an answer.
"""

COMMAND = re.compile(r"/[a-z]+")


def add_chat(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments and returns what runs it."""
    parser.epilog = "In the conversation, /help lists the commands."
    parser.add_argument("--system", metavar="TEXT", help="system message to begin with")
    add_local_flags(parser, max_tokens=DEFAULT_MAX_TOKENS)
    return run_chat


def run_chat(args: argparse.Namespace) -> int:
    """Raises UserError when the model cannot chat or standard input cannot be read.

    At a terminal a refused message is only reported and Ctrl-C stops only the answer; elsewhere both end the run, by
    InvalidRequest and KeyboardInterrupt: nobody is there to go on.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with open_engine(args) as engine:
        require_chat_template(engine.loaded.tokenizer)
        conversation = Conversation(engine, sampling_params(args, engine), args.max_tokens, args.system)
        for line in _read_lines(interactive):
            if line == "/exit":
                break
            _handle(conversation, line, interactive)
    return 0


class Conversation:
    """The messages so far, and how to get the next answer."""

    def __init__(self, engine: LocalEngine, sampling: SamplingParams, max_tokens: int, system: str | None) -> None:
        self._engine = engine
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._beginning = [{"role": "system", "content": system}] if system is not None else []
        self._messages = list(self._beginning)

    def reset(self) -> None:
        self._messages = list(self._beginning)

    def answer(self, text: str) -> Generator[str, None, None]:
        """Pieces of the answer to a message. Both are remembered, and so is an answer that an interrupt cut short.

        Raises InvalidRequest, and forgets the message, when the model's template or the engine refuses it.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        request = TextRequest(
            prompt=render_chat(self._engine.loaded.tokenizer, messages),
            max_tokens=self._max_tokens,
            sampling=self._sampling,
        )
        generation = self._engine.generate(request)
        pieces: list[str] = []
        try:
            for piece in generation:
                pieces.append(piece)
                yield piece
        finally:
            generation.cancel()
            self._messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        if generation.summary.finish_reason == "length":
            sys.stderr.write(f"\n(cut after {self._max_tokens} tokens; --max-tokens sets this)")


def _handle(conversation: Conversation, line: str, interactive: bool) -> None:
    """A command or a message."""
    if line == "/reset":
        conversation.reset()
    elif line == "/help":
        sys.stdout.write(HELP)
    elif COMMAND.fullmatch(line):
        sys.stderr.write(f"unknown command {line}; /help lists the commands\n")
    elif line:
        with _staying() if interactive else contextlib.nullcontext():
            _write_answer(conversation, line)


@contextlib.contextmanager
def _staying() -> Iterator[None]:
    """Keeps a conversation going after an answer that failed or was interrupted."""
    try:
        yield
    except InvalidRequest as error:
        sys.stderr.write(f"{error}\n")
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        sys.stdout.flush()


def _write_answer(conversation: Conversation, line: str) -> None:
    with contextlib.closing(conversation.answer(line)) as pieces:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _read_lines(interactive: bool) -> Iterator[str]:
    """Lines of standard input without surrounding space."""
    try:
        yield from _prompt_for_lines() if interactive else map(str.strip, sys.stdin)
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error.reason}") from error
    except OSError as error:
        raise UserError(f"cannot read standard input: {error.strerror}") from error


def _prompt_for_lines() -> Iterator[str]:
    """Lines typed at the terminal; Ctrl-C only discards what was typed."""
    with contextlib.suppress(ImportError):  # Python without it reads lines too, with no editing or history
        importlib.import_module("readline")
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n(/exit or Ctrl-D leaves)\n")

"""The verb `generate`: continues one text on standard output."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from unspool.errors import UserError
from unspool.local import LocalEngine, TextGeneration, TextRequest, add_local_flags, open_engine, sampling_params
from unspool.text import encode_prompt

MAX_PROMPT_BYTES = 64 << 20
DEFAULT_MAX_TOKENS = 256


def add_generate(parser: argparse.ArgumentParser) -> Callable[[argparse.Namespace], int]:
    """Adds the verb's arguments and returns what runs it."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="text to continue (default: standard input)")
    source.add_argument(
        "--prompt-file", type=Path, metavar="PATH", help="UTF-8 file to continue; a newline at its very end is dropped"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    parser.add_argument("--stats", action="store_true", help="write token counts and speeds to standard error")
    parser.add_argument(
        "--json", action="store_true", help="write one line of JSON at the end instead of text as it comes"
    )
    add_local_flags(parser, max_tokens=DEFAULT_MAX_TOKENS)
    return run_generate


def run_generate(args: argparse.Namespace) -> int:
    """Raises UserError for input that cannot be read, InvalidRequest for what the engine refuses."""
    prompt = _read_prompt(args)
    with open_engine(args) as engine:
        request = TextRequest(
            prompt=encode_prompt(engine.loaded.tokenizer, prompt),
            max_tokens=args.max_tokens,
            sampling=sampling_params(args, engine),
            stop=args.stop,
            mid_text=True,
        )
        generation = engine.generate(request)
        if args.json:
            _write_json(generation)
        else:
            _write_text(generation)
        if args.stats:
            sys.stderr.write(f"{generation.summary}; {_describe_state(engine)}\n")
    return 0


def _write_text(generation: TextGeneration) -> None:
    for piece in generation:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _write_json(generation: TextGeneration) -> None:
    text = "".join(generation)
    summary = generation.summary
    record = {
        "text": text,
        "finish_reason": summary.finish_reason,
        "prompt_tokens": summary.prompt_tokens,
        "generated_tokens": summary.generated_tokens,
        "seconds": round(summary.seconds, 6),
        "prompt_seconds": round(summary.prompt_seconds, 6),
    }
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")


def _describe_state(engine: LocalEngine) -> str:
    return f"state of {engine.engine.state_bytes:,} bytes at any length"


def _read_prompt(args: argparse.Namespace) -> str:
    """The text to continue. A file's or pipe's last newline is its end, not the text's."""
    if args.prompt is not None:
        return str(args.prompt)
    name = args.prompt_file or "standard input"
    try:
        content = _read_bytes(args.prompt_file)
    except OSError as error:
        raise UserError(f"cannot read the prompt from {name}: {error.strerror}") from error
    if len(content) > MAX_PROMPT_BYTES:
        raise UserError(f"{name} is longer than {MAX_PROMPT_BYTES >> 20} MiB; give a shorter prompt")
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 at byte {error.start}; convert it first") from error


def _read_bytes(path: Path | None) -> bytes:
    """At most one byte more than is allowed."""
    if path is not None:
        with path.open("rb") as file:
            return file.read(MAX_PROMPT_BYTES + 1)
    if sys.stdin.isatty():
        sys.stderr.write("Type the text to continue; end it with Ctrl-D.\n")
    return sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)

"""The command `unspool`. Verbs are entry points of the group `unspool.verbs`; only the one that is used is imported."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import TextIO

from unspool.errors import UserError
from unspool.requests import EngineDead, InvalidRequest

GROUP = "unspool.verbs"

AddVerb = Callable[[argparse.ArgumentParser], Callable[[argparse.Namespace], int]]

# Entry points carry no text, and importing a verb only to list it would load all that it needs.
SUMMARIES = {
    "convert": "turn a pretrained transformer into a recurrent model",
    "distill": "train a converted model to follow its teacher beyond the window",
    "verify": "measure a converted model against its teacher",
    "eval": "say what a converted model's state is worth, beside windows of the same bytes",
    "generate": "continue a text",
    "chat": "talk to a model in the terminal",
    "serve": "answer the OpenAI HTTP API",
    "sessions": "list, inspect, verify, export, import and clean up the sessions of a store",
    "bench": "measure speed and memory as ratios of one run",
    "doctor": "say what is installed, what is missing, and whether a model can be served",
}

FAILURE, USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 128 + 2, 128 + 13

OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
"""Why a standard stream, or a file that a verb writes, takes no more."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code. argparse leaves by SystemExit, with 0 after help and 2 for bad usage."""
    _replace_closed_streams()
    _escape_what_the_terminal_lacks()
    try:
        return _run_to_the_end(list(sys.argv[1:] if argv is None else argv))
    except (UserError, InvalidRequest) as error:
        return _report(error, USAGE_ERROR)
    except EngineDead as error:
        return _report(error, FAILURE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has left
        _drop_unwritten_text(sys.stdout)
        return BROKEN_PIPE
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS:
            raise
        _drop_unwritten_text(sys.stdout)
        return _report(f"cannot write the output: {error.strerror}", FAILURE)


def _run_to_the_end(arguments: list[str]) -> int:
    """Runs one verb; what it has written is out when this returns or raises."""
    try:
        return _run(arguments)
    finally:
        sys.stdout.flush()


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="unspool", description="Converts pretrained transformers into recurrent models, and runs them."
    )
    parser.add_argument("--version", action="version", version=f"unspool {version('unspool')}")
    verbs = _installed_verbs()
    parsers = _list_verbs(parser, verbs)
    # No option of the command itself takes a value, so the first word that is no option is the verb.
    name = next((word for word in arguments if not word.startswith("-")), "")
    if name in verbs:
        parsers[name].set_defaults(run=_load(verbs[name])(parsers[name]))
    args = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _installed_verbs() -> dict[str, EntryPoint]:
    """Verbs by name, ours first and in the order in which a user meets them."""
    found = {verb.name: verb for verb in entry_points(group=GROUP)}
    ours = [name for name in SUMMARIES if name in found]
    return {name: found[name] for name in [*ours, *sorted(set(found) - set(ours))]}


def _list_verbs(parser: argparse.ArgumentParser, verbs: dict[str, EntryPoint]) -> dict[str, argparse.ArgumentParser]:
    """One sub-parser a verb that knows no more than its summary."""
    group = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    parsers = {}
    for name, verb in verbs.items():
        summary = SUMMARIES.get(name, f"from {verb.module}")
        parsers[name] = group.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    return parsers


def _load(verb: EntryPoint) -> AddVerb:
    add: AddVerb = verb.load()
    return add


def _escape_what_the_terminal_lacks() -> None:
    """Makes a terminal that cannot encode a character show its escape, where Python would stop with an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _replace_closed_streams() -> None:
    """Python has None for a standard stream that was closed when it started."""
    # In this order each takes the lowest free descriptor, its own, which no file opened later can then get.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  open while the process is


def _drop_unwritten_text(stream: TextIO) -> None:
    """Leaves the interpreter nothing that it cannot write when it closes a standard stream."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report(error: Exception | str, code: int) -> int:
    try:
        sys.stderr.write(f"unspool: error: {error}\n")
    except OSError:  # then the code alone must tell
        _drop_unwritten_text(sys.stderr)
    return code

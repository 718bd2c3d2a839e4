"""What the sub-verbs of `unspool sessions` are told: flags that several have, and values as people write them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unspool.flags import add_flags
from unspool.local import LocalOptions
from unspool.sessions.default_store import DEFAULT_OWNER, default_store

AGE_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}

Run = Callable[[argparse.Namespace], int]


def add_sub_verb(verbs: Any, name: str, summary: str, run: Run, *, session: bool = False) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    if session:
        parser.add_argument("session", metavar="ID", help="the session")
    place = str(default_store()).replace("%", "%%")
    parser.add_argument(
        "--store", metavar="STORE", help=f"directory, redis://, rediss:// or s3://BUCKET/PREFIX (default: {place})"
    )
    parser.add_argument("--owner", help=f"whose sessions (every owner's where several are meant, else {DEFAULT_OWNER})")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.set_defaults(run_sub_verb=run)
    return parser


def add_model(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument("--model", required=required, metavar="DST", help="directory that `unspool convert` wrote")
    add_flags(parser.add_argument_group("machine"), LocalOptions)


def add_key(parser: argparse.ArgumentParser, summary: str) -> None:
    parser.add_argument("--signing-key-file", type=Path, metavar="PATH", help=summary)


def count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no count of at least 1")
    return int(text)


def age(text: str) -> float:
    """Seconds of 90, 90s, 30m, 12h or 7d."""
    number, unit = (text[:-1], AGE_UNITS[text[-1]]) if text[-1:] in AGE_UNITS else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no age like 90s, 30m, 12h or 7d") from error
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no age: must not be negative")
    return seconds

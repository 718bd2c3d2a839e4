"""The verb `sessions`: what is in a store, whether it is sound, and ways in and out of it."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unspool.cli import FAILURE
from unspool.errors import UserError
from unspool.flags import from_flags
from unspool.local import LocalOptions
from unspool.requests import EngineBusy
from unspool.sessions.arguments import Run, add_key, add_model, add_sub_verb, age, count
from unspool.sessions.collection import collect
from unspool.sessions.default_store import DEFAULT_OWNER, DEFAULT_STORE_BYTES, default_store
from unspool.sessions.errors import ImportRejected, SessionError, SessionMismatch
from unspool.sessions.head_scan import scan_heads
from unspool.sessions.inspection import inspect_session, list_sessions, turn_decoder
from unspool.sessions.local_sessions import local_sessions
from unspool.sessions.options import SessionOptions
from unspool.sessions.records import SessionRecords
from unspool.sessions.report_text import collection_text, inspection_text, list_text, verification_text
from unspool.sessions.sessions import Sessions
from unspool.sessions.signing_key import read_signing_key
from unspool.sessions.stored_states import read_newest
from unspool.sessions.transfer import export_session
from unspool.sessions.turn_log import TurnLog
from unspool.sessions.verification import verify
from unspool.sizes import format_size, parse_size
from unspool.store import Store, StoreCorrupt, StoreFull, StoreUnavailable, open_store

DEFAULT_LIMIT = 1000


def add_sessions(parser: argparse.ArgumentParser) -> Run:
    """Adds the sub-verbs with their arguments and returns what runs them."""
    verbs = parser.add_subparsers(title="sub-verbs", metavar="SUB-VERB", required=True)
    listing = add_sub_verb(verbs, "list", "sessions, also beside a running server", run_list)
    listing.add_argument("--limit", type=count, default=DEFAULT_LIMIT, metavar="COUNT", help="at most so many (1000)")

    inspect = add_sub_verb(
        verbs, "inspect", "a session's turns, states, snapshots and forks", run_inspect, session=True
    )
    inspect.add_argument(
        "--text", action="store_true", help="show what each turn says; needs --model for its tokenizer"
    )
    inspect.add_argument("--model", metavar="DST", help="directory that `unspool convert` wrote")

    check = add_sub_verb(verbs, "verify", "replay a session from its first token and compare its state", run_verify)
    which = check.add_mutually_exclusive_group(required=True)
    which.add_argument("session", nargs="?", metavar="ID", help="the session")
    which.add_argument("--all", action="store_true", help="every session: --owner's, or every owner's")
    check.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="difference that is still fine, as a share of a tensor's largest value; 0 is the same bits, which only "
        "the native kernels promise (default: 0)",
    )
    add_model(check, required=True)

    export = add_sub_verb(
        verbs, "export", "write a session, with its newest state, to a file", run_export, session=True
    )
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="file to write or replace")
    add_key(export, "sign the file with the key in this one")
    add_model(export, required=False)

    importing = add_sub_verb(verbs, "import", "make a session of an exported file", run_import)
    importing.add_argument("file", type=Path, metavar="FILE", help="what `unspool sessions export` wrote")
    importing.add_argument("--id", metavar="ID", help="id of the new session (default: a new one)")
    importing.add_argument(
        "--store-bytes", type=parse_size, default=DEFAULT_STORE_BYTES, metavar="SIZE", help="cap of the store (4GiB)"
    )
    add_key(importing, "take only what the key in this file has signed")
    add_model(importing, required=True)

    collecting = add_sub_verb(verbs, "gc", "delete what no session reaches any more", run_collect)
    collecting.add_argument(
        "--older-than", type=age, default=3600.0, metavar="AGE", help="leave alone what is younger, as in 30m (1h)"
    )
    collecting.add_argument(
        "--idle-days", type=float, metavar="DAYS", help="delete sessions that have not changed for so long, too"
    )
    collecting.add_argument("--dry-run", action="store_true", help="delete nothing, also beside a running server")
    return run_sessions


def run_sessions(args: argparse.Namespace) -> int:
    """Raises UserError for what the user can put right; a store that fails gives 1."""
    run: Run = args.run_sub_verb
    try:
        return run(args)
    except (SessionError, ImportRejected, EngineBusy) as error:
        raise UserError(str(error)) from error
    except (StoreUnavailable, StoreFull, StoreCorrupt) as error:
        sys.stderr.write(f"unspool: error: {error}\n")
        return FAILURE


def run_list(args: argparse.Namespace) -> int:
    """Exit code 1 when a session's record is damaged."""
    with _store(args, read_only=True) as store:
        listed = list_sessions(store, args.owner, args.limit)
    _write(args, listed, list_text(listed, time.time()))
    return FAILURE if listed["damaged"] else 0


def run_inspect(args: argparse.Namespace) -> int:
    """Exit code 1 when the log cannot be read to its beginning."""
    if args.text and args.model is None:
        raise UserError("--text needs the model's tokenizer; pass --model DST")
    owner, session = _owner(args), args.session
    with _store(args, read_only=True) as store:
        decode = turn_decoder(args.model, store, owner, session) if args.text else None
        record = inspect_session(store, owner, session, decode)
    _write(args, record, inspection_text(record, time.time()))
    return FAILURE if record["damaged"] else 0


def run_verify(args: argparse.Namespace) -> int:
    """Exit code 1 when a log or a state is not what it must be."""
    if not args.tolerance >= 0:
        raise UserError("--tolerance must not be negative")
    _require_store(args)
    records, all_hold = [], True
    with _store(args) as store, local_sessions(args.model, store, _local(args), SessionOptions()) as (_, sessions):
        for owner, session in _chosen(args, store):
            record, text, holds = _verified(sessions, owner, session, args.tolerance)
            all_hold &= holds
            records.append({"owner": owner, "session": session} | record)
            if not args.json:
                sys.stdout.write(text)
                sys.stdout.flush()
    if args.json:
        sys.stdout.write(json.dumps({"sessions": records}) + "\n")
    return 0 if all_hold else FAILURE


def run_export(args: argparse.Namespace) -> int:
    key = _key(args)
    with _store(args, read_only=True) as store:
        data = _exported(args, store, key)
    _replace(args.output, data)
    record = {"file": str(args.output), "bytes": len(data), "signed": key is not None}
    _write(args, record, f"{args.output}: {format_size(len(data))}{', signed' if key is not None else ''}\n")
    return 0


def run_import(args: argparse.Namespace) -> int:
    options = SessionOptions(signing_key=_key(args))
    data = _read(args.file, options.max_import_bytes)
    with (
        _store(args, max_bytes=args.store_bytes) as store,
        local_sessions(args.model, store, _local(args), options) as (_, sessions),
    ):
        info = sessions.import_session(_owner(args), data, args.id)
        sessions.flush()
    record = {"owner": _owner(args), "session": info.id, "tokens": info.position, "turns": info.turns}
    _write(args, record, f"session {info.id}: {info.position} tokens in {info.turns} turns\n")
    return 0


def run_collect(args: argparse.Namespace) -> int:
    """Exit code 1 when a record is damaged, so that turns were left alone."""
    if args.owner is not None:
        raise UserError("--owner: what is not reached is nobody's; gc looks at every owner")
    _require_store(args)
    with _store(args, read_only=args.dry_run) as store:
        done = collect(store, older_than_seconds=args.older_than, idle_days=args.idle_days, dry_run=args.dry_run)
    _write(args, vars(done), collection_text(done))
    return FAILURE if done.damaged else 0


def _exported(args: argparse.Namespace, store: Store, key: bytes | None) -> bytes:
    owner = _owner(args)
    if args.model is not None:
        options = SessionOptions(signing_key=key)
        with local_sessions(args.model, store, _local(args), options) as (_, sessions):
            return sessions.export(owner, args.session)
    head = SessionRecords(store, None).read(owner, args.session)
    found = read_newest(store, head)
    if found is None:
        raise UserError(f"{args.session} has no stored state, which would say what made it; pass --model DST")
    return export_session(TurnLog(store), head, found.identity, found.state, key)


def _chosen(args: argparse.Namespace, store: Store) -> Iterator[tuple[str, str]]:
    if not args.all:
        yield _owner(args), args.session
        return
    for found in scan_heads(store, args.owner):
        yield found.owner, found.session


def _verified(sessions: Sessions, owner: str, session: str, tolerance: float) -> tuple[dict[str, Any], str, bool]:
    """A session's result as JSON and as text, and whether it holds. Another model's is passed over."""
    label = f"{owner}/{session}"
    try:
        found = verify(sessions, owner, session)
    except SessionMismatch as error:
        return {"holds": None, "problems": [str(error)]}, f"{label}: passed over: {error}\n", True
    except StoreCorrupt as error:
        return {"holds": False, "problems": [str(error)]}, f"{label}: {error}\n", False
    holds = found.holds(tolerance)
    record = {
        "holds": holds,
        "tokens": found.position,
        "turns": found.turns,
        "problems": list(found.problems),
        "state_tier": found.state_tier,
        "replayed_tokens": found.replayed_tokens,
        "difference": found.difference._asdict() if found.difference is not None else None,
        "seconds": round(found.seconds, 6),
    }
    return record, f"{label}: {verification_text(found, holds=holds)}\n", holds


def _local(args: argparse.Namespace) -> LocalOptions:
    return from_flags(args, LocalOptions)


def _owner(args: argparse.Namespace) -> str:
    return args.owner if args.owner is not None else DEFAULT_OWNER


def _key(args: argparse.Namespace) -> bytes | None:
    return read_signing_key(args.signing_key_file) if args.signing_key_file is not None else None


@contextlib.contextmanager
def _store(
    args: argparse.Namespace, *, read_only: bool = False, max_bytes: int = DEFAULT_STORE_BYTES
) -> Iterator[Store]:
    where = args.store if args.store is not None else str(default_store())
    with contextlib.closing(open_store(where, max_bytes=max_bytes, read_only=read_only)) as store:
        yield store


def _require_store(args: argparse.Namespace) -> None:
    """Raises UserError where there is none: opening one for writing would make it."""
    with _store(args, read_only=True):
        pass


def _write(args: argparse.Namespace, record: dict[str, Any], text: str) -> None:
    sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n" if args.json else text)


def _read(path: Path, max_bytes: int) -> bytes:
    """A file, or one byte more of it than may be imported."""
    try:
        with path.open("rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    """Writes a file that only its owner may read, whole or not at all."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
            written = Path(folder, path.name)
            with open(os.open(written, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                file.write(data)
            os.replace(written, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error

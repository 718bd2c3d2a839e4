"""What the command prints of its results for people."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unspool.bench.report import Column, Report, table
from unspool.sessions.collection import Collection
from unspool.sessions.verification import Verification
from unspool.sizes import format_size

TEXT_CHARACTERS = 60
AGES = ((86_400, "d"), (3600, "h"), (60, "min"))


def list_text(listed: Mapping[str, Any], now: float) -> str:
    columns = [
        _words("owner"),
        _words("session"),
        _number("tokens", 10),
        _number("turns", 6),
        _number("states", 6),
        _number("snapshots", 9),
        Column("changed", 11, lambda row: format_age(now - row["updated"])),
        Column(" forked from", 0, lambda row: f" {row['forked_from'] or ''}"),
    ]
    notes = [*listed["damaged"], *(["there are more: --limit shows them"] if listed["more"] else [])]
    if not listed["sessions"]:
        return "".join(f"{line}\n" for line in ["no sessions", *notes])
    return table(Report(columns, listed["sessions"], {}, notes=notes))


def inspection_text(record: Mapping[str, Any], now: float) -> str:
    facts = {
        "session": f"{record['session']} of {record['owner']}",
        "tokens": f"{record['tokens']} in {record['turns']} turns, generation {record['generation']}",
        "created": format_age(now - record["created"]),
        "changed": format_age(now - record["updated"]),
        "tokenizer": record["tokenizer"][:16],
        "forked from": record["forked_from"],
        "forks": ", ".join(record["forks"]),
        "damaged": record["damaged"],
    }
    width = max(map(len, facts)) + 2
    text = "".join(f"{name:<{width}}{value}\n" for name, value in facts.items() if value)
    parts = [
        _turns_text(record["log"], now),
        _states_text(record["kept_states"], now),
        _snapshots_text(record["named"], now),
    ]
    return "\n".join([text, *filter(None, parts)])


def verification_text(found: Verification, *, holds: bool) -> str:
    if found.problems:
        return "; ".join(found.problems)
    log = f"the log of {found.position} tokens in {found.turns} turns is sound"
    if found.difference is None:
        return f"{log}; no state is at hand to compare"
    if found.difference.same_bits:
        compared = "has the same bits as"
    else:
        apart, share = found.difference.largest, found.difference.relative
        compared = f"{'differs' if holds else 'DIFFERS'} by up to {apart:.3g} ({share:.2g} of a tensor's largest) from"
    return f"{log}; the state at {found.replayed_tokens} {compared} a replay, which took {found.seconds:.1f} s"


def collection_text(done: Collection) -> str:
    counts = f"{done.sessions} sessions, {done.turns} turns, {done.states} states, {done.quarantined} in quarantine"
    lines = [f"{'would delete' if done.dry_run else 'deleted'} {counts}; {format_size(done.num_bytes)}"]
    if done.damaged:
        lines.append("no turns, as these records cannot be read:")
    return "".join(f"{line}\n" for line in [*lines, *done.damaged])


def format_age(seconds: float) -> str:
    """`3 h ago`; whole units, rounded down."""
    for size, unit in AGES:
        if seconds >= size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(int(seconds), 0)} s ago"


def _turns_text(log: Sequence[Mapping[str, Any]], now: float) -> str:
    columns = [
        _number("turn", 5),
        Column("positions", 15, lambda row: f"{row['start']}-{row['end']}"),
        _number("given", 8),
        _number("generated", 9),
        Column("ended by", 8, lambda row: str(row["finish_reason"])),
        Column("made", 11, lambda row: format_age(now - row["created"])),
    ]
    if log and "text" in log[0]:
        columns.append(Column(" text", 0, lambda row: f" {_one_line(row['text'])}"))
    return table(Report(columns, log, {})) if log else ""


def _states_text(states: Sequence[Mapping[str, Any]], now: float) -> str:
    columns = [
        Column("state after", 11, lambda row: f"turn {row['turn']}"),
        _number("position", 10),
        Column(" stored", 0, lambda row: f" {_places(row['stored'], now)}"),
    ]
    return table(Report(columns, states, {})) if states else ""


def _places(stored: Sequence[Mapping[str, Any]], now: float) -> str:
    """Each model's file of a state; one that has none is replayed when it is wanted."""
    files = (
        f"{format_size(entry['num_bytes'])} of model {entry['key'].split('/')[1][:8]}, "
        f"{format_age(now - entry['created'])}"
        for entry in stored
    )
    return "; ".join(files) or "no: replayed when it is wanted"


def _snapshots_text(named: Sequence[Mapping[str, Any]], now: float) -> str:
    columns = [
        _words("snapshot", key="name"),
        _number("position", 10),
        _number("turn", 6, key="number"),
        Column("made", 11, lambda row: format_age(now - row["created"])),
    ]
    return table(Report(columns, named, {})) if named else ""


def _one_line(text: str) -> str:
    """Without line ends and without what would move a terminal's cursor."""
    short = textwrap.shorten(text, TEXT_CHARACTERS, placeholder=" ...")
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in short)


def _words(title: str, key: str | None = None) -> Column:
    return Column(title, 0, _cell(key or title))


def _number(title: str, width: int, key: str | None = None) -> Column:
    return Column(title, width, _cell(key or title))


def _cell(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: str(row[key])

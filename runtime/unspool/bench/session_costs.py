"""What `unspool bench serve-engine` measures of sessions: finding one again, and forking it."""

import time
from typing import Any

from unspool.bench.engine_load import GREEDY
from unspool.sessions import Sessions, TurnRequest
from unspool.store import Store

OWNER = "bench"


def make_session(sessions: Sessions, name: str, tokens: tuple[int, ...]) -> float:
    """A session whose log holds these tokens; returns the seconds that reading them took."""
    sessions.create(OWNER, name)
    started = time.perf_counter()
    sessions.append(OWNER, name, tokens)
    seconds = time.perf_counter() - started
    sessions.flush()
    return seconds


def measure_restore(sessions: Sessions, store: Store, name: str, tier: str) -> dict[str, Any]:
    """One turn of one token, from where its state is; beside it, only reading the state's bytes from the store."""
    if tier == "store":
        sessions.tiers.drop_memory()
    started = time.perf_counter()
    first: list[float] = []
    request = TurnRequest(tokens=(1,), max_tokens=1, sampling=GREEDY)
    running = sessions.begin(OWNER, name, request, lambda _: first.append(time.perf_counter()))
    result = running.result()
    assert result.state_source == tier, f"the state came from {result.state_source}"
    sessions.flush()
    newest = max((entry for entry in store.list("states/")), key=lambda entry: entry.created)
    reading = time.perf_counter()
    store.get(newest.key)
    return {
        "tier": tier,
        "restore_seconds": result.restore_seconds,
        "first_token_seconds": first[-1] - started,
        "read_seconds": time.perf_counter() - reading,
        "state_bytes": newest.num_bytes,
        "position": result.position,
    }


def measure_forks(sessions: Sessions, name: str, count: int, read_seconds: float) -> dict[str, Any]:
    """Forks a session so many times and lets each generate a token; a prefill for each would take `read_seconds`."""
    started = time.perf_counter()
    forks = [sessions.fork(OWNER, name).id for _ in range(count)]
    forked = time.perf_counter()
    request = TurnRequest(tokens=(1,), max_tokens=1, sampling=GREEDY)
    running = [sessions.begin(OWNER, fork, request, lambda _: None) for fork in forks]
    for turn in running:
        turn.result()
    done = time.perf_counter()
    return {
        "forks": count,
        "fork_seconds": forked - started,
        "first_tokens_seconds": done - forked,
        "prefill_seconds": count * read_seconds,
        "share_of_prefills": (forked - started) / (count * read_seconds),
        "share_with_first_tokens": (done - started) / (count * read_seconds),
    }

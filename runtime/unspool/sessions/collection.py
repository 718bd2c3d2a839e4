"""Deletes from a store what no session reaches any more. Runs beside servers that share the store, on all owners.

A commit writes its turn and its state before the head that names them, so what is young is left alone.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from unspool.requests import InvalidRequest
from unspool.sessions.head import LogPlace, SessionHead
from unspool.sessions.head_scan import ScannedHead, scan_heads
from unspool.sessions.turn_log import TurnLog, turn_key
from unspool.store import Store, StoreCorrupt

HOUR, DAY = 3600, 86_400
QUARANTINE_DAYS = 7


@dataclass
class Collection:
    """What was deleted or, of a dry run, would have been."""

    dry_run: bool = False
    sessions: int = 0
    turns: int = 0
    states: int = 0
    quarantined: int = 0
    num_bytes: int = 0
    """Of turns, states and what was in quarantine."""
    damaged: tuple[str, ...] = ()
    """Records that could not be read. With any, no turn was deleted: whose they are is not known."""


def collect(
    store: Store, *, older_than_seconds: float = HOUR, idle_days: float | None = None, dry_run: bool = False
) -> Collection:
    """Deletes turns that no session reaches by its log, by a snapshot or by an idempotency key, states that none names,
    what has been in quarantine for a week, and with `idle_days` sessions that have not changed for so long.

    Nothing is touched that is younger than `older_than_seconds`: make it longer than any turn's commit takes. Takes
    memory for the ids of all turns in use. Raises InvalidRequest for a negative age, and StoreUnavailable; what was
    deleted by then is not told.
    """
    for name, value in (("older_than_seconds", older_than_seconds), ("idle_days", idle_days)):
        if value is not None and not value >= 0:
            raise InvalidRequest(name, "must not be negative")
    return _Collector(store, time.time(), older_than_seconds, dry_run).run(idle_days)


class _Collector:
    """One run. First what is in use is found, then all else that was there when it began is deleted."""

    def __init__(self, store: Store, now: float, older_than_seconds: float, dry_run: bool) -> None:
        self._store = store
        self._log = TurnLog(store)
        self._now = now
        self._before = now - older_than_seconds
        self._dry_run = dry_run
        self._seen: set[tuple[str, int]] = set()
        """Heads that were looked at, and their versions."""
        self._walked: set[str] = set()
        """Turns in use, with all that are before them."""
        self._repeatable: set[str] = set()
        """Turns that a request with their idempotency key is answered from; what is before them need not be there."""
        self._states: set[str] = set()
        """The ends of their keys: owner and digest."""
        self._unclear: set[str] = set()
        """Owners with a damaged head, which may name any of their states."""
        self._damaged: list[str] = []
        self._done = Collection(dry_run)

    def run(self, idle_days: float | None) -> Collection:
        idle_since = None if idle_days is None else min(self._now - idle_days * DAY, self._before)
        # Twice, as a fork may appear where the scan has been, of a session that goes back before the scan gets there.
        for _ in range(2):
            self._mark_all(idle_since)
        if not self._damaged:
            kept = {turn_key(turn) for turn in self._walked | self._repeatable}
            self._done.turns = self._sweep("turns/", self._before, lambda key: key in kept)
        self._done.states = self._sweep("states/", self._before, self._is_state_in_use)
        self._done.quarantined = self._sweep("quarantine/", self._now - QUARANTINE_DAYS * DAY, lambda _: False)
        self._done.damaged = tuple(self._damaged)
        return self._done

    def _mark_all(self, idle_since: float | None) -> None:
        for found in scan_heads(self._store):
            if (found.key, found.version) in self._seen:
                continue
            self._seen.add((found.key, found.version))
            if found.head is None:
                self._damaged.append(found.problem)
                self._unclear.add(found.owner)
            elif not (idle_since is not None and self._drop_idle(found, idle_since)):
                self._mark(found.head)

    def _drop_idle(self, found: ScannedHead, idle_since: float) -> bool:
        """Deletes a session that has not changed since; what it leaves is swept with everything else."""
        if found.written > idle_since:
            return False
        if not self._dry_run and self._store.swap_head(found.key, found.version, None) is None:
            return False
        self._done.sessions += 1
        return True

    def _mark(self, head: SessionHead) -> None:
        self._states |= {f"{head.owner}/{state.digest}" for state in head.wanted_states}
        self._repeatable |= {result.turn for result in head.results.values()}
        for place in (head.place, *(snapshot.place for snapshot in head.snapshots.values())):
            try:
                self._mark_log(place)
            except StoreCorrupt as error:
                self._damaged.append(f"session {head.id} of {head.owner}: {error}")

    def _mark_log(self, place: LogPlace) -> None:
        for turn, _ in self._log.back_from(place):
            if turn.id in self._walked:
                return
            self._walked.add(turn.id)

    def _is_state_in_use(self, key: str) -> bool:
        owner, digest = key.split("/")[-2:]
        return owner in self._unclear or f"{owner}/{digest}" in self._states

    def _sweep(self, prefix: str, before: float, is_in_use: Callable[[str], bool]) -> int:
        count = 0
        for entry in self._store.list(prefix):
            if entry.created <= before and not is_in_use(entry.key):
                if not self._dry_run:
                    self._store.delete(entry.key)
                count += 1
                self._done.num_bytes += entry.num_bytes
        return count

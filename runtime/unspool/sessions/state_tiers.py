"""Where a session's state is found again: in memory, or in the store; and how it gets there."""

import collections
import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from unspool.greedy_dual import GreedyDual
from unspool.sessions.room import with_room
from unspool.sessions.state_memory import StateKey, StateMemory
from unspool.state import SlotSnapshot, TensorSpec
from unspool.store import (
    Entry,
    ExpectedState,
    StateIdentity,
    StateProvenance,
    StateRejected,
    Store,
    StoreCorrupt,
    StoreFull,
    StoreUnavailable,
    read_state,
    write_state,
)

logger = logging.getLogger(__name__)

Tier = Literal["memory", "store"]

MAX_UNWRITTEN = 8
"""States that wait to be stored: more would only be more memory, as what is not stored can be replayed."""


class FoundState(NamedTuple):
    state: SlotSnapshot
    key: StateKey
    tier: Tier


@dataclass
class TierStatistics:
    """Counts since the tiers were opened, and what they hold now."""

    memory_states: int = 0
    memory_bytes: int = 0
    memory_hits: int = 0
    store_hits: int = 0
    stored: int = 0
    rejected: int = 0
    """Files that were damaged or another model's, and were moved to quarantine."""
    not_stored: int = 0
    """States that the store had no room for, or that came too fast for it."""


class StateTiers:
    """Keeps states by owner and by the digest of the tokens that made them. Thread-safe.

    A state is only a cache of the log: one that cannot be stored, or is damaged, costs a replay and nothing else. They
    are written to the store by a thread of their own, of each session only the newest.
    """

    def __init__(
        self,
        store: Store,
        identity: StateIdentity,
        layers: Sequence[dict[str, TensorSpec]],
        max_memory: int,
    ) -> None:
        self._store = store
        self._identity = identity
        self._layers = layers
        self._prefix = f"states/{_fingerprint(identity)}/"
        self._memory = StateMemory(max_memory)
        self._stored = _StoredStates(self._prefix)
        self._unwritten: collections.OrderedDict[str, tuple[StateKey, SlotSnapshot]] = collections.OrderedDict()
        self._counted = TierStatistics()
        self._changed = threading.Condition()
        self._writing: StateKey | None = None
        self._is_given_up = False
        """Whether what is being written is not wanted any more."""
        self._closing = False
        self._writer = threading.Thread(target=self._write_on, name="unspool-states", daemon=True)
        self._writer.start()

    def find(self, key: StateKey, position: int) -> FoundState | None:
        """The state after these tokens, so many. Raises StoreUnavailable."""
        with self._changed:
            state = self._memory.get(key)
            if state is not None:
                self._counted.memory_hits += 1
                return FoundState(state, key, "memory")
        state = self._read(key, position)
        if state is None:
            return None
        with self._changed:
            self._counted.store_hits += 1
            self._stored.use(self._store_key(key), position, state.num_bytes)
            self._memory.put(key, state, None, is_stored=True)
        return FoundState(state, key, "store")

    def keep(self, key: StateKey, state: SlotSnapshot, parent: StateKey | None, line: str) -> None:
        """Takes a state in. `line` is the session: of a line only the newest state is written to the store."""
        with self._changed:
            self._memory.put(key, state, parent, is_stored=False)
            self._unwritten.pop(line, None)
            self._unwritten[line] = (key, state)
            if len(self._unwritten) > MAX_UNWRITTEN:
                self._unwritten.popitem(last=False)
                self._counted.not_stored += 1
            self._changed.notify_all()

    def forget(self, keys: Sequence[StateKey]) -> None:
        """Deletes states that nobody will ask for; those that the store does not let go are left to `collect`."""
        with self._changed:
            for key in keys:
                self._memory.remove(key)
            for line, (key, _) in list(self._unwritten.items()):
                if key in keys:
                    del self._unwritten[line]
            self._is_given_up |= self._writing in keys
        for key in keys:
            self._delete(self._store_key(key))

    def make_room(self) -> bool:
        """Deletes the stored state that is worth the least; False when there is none. Raises StoreUnavailable."""
        with self._changed:
            is_listed = self._stored.is_listed
        listed = [] if is_listed else list(self._store.list("states/"))
        with self._changed:
            self._stored.take_in(listed)
            victim = self._stored.give_up()
        if victim is None:
            return False
        self._store.delete(victim)
        return True

    def drop_memory(self) -> None:
        """Leaves everything to the store and the log."""
        self.flush()
        with self._changed:
            self._memory.clear()

    def flush(self) -> None:
        """Returns when everything that waits has been written, or could not be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._unwritten and self._writing is None)

    def close(self) -> None:
        """Writes what waits and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join()

    def statistics(self) -> TierStatistics:
        with self._changed:
            self._counted.memory_states, self._counted.memory_bytes = len(self._memory), self._memory.num_bytes
            return TierStatistics(**asdict(self._counted))

    def _store_key(self, key: StateKey) -> str:
        return f"{self._prefix}{key.owner}/{key.digest}"

    def _read(self, key: StateKey, position: int) -> SlotSnapshot | None:
        """A stored state that passes every check; what does not is put aside."""
        name = self._store_key(key)
        try:
            data = self._store.get(name)
            if data is None:
                return None
            expected = ExpectedState(
                identity=self._identity, layers=self._layers, position=position, owner=key.owner, log_digest=key.digest
            )
            return read_state(data, expected)[0]
        except StateRejected as error:
            self._quarantine(name, data, error)
        except StoreCorrupt as error:
            self._quarantine(name, None, error)
        return None

    def _quarantine(self, name: str, data: bytes | None, error: Exception) -> None:
        """Moves a bad file out of the way, where somebody may look at it."""
        logger.warning("%s was not used, its log is replayed instead: %s", name, error)
        with self._changed:
            self._counted.rejected += 1
            self._stored.forget(name)
        try:
            if data is not None:
                self._store.put(f"quarantine/{name}", data)
        except StoreFull:
            logger.warning("%s was deleted, as the store has no room for a quarantine", name)
        self._store.delete(name)

    def _write_on(self) -> None:
        """The writer's thread."""
        while True:
            with self._changed:
                self._writing, self._is_given_up = None, False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._unwritten or self._closing)
                if not self._unwritten:
                    return
                _, (key, state) = self._unwritten.popitem(last=False)
                self._writing = key
            is_written = self._write(key, state)
            with self._changed:
                is_given_up = self._is_given_up
                if not is_written:
                    self._counted.not_stored += 1
                elif not is_given_up:
                    self._counted.stored += 1
                    self._memory.mark_stored(key)
            if is_given_up:
                self._delete(self._store_key(key))

    def _delete(self, name: str) -> None:
        with self._changed:
            self._stored.forget(name)
        try:
            self._store.delete(name)
        except Exception as error:  # whatever it is, a turn that is committed must not fail for it
            logger.warning("%s is to be collected later: %s", name, error)

    def _write(self, key: StateKey, state: SlotSnapshot) -> bool:
        """Whether the store has the state now."""
        name = self._store_key(key)
        try:
            provenance = StateProvenance(log_digest=key.digest, owner=key.owner)
            data = write_state(state, self._identity, provenance)
            with_room(lambda: self._store.put(name, data), self.make_room)
            with self._changed:
                self._stored.use(name, state.position, len(data))
            return True
        except (StoreFull, StoreUnavailable, StoreCorrupt) as error:
            logger.warning("a state was not stored, it can only be replayed: %s", error)
        except Exception:  # the thread must go on for the others
            logger.exception("a state was not stored, it can only be replayed")
        return False


class _StoredStates:
    """Which stored state to delete first: another model's, then those of earlier runs, then by replay saved a byte."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._worth: GreedyDual[str] = GreedyDual()
        self.is_listed = False
        """Whether it knows of what others have stored, or an earlier run."""

    def use(self, name: str, position: int, num_bytes: int) -> None:
        self._worth.use(name, position / num_bytes)

    def forget(self, name: str) -> None:
        self._worth.forget(name)

    def give_up(self) -> str | None:
        """None when there is nothing left to delete."""
        try:
            return self._worth.give_up()
        except KeyError:
            self.is_listed = False  # other processes may store some until the next time
            return None

    def take_in(self, listed: Sequence[Entry]) -> None:
        """States whose making is not known: other models' first, then the oldest."""
        self.is_listed = True
        oldest_first = sorted(listed, key=lambda entry: entry.created)
        for age, entry in enumerate(oldest_first):
            if entry.key not in self._worth:
                is_ours = entry.key.startswith(self._prefix)
                self._worth.use(entry.key, 1e-12 * (age + 1) if is_ours else 0.0)


def _fingerprint(identity: StateIdentity) -> str:
    return hashlib.sha256(json.dumps(asdict(identity), sort_keys=True).encode()).hexdigest()[:32]

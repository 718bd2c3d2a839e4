"""States in memory, as many as fit."""

from dataclasses import dataclass
from typing import NamedTuple

from unspool.greedy_dual import GreedyDual
from unspool.state import SlotSnapshot

READING_TOKENS = 16
"""What reading a state from the store costs, in tokens that might have been computed instead."""


class StateKey(NamedTuple):
    """A state is a function of the model and of the tokens that it has consumed: their digest names it."""

    owner: str
    digest: str


@dataclass(eq=False)
class _Held:
    state: SlotSnapshot
    parent: StateKey | None
    """A state that this one went on from."""
    is_stored: bool = False


class StateMemory:
    """States by their keys. Not thread-safe.

    What gives way is what is the cheapest to have again, for each of its bytes, and was long of no use: a state that is
    in the store too costs its reading, another one all tokens since the state that it went on from.
    """

    def __init__(self, max_bytes: int) -> None:
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._held: dict[StateKey, _Held] = {}
        self._children: dict[StateKey, set[StateKey]] = {}
        self._worth: GreedyDual[StateKey] = GreedyDual()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: StateKey) -> bool:
        return key in self._held

    def get(self, key: StateKey) -> SlotSnapshot | None:
        held = self._held.get(key)
        if held is None:
            return None
        self._worth.use(key, self._worth_of(held))
        return held.state

    def put(self, key: StateKey, state: SlotSnapshot, parent: StateKey | None, *, is_stored: bool) -> None:
        """Keeps a state, unless it is larger than all that there is room for; others may have to go."""
        self.remove(key)
        if state.num_bytes > self._max_bytes:
            return
        held = self._held[key] = _Held(state, parent if parent != key else None, is_stored)
        if held.parent is not None:
            self._children.setdefault(held.parent, set()).add(key)
        self.num_bytes += state.num_bytes
        self._worth.use(key, self._worth_of(held))
        while self.num_bytes > self._max_bytes:
            self._drop(self._worth.give_up())

    def mark_stored(self, key: StateKey) -> None:
        """Notes that the store has it now."""
        if held := self._held.get(key):
            held.is_stored = True
            self._worth.revalue(key, self._worth_of(held))

    def remove(self, key: StateKey) -> None:
        """Absent is fine."""
        if key in self._held:
            self._worth.forget(key)
            self._drop(key)

    def clear(self) -> None:
        for key in list(self._held):
            self.remove(key)

    def _worth_of(self, held: _Held) -> float:
        before = self._held.get(held.parent) if held.parent is not None else None
        replayed = held.state.position - (before.state.position if before is not None else 0)
        return (min(replayed, READING_TOKENS) if held.is_stored else replayed) / held.state.num_bytes

    def _drop(self, key: StateKey) -> None:
        """Takes a state out; those that went on from it have to be made from where it went on from itself."""
        held = self._held.pop(key)
        self.num_bytes -= held.state.num_bytes
        if held.parent is not None:
            self._leave(held.parent, key)
        for child in self._children.pop(key, set()):
            below = self._held[child]
            below.parent = held.parent
            if held.parent is not None:
                self._children.setdefault(held.parent, set()).add(child)
            self._worth.revalue(child, self._worth_of(below))

    def _leave(self, parent: StateKey, child: StateKey) -> None:
        siblings = self._children.get(parent, set())
        siblings.discard(child)
        if not siblings:
            self._children.pop(parent, None)

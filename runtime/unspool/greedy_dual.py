"""Which of many things of unequal worth and size to give up first. Knows nothing of what they are."""

import heapq
import itertools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


@dataclass
class _Entry:
    since: float
    """The clock when the thing was last of use."""
    value: float
    number: int


class GreedyDual(Generic[Key]):
    """GreedyDual-Size (Cao and Irani, "Cost-Aware WWW Proxy Caching Algorithms", 1997). Not thread-safe.

    A thing's value is what it would cost to make again, for each of its bytes, on top of a clock that moves on to the
    value of whatever is given up. So what has long been of no use goes in the end, whatever it cost.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._entries: dict[Key, _Entry] = {}
        self._heap: list[tuple[float, int, Key]] = []
        """Values as they were pushed; an entry's number tells its last one."""
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def use(self, key: Key, worth: float) -> None:
        """Notes that a thing is new or was of use; `worth` is its cost for each byte."""
        self._set(key, self._clock, worth)

    def revalue(self, key: Key, worth: float) -> None:
        """Notes another cost of a thing that was not used. Unknown keys are ignored."""
        if entry := self._entries.get(key):
            self._set(key, entry.since, worth)

    def forget(self, key: Key) -> None:
        """Absent is fine."""
        self._entries.pop(key, None)

    def give_up(self) -> Key:
        """Takes out the least valuable thing. Raises KeyError when there is none."""
        while self._heap:
            value, number, key = heapq.heappop(self._heap)
            entry = self._entries.get(key)
            if entry is not None and entry.number == number:
                self._clock = max(self._clock, value)
                del self._entries[key]
                return key
        raise KeyError("nothing is left")

    def _set(self, key: Key, since: float, worth: float) -> None:
        entry = self._entries[key] = _Entry(since, since + worth, next(self._numbers))
        heapq.heappush(self._heap, (entry.value, entry.number, key))
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = [(entry.value, entry.number, key) for key, entry in self._entries.items()]
            heapq.heapify(self._heap)

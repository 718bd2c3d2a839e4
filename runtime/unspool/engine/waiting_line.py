"""Who gets the next slot: priority with ageing, a fair share for every owner, the earliest deadline of an owner."""

import collections
import math
from collections.abc import Callable, Iterable, Iterator

from unspool.engine.sequence import EngineSequence

MAX_OWNERS = 4096
"""Owners whose share is remembered while they have nothing to do."""


class WaitingLine:
    """Sequences without a slot. Not thread-safe.

    The lowest priority number goes first, less one for each `ageing_seconds` of waiting. Among equals it is the owner
    for whom the engine has computed the fewest tokens; an owner's own requests go by deadline, then by arrival. So
    no owner gains by asking for haste, and none who comes back after a rest has the engine for itself.
    """

    def __init__(self, ageing_seconds: float) -> None:
        self._ageing_seconds = ageing_seconds
        self._waiting: dict[int, EngineSequence] = {}
        self._computed: collections.OrderedDict[str, int] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[EngineSequence]:
        return iter(self._waiting.values())

    def add(self, sequence: EngineSequence, busy_owners: Iterable[str]) -> None:
        """`busy_owners` are those with requests in flight: a newcomer starts level with the least served of them."""
        self._waiting[sequence.number] = sequence
        owner = sequence.request.owner
        others = [self._computed[busy] for busy in set(busy_owners) - {owner} if busy in self._computed]
        self._computed[owner] = max(self._computed.pop(owner, 0), min(others, default=0))
        while len(self._computed) > MAX_OWNERS:
            self._computed.popitem(last=False)

    def put_back(self, sequence: EngineSequence, now: float) -> None:
        """One that had a slot and lost it: its waiting begins anew."""
        sequence.queued = now
        self._waiting[sequence.number] = sequence

    def remove(self, sequence: EngineSequence) -> None:
        """Absent is fine."""
        self._waiting.pop(sequence.number, None)

    def charge(self, owner: str, tokens: int) -> None:
        """Counts what was computed for an owner."""
        self._computed[owner] = self._computed.get(owner, 0) + tokens

    def first(self, now: float, is_ready: Callable[[EngineSequence], bool]) -> EngineSequence | None:
        """Whose turn it is among those that are ready."""
        ready = filter(is_ready, self._waiting.values())
        return min(ready, key=lambda sequence: self._rank(sequence, now), default=None)

    def level(self, sequence: EngineSequence, now: float) -> int:
        """Its priority, raised by its waiting."""
        return sequence.request.priority - math.floor((now - sequence.queued) / self._ageing_seconds)

    def _rank(self, sequence: EngineSequence, now: float) -> tuple[int, int, float, int]:
        return (
            self.level(sequence, now),
            self._computed.get(sequence.request.owner, 0),
            sequence.deadline,
            sequence.number,
        )

"""The rows of a pool of states: lent to sequences, moved out and back, taken back."""

from unspool.engine.sequence import EngineSequence
from unspool.state import SlotSnapshot, StatePool


class Slots:
    """Which sequence has which row. Whoever gets one finds its own state there, or zeros. Not thread-safe."""

    def __init__(self, pool: StatePool) -> None:
        self.pool = pool
        self._free = list(reversed(range(pool.num_slots)))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def lend(self, sequence: EngineSequence, state: SlotSnapshot | None) -> None:
        """Gives a free slot with that state, or an empty one."""
        sequence.slot = self._free.pop()
        if state is None:
            self.pool.clear(sequence.slot)
        else:
            self.pool.restore(sequence.slot, state)

    def copy(self, sequence: EngineSequence) -> SlotSnapshot:
        """In the host's memory, wherever the pool is."""
        return self.pool.snapshot(sequence.slot, device="cpu")

    def park(self, sequence: EngineSequence) -> None:
        """Moves a sequence's state out, so that another may have its slot."""
        sequence.parked = self.copy(sequence)
        self.take_back(sequence)

    def take_back(self, sequence: EngineSequence) -> None:
        if sequence.slot >= 0:
            self._free.append(sequence.slot)
            sequence.slot = -1

"""Which states stay in memory."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from unspool.sessions.state_memory import StateKey, StateMemory
from unspool.state import SlotSnapshot

BYTES = 100


def state(position: int) -> SlotSnapshot:
    return SlotSnapshot(position, ({"far": torch.zeros(BYTES, dtype=torch.uint8)},))


def key(number: int) -> StateKey:
    return StateKey("me", str(number))


def test_what_is_in_the_store_too_goes_before_what_must_be_replayed() -> None:
    memory = StateMemory(2 * BYTES)
    memory.put(key(1), state(1000), None, is_stored=False)
    memory.put(key(2), state(5000), None, is_stored=False)
    memory.mark_stored(key(2))
    memory.put(key(3), state(900), None, is_stored=False)
    assert [key(number) in memory for number in (1, 2, 3)] == [True, False, True]


def test_a_state_is_worth_what_was_read_since_the_one_before_it() -> None:
    memory = StateMemory(3 * BYTES)
    memory.put(key(1), state(1000), None, is_stored=False)
    memory.put(key(2), state(1010), key(1), is_stored=False)
    memory.put(key(3), state(500), None, is_stored=False)
    memory.put(key(4), state(400), None, is_stored=False)
    assert key(2) not in memory and key(1) in memory


def test_without_the_one_before_it_a_state_is_worth_more() -> None:
    memory = StateMemory(2 * BYTES)
    memory.put(key(1), state(20), None, is_stored=False)
    memory.put(key(2), state(30), key(1), is_stored=False)
    memory.remove(key(1))
    memory.put(key(3), state(25), None, is_stored=False)
    memory.put(key(4), state(26), None, is_stored=False)
    assert key(2) in memory and key(3) not in memory


def test_a_state_larger_than_the_memory_is_not_kept() -> None:
    memory = StateMemory(BYTES - 1)
    memory.put(key(1), state(10), None, is_stored=False)
    assert (len(memory), memory.num_bytes) == (0, 0)


CHANGES = st.lists(
    st.tuples(st.sampled_from(["put", "get", "store", "remove"]), st.integers(0, 9), st.integers(0, 9)), max_size=200
)


@given(CHANGES, st.integers(0, 5))
def test_bytes_stay_within_the_cap_and_links_are_sound(changes: list[tuple[str, int, int]], states: int) -> None:
    memory = StateMemory(states * BYTES)
    for change, number, parent in changes:
        if change == "put":
            memory.put(key(number), state(number + 1), key(parent) if parent != number else None, is_stored=False)
        elif change == "get":
            found = memory.get(key(number))
            assert found is None or found.position == number + 1
        elif change == "store":
            memory.mark_stored(key(number))
        else:
            memory.remove(key(number))
        assert memory.num_bytes == BYTES * len(memory) <= states * BYTES
        children = {(held.parent, own) for own, held in memory._held.items() if held.parent is not None}
        assert children == {(above, child) for above, below in memory._children.items() for child in below}
        assert len(memory._worth) == len(memory)

"""What goes first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unspool.greedy_dual import GreedyDual


def test_the_cheapest_goes_first() -> None:
    cache: GreedyDual[str] = GreedyDual()
    for key, worth in (("b", 2.0), ("a", 1.0), ("c", 3.0)):
        cache.use(key, worth)
    cache.revalue("c", 0.5)
    cache.forget("b")
    assert [cache.give_up(), cache.give_up()] == ["c", "a"]
    with pytest.raises(KeyError):
        cache.give_up()


def test_what_is_of_use_outlives_what_was_dear_once() -> None:
    cache: GreedyDual[str] = GreedyDual()
    cache.use("dear", 10.0)
    for number in range(30):
        cache.use("used", 1.0)
        cache.use(f"other {number}", 1.0)
        given_up = cache.give_up()
        if given_up == "dear":
            break
        assert given_up != "used" or number == 0
    else:
        pytest.fail("what was dear once stayed for ever")


CHANGES = st.lists(
    st.tuples(st.sampled_from(["use", "revalue", "forget", "give up"]), st.integers(0, 5), st.integers(0, 9)),
    max_size=300,
)


@given(CHANGES)
def test_it_is_the_plain_definition(changes: list[tuple[str, int, int]]) -> None:
    cache: GreedyDual[int] = GreedyDual()
    clock, plain = 0.0, dict[int, tuple[float, float]]()
    for change, key, worth in changes:
        if change == "use":
            cache.use(key, worth)
            plain[key] = (clock, worth)
        elif change == "revalue":
            cache.revalue(key, worth)
            if key in plain:
                plain[key] = (plain[key][0], worth)
        elif change == "forget":
            cache.forget(key)
            plain.pop(key, None)
        elif plain:
            given_up = cache.give_up()
            value = sum(plain.pop(given_up))
            assert value == min([value, *map(sum, plain.values())])
            clock = max(clock, value)
        assert len(cache) == len(plain)
        assert len(cache._heap) <= 2 * len(plain) + 65

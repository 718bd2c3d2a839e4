"""Places that are lent in order, and given back by those who do not wait any more."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.llm.admission import Admission

STEPS = st.tuples(st.sampled_from(["ask", "ask", "release", "abandon"]), st.integers(0, 9))


@settings(max_examples=300)
@given(st.integers(1, 3), st.lists(STEPS, min_size=4, max_size=20))
def test_never_more_than_there_is_room_for_and_in_order(room: int, steps: list[tuple[str, int]]) -> None:
    admission = Admission(room)
    asked = []
    for step, choice in steps:
        if step == "ask":
            asked.append(admission.ask())
        elif step == "release" and (lent := [place for place in asked if place.done()]):
            asked.remove(lent[choice % len(lent)])
            admission.release()
        elif step == "abandon" and asked:
            admission.abandon(asked.pop(choice % len(asked)))
        done = [place.done() for place in asked]
        assert done == sorted(done, reverse=True), "the first to ask is served first"
        assert sum(done) == min(room, len(asked)), "nobody waits while there is room"

"""Whose turn it is: priority, ageing, fair shares, deadlines."""

import itertools
from collections.abc import Callable

import pytest

from unspool.engine.sequence import EngineSequence
from unspool.engine.waiting_line import MAX_OWNERS, WaitingLine
from unspool.requests import GenerationRequest, SamplingParams
from unspool.sampling import Sampler

Make = Callable[..., EngineSequence]


@pytest.fixture
def make() -> Make:
    numbers = itertools.count()

    def sequence(arrived: float = 0.0, **fields: object) -> EngineSequence:
        request = GenerationRequest(request_id="", prompt=(1,), **fields)  # type: ignore[arg-type]
        return EngineSequence(request, print, Sampler(SamplingParams(), (1,), 8), None, next(numbers), arrived)

    return sequence


def order(line: WaitingLine, now: float = 0.0, tokens: int = 0) -> list[EngineSequence]:
    """Takes all out, each costing its owner so many tokens."""
    taken = []
    while sequence := line.first(now, lambda _: True):
        line.remove(sequence)
        line.charge(sequence.request.owner, tokens)
        taken.append(sequence)
    return taken


def test_equal_requests_go_in_the_order_of_their_arrival(make: Make) -> None:
    line, sequences = WaitingLine(10), [make() for _ in range(5)]
    for sequence in sequences:
        line.add(sequence, [])
    assert order(line) == sequences


def test_a_lower_priority_number_goes_first_until_others_have_waited_long(make: Make) -> None:
    line, patient, urgent = WaitingLine(10), make(arrived=0.0, priority=1), make(arrived=9.0, priority=0)
    for sequence in (urgent, patient):
        line.add(sequence, [])
    assert line.first(9.0, lambda _: True) is urgent
    assert line.first(10.0, lambda _: True) is patient  # raised by one it is an equal, and has come before


def test_an_owner_with_many_requests_does_not_keep_others_waiting(make: Make) -> None:
    line = WaitingLine(10)
    many = [make(owner="many") for _ in range(6)]
    few = [make(owner="few") for _ in range(2)]
    for sequence in (*many, *few):
        line.add(sequence, ["many", "few"])
    taken = order(line, tokens=10)
    assert [sequence.request.owner for sequence in taken[:4]] == ["many", "few", "many", "few"]


def test_who_rested_starts_level_with_the_others(make: Make) -> None:
    line = WaitingLine(10)
    line.add(make(owner="steady"), ["steady"])
    line.charge("steady", 1000)
    for _ in range(4):
        line.add(make(owner="rested"), ["steady", "rested"])
        line.add(make(owner="steady"), ["steady", "rested"])
    owners = [sequence.request.owner for sequence in order(line, tokens=10)]
    assert owners[:6].count("rested") <= 4 and owners[:2].count("rested") == 1


def test_deadlines_order_the_requests_of_one_owner_only(make: Make) -> None:
    line = WaitingLine(10)
    late, early, hasty = make(owner="a", deadline=9.0), make(owner="a", deadline=3.0), make(owner="b", deadline=0.5)
    for sequence in (late, early, hasty):
        line.add(sequence, ["a", "b"])
    line.charge("b", 5)
    assert order(line) == [early, late, hasty]


def test_who_is_not_ready_is_passed_over(make: Make) -> None:
    line, first, second = WaitingLine(10), make(), make()
    for sequence in (first, second):
        line.add(sequence, [])
    assert line.first(0.0, lambda sequence: sequence is not first) is second
    assert line.first(0.0, lambda _: False) is None


def test_shares_of_the_absent_are_forgotten_in_the_end(make: Make) -> None:
    line = WaitingLine(10)
    for number in range(5000):
        sequence = make(owner=f"owner {number}")
        line.add(sequence, [])
        line.remove(sequence)
    assert len(line._computed) == MAX_OWNERS

"""States that requests leave and go on from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from unspool.engine import Engine
from unspool.executor import Executor
from unspool.requests import GenerationRequest, InvalidRequest
from unspool.state import SlotSnapshot

if TYPE_CHECKING:
    from conftest import Answer

    RequestOf = Callable[..., GenerationRequest]
    Run = Callable[..., list[Answer]]
    Start = Callable[..., Engine]


def same_bits(first: SlotSnapshot, second: SlotSnapshot) -> bool:
    return first.position == second.position and all(
        torch.equal(layer[name], other[name])
        for layer, other in zip(first.layers, second.layers, strict=True)
        for name in layer
    )


def test_a_text_goes_on_from_its_state(native: Executor, start_engine: Start, request_of: RequestOf, run: Run) -> None:
    engine = start_engine(native, prefill_chunk=16)
    whole = request_of("whole", 90, max_tokens=20, keep_state=True)
    (expected,) = run(engine, whole)
    (begun,) = run(engine, request_of("begun", 1, prompt=whole.prompt[:37], max_tokens=0, keep_state=True))
    state = begun.end.state
    assert state is not None and state.position == 37 and begun.tokens == []
    (goes_on,) = run(engine, request_of("on", 1, prompt=whole.prompt[37:], start=state, max_tokens=8, keep_state=True))
    state = goes_on.end.state
    assert state is not None and state.position == 90 + 7  # the last token is known and has not been read
    (rest,) = run(
        engine, request_of("rest", 1, prompt=tuple(goes_on.tokens[-1:]), start=state, max_tokens=12, keep_state=True)
    )
    assert goes_on.tokens + rest.tokens == expected.tokens
    assert rest.end.state is not None and expected.end.state is not None
    assert same_bits(rest.end.state, expected.end.state)


def test_a_state_may_be_started_from_many_times(
    executor: Executor, start_engine: Start, request_of: RequestOf, run: Run
) -> None:
    engine = start_engine(executor, max_slots=3)
    (begun,) = run(engine, request_of("begun", 40, max_tokens=0, keep_state=True))
    before = [{name: tensor.clone() for name, tensor in layer.items()} for layer in begun.end.state.layers]
    branches = [request_of(f"branch{n}", 7, start=begun.end.state) for n in range(8)]
    answers = run(engine, *branches)
    assert len({tuple(answer.tokens) for answer in answers}) == 1
    assert same_bits(begun.end.state, SlotSnapshot(40, tuple(before)))


def test_who_does_not_ask_or_does_not_finish_gets_no_state(
    native: Executor, start_engine: Start, request_of: RequestOf, run: Run, new_answer: type[Answer]
) -> None:
    engine = start_engine(native)
    assert run(engine, request_of("plain", 5))[0].end.state is None
    answer = new_answer()
    engine.submit(request_of("long", 5, max_tokens=1_000_000, keep_state=True), answer)
    answer.next()
    engine.cancel("long")
    assert answer.finish().state is None


def test_the_state_of_another_model_is_refused(
    native: Executor, start_engine: Start, request_of: RequestOf, run: Run
) -> None:
    engine = start_engine(native)
    state = run(engine, request_of("a", 5, max_tokens=0, keep_state=True))[0].end.state
    first, *rest = state.layers
    strangers = [
        SlotSnapshot(5, (first,)),
        SlotSnapshot(5, ({**first, "more": first["far"]}, *rest)),
        SlotSnapshot(5, ({**first, "far": first["far"].half()}, *rest)),
        SlotSnapshot(5, ({**first, "far": first["far"][:1]}, *rest)),
    ]
    for stranger in strangers:
        with pytest.raises(InvalidRequest, match="start: is the state of another model"):
            engine.submit(request_of("b", 5, start=stranger), print)
    assert engine.alive


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"deadline": 0.0}, "deadline"),
        ({"deadline": float("nan")}, "deadline"),
        ({"priority": 10**6}, "priority"),
        ({"checkpoints": tuple(range(65))}, "checkpoints"),
        ({"stop": ("x",)}, "stop"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    native: Executor, start_engine: Start, request_of: RequestOf, fields: dict[str, object], field: str
) -> None:
    engine = start_engine(native)
    with pytest.raises(InvalidRequest) as error:
        engine.submit(dataclasses.replace(request_of("a", 5), **fields), print)
    assert error.value.field == field

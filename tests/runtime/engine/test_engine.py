"""The engine on a tiny model: results alone and together, limits, cancellation and failure."""

from __future__ import annotations

import copy
import queue
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

from unspool import UnspoolForCausalLM
from unspool.engine import Engine, EngineOptions
from unspool.executor import Executor, NativeExecutor, TorchExecutor
from unspool.native import pack
from unspool.requests import (
    EngineBusy,
    EngineDead,
    EngineEvent,
    FinishEvent,
    GenerationRequest,
    InvalidRequest,
    PromptEvent,
    SamplingParams,
    TokenEvent,
)

if TYPE_CHECKING:
    from conftest import Answer

    RequestOf = Callable[..., GenerationRequest]
    Run = Callable[..., list[Answer]]

GREEDY = SamplingParams(temperature=0.0)
VOCABULARY = 64

FULL: dict[str, Callable[[UnspoolForCausalLM], Executor]] = {
    "torch": TorchExecutor,
    "native": lambda model: NativeExecutor(model.config, pack(model, "float32"), torch.float32),
}
NARROW: dict[str, Callable[[UnspoolForCausalLM], Executor]] = {
    "torch bfloat16": lambda model: TorchExecutor(copy.deepcopy(model).to(torch.bfloat16)),
    "native int8": lambda model: NativeExecutor(model.config, pack(model, "int8"), torch.float32),
    "native int4, half state": lambda model: NativeExecutor(model.config, pack(model, "int4"), torch.float16),
}


def test_greedy_tokens_are_those_of_generate(
    engine: Engine, model: UnspoolForCausalLM, request_of: RequestOf, run: Run
) -> None:
    one = request_of("a", 40)
    (answer,) = run(engine, one)
    expected = model.generate(torch.tensor([one.prompt]), max_new_tokens=12, do_sample=False)
    assert answer.tokens == expected[0, 40:].tolist()
    assert answer.end == FinishEvent("a", "length", 40, 12)


def test_many_requests_together_give_what_each_gives_alone(engine: Engine, request_of: RequestOf, run: Run) -> None:
    requests = [request_of(f"r{n}", length) for n, length in enumerate([1, 5, 7, 8, 30, 50, 3])]
    alone = [run(engine, one)[0].tokens for one in requests]
    together = [answer.tokens for answer in run(engine, *requests)]
    assert together == alone


def test_a_seed_repeats_a_sample_whatever_else_runs(engine: Engine, request_of: RequestOf, run: Run) -> None:
    sampled = request_of("s", 9, sampling=SamplingParams(temperature=1.5, seed=7))
    alone = run(engine, sampled)[0].tokens
    together = run(engine, request_of("x", 4), sampled, request_of("y", 6))[1].tokens
    assert together == alone


def test_a_stop_token_ends_the_text_and_is_reported(engine: Engine, request_of: RequestOf, run: Run) -> None:
    tokens = run(engine, request_of("a", 20))[0].tokens
    stop = tokens[3]
    (answer,) = run(engine, request_of("a", 20, stop_ids=frozenset([stop])))
    assert answer.tokens == tokens[: tokens.index(stop) + 1]
    assert isinstance(answer.events[-1], FinishEvent)
    assert answer.events[-1].reason == "stop"


def test_log_probabilities_are_those_of_the_whole_text(
    engine: Engine, model: UnspoolForCausalLM, request_of: RequestOf, run: Run
) -> None:
    one = request_of("a", 25, logprobs=2, prompt_logprobs=3, max_tokens=4)
    (answer,) = run(engine, one)
    text = [*one.prompt, *answer.tokens]
    with torch.no_grad():
        expected = model(torch.tensor([text])).logits[0].log_softmax(-1)
    assert answer.prompt.logprobs[0] is None
    scores = [
        *answer.prompt.logprobs[1:],
        *(event.logprobs for event in answer.events if isinstance(event, TokenEvent)),
    ]
    assert len(scores) == len(text) - 1
    for position, score in enumerate(scores):
        assert score is not None
        assert score.logprob == pytest.approx(float(expected[position, text[position + 1]]), abs=1e-4)
        assert score.top[0][0] == int(expected[position].argmax())
        assert len(score.top) == (3 if position < 24 else 2)


def test_a_prompt_can_be_scored_without_generating(engine: Engine, request_of: RequestOf, run: Run) -> None:
    (answer,) = run(engine, request_of("a", 20, max_tokens=0, prompt_logprobs=0))
    assert isinstance(answer.events[0], PromptEvent)
    assert len(answer.events[0].logprobs) == 20
    assert answer.events[1] == FinishEvent("a", "length", 20, 0)


def test_a_cancelled_request_frees_its_slot(engine: Engine, request_of: RequestOf, new_answer: type[Answer]) -> None:
    answers = [new_answer() for _ in range(3)]
    for number, answer in enumerate(answers):
        engine.submit(request_of(f"long{number}", 5, max_tokens=1_000_000), answer)
    waiting = new_answer()
    engine.submit(request_of("waiting", 5), waiting)
    answers[1].next()
    engine.cancel("long1")
    assert answers[1].finish().reason == "cancelled"
    assert waiting.finish().reason == "length"
    engine.cancel("long0")
    engine.cancel("long2")
    assert [answers[n].finish().reason for n in (0, 2)] == ["cancelled", "cancelled"]
    engine.cancel("never heard of")


def test_a_full_queue_refuses(model: UnspoolForCausalLM, request_of: RequestOf, new_answer: type[Answer]) -> None:
    engine = Engine(TorchExecutor(model), EngineOptions(max_slots=1, max_queue=1))
    engine.start()
    running, waiting = new_answer(), new_answer()
    engine.submit(request_of("running", 5, max_tokens=1_000_000), running)
    running.next()
    engine.submit(request_of("waiting", 5), waiting)
    with pytest.raises(EngineBusy):
        engine.submit(request_of("too many", 5), new_answer())
    engine.shutdown()
    assert running.finish().reason == "cancelled"
    assert waiting.finish().reason == "cancelled"
    with pytest.raises(EngineDead):
        engine.submit(request_of("late", 5), new_answer())


def test_numbers_that_are_not_numbers_end_only_their_own_request(model: UnspoolForCausalLM, run: Run) -> None:
    config = model.config
    broken = UnspoolForCausalLM(config).eval()
    broken.load_state_dict(model.state_dict())
    broken.model.embed_tokens.weight.data[3] = torch.nan
    engine = Engine(TorchExecutor(broken))
    engine.start()
    bad = GenerationRequest(request_id="bad", prompt=(1, 3), sampling=GREEDY)
    good = GenerationRequest(request_id="good", prompt=(1, 2), sampling=GREEDY, max_tokens=1)
    first, second = run(engine, bad, good)
    assert isinstance(first.events[-1], FinishEvent)
    assert first.events[-1].reason == "error"
    assert first.events[-1].error
    assert isinstance(second.events[-1], FinishEvent)
    assert second.events[-1].reason == "length"
    assert engine.alive
    engine.shutdown()


def test_a_failing_model_ends_every_request_and_the_engine_says_so(
    model: UnspoolForCausalLM, request_of: RequestOf, new_answer: type[Answer]
) -> None:
    broken = UnspoolForCausalLM(model.config).eval()
    broken.model.norm.weight = torch.nn.Parameter(torch.ones(5))  # the wrong size: every forward pass raises
    engine = Engine(TorchExecutor(broken))
    engine.start()
    answer = new_answer()
    engine.submit(request_of("a", 5), answer)
    assert answer.finish().reason == "error"
    with pytest.raises(EngineDead):
        for _ in range(100):
            engine.submit(request_of("b", 5), answer)
            answer.finish()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"sampling": SamplingParams(logit_bias={VOCABULARY: 1.0})}, "logit_bias"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    engine: Engine, fields: dict[str, object], field: str, request_of: RequestOf, new_answer: type[Answer]
) -> None:
    with pytest.raises(InvalidRequest) as error:
        engine.submit(request_of("a", 5, **fields), new_answer())
    assert error.value.field == field


@pytest.mark.parametrize("prompt", [(), (-1,), (VOCABULARY,)])
def test_a_prompt_outside_the_vocabulary_is_refused(
    engine: Engine, prompt: tuple[int, ...], new_answer: type[Answer]
) -> None:
    with pytest.raises(InvalidRequest, match="prompt"):
        engine.submit(GenerationRequest(request_id="a", prompt=prompt), new_answer())


def test_an_id_in_flight_is_refused(engine: Engine, request_of: RequestOf, new_answer: type[Answer]) -> None:
    answer = new_answer()
    engine.submit(request_of("same", 5, max_tokens=1_000_000), answer)
    with pytest.raises(InvalidRequest, match="request_id"):
        engine.submit(request_of("same", 5), new_answer())
    engine.cancel("same")
    answer.finish()


@pytest.mark.parametrize("name", [*FULL, *NARROW])
def test_log_probabilities_have_the_same_bits_alone_and_in_any_company(
    model: UnspoolForCausalLM, name: str, request_of: RequestOf, run: Run
) -> None:
    engine = Engine((FULL | NARROW)[name](model), EngineOptions(max_slots=5, prefill_chunk=16, prefix_cache=0))
    engine.start()
    requests = [request_of(f"r{n}", length, logprobs=2) for n, length in enumerate([33, 1, 7, 20, 12])]

    def scores(answer: Answer) -> list[object]:
        return [event.logprobs for event in answer.events if isinstance(event, TokenEvent)]

    alone = [scores(run(engine, one)[0]) for one in requests]
    for company in (requests, requests[1:4], requests[::2]):
        together = [scores(answer) for answer in run(engine, *company)]
        assert together == [alone[requests.index(one)] for one in company]
    engine.shutdown()


def test_a_short_prompt_does_not_wait_for_a_long_one(engine: Engine, request_of: RequestOf) -> None:
    order: list[str] = []
    done = queue.SimpleQueue[None]()

    def sink(event: EngineEvent) -> None:
        if isinstance(event, FinishEvent):
            order.append(event.request_id)
            done.put(None)

    engine.submit(request_of("long", 3000, max_tokens=1), sink)
    engine.submit(request_of("short", 5, max_tokens=1), sink)
    for _ in range(2):
        done.get(timeout=60)
    assert order == ["short", "long"]


def test_a_receiver_that_fails_loses_only_its_own_request(engine: Engine, request_of: RequestOf, run: Run) -> None:
    def broken(_: EngineEvent) -> None:
        raise RuntimeError("no")

    engine.submit(request_of("broken", 5, max_tokens=1_000_000), broken)
    (answer,) = run(engine, request_of("good", 5))
    assert len(answer.tokens) == 12
    assert engine.alive

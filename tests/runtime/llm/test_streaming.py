"""Streams of `LLM`: pieces, many at once, and leaving early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from unspool import LLM, SamplingParams
from unspool.llm import CompletionOutput

RANDOM = SamplingParams(max_tokens=20, seed=3)
ENDLESS = SamplingParams(max_tokens=1_000_000, ignore_eos=True, temperature=0)
MESSAGES = [{"role": "user", "content": "Hello there"}]


async def streamed(llm: LLM, prompt: str, params: SamplingParams) -> CompletionOutput:
    """The last piece's output, whose text is that of all pieces."""
    text = ""
    async with aclosing(llm.stream(prompt, params)) as pieces:
        async for piece in pieces:
            text += piece.delta
    assert piece.output.text == text
    return piece.output


def test_64_streams_at_once_give_what_each_gives_alone(llm: LLM) -> None:
    prompts = [f"{number} A thread of any length" for number in range(64)]
    each = [replace(RANDOM, seed=number) for number in range(64)]
    alone = [llm.generate(prompt, params)[0].outputs[0] for prompt, params in zip(prompts, each, strict=True)]

    async def together() -> list[CompletionOutput]:
        return await asyncio.gather(*(streamed(llm, *pair) for pair in zip(prompts, each, strict=True)))

    assert asyncio.run(together()) == alone


def test_pieces_tell_what_there_is_so_far(llm: LLM) -> None:
    (expected,) = llm.generate("The quick", replace(RANDOM, logprobs=1))[0].outputs
    pieces = list(llm.stream_sync("The quick", replace(RANDOM, logprobs=1)))
    text = ""
    for piece in pieces:
        text += piece.delta
        assert piece.output.text == text
        assert piece.output.token_ids == expected.token_ids[: len(piece.output.token_ids)]
        assert piece.output.logprobs == expected.logprobs[: len(piece.output.token_ids)]  # type: ignore[index]
        assert piece.output.finish_reason == piece.finish_reason
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].output == expected


def test_samples_are_streamed_side_by_side(llm: LLM) -> None:
    params = replace(RANDOM, n=3)
    texts = ["", "", ""]
    for piece in llm.stream_sync(MESSAGES, params):
        texts[piece.index] += piece.delta
    assert texts == [sample.text for sample in llm.chat(MESSAGES, params)[0].outputs]


def test_async_calls_return_what_the_others_do(llm: LLM) -> None:
    async def both() -> list[object]:
        return [await llm.agenerate(["A", "B"], RANDOM), await llm.achat(MESSAGES, RANDOM)]

    generated, answered = asyncio.run(both())
    expected = [llm.generate(["A", "B"], RANDOM), llm.chat(MESSAGES, RANDOM)]
    for outputs, wanted in zip((generated, answered), expected, strict=True):
        assert [one.outputs for one in outputs] == [one.outputs for one in wanted]  # type: ignore[attr-defined]


@pytest.fixture
def single(open_llm: Callable[..., LLM]) -> LLM:
    """With one slot: whoever does not give it back keeps all others waiting for ever."""
    return open_llm(max_slots=1)


def test_cancelling_a_task_frees_its_slot(single: LLM) -> None:
    async def cancel_after_a_piece() -> None:
        begun = asyncio.Event()

        async def read() -> None:
            async for _ in single.stream("A", ENDLESS):
                begun.set()

        task = asyncio.create_task(read())
        await begun.wait()
        waiting = asyncio.create_task(single.agenerate(["B"] * 300, RANDOM))
        await asyncio.sleep(0)
        waiting.cancel()
        task.cancel()
        results = await asyncio.gather(task, waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2
        assert (await single.agenerate("C", RANDOM))[0].outputs[0].finish_reason is not None

    asyncio.run(cancel_after_a_piece())
    assert single.engine.statistics().computing == 0


def test_leaving_a_stream_early_frees_its_slot(single: LLM) -> None:
    async def leave() -> None:
        async with aclosing(single.stream("A", ENDLESS)) as pieces:
            async for _ in pieces:
                break
        await single.agenerate("B", RANDOM)

    asyncio.run(leave())
    pieces = single.stream_sync("A", ENDLESS)
    next(pieces)
    pieces.close()
    single.generate("B", RANDOM)
    assert single.engine.statistics().computing == 0


def test_a_cancelled_call_gives_its_places_in_the_queue_back(single: LLM) -> None:
    async def cancel_many() -> None:
        holding = asyncio.create_task(streamed(single, "A", ENDLESS))
        calls = [asyncio.create_task(single.agenerate(["B"] * 200, RANDOM)) for _ in range(4)]
        await asyncio.sleep(0.05)
        for task in (*calls, holding):
            task.cancel()
        await asyncio.gather(*calls, holding, return_exceptions=True)

    asyncio.run(cancel_many())
    room = single.engine.options.max_queue
    outputs = single.generate(["A"] * (room + 1), SamplingParams(max_tokens=1, temperature=0))
    assert len({output.outputs[0].text for output in outputs}) == 1
    assert single._admission._room == room

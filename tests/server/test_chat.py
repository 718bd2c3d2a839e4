"""POST /v1/chat/completions and /v1/models on a real server process, by OpenAI's own clients."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:
    from conftest import ServerProcess

MESSAGES = [{"role": "system", "content": "be quick"}, {"role": "user", "content": "the lazy dog?"}]
GREEDY = {"model": "tiny", "temperature": 0}


def test_chat_is_the_completion_of_its_template(client: OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    chat = client.chat.completions.create(messages=MESSAGES, max_completion_tokens=16, **GREEDY)
    plain = client.completions.create(prompt=prompt, max_tokens=16, **GREEDY)
    assert chat.choices[0].message.content.strip() == plain.choices[0].text.strip()
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage.prompt_tokens == len(prompt) == plain.usage.prompt_tokens


def test_text_parts_and_developer_are_other_spellings(client: OpenAI) -> None:
    parts = [
        {"role": "developer", "content": [{"type": "text", "text": "be quick"}]},
        {"role": "user", "content": [{"type": "text", "text": "the lazy dog?"}]},
    ]
    replies = [
        client.chat.completions.create(messages=messages, max_tokens=8, **GREEDY) for messages in (MESSAGES, parts)
    ]
    assert replies[0].choices == replies[1].choices and replies[0].usage == replies[1].usage


def test_streamed_chat_equals_whole_chat(client: OpenAI) -> None:
    whole = client.chat.completions.create(messages=MESSAGES, max_tokens=32, logprobs=True, top_logprobs=3, **GREEDY)
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES,
            max_tokens=32,
            logprobs=True,
            top_logprobs=3,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
    )
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert choices[0].delta.role == "assistant" and choices[-1].finish_reason == "length"
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [score for choice in choices for score in choice.logprobs.content] == whole.choices[0].logprobs.content
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_logprobs_name_each_token_by_its_bytes(client: OpenAI) -> None:
    reply = client.chat.completions.create(messages=MESSAGES, max_tokens=24, logprobs=True, top_logprobs=2, **GREEDY)
    content = reply.choices[0].logprobs.content
    assert len(content) == reply.usage.completion_tokens == 24
    assert all(len(scored.top_logprobs) == 2 for scored in content)
    assert all(scored.logprob == scored.top_logprobs[0].logprob for scored in content)
    spelled = b"".join(bytes(scored.bytes) for scored in content).decode(errors="replace")
    assert spelled == reply.choices[0].message.content


def test_answer_can_be_sent_back_as_it_came(client: OpenAI) -> None:
    first = client.chat.completions.create(messages=MESSAGES, max_tokens=4, **GREEDY)
    history = [*MESSAGES, first.choices[0].message.model_dump(), {"role": "user", "content": "and then?"}]
    assert client.chat.completions.create(messages=history, max_tokens=4, **GREEDY).choices[0].message.content


def test_harmless_fields_are_accepted(client: OpenAI) -> None:
    client.chat.completions.create(
        messages=MESSAGES,
        max_tokens=2,
        user="me",
        metadata={"job": "1"},
        store=False,
        service_tier="auto",
        parallel_tool_calls=True,
        prompt_cache_key="key",
        safety_identifier="me",
        response_format={"type": "text"},
        tool_choice="none",
        n=1,
        stop=None,
        prediction={"type": "content", "content": "guess"},
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 0},
        **GREEDY,
    )


def test_async_client_streams_several_chats_at_once(server: ServerProcess) -> None:
    async def ask(client: AsyncOpenAI, text: str) -> str:
        stream = await client.chat.completions.create(
            messages=[{"role": "user", "content": text}], max_tokens=16, stream=True, **GREEDY
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> tuple[list[str], list[str]]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            texts = [f"question {index}" for index in range(8)]
            together = await asyncio.gather(*[ask(client, text) for text in texts])
            return together, [await ask(client, text) for text in texts]

    together, alone = asyncio.run(ask_all())
    assert together == alone


def test_models_are_listed_and_described(client: OpenAI) -> None:
    listed = client.models.list().data
    assert [model.id for model in listed] == ["tiny"]
    assert client.models.retrieve("tiny") == listed[0]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("some/other")
    with pytest.raises(openai.NotFoundError, match="no such model"):
        client.chat.completions.create(model="gpt-4o", messages=MESSAGES)

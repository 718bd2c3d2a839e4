"""POST /v1/completions on a real server process, by OpenAI's own client."""

import math
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from openai import OpenAI
from transformers import PreTrainedTokenizerFast

from unspool import UnspoolForCausalLM

PROMPT = "the quick brown fox jumps over the lazy dog"
GREEDY = {"model": "tiny", "temperature": 0}


def reference_logprobs(model: UnspoolForCausalLM, tokens: list[int]) -> torch.Tensor:
    """[T, vocabulary]: of what follows each token."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0].float(), dim=-1)


def test_greedy_text_is_that_of_the_model(
    client: OpenAI, model: UnspoolForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    reply = client.completions.create(prompt=PROMPT, max_tokens=12, **GREEDY)
    tokens = tokenizer.encode(PROMPT)
    prompt_len = len(tokens)
    for _ in range(12):
        tokens.append(int(reference_logprobs(model, tokens)[-1].argmax()))
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    assert reply.choices[0].text == whole[len(PROMPT) :]
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (prompt_len, 12)
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_streamed_text_equals_whole_text(client: OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, max_tokens=40, **GREEDY)
    chunks = list(
        client.completions.create(
            prompt=PROMPT, max_tokens=40, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_every_form_of_prompt_gives_the_same_text(client: OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.encode(PROMPT)
    texts = []
    for prompt in (PROMPT, [PROMPT, PROMPT], tokens, [tokens, tokens]):
        reply = client.completions.create(prompt=prompt, max_tokens=8, **GREEDY)
        assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
        texts += [choice.text for choice in reply.choices]
    assert len(texts) == 6 and len(set(texts)) == 1


def test_echo_scores_the_prompt_as_the_model_does(
    client: OpenAI, model: UnspoolForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [tokenizer.encode(PROMPT), tokenizer.encode("a thread of any length, drawn from a spool, and more")]
    reply = client.completions.create(prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234, **GREEDY)
    for tokens, choice in zip(prompts, reply.choices, strict=True):
        scores = choice.logprobs
        assert len(scores.tokens) == len(scores.top_logprobs) == len(scores.text_offset) == len(tokens) + 1
        assert scores.token_logprobs[0] is None and scores.top_logprobs[0] is None
        expected = reference_logprobs(model, tokens)
        for index, token in enumerate(tokens[1:]):
            assert math.isclose(scores.token_logprobs[index + 1], expected[index, token], abs_tol=2e-4)
            best = max(scores.top_logprobs[index + 1].values())
            assert math.isclose(best, expected[index].max(), abs_tol=2e-4)
        assert choice.text.startswith(tokenizer.decode(tokens))


def test_echo_without_output_reads_the_prompt_only(client: OpenAI) -> None:
    reply = client.completions.create(prompt=PROMPT, echo=True, logprobs=0, max_tokens=0, **GREEDY)
    choice = reply.choices[0]
    assert choice.text == PROMPT and reply.usage.completion_tokens == 0
    starts = choice.logprobs.text_offset
    assert [PROMPT[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)] == choice.logprobs.tokens


def test_streamed_echo_begins_with_the_prompt_and_its_scores(client: OpenAI) -> None:
    whole = client.completions.create(prompt=PROMPT, echo=True, logprobs=2, max_tokens=5, **GREEDY)
    chunks = list(client.completions.create(prompt=PROMPT, echo=True, logprobs=2, max_tokens=5, stream=True, **GREEDY))
    assert chunks[0].choices[0].text == PROMPT
    streamed = [score for chunk in chunks for score in chunk.choices[0].logprobs.token_logprobs]
    assert streamed == whole.choices[0].logprobs.token_logprobs


def test_echo_of_half_a_character_is_completed_by_the_answer(
    client: OpenAI, tokenizer: PreTrainedTokenizerFast
) -> None:
    letters = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\u65e5")[0][0]
    *beginning, rest = tokenizer.convert_tokens_to_ids(list(letters))
    for logprobs in (None, 0):
        reply = client.completions.create(
            prompt=beginning, echo=True, logprobs=logprobs, max_tokens=1, logit_bias={str(rest): 100}, **GREEDY
        )
        assert reply.choices[0].text == "\u65e5"
    assert reply.choices[0].logprobs.text_offset == [0, 0, 0]
    unanswered = client.completions.create(prompt=beginning, echo=True, max_tokens=0, **GREEDY)
    assert unanswered.choices[0].text == "\ufffd"


def test_echo_of_a_replacement_character_shows_it_once(client: OpenAI) -> None:
    reply = client.completions.create(prompt="fox\ufffd", echo=True, max_tokens=0, **GREEDY)
    assert reply.choices[0].text == "fox\ufffd"


def test_text_ends_before_a_stop_string(client: OpenAI) -> None:
    text = client.completions.create(prompt=PROMPT, max_tokens=40, **GREEDY).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    for stream in (False, True):
        reply = client.completions.create(prompt=PROMPT, max_tokens=40, stop=[stop], stream=stream, **GREEDY)
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


def test_end_of_text_token_ends_the_text_unless_ignored(client: OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    bias = {str(tokenizer.eos_token_id): 100}
    reply = client.completions.create(prompt=PROMPT, max_tokens=9, logit_bias=bias, logprobs=1, **GREEDY)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "stop")
    assert reply.choices[0].logprobs.tokens == [tokenizer.eos_token]
    assert reply.usage.completion_tokens == 1
    ignoring = client.completions.create(
        prompt=PROMPT, max_tokens=9, logit_bias=bias, extra_body={"ignore_eos": True}, **GREEDY
    )
    assert ignoring.choices[0].finish_reason == "length" and ignoring.usage.completion_tokens == 9


def test_stop_token_is_no_part_of_the_text(client: OpenAI, tokenizer: PreTrainedTokenizerFast) -> None:
    token = tokenizer.encode("fox")[-1]
    reply = client.completions.create(
        prompt=PROMPT, logit_bias={str(token): 100}, extra_body={"stop_token_ids": [token]}, **GREEDY
    )
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == ("", "stop")


def test_seed_makes_sampling_repeatable(client: OpenAI) -> None:
    def sample(seed: int) -> str:
        return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=seed).choices[0].text

    assert sample(7) == sample(7) != sample(8)


def test_requests_in_flight_together_answer_as_alone(client: OpenAI) -> None:
    prompts = [PROMPT[: 4 + 3 * index] for index in range(12)]

    def ask(prompt: str) -> str:
        return client.completions.create(prompt=prompt, max_tokens=24, **GREEDY).choices[0].text

    alone = [ask(prompt) for prompt in prompts]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, prompts)) == alone


def test_stream_is_events_that_end_with_done(http: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "stream": True, "stream_options": {"continuous_usage_stats": True}}
    with http.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        events = reply.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") and '"usage":{' in event for event in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_answer_carries_the_request_id(http: httpx.Client, stream: bool) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "stream": stream}
    given = http.post("/v1/completions", json=body, headers={"X-Request-Id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    replaced = http.post("/v1/completions", json=body, headers={"X-Request-Id": "no good"})
    assert replaced.headers["x-request-id"] not in ("", "no good")

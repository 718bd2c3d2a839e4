"""Whole calls of `LLM`: against transformers, alone and in company, and everything that a call may ask for."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unspool import LLM, SamplingParams, StructuredOutput
from unspool.llm import RequestOutput
from unspool.requests import EngineDead, InvalidRequest

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
RANDOM = SamplingParams(max_tokens=12, seed=7)
PROMPTS = ["The quick brown fox", "A thread of any length", "Sphinx of black quartz, judge", "Ünïcödé", "0123"]


@pytest.fixture(scope="module")
def reference(chat_model: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(chat_model, dtype=torch.float32).eval()


def token_ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [sample.token_ids for output in outputs for sample in output.outputs]


def logprobs_of(reference: AutoModelForCausalLM, tokens: list[int]) -> torch.Tensor:
    """Of every token given those before it [len(tokens) - 1], and of all others."""
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0, :-1].log_softmax(dim=-1)


def test_greedy_is_what_transformers_generates(llm: LLM, reference: AutoModelForCausalLM) -> None:
    for output in llm.generate(PROMPTS, GREEDY):
        prompt = torch.tensor([llm.tokenizer.encode(output.prompt)])
        expected = reference.generate(prompt, do_sample=False, max_new_tokens=24)[0, prompt.shape[1] :].tolist()
        (sample,) = output.outputs
        assert sample.token_ids == expected
        assert sample.finish_reason == ("stop" if expected[-1] == llm.tokenizer.eos_token_id else "length")
        whole = llm.tokenizer.decode([*output.prompt_token_ids, *expected], skip_special_tokens=True)
        assert output.prompt + sample.text == whole


def test_prompts_are_texts_or_tokens_one_or_many(llm: LLM) -> None:
    tokens = [llm.tokenizer.encode(prompt) for prompt in PROMPTS]
    expected = token_ids(llm.generate(PROMPTS, GREEDY))
    assert token_ids(llm.generate(tokens, GREEDY)) == expected
    assert token_ids(llm.generate([PROMPTS[0], *tokens[1:]], [GREEDY] * len(PROMPTS))) == expected
    (by_text,), (by_tokens,) = llm.generate(PROMPTS[0], GREEDY), llm.generate(tokens[0], GREEDY)
    assert by_text.outputs == by_tokens.outputs
    assert (by_text.prompt, by_tokens.prompt, by_tokens.prompt_token_ids) == (PROMPTS[0], None, tokens[0])
    assert llm.generate([]) == []


def test_samples_are_what_each_seed_gives_alone(llm: LLM) -> None:
    together = llm.generate(PROMPTS, replace(RANDOM, n=4))
    for prompt, output in zip(PROMPTS, together, strict=True):
        alone = [llm.generate(prompt, replace(RANDOM, seed=7 + index))[0].outputs[0] for index in range(4)]
        assert [sample.token_ids for sample in output.outputs] == [sample.token_ids for sample in alone]
        assert [sample.index for sample in output.outputs] == [0, 1, 2, 3]
    assert len({tuple(tokens) for tokens in token_ids(together)}) > len(PROMPTS)


def test_seeds_beyond_the_last_begin_again(llm: LLM) -> None:
    highest = replace(RANDOM, seed=(1 << 63) - 1)
    both = token_ids(llm.generate("A", replace(highest, n=2)))
    assert both == token_ids([*llm.generate("A", highest), *llm.generate("A", replace(RANDOM, seed=-(1 << 63)))])


def test_best_of_returns_the_samples_of_the_highest_log_probability(llm: LLM, reference: AutoModelForCausalLM) -> None:
    (everything,) = llm.generate(PROMPTS[0], replace(RANDOM, n=8))
    scores = []
    for sample in everything.outputs:
        tokens = [*everything.prompt_token_ids, *sample.token_ids]
        rows = logprobs_of(reference, tokens)[len(everything.prompt_token_ids) - 1 :]
        scores.append(float(rows.gather(1, torch.tensor([sample.token_ids]).T).sum()))
    expected = sorted(range(8), key=lambda index: -scores[index])[:3]
    (best,) = llm.generate(PROMPTS[0], replace(RANDOM, n=3, best_of=8))
    assert [sample.token_ids for sample in best.outputs] == [everything.outputs[i].token_ids for i in expected]
    assert [sample.cumulative_logprob for sample in best.outputs] == pytest.approx([scores[i] for i in expected])
    assert [sample.index for sample in best.outputs] == [0, 1, 2]
    assert best.outputs[0].logprobs is None, "nobody asked for them"
    assert everything.outputs[0].cumulative_logprob is None


def test_log_probabilities_are_the_models(llm: LLM, reference: AutoModelForCausalLM) -> None:
    (output,) = llm.generate(PROMPTS[1], replace(RANDOM, logprobs=3, prompt_logprobs=2))
    (sample,) = output.outputs
    tokens = [*output.prompt_token_ids, *sample.token_ids]
    rows = logprobs_of(reference, tokens)
    assert output.prompt_logprobs is not None and sample.logprobs is not None
    assert output.prompt_logprobs[0] is None
    places = [*output.prompt_logprobs[1:], *sample.logprobs]
    for index, (place, row) in enumerate(zip(places, rows, strict=True)):
        assert place is not None
        top = 2 if index + 1 < len(output.prompt_token_ids) else 3
        likely = row.topk(top).indices.tolist()
        assert set(place) == {tokens[index + 1], *likely}
        for token, score in place.items():
            assert score.logprob == pytest.approx(float(row[token]), abs=1e-4)
            assert score.rank == (likely.index(token) + 1 if token in likely else None)
            assert score.decoded_token == llm.tokenizer.decode([token])
    assert sample.cumulative_logprob == pytest.approx(
        sum(place[token].logprob for place, token in zip(sample.logprobs, sample.token_ids, strict=True))
    )


def test_a_prompt_can_only_be_scored(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[1], SamplingParams(max_tokens=0, prompt_logprobs=0))
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [])


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    text = whole.outputs[0].text
    stop = text[9:12]
    (output,) = llm.generate(PROMPTS[0], replace(GREEDY, stop=[stop, "never there"]))
    (sample,) = output.outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert sample.token_ids == whole.outputs[0].token_ids[: len(sample.token_ids)]
    assert stop in llm.tokenizer.decode(sample.token_ids)
    (kept,) = llm.generate(PROMPTS[0], replace(GREEDY, stop=stop, include_stop_str_in_output=True))
    assert kept.outputs[0].text == sample.text + stop


def test_a_stop_token_ends_the_text_before_it(llm: LLM) -> None:
    (whole,) = llm.generate(PROMPTS[0], GREEDY)
    tokens = whole.outputs[0].token_ids
    (output,) = llm.generate(PROMPTS[0], replace(GREEDY, stop_token_ids=[tokens[4]]))
    (sample,) = output.outputs
    end = tokens.index(tokens[4])
    assert (sample.token_ids, sample.finish_reason, sample.stop_reason) == (tokens[: end + 1], "stop", tokens[4])
    assert whole.outputs[0].text.startswith(sample.text)
    (kept,) = llm.generate(PROMPTS[0], replace(GREEDY, stop_token_ids=[tokens[4]], include_stop_str_in_output=True))
    assert kept.outputs[0].text == sample.text + llm.tokenizer.decode([tokens[4]])


@pytest.fixture(scope="module")
def ends_at_once(llm: LLM) -> SamplingParams:
    """Makes the model's own end token the likeliest by far."""
    assert llm.tokenizer.eos_token_id is not None
    return replace(GREEDY, logit_bias={llm.tokenizer.eos_token_id: 100.0}, max_tokens=3)


def test_the_models_own_end_gives_no_stop_reason(llm: LLM, ends_at_once: SamplingParams) -> None:
    (sample,) = llm.generate("A", ends_at_once)[0].outputs
    end = llm.tokenizer.eos_token_id
    assert (sample.text, sample.token_ids) == ("", [end])
    assert (sample.finish_reason, sample.stop_reason) == ("stop", None)
    (sample,) = llm.generate("A", replace(ends_at_once, ignore_eos=True))[0].outputs
    assert (sample.text, sample.token_ids, sample.finish_reason) == ("", [end] * 3, "length")


def test_special_tokens_are_shown_on_request_and_can_be_stopped_at(llm: LLM, ends_at_once: SamplingParams) -> None:
    shown = replace(ends_at_once, ignore_eos=True, skip_special_tokens=False, max_tokens=1_000_000)
    (sample,) = llm.generate("A", replace(shown, max_tokens=3))[0].outputs
    assert sample.text == "<|end|>" * 3
    (sample,) = llm.generate("A", replace(shown, stop="end|><|end"))[0].outputs
    assert (sample.text, sample.finish_reason, sample.stop_reason) == ("<|", "stop", "end|><|end")
    assert len(sample.token_ids) == 2


def test_a_stop_string_that_special_tokens_divide_is_none_where_they_are_shown(llm: LLM) -> None:
    letter, end = llm.tokenizer.encode("a")[0], llm.tokenizer.eos_token_id
    assert end is not None
    bias = {letter: 100.0, end: 100.0}
    params = replace(RANDOM, max_tokens=64, ignore_eos=True, temperature=50.0, logit_bias=bias)
    shown = replace(params, skip_special_tokens=False)
    text = llm.generate("A", shown)[0].outputs[0].text
    divided = max(text.split("<|end|>"), key=len) + "a"
    assert divided in text.replace("<|end|>", "")
    (sample,) = llm.generate("A", replace(params, stop=divided))[0].outputs
    assert sample.finish_reason == "stop"
    (sample,) = llm.generate("A", replace(shown, stop=divided))[0].outputs
    assert (sample.text, sample.finish_reason) == (text, "length")


def test_a_text_goes_on_with_its_blank(blanks_in_front: LLM, only_new_words: dict[int, float]) -> None:
    llm = blanks_in_front
    params = replace(RANDOM, max_tokens=5, logit_bias=only_new_words)
    (output,) = llm.generate("The quick", params)
    (sample,) = output.outputs
    assert sample.text.startswith(" ")
    whole = llm.tokenizer.decode([*output.prompt_token_ids, *sample.token_ids], skip_special_tokens=True)
    assert whole == "The quick" + sample.text
    (cut,) = llm.generate("The quick", replace(params, stop=sample.text[:2]))[0].outputs
    assert (cut.text, cut.finish_reason) == ("", "stop")


def test_structured_outputs_are_what_was_asked_for(llm: LLM) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "urgent": {"type": "boolean"}},
        "required": ["mood", "urgent"],
        "additionalProperties": False,
    }
    structured = StructuredOutput(kind="json_schema", value=json.dumps(schema))
    params = replace(RANDOM, n=4, max_tokens=200, structured_outputs=structured)
    (output,) = llm.chat([{"role": "user", "content": "How are you?"}], params)
    for sample in output.outputs:
        value = json.loads(sample.text)
        assert value["mood"] in ("good", "bad") and isinstance(value["urgent"], bool)
        assert sample.finish_reason == "stop"


def test_a_chat_is_rendered_by_the_models_template(llm: LLM) -> None:
    one = [{"role": "user", "content": "Hello"}]
    two = [{"role": "system", "content": "Be brief."}, *one]
    rendered = [
        llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for messages in (one, two)
    ]
    outputs = llm.chat([one, two], GREEDY)
    assert [output.prompt_token_ids for output in outputs] == rendered
    assert token_ids(outputs) == token_ids(llm.generate(rendered, GREEDY))
    assert llm.chat(one, GREEDY)[0].outputs == outputs[0].outputs


def test_more_prompts_than_the_engine_lets_wait(llm: LLM) -> None:
    short = replace(GREEDY, max_tokens=2)
    expected = token_ids([llm.generate(prompt, short)[0] for prompt in PROMPTS])
    rounds = llm.engine.options.max_queue // len(PROMPTS) + 10
    results: list[list[list[int]]] = []
    calls = [
        threading.Thread(target=lambda: results.append(token_ids(llm.generate(PROMPTS * rounds, short))))
        for _ in range(2)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert results == [expected * rounds] * 2


def test_the_second_prompt_with_a_beginning_does_not_read_it_again(llm: LLM) -> None:
    prompt = llm.tokenizer.encode("Sphinx of black quartz, judge my vow! " * 8)
    first, second = (llm.generate(prompt, GREEDY)[0] for _ in range(2))
    assert first.num_cached_tokens < second.num_cached_tokens
    assert first.outputs == second.outputs
    (several,) = llm.generate(list(reversed(prompt)), replace(RANDOM, n=4))
    assert several.num_cached_tokens == 0, "the first sample read it for the others"


def test_what_has_not_begun_by_its_deadline_expires(open_llm: Callable[..., LLM]) -> None:
    llm = open_llm(max_slots=1)
    endless = llm.stream_sync("A", SamplingParams(max_tokens=1_000_000, ignore_eos=True, temperature=0))
    next(endless)
    (output,) = llm.generate("A", SamplingParams(deadline=0.001))
    assert (output.outputs[0].finish_reason, output.outputs[0].text) == ("expired", "")
    endless.close()
    assert llm.generate("A", GREEDY)[0].outputs[0].finish_reason in ("stop", "length")


def test_a_closed_model_says_so(open_llm: Callable[..., LLM]) -> None:
    llm = open_llm()
    pieces = llm.stream_sync("A", SamplingParams(max_tokens=1_000_000, ignore_eos=True, temperature=0))
    next(pieces)
    llm.close()
    with pytest.raises(EngineDead, match="shut down"):
        list(pieces)
    with pytest.raises(EngineDead):
        llm.generate("A")
    with pytest.raises(EngineDead, match="closed"):
        llm.session()
    llm.close()


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", {"n": 0}),
        ("n", {"n": 129}),
        ("n", {"n": 2, "temperature": 0}),
        ("best_of", {"n": 2, "best_of": 1}),
        ("best_of", {"best_of": 2, "temperature": 0}),
        ("max_tokens", {"max_tokens": -1}),
        ("max_tokens", {"max_tokens": None}),
        ("min_tokens", {"min_tokens": 20}),
        ("logprobs", {"logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": -1}),
        ("stop", {"stop": ["a", ""]}),
        ("stop", {"stop": ""}),
        ("stop_token_ids", {"stop_token_ids": ["a"]}),
        ("structured_outputs", {"structured_outputs": {"json": "{}"}}),
        ("temperature", {"temperature": -1.0}),
    ],
)
def test_a_value_out_of_range_is_named(field: str, values: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest) as error:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert error.value.field == field


def test_bad_input_is_refused_before_anything_is_generated(llm: LLM) -> None:
    before = llm.engine.statistics().prompt_tokens
    refused: list[tuple[str, Callable[[], object]]] = [
        ("prompt", lambda: llm.generate(["A", "\ud83d"])),
        ("prompts[1]", lambda: llm.generate([[1], [-1]])),
        ("prompts[0]", lambda: llm.generate([[]])),
        ("prompts[1]", lambda: llm.generate(["A", 3])),  # type: ignore[list-item]
        ("params", lambda: llm.generate(["A", "B"], [GREEDY])),
        ("messages", lambda: llm.chat([])),
        ("messages", lambda: llm.chat([{"role": "nobody", "content": "?"}])),
        ("structured_outputs", lambda: llm.generate("A", replace(GREEDY, structured_outputs=_regex("(")))),
        ("best_of", lambda: next(llm.stream_sync("A", SamplingParams(best_of=2)))),
        ("priority", lambda: llm.generate("A", replace(GREEDY, priority=5000))),
        ("deadline", lambda: llm.generate("A", replace(GREEDY, deadline=-1.0))),
    ]
    for field, call in refused:
        with pytest.raises(InvalidRequest) as error:
            call()
        assert error.value.field == field
    assert llm.engine.statistics().prompt_tokens == before


def _regex(pattern: str) -> StructuredOutput:
    return StructuredOutput(kind="regex", value=pattern)

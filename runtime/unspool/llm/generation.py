"""Prompts become engine requests, and what the engine says of them becomes outputs. Knows no queue and no loop."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from unspool.constraint import Constraint
from unspool.llm.outputs import RequestOutput, TokenLogprobs
from unspool.llm.params import SamplingParams
from unspool.llm.sample import Sample, StreamPiece, named_logprobs
from unspool.loading import LoadedModel
from unspool.requests import (
    EngineEvent,
    FinishEvent,
    GenerationRequest,
    InvalidRequest,
    PromptEvent,
    StructuredOutput,
    TokenEvent,
)
from unspool.structured import GrammarCompiler
from unspool.text import TextStream, encode_prompt, render_chat

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Conversation = Sequence[Message]

REMEMBERED_TOKENS = 1 << 16


class Generation:
    """One prompt being continued: `requests` are for the engine, whose events belong to `take`."""

    def __init__(
        self,
        name: str,
        prompt: str | None,
        params: SamplingParams,
        requests: list[GenerationRequest],
        samples: list[Sample],
    ) -> None:
        self.requests = requests
        self._name = name
        self._prompt = prompt
        self._params = params
        self._samples = {request.request_id: sample for request, sample in zip(requests, samples, strict=True)}
        self._num_cached = 0
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    def take(self, event: EngineEvent, token_text: Callable[[int], str]) -> StreamPiece | None:
        """The piece of text that an event completes."""
        sample = self._samples[event.request_id]
        match event:
            case PromptEvent():
                if sample.index == 0:
                    self._take_prompt(event, token_text)
                return None
            case TokenEvent():
                delta = sample.take(event)
                return sample.piece(delta) if delta else None
            case FinishEvent():
                return sample.piece(sample.finish(event.reason, event.stopped_by, event.error))

    def output(self) -> RequestOutput:
        """When all has finished."""
        outputs = [sample.output() for sample in self._samples.values()]
        if self._params.ranks_samples:
            # What could not be finished may have few tokens, and so a high log-probability.
            outputs.sort(key=lambda one: (one.finish_reason not in ("stop", "length"), -(one.cumulative_logprob or 0)))
            outputs = [replace(one, index=rank) for rank, one in enumerate(outputs[: self._params.n])]
        return RequestOutput(
            request_id=self._name,
            prompt=self._prompt,
            prompt_token_ids=list(self.requests[0].prompt),
            prompt_logprobs=self._prompt_logprobs,
            outputs=outputs,
            num_cached_tokens=self._num_cached,
        )

    def _take_prompt(self, event: PromptEvent, token_text: Callable[[int], str]) -> None:
        self._num_cached = event.cached_tokens
        if event.logprobs is not None:
            places = zip(self.requests[0].prompt, event.logprobs, strict=True)
            self._prompt_logprobs = [scores and named_logprobs(token, scores, token_text) for token, scores in places]


class Preparer:
    """Makes generations for one model. Thread-safe; a long prompt or a new grammar takes a while."""

    def __init__(self, loaded: LoadedModel, vocab_size: int, owner: str) -> None:
        self.tokenizer = loaded.tokenizer
        self.eos_ids = loaded.eos_ids
        self._vocab_size = vocab_size
        self._owner = owner
        self._compiler = GrammarCompiler(loaded.tokenizer, loaded.eos_ids)
        self.token_text = lru_cache(maxsize=REMEMBERED_TOKENS)(self._decode)

    def prompt(self, prompt: Prompt, params: SamplingParams, parameter: str = "prompt") -> Generation:
        """To continue a text where it ends. Raises InvalidRequest, naming `parameter` or the field of `params`."""
        text = prompt if isinstance(prompt, str) else None
        tokens = tuple(encode_prompt(self.tokenizer, prompt)) if isinstance(prompt, str) else tuple(prompt)
        self._check_tokens(tokens, parameter)
        return self._generation(text, tokens, params, continues_text=True)

    def chat(self, messages: Conversation, params: SamplingParams) -> Generation:
        """To answer messages. Raises InvalidRequest, and UserError when the model has no chat template."""
        return self._generation(None, tuple(render_chat(self.tokenizer, messages)), params, continues_text=False)

    def sample(self, params: SamplingParams, index: int = 0, context: Sequence[int] = ()) -> Sample:
        """`context` are the tokens that its text goes on after."""
        stream = TextStream(
            self.tokenizer,
            params.stop_strings,
            skip_special_tokens=params.skip_special_tokens,
            context=context,
            min_tokens=params.min_tokens,
        )
        return Sample(index, params, stream, self.eos_ids, self.token_text)

    def _generation(
        self, text: str | None, prompt: tuple[int, ...], params: SamplingParams, *, continues_text: bool
    ) -> Generation:
        context = prompt if continues_text else ()
        name = f"gen-{uuid.uuid4().hex}"
        common = GenerationRequest(
            request_id=name,
            prompt=prompt,
            max_tokens=params.max_tokens,
            stop_ids=params.stop_ids(self.eos_ids),
            stop=params.stop_strings,
            continues_text=continues_text,
            skip_special_tokens=params.skip_special_tokens,
            constraint=self.constraint(params.structured_outputs),
            logprobs=0 if params.logprobs is None and params.ranks_samples else params.logprobs,
            owner=self._owner,
            priority=params.priority,
            deadline=params.deadline,
        )
        indices = range(params.num_samples)
        requests = [
            replace(
                common,
                request_id=f"{name}-{index}",
                sampling=params.token_sampling(index),
                prompt_logprobs=params.prompt_logprobs if index == 0 else None,
            )
            for index in indices
        ]
        samples = [self.sample(params, index, context) for index in indices]
        return Generation(name, text, params, requests, samples)

    def constraint(self, structured: StructuredOutput | None) -> Constraint | None:
        """Compiled. Raises InvalidRequest."""
        if structured is None:
            return None
        return self._compiler.compile(replace(structured, parameter="structured_outputs"))

    def _check_tokens(self, tokens: tuple[int, ...], parameter: str) -> None:
        if not tokens:
            raise InvalidRequest(parameter, "must hold at least one token")
        if not all(isinstance(token, int) and 0 <= token < self._vocab_size for token in tokens):
            raise InvalidRequest(parameter, f"must be text, or token ids between 0 and {self._vocab_size - 1}")

    def _decode(self, token: int) -> str:
        text = self.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def is_conversation(prompt: Prompt | Conversation) -> bool:
    """Whether messages are meant."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. Raises InvalidRequest for what is neither text nor token ids."""
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # tokens are not mixed with prompts: that is checked below
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, (str, Sequence)):
            raise InvalidRequest(f"prompts[{index}]", "must be text, or a list of token ids")
    return list(prompts)  # type: ignore[arg-type]


def as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation or several as a list. Raises InvalidRequest when there is none."""
    if not messages:
        raise InvalidRequest("messages", "must hold at least one message")
    if isinstance(messages[0], Mapping):
        return [messages]  # type: ignore[list-item]
    return list(messages)  # type: ignore[arg-type]

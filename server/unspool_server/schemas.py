"""The bodies of the generation routes: OpenAI's documented fields, our sampling extras, and nothing else."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, JsonValue, ValidationInfo, field_validator

from unspool.requests import MAX_LOGPROBS, InvalidRequest, SamplingParams
from unspool_server.fields import Content, LogitBias, Only, Prompts, StopStrings, Text, wrong

MAX_MESSAGES = 4096
MAX_STOP_TOKENS = 128
DEFAULT_COMPLETION_TOKENS = 16

SAMPLING_DEFAULTS = (
    "Sampling fields that a request leaves out come from the model's generation_config.json if it asks for sampling, "
    "else they have OpenAI's defaults."
)

LogprobCount = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
TokenCount = Annotated[int, Field(ge=0)]


class Strict(BaseModel):
    """Unknown fields are errors, and a string is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class GenerationBody(Strict):
    """What both generation routes take. Value ranges of sampling fields are SamplingParams' to check."""

    model_config = ConfigDict(json_schema_extra={"description": SAMPLING_DEFAULTS})

    model: str
    max_tokens: TokenCount | None = None
    stop: StopStrings = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: LogitBias = {}
    user: str | None = None
    n: Annotated[Any, Only((1,))] = None
    # Fields that vLLM's users know.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenCount], Field(max_length=MAX_STOP_TOKENS)] | None = None
    min_tokens: int | None = None

    @field_validator("stream_options")
    @classmethod
    def _needs_a_stream(cls, options: StreamOptions | None, others: ValidationInfo) -> StreamOptions | None:
        if options is not None and not others.data.get("stream"):
            raise wrong("needs stream to be true")
        return options

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """What is left out, or null, comes from `defaults`. Raises InvalidRequest for a value out of range."""
        values = {field.name: getattr(self, field.name) for field in fields(SamplingParams)}
        given = {name: value for name, value in values.items() if value is not None}
        return SamplingParams(**(dict(defaults) | given))

    def stop_ids(self, eos_ids: frozenset[int]) -> frozenset[int]:
        return frozenset(self.stop_token_ids or ()) | (frozenset() if self.ignore_eos else eos_ids)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: LogprobCount | None = None
    best_of: Annotated[Any, Only((1,))] = None
    suffix: Annotated[Any, Only(("",))] = None

    def output_tokens(self) -> int:
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequest("max_tokens", "0 generates nothing; it is of use with echo only")
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens


class ChatMessage(Strict):
    """One message. What an assistant's message of ours carries besides its text may be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Text | None = None
    refusal: Annotated[Any, Only()] = None
    annotations: Annotated[Any, Only(([],))] = None
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only()] = None
    tool_calls: Annotated[Any, Only(([],))] = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates expect it; they know a developer by the older name, system."""
        values = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return values if self.name is None else values | {"name": self.name}


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: LogprobCount | None = None
    # Not implemented, and no answer would mean what was asked.
    audio: Annotated[Any, Only()] = None
    function_call: Annotated[Any, Only(("none", "auto"))] = None
    functions: Annotated[Any, Only(([],))] = None
    modalities: Annotated[Any, Only((["text"],))] = None
    moderation: Annotated[Any, Only()] = None
    reasoning_effort: Annotated[Any, Only(("none",))] = None
    response_format: Annotated[Any, Only(({"type": "text"},))] = None
    store: Annotated[Any, Only((False,))] = None
    tool_choice: Annotated[Any, Only(("none", "auto"))] = None
    tools: Annotated[Any, Only(([],))] = None
    verbosity: Annotated[Any, Only(("medium",))] = None
    web_search_options: Annotated[Any, Only()] = None
    # Hints and labels: the answer is right without them.
    metadata: dict[str, str] | None = None
    parallel_tool_calls: bool | None = None
    prediction: JsonValue = None
    prompt_cache_key: str | None = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None

    def output_tokens(self, most: int) -> int:
        asked = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        if asked == 0:
            raise InvalidRequest("max_completion_tokens", "must be at least 1")
        return most if asked is None else asked

    def num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs is not None:
            raise InvalidRequest("top_logprobs", "needs logprobs to be true")
        return None

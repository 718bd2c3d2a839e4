"""Bounds that hang on the server's settings, checked before the engine hears of a request. Raises InvalidRequest."""

from collections.abc import Sequence

from unspool.requests import InvalidRequest
from unspool_server.settings import ServerSettings

MAX_SCORES = 1 << 20
"""Log-probabilities of prompt tokens that one reply may hold."""


def check_prompt_count(count: int, settings: ServerSettings) -> None:
    if count > settings.max_prompts:
        raise InvalidRequest("prompt", f"at most {settings.max_prompts} prompts")


def check_text_length(field: str, num_characters: int, longest_token: int, settings: ServerSettings) -> None:
    """Refuses, without tokenising it, a text that cannot fit; what the tokenizer would drop of it counts too."""
    if num_characters > settings.max_prompt_tokens * longest_token:
        raise _too_many_tokens(field, settings)


def check_tokens(field: str, prompt: Sequence[int], settings: ServerSettings) -> None:
    if len(prompt) > settings.max_prompt_tokens:
        raise _too_many_tokens(field, settings)


def _too_many_tokens(field: str, settings: ServerSettings) -> InvalidRequest:
    return InvalidRequest(field, f"at most {settings.max_prompt_tokens} tokens")


def check_output_tokens(count: int, settings: ServerSettings) -> None:
    if count > settings.max_output_tokens:
        raise InvalidRequest("max_tokens", f"at most {settings.max_output_tokens}")


def check_scores(prompts: Sequence[Sequence[int]], logprobs: int) -> None:
    if sum(map(len, prompts)) * (logprobs + 1) > MAX_SCORES:
        raise InvalidRequest("logprobs", f"tokens echoed times log-probabilities of each must be at most {MAX_SCORES}")

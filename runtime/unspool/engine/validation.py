"""What an engine refuses before it queues a request."""

import math
from collections.abc import Iterable

from unspool.config import UnspoolConfig
from unspool.requests import MAX_LOGPROBS, GenerationRequest, InvalidRequest
from unspool.state import StatePool

MAX_PRIORITY = 1000
MAX_CHECKPOINT_HINTS = 64


def check_request(request: GenerationRequest, config: UnspoolConfig, pool: StatePool, *, has_tokenizer: bool) -> None:
    """Raises InvalidRequest that names the field."""
    if not request.prompt:
        raise InvalidRequest("prompt", "must hold at least one token")
    _check_tokens("prompt", request.prompt, config)
    _check_tokens("logit_bias", request.sampling.logit_bias, config)
    if request.start is not None and not pool.fits(request.start):
        raise InvalidRequest("start", "is the state of another model, or of another number format")
    if request.stop and not has_tokenizer:
        raise InvalidRequest("stop", "needs an engine with a tokenizer; use stop_ids")
    _check_counts(request)
    _check_order(request)


def _check_tokens(field: str, tokens: Iterable[int], config: UnspoolConfig) -> None:
    if not all(0 <= token < config.vocab_size for token in tokens):
        raise InvalidRequest(field, f"token ids must be between 0 and {config.vocab_size - 1}")


def _check_counts(request: GenerationRequest) -> None:
    if request.max_tokens < 0:
        raise InvalidRequest("max_tokens", "must not be negative")
    if request.max_tokens and request.sampling.min_tokens > request.max_tokens:
        raise InvalidRequest("min_tokens", "must not be more than max_tokens")
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(request, name)
        if count is not None and not 0 <= count <= MAX_LOGPROBS:
            raise InvalidRequest(name, f"must be between 0 and {MAX_LOGPROBS}")
    if len(request.checkpoints) > MAX_CHECKPOINT_HINTS:
        raise InvalidRequest("checkpoints", f"at most {MAX_CHECKPOINT_HINTS} positions")


def _check_order(request: GenerationRequest) -> None:
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be between {-MAX_PRIORITY} and {MAX_PRIORITY}")
    if request.deadline is not None and not (math.isfinite(request.deadline) and request.deadline > 0):
        raise InvalidRequest("deadline", "must be a positive number of seconds")

"""POST /v1/completions: prompts as text or tokens, OpenAI's legacy log-probabilities."""

from typing import Any

from fastapi import APIRouter, Request, Response

from unspool.requests import GenerationRequest, TokenLogprobs
from unspool.text import TextStream, encode_prompt
from unspool_server.answers import Answer, ReplyFormat, respond
from unspool_server.bodies import describe_body, read_body
from unspool_server.choices import Choice, Piece, ScoredToken
from unspool_server.fields import Prompt
from unspool_server.limits import (
    check_output_tokens,
    check_prompt_count,
    check_scores,
    check_text_length,
    check_tokens,
)
from unspool_server.schemas import CompletionBody
from unspool_server.security import owner_of
from unspool_server.service import Backend, service_of
from unspool_server.settings import ServerSettings
from unspool_server.vocabulary import TextOffsets, finite

router = APIRouter()


@router.post("/v1/completions", openapi_extra=describe_body(CompletionBody))
async def create_completion(request: Request) -> Response:
    """Continues one or several prompts."""
    service = service_of(request)
    body = await read_body(request, CompletionBody)
    backend = service.backend_of(body.model)
    check_prompt_count(len(body.prompt), service.settings)
    backend.generations.check_room(len(body.prompt))
    answer = await service.prepare(prepare_completion, body, backend, service.settings, owner_of(request))
    return await respond(request, body, answer, backend.generations)


def prepare_completion(body: CompletionBody, backend: Backend, settings: ServerSettings, owner: str) -> Answer:
    """Tokenises the prompts and checks what they ask for. Raises InvalidRequest."""
    reply = CompletionFormat(backend.model.name, backend.vocabulary, body.logprobs is not None)
    check_output_tokens(body.output_tokens(), settings)
    prompts = [_tokens(prompt, backend, settings) for prompt in body.prompt]
    if body.echo and body.logprobs is not None:
        check_scores(prompts, body.logprobs)
    sampling, stop_ids = body.sampling(backend.model.sampling_defaults), body.stop_ids(backend.model.eos_ids)
    requests = [
        GenerationRequest(
            request_id=f"{reply.id}-{index}",
            prompt=prompt,
            max_tokens=body.output_tokens(),
            sampling=sampling,
            stop_ids=stop_ids,
            stop=tuple(body.stop),
            continues_text=True,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            owner=owner,
        )
        for index, prompt in enumerate(prompts)
    ]
    choices = [_choice(index, request, body, backend) for index, request in enumerate(requests)]
    return Answer(choices, reply)


def _tokens(prompt: Prompt, backend: Backend, settings: ServerSettings) -> tuple[int, ...]:
    if isinstance(prompt, str):
        check_text_length("prompt", len(prompt), backend.vocabulary.longest_token, settings)
        prompt = tuple(encode_prompt(backend.model.tokenizer, prompt))
    check_tokens("prompt", prompt, settings)
    return prompt


def _choice(index: int, request: GenerationRequest, body: CompletionBody, backend: Backend) -> Choice:
    echo = _echo(body.prompt[index], request.prompt, backend) if body.echo else ""
    stream = TextStream(
        backend.model.tokenizer, body.stop, context=request.prompt, min_tokens=request.sampling.min_tokens
    )
    return Choice(index, request, stream, TextOffsets(backend.vocabulary, echo), echo)


def _echo(prompt: Prompt, tokens: tuple[int, ...], backend: Backend) -> str:
    """The prompt as it was sent; of tokens, all that they stand for. But for what the answer's text begins with: the
    bytes at the end of the prompt that may be no whole character yet."""
    tokenizer = backend.model.tokenizer
    text = prompt if isinstance(prompt, str) else tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text.removesuffix(TextStream(tokenizer, context=tokens).finish())


class CompletionFormat(ReplyFormat):
    """OpenAI's text_completion object."""

    id_prefix = "cmpl"

    def object_name(self, *, streamed: bool) -> str:
        return "text_completion"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return None

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return self.whole(choice, piece)

    def whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return {
            "text": piece.text,
            "index": choice.index,
            "logprobs": self._token_lists(piece.tokens) if self._logprobs else None,
            "finish_reason": piece.finish_reason,
        }

    def _token_lists(self, tokens: tuple[ScoredToken, ...]) -> dict[str, Any]:
        text = self._vocabulary.token_text
        return {
            "tokens": [text(scored.token) for scored in tokens],
            "token_logprobs": [scored.logprobs and finite(scored.logprobs.logprob) for scored in tokens],
            "top_logprobs": [scored.logprobs and self._best(scored.token, scored.logprobs) for scored in tokens],
            "text_offset": [scored.offset for scored in tokens],
        }

    def _best(self, token: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens and the one that is there. Of tokens with the same text the likelier one counts."""
        best: dict[str, float] = {}
        for candidate, logprob in (*logprobs.top, (token, logprobs.logprob)):
            best.setdefault(self._vocabulary.token_text(candidate), finite(logprob))
        return best

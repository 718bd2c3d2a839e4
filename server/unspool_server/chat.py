"""POST /v1/chat/completions: messages by the model's own template, OpenAI's chat format."""

from typing import Any

from fastapi import APIRouter, Request, Response

from unspool.errors import UserError
from unspool.requests import GenerationRequest, InvalidRequest
from unspool.text import TextStream, render_chat
from unspool_server.answers import Answer, ReplyFormat, respond
from unspool_server.bodies import describe_body, read_body
from unspool_server.choices import Choice, Piece, ScoredToken
from unspool_server.limits import check_output_tokens, check_text_length, check_tokens
from unspool_server.schemas import ChatBody
from unspool_server.security import owner_of
from unspool_server.service import Backend, service_of
from unspool_server.settings import ServerSettings
from unspool_server.vocabulary import TextOffsets, finite

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=describe_body(ChatBody))
async def create_chat_completion(request: Request) -> Response:
    """Answers the last of a list of messages."""
    service = service_of(request)
    body = await read_body(request, ChatBody)
    backend = service.backend_of(body.model)
    backend.generations.check_room(1)
    answer = await service.prepare(prepare_chat, body, backend, service.settings, owner_of(request))
    return await respond(request, body, answer, backend.generations)


def prepare_chat(body: ChatBody, backend: Backend, settings: ServerSettings, owner: str) -> Answer:
    """Renders and tokenises the messages, and checks what they ask for. Raises InvalidRequest."""
    reply = ChatFormat(backend.model.name, backend.vocabulary, bool(body.logprobs))
    max_tokens = body.output_tokens(settings.max_output_tokens)
    check_output_tokens(max_tokens, settings)
    tokenizer = backend.model.tokenizer
    num_characters = sum(len(message.content) for message in body.messages)
    check_text_length("messages", num_characters, backend.vocabulary.longest_token, settings)
    try:
        prompt = tuple(render_chat(tokenizer, [message.for_template() for message in body.messages]))
    except UserError as error:  # the model has no template
        raise InvalidRequest("messages", str(error)) from error
    check_tokens("messages", prompt, settings)
    request = GenerationRequest(
        request_id=reply.id,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=body.sampling(backend.model.sampling_defaults),
        stop_ids=body.stop_ids(backend.model.eos_ids),
        stop=tuple(body.stop),
        logprobs=body.num_logprobs(),
        owner=owner,
    )
    stream = TextStream(tokenizer, body.stop, min_tokens=request.sampling.min_tokens)
    return Answer([Choice(0, request, stream, TextOffsets(backend.vocabulary))], reply)


class ChatFormat(ReplyFormat):
    """OpenAI's chat.completion and chat.completion.chunk objects."""

    id_prefix = "chatcmpl"

    def object_name(self, *, streamed: bool) -> str:
        return "chat.completion.chunk" if streamed else "chat.completion"

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        return self._choice(choice, Piece()) | {"delta": {"role": "assistant", "content": ""}}

    def delta(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        return self._choice(choice, piece) | {"delta": {"content": piece.text} if piece.text else {}}

    def whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(choice, piece) | {"message": message}

    def _choice(self, choice: Choice, piece: Piece) -> dict[str, Any]:
        content = [self._token(scored) for scored in piece.tokens]
        logprobs = {"content": content, "refusal": None} if self._logprobs else None
        return {"index": choice.index, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _token(self, scored: ScoredToken) -> dict[str, Any]:
        assert scored.logprobs is not None
        top = [self._named(token, logprob) for token, logprob in scored.logprobs.top]
        return self._named(scored.token, scored.logprobs.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._vocabulary.token_text(token),
            "bytes": list(self._vocabulary.token_bytes(token)),
            "logprob": finite(logprob),
        }

"""Kinds of request field: text, prompts, stop strings, biases, and fields that may only be left at their default."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from unspool.requests import MAX_LOGIT_BIAS

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_TOKEN_DIGITS = 9
MAX_BIAS = 100

Prompt = str | tuple[int, ...]


# Compared by identity: typing keeps one of two equal annotations, and False == 0.
@dataclass(frozen=True, eq=False)
class Only:
    """A field whose other values are not implemented: it may be absent, null, or one of `values`."""

    values: tuple[Any, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [None, *self.values]}

    def _check(self, value: Any) -> Any:
        if value is None or any(type(value) is type(allowed) and value == allowed for allowed in self.values):
            return value
        shown = "".join(f" or {json.dumps(allowed)}" for allowed in self.values)
        raise wrong(f"is not implemented beyond its default; leave it out or send null{shown}")


def wrong(message: str) -> PydanticCustomError:
    """What a validator raises. The message is no template: braces in it are braces."""
    return PydanticCustomError("invalid", "{message}", {"message": message})


def _is_text(value: Any) -> bool:
    """Whether this is a string that has a UTF-8 form: JSON can spell half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < 10**MAX_TOKEN_DIGITS


def _read_text(value: Any) -> str:
    if not _is_text(value):
        raise wrong("must be a string of valid Unicode")
    return str(value)


def _read_prompts(value: Any) -> tuple[Prompt, ...]:
    if not isinstance(value, list) or (value and all(map(_is_token, value))):
        return (_read_prompt(value),)
    prompts = tuple(_read_prompt(prompt) for prompt in value)
    if len({type(prompt) for prompt in prompts}) != 1:
        raise _wrong_prompt()
    return prompts


def _read_prompt(value: Any) -> Prompt:
    if _is_text(value):
        return str(value)
    if isinstance(value, list) and value and all(map(_is_token, value)):
        return tuple(value)
    raise _wrong_prompt()


def _wrong_prompt() -> PydanticCustomError:
    return wrong(
        "must be a string, a list of strings, a list of token ids, or a list of lists of token ids; none empty"
    )


def _read_stop(value: Any) -> tuple[str, ...]:
    strings = [] if value is None else value if isinstance(value, list) else [value]
    if len(strings) > MAX_STOP_STRINGS:
        raise wrong(f"at most {MAX_STOP_STRINGS} strings")
    if not all(_is_text(string) and 0 < len(string) <= MAX_STOP_CHARS for string in strings):
        raise wrong(f"must be a string or a list of strings, each of 1 to {MAX_STOP_CHARS} characters")
    return tuple(strings)


def _read_logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise wrong(f"must be an object of at most {MAX_LOGIT_BIAS} token ids and their biases")
    if not all(key.isascii() and key.isdecimal() and len(key) <= MAX_TOKEN_DIGITS for key in value):
        raise wrong("its keys must be token ids")
    # In this order: an integer of hundreds of digits is no float.
    if not all(type(bias) in (int, float) and -MAX_BIAS <= bias <= MAX_BIAS for bias in value.values()):
        raise wrong(f"its values must be numbers between -{MAX_BIAS} and {MAX_BIAS}")
    return {int(key): float(bias) for key, bias in value.items()}


def _read_content(value: Any) -> str:
    """A message's text; several text parts are joined by line breaks."""
    if not isinstance(value, list):
        return _read_text(value)
    return "\n".join(_read_part(part) for part in value)


def _read_part(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not set(part) <= {"type", "text"}:
        raise wrong('only text parts are implemented: {"type": "text", "text": string}')
    return _read_text(part.get("text"))


def _described(read: Callable[[Any], Any], schema: JsonSchemaValue) -> tuple[PlainValidator, WithJsonSchema]:
    return PlainValidator(read), WithJsonSchema(schema)


_STRING = {"type": "string"}
_TOKEN_LIST = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _STRING},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_PROMPT_SCHEMA: JsonSchemaValue = {
    "anyOf": [
        _STRING,
        {"type": "array", "items": _STRING, "minItems": 1},
        _TOKEN_LIST,
        {"type": "array", "items": _TOKEN_LIST, "minItems": 1},
    ]
}
_STOP_STRING = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA: JsonSchemaValue = {
    "anyOf": [{"type": "null"}, _STOP_STRING, {"type": "array", "items": _STOP_STRING, "maxItems": MAX_STOP_STRINGS}]
}
_BIAS_SCHEMA: JsonSchemaValue = {
    "type": ["object", "null"],
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_LOGIT_BIAS,
}
_CONTENT_SCHEMA: JsonSchemaValue = {"anyOf": [_STRING, {"type": "array", "items": _TEXT_PART}]}

Text = Annotated[str, *_described(_read_text, _STRING)]
Prompts = Annotated[tuple[Prompt, ...], *_described(_read_prompts, _PROMPT_SCHEMA)]
StopStrings = Annotated[tuple[str, ...], *_described(_read_stop, _STOP_SCHEMA)]
LogitBias = Annotated[dict[int, float], *_described(_read_logit_bias, _BIAS_SCHEMA)]
Content = Annotated[str, *_described(_read_content, _CONTENT_SCHEMA)]

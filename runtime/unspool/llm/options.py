"""The keyword arguments of `LLM`, and the options of its parts that they make."""

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

from unspool.engine import EngineOptions
from unspool.executor import Quant
from unspool.local import LocalOptions
from unspool.requests import InvalidRequest
from unspool.sessions import SessionOptions
from unspool.sizes import ByteSize, parse_size

Options = TypeVar("Options", LocalOptions, EngineOptions, SessionOptions, "StoreOptions")

Size = int | str
"""Bytes, or a text like "2GB"."""


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """Where sessions live, and whose they are."""

    store: str | Path = "memory:"
    """`memory:`, a directory, `redis://`, `rediss://` or `s3://BUCKET/PREFIX`."""
    store_bytes: ByteSize = ByteSize(4 << 30)
    """What the store may hold."""
    store_cache: str | Path | None = None
    """A directory of this process's own, for copies of the states that a shared store holds."""
    store_cache_bytes: ByteSize = ByteSize(4 << 30)
    """What the copies may take."""
    owner: str = "local"
    """Of the sessions that are made and seen."""

    def __post_init__(self) -> None:
        for name in ("store_bytes", "store_cache_bytes"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, "must be at least 1")


class LLMArguments(TypedDict, total=False):
    """What each means is said where the part that it belongs to has it: `LocalOptions`, `EngineOptions`,
    `SessionOptions` and `StoreOptions`. Sizes may be written like "2GB"."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    device: str
    threads: int | None
    quant: Quant
    state_dtype: Literal["float32", "float16"]
    backend: Literal["auto", "native", "triton", "torch"]
    max_slots: int
    slot_memory: Size | None
    prefill_chunk: int
    decode_interval_ms: int
    ageing_seconds: int
    prefix_cache: Size
    state_memory: Size
    max_turn_tokens: int
    lease_seconds: int
    store: str | Path
    store_bytes: Size
    store_cache: str | Path | None
    store_cache_bytes: Size
    owner: str


class LLMOptions(NamedTuple):
    local: LocalOptions
    engine: EngineOptions
    sessions: SessionOptions
    store: StoreOptions


def read_options(arguments: Mapping[str, Any]) -> LLMOptions:
    """Raises TypeError for an unknown argument, and ValueError, mostly InvalidRequest, that names the one whose value
    is out of range."""
    if unknown := sorted(set(arguments) - set(LLMArguments.__annotations__)):
        raise TypeError(f"LLM has no argument {unknown[0]!r}")
    engine = _options(EngineOptions, arguments)
    return LLMOptions(
        local=_options(LocalOptions, arguments),
        # Nobody sees the queue: what does not fit waits outside. It only has to keep all slots busy.
        engine=replace(engine, max_queue=max(engine.max_queue, engine.max_slots)),
        sessions=_options(SessionOptions, arguments),
        store=_options(StoreOptions, arguments),
    )


def _options(cls: type[Options], arguments: Mapping[str, Any]) -> Options:
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls) if field.name in arguments]
    return cls(**{name: _value(name, hints[name], arguments[name]) for name in names})


def _value(name: str, hint: Any, value: Any) -> Any:
    """A value of the field's type, or InvalidRequest."""
    members = get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)
    if value is None and type(None) in members:
        return None
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise InvalidRequest(name, f"must be one of {', '.join(map(str, get_args(hint)))}")
    if ByteSize in members:
        return _size(name, value)
    if int in members and (not isinstance(value, int) or isinstance(value, bool)):
        raise InvalidRequest(name, "must be a whole number")
    return value


def _size(name: str, value: object) -> ByteSize:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return ByteSize(value)
    try:
        return parse_size(str(value))
    except ValueError as error:
        raise InvalidRequest(name, str(error)) from error

"""The sessions of a store on a model that runs in this process: what the command's verbs share."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from unspool.engine import Engine, EngineOptions
from unspool.executor import make_executor
from unspool.loading import LoadedModel
from unspool.local import LocalOptions, computed_format, load_for
from unspool.sessions.options import SessionOptions
from unspool.sessions.sessions import Sessions
from unspool.sizes import ByteSize
from unspool.store import Store, identity_of

ONE_AT_A_TIME = EngineOptions(max_slots=1, prefix_cache=ByteSize(0))


class LocalSessions(NamedTuple):
    loaded: LoadedModel
    sessions: Sessions


@contextlib.contextmanager
def local_sessions(
    path: str, store: Store, local: LocalOptions, options: SessionOptions, engine_options: EngineOptions = ONE_AT_A_TIME
) -> Iterator[LocalSessions]:
    """Loads the model, and reads its weights once more for their fingerprint. The store stays the caller's.

    Raises UserError as `load_for` and `make_executor` do.
    """
    loaded, local = load_for(path, local)
    identity = identity_of(
        loaded.path,
        loaded.model.config,
        weight_format=computed_format(loaded, local),
        state_dtype=getattr(torch, local.state_dtype),
    )
    engine = Engine(make_executor(loaded.model, local), engine_options, loaded.tokenizer)
    sessions = Sessions(engine, store, identity, options)
    engine.start()
    try:
        yield LocalSessions(loaded, sessions)
    finally:
        engine.shutdown()
        sessions.close()

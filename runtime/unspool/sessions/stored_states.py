"""A session's states as a store has them, without the model that made them."""

import json
import logging
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from unspool.sessions.head import SessionHead
from unspool.state import SlotSnapshot, TensorSpec
from unspool.store import Entry, ExpectedState, StateIdentity, StateRejected, Store, StoreCorrupt, read_state
from unspool.store.state_layout import DTYPE_NAMES, LENGTH_BYTES

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 16 << 20

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class StoredState(NamedTuple):
    state: SlotSnapshot
    identity: StateIdentity


def stored_states(store: Store, head: SessionHead) -> dict[str, list[Entry]]:
    """Where the states that a session names are stored, by their digests: one file for each model that made it."""
    found: dict[str, list[Entry]] = {state.digest: [] for state in head.states}
    for entry in store.list("states/"):
        owner, digest = entry.key.split("/")[-2:]
        if owner == head.owner and digest in found:
            found[digest].append(entry)
    return found


def read_newest(store: Store, head: SessionHead) -> StoredState | None:
    """The newest state that is stored and whole, and what made it by its own account: whoever imports it compares that
    with his model. Raises StoreUnavailable."""
    stored = stored_states(store, head)
    for taken in reversed(head.states):
        for entry in stored[taken.digest]:
            try:
                data = store.get(entry.key)
                if data is None:
                    continue
                identity, layers = _described(data)
                expected = ExpectedState(
                    identity=identity,
                    layers=layers,
                    position=taken.position,
                    owner=head.owner,
                    log_digest=taken.digest,
                )
                if identity.tokenizer == head.tokenizer:
                    return StoredState(read_state(data, expected)[0], identity)
            except (StateRejected, StoreCorrupt) as error:
                logger.warning("%s was passed over: %s", entry.key, error)
    return None


def _described(data: bytes) -> tuple[StateIdentity, list[Mapping[str, TensorSpec]]]:
    """What a file's header says of its model and its tensors; `read_state` checks all of it. Raises StateRejected."""
    try:
        (length,) = struct.unpack_from("<Q", data)
        if length > MAX_HEADER_BYTES:
            raise ValueError("is too long")
        header: dict[str, Any] = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
        metadata = header.pop("__metadata__")
        values = {name: metadata[name] for name in StateIdentity.__dataclass_fields__}
        identity = StateIdentity(**(values | {"depth": int(values["depth"])}))
        layers: list[Mapping[str, TensorSpec]] = [_layer(header, index) for index in range(_depth(identity, header))]
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, RecursionError) as error:
        raise StateRejected("header", f"is not what a writer makes ({type(error).__name__})") from error
    return identity, layers


def _depth(identity: StateIdentity, header: Mapping[str, Any]) -> int:
    if not 1 <= identity.depth <= len(header):
        raise ValueError("depth")
    return identity.depth


def _layer(header: Mapping[str, Any], index: int) -> dict[str, TensorSpec]:
    prefix = f"layers.{index}."
    return {
        name.removeprefix(prefix): TensorSpec(tuple(tensor["shape"]), _DTYPES[tensor["dtype"]])
        for name, tensor in header.items()
        if name.startswith(prefix)
    }

"""One state as a safetensors file, with what it may be used under and digests of every byte.

A recurrent state that is wrong gives fluent wrong answers and no error, so a file is used only if its identity is the
running model's, its tensors are exactly the expected ones, and nothing in it has changed since it was written.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch

from unspool.state import LayerState, SlotSnapshot, TensorSpec
from unspool.store.identity import StateIdentity
from unspool.store.interface import Buffer, byte_view
from unspool.store.state_layout import (
    PlacedTensor,
    StateRejected,
    encode_header,
    header_limit,
    parse_header,
    place,
)

FORMAT = "unspool.state"
FORMAT_VERSION = "1"
MAX_LABEL_CHARACTERS = 200
MAX_POSITION = (1 << 63) - 1
SEALS = ("digest", "hmac")


@dataclass(frozen=True, kw_only=True)
class StateProvenance:
    """Where a state comes from. The strings are the caller's own: up to 200 printable ASCII characters, not read here.

    Raises ValueError when a field is anything else.
    """

    log_digest: str
    """Digest of the tokens that the state has consumed."""
    owner: str
    """A hash of whose it is."""
    parent: str = ""
    """What it continues; empty for a first state."""
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __post_init__(self) -> None:
        for name in ("log_digest", "owner", "parent"):
            text = getattr(self, name)
            if len(text) > MAX_LABEL_CHARACTERS or not (text.isascii() and text.isprintable()):
                raise ValueError(f"{name}: must be at most {MAX_LABEL_CHARACTERS} printable ASCII characters")
        if self.created.tzinfo is not UTC:
            raise ValueError("created: must be in UTC; use datetime.now(UTC)")


@dataclass(frozen=True, kw_only=True)
class ExpectedState:
    """What a file must hold to be read. None asks for nothing."""

    identity: StateIdentity
    layers: Sequence[Mapping[str, TensorSpec]]
    """Every layer's tensors for one sequence, as `layer_state_specs` gives them."""
    position: int | None = None
    owner: str | None = None
    log_digest: str | None = None


def write_state(
    snapshot: SlotSnapshot, identity: StateIdentity, provenance: StateProvenance, *, key: bytes | None = None
) -> bytearray:
    """The file's bytes: the tensors are copied once and hashed once. With a key it also carries an HMAC, which proves
    to the holder of the key that nobody else made it.

    Raises ValueError when the snapshot is not of the identity's depth or has an impossible position.
    """
    if len(snapshot.layers) != identity.depth:
        raise ValueError(f"snapshot: has {len(snapshot.layers)} layers, its identity {identity.depth}")
    if not 0 <= snapshot.position <= MAX_POSITION:
        raise ValueError(f"snapshot: position {snapshot.position} is none")
    placed = place(
        [
            {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in layer.items()}
            for layer in snapshot.layers
        ]
    )
    metadata = _describe(snapshot.position, identity, provenance)
    no_seal = "0" * hashlib.sha256().digest_size * 2
    unsealed = metadata | dict.fromkeys(SEALS if key is not None else SEALS[:1], no_seal)
    body_start = len(encode_header(unsealed, placed))
    file = bytearray(body_start + placed[-1].end)
    body = torch.frombuffer(file, dtype=torch.uint8, offset=body_start)
    for tensor in placed:
        _view(body, tensor).copy_(snapshot.layers[tensor.layer][tensor.name])
    body_digest = hashlib.sha256(memoryview(file)[body_start:]).digest()
    if key is not None:
        metadata["hmac"] = _signature(metadata, placed, body_digest, key)
    metadata["digest"] = _content_digest(metadata, placed, body_digest)
    file[:body_start] = encode_header(metadata, placed)
    return file


def read_state(
    data: Buffer, expected: ExpectedState, *, key: bytes | None = None
) -> tuple[SlotSnapshot, StateProvenance]:
    """The snapshot, on the CPU, and where it comes from; with a key the file must carry its HMAC. The tensors are views
    of one copy of their bytes, made before these are hashed: what was checked is what is used, and `data` is let go.

    Raises StateRejected. Each check is made before the work that it would save: size, header, version, identity,
    tensors, digest, HMAC, what else is expected, finite values.
    """
    view, placed = byte_view(data), place(expected.layers)
    header, body_start = parse_header(view, placed[-1].end, header_limit(len(placed), expected.identity.depth))
    metadata = _metadata(header)
    _check_identity(metadata, expected.identity)
    _check_tensors(header, placed)
    body = torch.empty(placed[-1].end, dtype=torch.uint8)
    body_view = body.numpy().data
    body_view[:] = view[body_start:]
    _check_seals(metadata, placed, hashlib.sha256(body_view).digest(), key)
    snapshot = SlotSnapshot(_position(metadata, expected.identity.depth), _layers(body, placed, len(expected.layers)))
    provenance = _provenance(metadata)
    _check_expectations(snapshot, provenance, expected)
    _check_finite(snapshot)
    return snapshot, provenance


def _describe(position: int, identity: StateIdentity, provenance: StateProvenance) -> dict[str, str]:
    labels = asdict(provenance) | {"created": provenance.created.isoformat()}
    own = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "position": str(position),
        "valid_positions": _valid_positions(position, identity.depth),
    }
    return own | {name: str(value) for name, value in (asdict(identity) | labels).items()}


def _valid_positions(position: int, depth: int) -> str:
    """How many tokens each layer has seen. A layer that was skipped for some would lag; nothing skips layers yet, so
    they must agree."""
    return json.dumps([position] * depth, separators=(",", ":"))


def _view(body: torch.Tensor, tensor: PlacedTensor) -> torch.Tensor:
    return body[tensor.start : tensor.end].view(tensor.spec.dtype).view(tensor.spec.shape)


def _layers(body: torch.Tensor, placed: Sequence[PlacedTensor], depth: int) -> tuple[LayerState, ...]:
    layers: tuple[LayerState, ...] = tuple({} for _ in range(depth))
    for tensor in placed:
        layers[tensor.layer][tensor.name] = _view(body, tensor)
    return layers


def _metadata(header: Mapping[str, Any]) -> dict[str, str]:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise StateRejected("header", "has no metadata of strings")
    if (metadata.get("format"), metadata.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise StateRejected("version", f"is no {FORMAT} of version {FORMAT_VERSION}")
    names = {"format", "format_version", "position", "valid_positions", "digest"}
    names |= set(StateIdentity.__dataclass_fields__) | set(StateProvenance.__dataclass_fields__)
    if metadata.keys() - {"hmac"} != names:
        raise StateRejected("header", f"metadata: {sorted(metadata.keys() ^ names)} missing or not known")
    return metadata


def _check_identity(metadata: Mapping[str, str], identity: StateIdentity) -> None:
    if different := [name for name, value in asdict(identity).items() if metadata[name] != str(value)]:
        raise StateRejected("identity", f"the state was made under another {', '.join(different)}")


def _check_tensors(header: Mapping[str, Any], placed: Sequence[PlacedTensor]) -> None:
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    wanted = {tensor.file_name: tensor.description for tensor in placed}
    if json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True):  # as text, in which true is not 1
        return
    if different := sorted(found.keys() ^ wanted.keys()):
        raise StateRejected("shape", f"{len(different)} tensors missing or not known")
    raise StateRejected("shape", "a tensor has another dtype, shape or place than this model's")


def _check_seals(
    metadata: Mapping[str, str], placed: Sequence[PlacedTensor], body_digest: bytes, key: bytes | None
) -> None:
    if not hmac.compare_digest(metadata["digest"].encode(), _content_digest(metadata, placed, body_digest).encode()):
        raise StateRejected("digest", "the content has changed since it was written")
    if key is None:
        return
    if not hmac.compare_digest(
        metadata.get("hmac", "").encode(), _signature(metadata, placed, body_digest, key).encode()
    ):
        raise StateRejected("signature", "was not signed with this server's key")


def _content_digest(metadata: Mapping[str, str], placed: Sequence[PlacedTensor], body_digest: bytes) -> str:
    """sha256 over all metadata but itself, the tensors' places and the digest of their bytes. It covers the HMAC."""
    return hashlib.sha256(_canonical(metadata, placed, ("digest",)) + body_digest).hexdigest()


def _signature(metadata: Mapping[str, str], placed: Sequence[PlacedTensor], body_digest: bytes, key: bytes) -> str:
    return hmac.new(key, _canonical(metadata, placed, SEALS) + body_digest, hashlib.sha256).hexdigest()


def _canonical(metadata: Mapping[str, str], placed: Sequence[PlacedTensor], without: Sequence[str]) -> bytes:
    described = {name: value for name, value in metadata.items() if name not in without}
    tensors = {tensor.file_name: tensor.description for tensor in placed}
    return json.dumps([described, tensors], sort_keys=True, separators=(",", ":")).encode()


def _position(metadata: Mapping[str, str], depth: int) -> int:
    text = metadata["position"]
    if not (text.isascii() and text.isdigit() and len(text) < 20 and str(int(text)) == text):
        raise StateRejected("position", "is no count of tokens")
    if metadata["valid_positions"] != _valid_positions(int(text), depth):
        raise StateRejected("position", "the layers have not all consumed the same tokens")
    return int(text)


def _provenance(metadata: Mapping[str, str]) -> StateProvenance:
    try:
        created = datetime.fromisoformat(metadata["created"]).astimezone(UTC)
        return StateProvenance(
            log_digest=metadata["log_digest"], owner=metadata["owner"], parent=metadata["parent"], created=created
        )
    except (ValueError, OverflowError) as error:
        raise StateRejected("header", f"metadata: {error}") from error


def _check_expectations(snapshot: SlotSnapshot, provenance: StateProvenance, expected: ExpectedState) -> None:
    if expected.owner is not None and not hmac.compare_digest(provenance.owner.encode(), expected.owner.encode()):
        raise StateRejected("owner", "the state belongs to another")
    if expected.log_digest not in (None, provenance.log_digest):
        raise StateRejected("log", "the state has consumed other tokens")
    if expected.position not in (None, snapshot.position):
        raise StateRejected("position", f"is {snapshot.position}, not {expected.position}")


def _check_finite(snapshot: SlotSnapshot) -> None:
    for index, layer in enumerate(snapshot.layers):
        for name, tensor in layer.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise StateRejected("not_finite", f"layers.{index}.{name} holds a value that is no finite number")

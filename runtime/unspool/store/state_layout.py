"""Where a state's tensors lie in a safetensors file, and the header that says so: written, and read with distrust."""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from unspool.state import TensorSpec

Reason = Literal[
    "truncated",
    "oversized",
    "header",
    "version",
    "identity",
    "shape",
    "digest",
    "signature",
    "owner",
    "log",
    "position",
    "not_finite",
]

LENGTH_BYTES = 8
ALIGNMENT = 64
"""The tensors of a file that we write begin on a cache line."""
METADATA_BYTES = 1 << 14
TENSOR_HEADER_BYTES = 256
LAYER_METADATA_BYTES = 24

# From the widest to the narrowest, as the safetensors library orders tensors: each is aligned to its own size.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_DTYPE_ORDER = {dtype: place for place, dtype in enumerate(DTYPE_NAMES)}


class StateRejected(ValueError):
    """A state that must not be used: replay the token log instead. `reason` is one of a few words, for metrics."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason


class PlacedTensor(NamedTuple):
    """One layer's tensor and its place in the file, in bytes from the first tensor's beginning."""

    layer: int
    name: str
    spec: TensorSpec
    start: int

    @property
    def end(self) -> int:
        return self.start + self.spec.num_bytes

    @property
    def file_name(self) -> str:
        return f"layers.{self.layer}.{self.name}"

    @property
    def description(self) -> dict[str, Any]:
        """The header's entry."""
        shape = list(self.spec.shape)
        return {"dtype": DTYPE_NAMES[self.spec.dtype], "shape": shape, "data_offsets": [self.start, self.end]}


def place(layers: Sequence[Mapping[str, TensorSpec]]) -> list[PlacedTensor]:
    """Every layer's tensors one after another without gaps."""
    tensors = [PlacedTensor(layer, name, spec, 0) for layer, specs in enumerate(layers) for name, spec in specs.items()]
    placed, start = [], 0
    for tensor in sorted(tensors, key=lambda tensor: (_DTYPE_ORDER[tensor.spec.dtype], tensor.file_name)):
        placed.append(tensor._replace(start=start))
        start = placed[-1].end
    return placed


def header_limit(num_tensors: int, depth: int) -> int:
    """Bytes that a header with this many tensors never needs."""
    return METADATA_BYTES + TENSOR_HEADER_BYTES * num_tensors + LAYER_METADATA_BYTES * depth


def encode_header(metadata: Mapping[str, str], placed: Sequence[PlacedTensor]) -> bytes:
    """The length and the JSON of a safetensors header, padded with spaces."""
    header = {"__metadata__": dict(metadata)} | {tensor.file_name: tensor.description for tensor in placed}
    text = _compact(header)
    padding = -(LENGTH_BYTES + len(text)) % ALIGNMENT
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def parse_header(data: memoryview, body_bytes: int, limit: int) -> tuple[dict[str, Any], int]:
    """The header of a file whose tensors take exactly `body_bytes`, as parsed JSON, and where the tensors begin.

    Only the one text that a compact JSON writer makes of the header is taken, padded at its end with spaces alone, so
    that a file in which any byte has changed cannot mean the same, and no name can stand there twice.

    Raises StateRejected.
    """
    if len(data) > LENGTH_BYTES + limit + body_bytes:
        raise StateRejected("oversized", f"{len(data)} bytes for {body_bytes} bytes of state")
    if len(data) < LENGTH_BYTES:
        raise StateRejected("truncated", f"{len(data)} bytes are no file")
    (length,) = struct.unpack_from("<Q", data)
    if length > limit:
        raise StateRejected("header", f"a header of {length} bytes; at most {limit} can be right")
    body_start = LENGTH_BYTES + length
    if len(data) < body_start + body_bytes:
        raise StateRejected("truncated", f"{len(data)} of {body_start + body_bytes} bytes")
    if len(data) > body_start + body_bytes:
        raise StateRejected("oversized", f"{len(data) - body_start - body_bytes} bytes after the last tensor")
    return _parse(bytes(data[LENGTH_BYTES:body_start]).rstrip(b" ")), body_start


def _parse(text: bytes) -> dict[str, Any]:
    try:
        header: dict[str, Any] = json.loads(text.decode(), parse_constant=_no_number)
        unchanged = isinstance(header, dict) and _compact(header) == text
    except (ValueError, RecursionError) as error:  # nested deeper than Python's parser goes
        raise StateRejected("header", f"is no JSON of a safetensors file ({type(error).__name__})") from error
    if not unchanged:
        raise StateRejected("header", "is not the compact JSON object that a writer makes")
    return header


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} stands for no size")


def _compact(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
